"""CUDA graphs of model and sampling on a device; needs torch and triton alone, so that a bare machine can run it."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the shapes come from the GPU benchmarks")

from benchmarks.gpu.models import config_of, random_model
from dijiang_model.batch import decode
from dijiang_model.state import StateBuffer
from server.engine.fast_steps import graph_sampling
from server.engine.fast_steps.graphs import CudaCapture, DecodeGraphs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
NUM_SLOTS = 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "attention", "state_dtype"),
    [
        ("tiny", "pure", torch.float32),
        ("tiny", "hybrid", torch.float32),
        ("tiny", "hybrid", torch.int8),
        ("tiny-neox", "released", torch.float32),
        ("tiny-neox", "hybrid", torch.float32),
    ],
)
def test_captured_steps_say_what_fresh_ones_say(
    shape: str, attention: str, state_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Greedy, over buckets and slots in turn, padding included; fresh steps have as many rows, padding too."""
    torch.manual_seed(0)
    model = random_model(config_of(shape, attention), device="cuda", dtype=dtype).keep_states_in(state_dtype)
    captured, fresh = (StateBuffer(model.state_spec, NUM_SLOTS + 1, "cuda", cleared=True) for _ in range(2))
    last = torch.arange(NUM_SLOTS + 1, device="cuda") * 7 % model.config.vocab_size
    last[0] = 0
    graphs = DecodeGraphs(
        model, buffer=captured, last_token_ids=last.clone(), buckets=(1, 2, 4, 6), capture=CudaCapture()
    )
    graph_sampling.record(graphs, model.config.vocab_size)
    captured.storage.zero_()
    for step in range(12):
        num_rows = 1 + step % NUM_SLOTS
        bucket = graphs.bucket_for(num_rows)
        assert bucket is not None
        slots = torch.zeros(bucket, dtype=torch.int64)
        slots[:num_rows] = (torch.arange(num_rows) + step) % NUM_SLOTS + 1
        positions = torch.full((bucket,), step)
        graphs.feed(bucket, torch.cat((slots, positions)).cuda())
        expected = _fresh_step(model, fresh, last, slots.cuda(), positions.cuda())
        assert torch.equal(graphs.forward(bucket)[:num_rows], expected[:num_rows])
        tokens = graphs.sample(bucket, "greedy")
        assert torch.equal(tokens[:num_rows].long(), expected[:num_rows].argmax(-1))
        last[slots.cuda()] = expected.argmax(-1)
    assert torch.equal(captured.storage[1:], fresh.storage[1:])


@torch.inference_mode()
def _fresh_step(model: torch.nn.Module, state: StateBuffer, last: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    return decode(model, last[slots], slots=slots, positions=positions, state=state)
