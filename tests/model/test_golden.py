"""The released format, end to end: what the authors' forward pass computes is what we compute."""

import pytest
import torch
from torch import Tensor

from dijiang_model import reference
from dijiang_model.config import ModelConfig
from dijiang_model.reference import network
from tests.model.golden_checkpoints import NAMES, load_golden

# The released code keeps RoPE's cosines in fp32 even in a float64 run; ours come from float64 angles.
# That is all of the difference (see the first test), about 3e-9 of the norm.
TOLERANCE_FP32_ANGLES = 1e-8


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
