"""States in int8 under Triton's kernels in an engine: files from the other kind of device, captured steps, padding."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")
if torch.cuda.is_available():
    pytest.skip("in Triton's interpreter; test_graphs_cuda has a device", allow_module_level=True)

from dijiang_model.batch import decode, prefill
from dijiang_model.ops.triton import TritonAttention
from dijiang_model.serving.network import FrozenModel, freeze
from dijiang_model.state import StateBuffer
from server.engine.fast_steps.graphs import DecodeGraphs, eager
from server.engine.state.norm import StateNorm
from server.engine.types.requests import FinishReason
from tests.server.engine.state.test_snapshots import LOAD, PROMPT, SAVE, Bench
from tests.tiny_models import tiny_model

NUM_SLOTS = 3


def int8_model(*, triton: bool) -> FrozenModel:
    """As it runs on a CPU, or as on a CUDA device."""
    model = tiny_model().keep_states_in(torch.int8)
    if triton:
        model.attention_op = TritonAttention()
    return freeze(model)


@pytest.mark.parametrize("from_triton", [True, False])
def test_a_conversation_saved_on_one_kind_of_device_goes_on_on_the_other(tmp_path: Path, from_triton: bool) -> None:
    """What torch and the kernels for CPUs compute differs in last bits, and the sums' roundings with it."""
    source, target = int8_model(triton=from_triton), int8_model(triton=not from_triton)
    prompt = PROMPT[:21]
    whole = Bench(source, tmp_path).one(*prompt, max_tokens=7)
    first = Bench(source, tmp_path).one(*prompt, states=SAVE, max_tokens=3)
    assert first.saved is not None
    then = Bench(target, tmp_path).one(states=LOAD, max_tokens=4)
    assert (then.error, then.reason) == (None, FinishReason.LENGTH)
    assert first.tokens + then.tokens == whole.tokens


def test_captured_steps_leave_the_bits_of_fresh_ones_and_no_trace_in_the_scratch_slot() -> None:
    model = int8_model(triton=True)
    captured, fresh = (StateBuffer(model.state_spec, NUM_SLOTS + 1, cleared=True) for _ in range(2))
    last = torch.arange(NUM_SLOTS + 1) * 7
    graphs = DecodeGraphs(model, buffer=captured, last_token_ids=last, buckets=(1, 4), capture=eager)
    captured.storage[0].fill_(0xFF)  # NaN: whatever read it would show
    fresh.storage[0].fill_(0xFF)
    for step in range(4):
        num_rows = 1 + step % NUM_SLOTS
        bucket = graphs.bucket_for(num_rows)
        assert bucket is not None
        slots = torch.zeros(bucket, dtype=torch.int64)
        slots[:num_rows] = (torch.arange(num_rows) + step) % NUM_SLOTS + 1
        positions = torch.full((bucket,), step)
        graphs.feed(bucket, torch.cat((slots, positions)))
        with torch.inference_mode():
            expected = decode(model, last[slots], slots=slots, positions=positions, state=fresh)
            assert torch.equal(graphs.forward(bucket)[:num_rows], expected[:num_rows])
    assert torch.equal(captured.storage, fresh.storage)
    assert (captured.storage[0] == 0xFF).all()


def test_the_health_of_a_state_shows_in_its_scales() -> None:
    model = int8_model(triton=True)
    buffer = StateBuffer(model.state_spec, NUM_SLOTS + 1, cleared=True)
    prefill(model, torch.arange(4), lengths=(4,), slots=torch.tensor([2]), starts=torch.tensor([0]), state=buffer)
    norm = StateNorm(buffer)
    norm.launch(2)
    assert norm.collect() > 0
    buffer.tensors["layers.0.near_value_scales"][2, 0, 1] = torch.nan
    norm.launch(2)
    assert not norm.collect() > 0
