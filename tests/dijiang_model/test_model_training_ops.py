"""The differentiable attentions of training: the same numbers as the served model, and true gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.training.attention import HybridAttention, SoftmaxAttention, WindowAttention
from dijiang_model.segments import run_segments
from tests.dijiang_model.stepping import assert_close_in_norm, logits_of, random_text
from tests.tiny_models import (
    CONSTANT,
    HYBRID,
    NO_LINEAR,
    PURE,
    anchored,
    gpt_neox_config,
    llama_config,
    opt_config,
    tiny_model,
)

FAR_QUERIES = replace(HYBRID, window=12, features=replace(HYBRID.features, far_rank=3))
UNROTATED = replace(HYBRID, features=replace(HYBRID.features, rotated=False, far_rank=3))
PAPER = replace(PURE, features=replace(PURE.features, normalisation="exp"))
CONFIGS = {
    "llama": llama_config(),
    "llama, far queries and exp features": llama_config(FAR_QUERIES, PAPER),
    "llama, features before rotation": llama_config(
        replace(FAR_QUERIES, features=replace(FAR_QUERIES.features, rotated=False))
    ),
    "gpt_neox": replace(gpt_neox_config(HYBRID, PURE), position_table_length=0),
    "opt": opt_config(),
    "llama, anchors": llama_config(anchored(2), HYBRID, anchored(2, base=UNROTATED)),
    "llama, anchors and no linear part": llama_config(anchored(2, base=NO_LINEAR), HYBRID),
    "llama, anchors and a decayed mean": llama_config(anchored(2, base=CONSTANT, places=(11, 9)), HYBRID),
    "opt, anchors": opt_config(anchored(3), anchored(3, value_bits=4)),
}
TOLERANCE = 1e-10
"""fp64, of the logits' norm; the same operators in another order."""


def segment_logits(model: DiJiangForCausalLM, texts: list[list[int]], op: object) -> list[Tensor]:
    """[T, vocab] for each of several texts of one length, run together."""
    hidden = run_segments(model, torch.tensor(texts), op)  # type: ignore[arg-type]
    return list(model.logits(hidden).split(len(texts[0])))


def with_windows(config: ModelConfig, *, window: int, sinks: int) -> ModelConfig:
    """Every layer a hybrid."""
    return replace(
        config, layers=tuple(replace(layer, window=window, sinks=sinks, anchors=None) for layer in config.layers)
    )


def same_weights(model: DiJiangForCausalLM, config: ModelConfig, *, silent: bool) -> DiJiangForCausalLM:
    """A model of another config with `model`'s tensors and its own mixing weights."""
    other = tiny_model(config, dtype=torch.float64)
    other.load_state_dict(model.state_dict(), strict=False)  # other features, or no anchors, need not all of it
    for attention in other.attentions:
        if silent:
            attention.linear.mix_bias.fill_(-torch.inf)
    return other.prepare()


@pytest.mark.parametrize("length", [1, 2, 64, 65, 150])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_computes_what_is_served(name: str, length: int) -> None:
    """150 tokens pass the trained range of 128, where sinks are seen with the capped rotation."""
    model = tiny_model(CONFIGS[name], dtype=torch.float64)
    texts = [random_text(length, seed=seed) for seed in range(3)]
    for logits, text in zip(segment_logits(model, texts, HybridAttention()), texts, strict=True):
        assert_close_in_norm(logits, logits_of(model, text), tolerance=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_narrowed_window_is_the_model_with_that_window(name: str) -> None:
    model = tiny_model(CONFIGS[name], dtype=torch.float64)
    layers = tuple(replace(one, window=1, anchors=None) if one.window > 0 else one for one in model.config.layers)
    narrow = same_weights(model, replace(model.config, layers=layers), silent=False)
    text = random_text(70)
    logits = segment_logits(model, [text], HybridAttention(window=1))[0]
    assert_close_in_norm(logits, logits_of(narrow, text), tolerance=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_teacher_is_the_model_with_a_window_over_everything(name: str) -> None:
    model = tiny_model(CONFIGS[name], dtype=torch.float64)
    texts = [random_text(90, seed=seed) for seed in range(2)]
    wide = same_weights(model, with_windows(model.config, window=90, sinks=0), silent=False)
    for logits, text in zip(segment_logits(model, texts, SoftmaxAttention()), texts, strict=True):
        assert_close_in_norm(logits, logits_of(wide, text), tolerance=TOLERANCE)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 2), (60, 4), (3, 9)])
@pytest.mark.parametrize("name", CONFIGS)
def test_baseline_is_the_silent_hybrid(name: str, window: int, sinks: int) -> None:
    model = tiny_model(CONFIGS[name], dtype=torch.float64)
    silent = same_weights(model, with_windows(model.config, window=window, sinks=sinks), silent=True)
    texts = [random_text(140, seed=seed) for seed in range(2)]
    for logits, text in zip(segment_logits(model, texts, WindowAttention(window, sinks)), texts, strict=True):
        assert_close_in_norm(logits, logits_of(silent, text), tolerance=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_slopes_of_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter's gradient along a random direction, against a central difference: fp64, steps of 1e-5, whose
    error of second order is near 1e-9 of the loss. gelu for all, as relu has kinks; so has rounding to int8."""
    monkeypatch.setattr("dijiang_model.ops.training.attention.rounded", lambda x, bits=8: x)
    model = tiny_model(replace(CONFIGS[name], activation="gelu"), dtype=torch.float64)
    texts = torch.tensor([random_text(40, seed=seed) for seed in range(2)])
    direction = torch.randn(80, 260, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 100

    def loss() -> Tensor:
        return (model.logits(run_segments(model, texts, HybridAttention())) * direction).sum()

    for parameter_name, parameter in model.named_parameters():
        if "priority" in parameter_name:
            continue
        along = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        parameter.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(), parameter)
        parameter.requires_grad_(False)
        original = parameter.clone()
        ends = [loss() for parameter.data in (original + 1e-5 * along, original - 1e-5 * along)]
        parameter.data = original
        slope = float(ends[0] - ends[1]) / 2e-5
        assert float((gradient * along).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), parameter_name
