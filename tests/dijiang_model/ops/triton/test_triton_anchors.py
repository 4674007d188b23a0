"""Anchors in the Triton operator: decode rows by its kernel, prompts by torch, against torch's operator in fp64."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.ops.triton import TritonAttention
from tests.dijiang_model.ops.triton.test_triton_attention import HAS_GPU
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, random_text
from tests.dijiang_model.test_anchors import RANKED, UNROTATED, neox
from tests.tiny_models import CONSTANT, HYBRID, NO_LINEAR, anchored, llama_config, opt_config, tiny_model

pytestmark = pytest.mark.skipif(HAS_GPU, reason="these models are on the CPU, in the interpreter")
NO_SINKS = replace(HYBRID, sinks=0)
CONFIGS = {
    "features before rotation": llama_config(anchored(2, base=UNROTATED)),
    "far queries": llama_config(anchored(2, base=RANKED)),
    "rotation of some channels": neox(anchored(3)),
    "nothing to rotate": opt_config(anchored(3)),
    "a decayed mean, beside a layer without a linear part": llama_config(
        anchored(2, base=CONSTANT), anchored(2, base=NO_LINEAR)
    ),
    "no sinks": llama_config(anchored(2, base=NO_SINKS)),
    "channels and places that fill no block": replace(
        llama_config(anchored(1, places=(23,)), num_heads=3, num_kv_heads=1), head_size=48, rotary_dims=48
    ),
}
TOLERANCE = 1e-3
"""A number between two int8 codes may go to the other one where fp32 sums differ in their last bit."""


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def model_of(config: ModelConfig, *, triton: bool) -> DiJiangForCausalLM:
    model = tiny_model(config, dtype=torch.float32 if triton else torch.float64)
    model.attention_op = TritonAttention() if triton else TorchAttention()
    return model


def assert_same_state(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in actual.items():
        if name.endswith("near_positions"):
            assert torch.equal(tensor, expected[name]), name
        else:
            assert_close_in_norm(tensor, expected[name], tolerance=TOLERANCE, what=name)


def test_tokens_one_by_one_choose_and_answer_as_torch() -> None:
    text, config = random_text(28), CONFIGS["no sinks"]
    ours, twin = (Stepper(model_of(config, triton=triton)).open(3) for triton in (True, False))
    for i, token in enumerate(text):
        found, expected = (stepper.step(decode={3: token}, num_padding=i % 2)[3] for stepper in (ours, twin))
        assert_close_in_norm(found, expected, tolerance=TOLERANCE, what=f"token {i}")
    assert_same_state(ours.state(3), twin.state(3))


def test_prompts_and_decode_rows_share_a_step(config: ModelConfig) -> None:
    text = random_text(60)
    ours, twin = (Stepper(model_of(config, triton=triton)).open(1, 2) for triton in (True, False))
    for stepper in (ours, twin):
        stepper.step({1: text[:30]})
        stepper.step({2: text[:7]}, decode={1: text[30]}, num_padding=1)
    found, expected = (
        torch.cat([stepper.step(decode={1: token})[1] for token in text[31:43]]) for stepper in (ours, twin)
    )
    assert_close_in_norm(found, expected, tolerance=TOLERANCE)
    for slot in (1, 2):
        assert_same_state(ours.state(slot), twin.state(slot))


def test_padding_touches_no_state() -> None:
    stepper = Stepper(model_of(CONFIGS["far queries"], triton=True)).open(1)
    before = stepper.buffer.storage[0].clone()
    stepper.step(decode={1: 7}, num_padding=2)
    assert torch.equal(stepper.buffer.storage[0], before)
    assert torch.equal(stepper.buffer.storage[2:], before.expand(len(stepper.buffer.storage) - 2, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_sums_in_bf16_beside_places(dtype: torch.dtype) -> None:
    text, config = random_text(40), CONFIGS["features before rotation"]
    narrow = model_of(config, triton=True).keep_states_in(dtype)
    ours, twin = Stepper(narrow).open(1), Stepper(model_of(config, triton=False)).open(1)
    for stepper in (ours, twin):
        stepper.step({1: text[:32]})
    found, expected = (
        torch.cat([stepper.step(decode={1: token})[1] for token in text[32:]]) for stepper in (ours, twin)
    )
    assert_close_in_norm(found, expected, tolerance=3e-2)
