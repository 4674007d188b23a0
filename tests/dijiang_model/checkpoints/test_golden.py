"""The released format, end to end: what the authors' forward pass computes is what we compute."""

import pytest
import torch
from torch import Tensor

from dijiang_model import reference
from dijiang_model.batch import PackedBatch
from dijiang_model.checkpoints.checkpoint import load_config, load_model
from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.reference import network
from dijiang_model.state import StateBuffer
from tests.dijiang_model.checkpoints.golden_checkpoints import NAMES, Golden, load_golden
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, logits_of

# The released code keeps RoPE's cosines in fp32 even in a float64 run; ours come from float64 angles.
# That is all of the difference (see the first test), about 3e-9 of the norm.
TOLERANCE_FP32_ANGLES = 1e-8

TOLERANCES = {torch.float64: TOLERANCE_FP32_ANGLES, torch.float32: 1e-5}
"""Of the fast path. fp32 has 6e-8 per operation; 1e-5 is what faithful loading is held to."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def released_angles(config: ModelConfig, positions: range, channel: int) -> Tensor:
    """RoPE's angles as the released code computes them, everything in fp32."""
    exponents = torch.arange(0, config.rotary_dims, 2).float() / config.rotary_dims
    frequencies = 1.0 / (config.rope_theta**exponents)
    return torch.tensor(list(positions), dtype=torch.float32) * frequencies[channel]


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_the_released_forward_pass_to_the_last_digits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_golden(name)
    monkeypatch.setattr(network, "_angles", released_angles)
    hidden, logits = reference.forward(golden.config, golden.tensors, golden.input_ids[0].tolist())
    for actual, expected in zip([*hidden, logits], [*(h[0] for h in golden.hidden), golden.logits[0]], strict=True):
        assert relative_error(actual, expected) < 1e-14


@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
@pytest.mark.parametrize("name", NAMES)
def test_reference_matches_golden_hidden_states_and_logits(name: str, form: network.Form) -> None:
    golden = load_golden(name)
    for row, token_ids in enumerate(golden.input_ids.tolist()):
        hidden, logits = reference.forward(golden.config, golden.tensors, token_ids, form=form)
        assert relative_error(logits, golden.logits[row]) < TOLERANCE_FP32_ANGLES
        for actual, expected in zip(hidden, golden.hidden, strict=True):
            assert relative_error(actual, expected[row]) < TOLERANCE_FP32_ANGLES


@pytest.mark.parametrize("name", NAMES)
def test_reference_continues_golden_prompts_greedily(name: str) -> None:
    golden = load_golden(name)
    prompt = golden.greedy_ids[:8]
    assert reference.greedy(golden.config, golden.tensors, prompt, num_new=24) == golden.greedy_ids


def test_golden_tables_hold_the_signs_they_are_named_for() -> None:
    golden = load_golden("sign_flips")
    tables = golden.tensors["gpt_neox.layers.0.attention.linear.write_table"]
    assert (tables < 0).any()
    assert (load_golden("aligned").tensors["gpt_neox.layers.0.attention.linear.write_table"] > 0).all()


def feed(model: DiJiangForCausalLM, token_ids: list[int], form: str) -> Tensor:
    """Logits [T, vocab]: in one prefill, in ragged prefill pieces, or token by token."""
    if form == "parallel":
        return logits_of(model, token_ids)
    stepper = Stepper(model).open(3)
    if form == "recurrent":
        return torch.cat([stepper.step(decode={3: token})[3] for token in token_ids])
    pieces = [token_ids[:1], token_ids[1:24], token_ids[24:26], token_ids[26:]]
    return torch.cat([stepper.step({3: piece})[3] for piece in pieces])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
@pytest.mark.parametrize("name", NAMES)
def test_loaded_checkpoint_computes_golden_logits(name: str, form: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    model = load_model(golden.path, dtype=dtype)
    for row, token_ids in enumerate(golden.input_ids.tolist()):
        assert_close_in_norm(feed(model, token_ids, form), golden.logits[row], tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_loaded_checkpoint_computes_golden_hidden_states(name: str, dtype: torch.dtype) -> None:
    """Both golden texts in one packed step."""
    golden = load_golden(name)
    model = load_model(golden.path, dtype=dtype)
    buffer = StateBuffer(model.state_spec, 3)
    buffer.storage.zero_()
    num_texts, length = golden.input_ids.shape
    positions = torch.arange(length).repeat(num_texts)
    slots = torch.tensor([2, 1])
    batch = PackedBatch(golden.input_ids.flatten(), positions, slots, (length,) * num_texts, 0, positions[:0])
    hidden = model.hidden_states(batch, buffer, all_layers=True)
    for actual, expected in zip(hidden, golden.hidden, strict=True):
        assert_close_in_norm(actual, expected.flatten(0, 1), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_loaded_checkpoint_continues_golden_prompts_greedily(name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    stepper = Stepper(load_model(golden.path, dtype=dtype)).open(1)
    token_ids = golden.greedy_ids[:8]
    logits = stepper.step({1: token_ids})[1]
    for _ in range(24):
        token_ids.append(int(logits[-1].argmax()))
        logits = stepper.step(decode={1: token_ids[-1]})[1]
    assert token_ids == golden.greedy_ids


@pytest.mark.parametrize("name", NAMES)
def test_loader_reads_what_was_read_by_hand(name: str) -> None:
    golden = load_golden(name)
    same_backbone(load_config(golden.path), golden)
    for tensor_name, tensor in load_model(golden.path, dtype=torch.float64).state_dict().items():
        torch.testing.assert_close(tensor, golden.tensors[tensor_name].double(), rtol=1e-7, atol=1e-7)


def same_backbone(config: ModelConfig, golden: Golden) -> None:
    assert config.layers == golden.config.layers
    for field in ("num_heads", "head_size", "rotary_dims", "rope_theta", "parallel_residual", "position_table_length"):
        assert getattr(config, field) == getattr(golden.config, field), field


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_generation_goes_on_past_the_tables(name: str, dtype: torch.dtype) -> None:
    """200 tokens with tables of 64: the fast path against the definition with tables continued in fp64."""
    golden = load_golden(name)
    model = load_model(golden.path, dtype=dtype)
    token_ids = (golden.input_ids.flatten().tolist() * 3)[:200]
    _, expected = reference.forward(golden.config, golden.tensors, token_ids)
    for form in ("parallel", "chunked", "recurrent"):
        assert_close_in_norm(feed(model, token_ids, form), expected, tolerance=TOLERANCES[dtype])
