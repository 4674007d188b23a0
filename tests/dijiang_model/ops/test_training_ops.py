"""The attention for training: the inference path's answers, right gradients, the teacher's logits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dijiang_model.batch import decode, prefill
from dijiang_model.config import AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.training.attention import HybridAttention, SoftmaxAttention, WindowAttention
from dijiang_model.segments import run_segments
from dijiang_model.state import StateBuffer
from tests.tiny_models import HYBRID, PURE, gpt_neox_config, llama_config, tiny_model

FAR = replace(HYBRID, features=FeatureConfig(bases=("dct2", "dct4"), scale=1.0, nodes="signed_sphere", far_rank=3))
UNROTATED = replace(FAR, features=replace(FAR.features, rotated=False))
LENGTHS = (1, 2, 63, 65, 150)


def tokens(length: int, *, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def inferred(model: DiJiangForCausalLM, token_ids: Tensor) -> Tensor:
    """Logits [T, vocab] of the inference path from an empty slot."""
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    return prefill(
        model, token_ids, lengths=[len(token_ids)], slots=torch.tensor([1]), starts=torch.tensor([0]), state=state
    )


def trained(model: DiJiangForCausalLM, token_ids: Tensor) -> Tensor:
    return model.logits(run_segments(model, token_ids[None], HybridAttention()))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "layer", [HYBRID, PURE, FAR, UNROTATED], ids=["hybrid", "pure", "far queries", "before rotation"]
)
def test_training_answers_what_inference_answers(layer: AttentionConfig, length: int) -> None:
    model = tiny_model(llama_config(layer, layer), dtype=torch.float64)
    ids = tokens(length)[0]
    # fp64: only the order of sums differs.
    torch.testing.assert_close(trained(model, ids), inferred(model, ids), rtol=1e-9, atol=1e-9)


def test_far_queries_decode_as_they_prefill() -> None:
    model = tiny_model(llama_config(FAR, FAR), dtype=torch.float64)
    ids = tokens(40)[0]
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    slot = torch.tensor([1])
    steps = [
        decode(model, ids[t : t + 1], slots=slot, positions=torch.tensor([t]), state=state) for t in range(len(ids))
    ]
    torch.testing.assert_close(torch.cat(steps), inferred(model, ids), rtol=1e-9, atol=1e-9)


def test_unrotated_features_do_not_see_where_a_text_stands() -> None:
    ids = tokens(100, rows=1)
    for layer, is_seen in ((FAR, True), (UNROTATED, False)):
        model = tiny_model(llama_config(layer, layer), dtype=torch.float64)
        here, there = (run_segments(model, ids, HybridAttention(), offset=offset) for offset in (0, 5000))
        assert torch.allclose(here, there, rtol=1e-8, atol=1e-9) != is_seen


def test_segments_do_not_see_each_other() -> None:
    model = tiny_model(llama_config(FAR, FAR), dtype=torch.float64)
    ids = tokens(70, rows=3)
    together = run_segments(model, ids, HybridAttention()).unflatten(0, (3, 70))
    for row in range(3):
        alone = run_segments(model, ids[row : row + 1], HybridAttention())
        torch.testing.assert_close(together[row], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config", [llama_config(HYBRID, HYBRID), gpt_neox_config(HYBRID, HYBRID)], ids=lambda c: c.family
)
def test_a_window_longer_than_the_text_is_the_teacher(config: ModelConfig) -> None:
    config = replace(config, position_table_length=0)
    model = tiny_model(config, dtype=torch.float64)
    ids = tokens(50)
    teacher = run_segments(model, ids, SoftmaxAttention())
    torch.testing.assert_close(run_segments(model, ids, WindowAttention(50, 2)), teacher, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(run_segments(model, ids, WindowAttention(5, 2)), teacher, rtol=1e-3)


def test_a_window_attention_is_the_hybrid_with_a_disabled_linear_part() -> None:
    model = tiny_model(llama_config(FAR, FAR), dtype=torch.float64)
    without = run_segments(model, tokens(80), WindowAttention())
    for attention in model.attentions:
        attention.linear.mix_bias.fill_(-torch.inf)
    torch.testing.assert_close(run_segments(model, tokens(80), HybridAttention()), without, rtol=1e-9, atol=1e-9)


def test_an_offset_changes_the_linear_part_alone() -> None:
    model = tiny_model(llama_config(FAR, FAR), dtype=torch.float64)
    ids = tokens(80)
    for op in (SoftmaxAttention(), WindowAttention()):
        there = run_segments(model, ids, op, offset=700)
        torch.testing.assert_close(there, run_segments(model, ids, op), rtol=1e-9, atol=1e-9)
    linear = run_segments(model, ids, HybridAttention(), offset=700)
    assert not torch.allclose(linear, run_segments(model, ids, HybridAttention()), rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["nodes", "log_weights", "log_decay", "mix_bias", "mix_weight", "far_query_down", "far_query_up"]
)
def test_gradients_equal_finite_differences(name: str) -> None:
    model = tiny_model(llama_config(FAR, FAR), dtype=torch.float64)
    parameter = getattr(next(iter(model.attentions)).linear, name).requires_grad_(True)
    ids = tokens(90)

    def loss() -> Tensor:
        return run_segments(model, ids, HybridAttention()).square().mean()

    loss().backward()
    assert parameter.grad is not None
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        parameter += step * direction
        above = loss()
        parameter -= 2 * step * direction
        below = loss()
    # Central differences of a smooth function: an error of step^2, and of rounding over step.
    torch.testing.assert_close((above - below) / (2 * step), (parameter.grad * direction).sum(), rtol=1e-5, atol=1e-9)
