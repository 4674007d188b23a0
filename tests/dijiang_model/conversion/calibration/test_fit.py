"""What calibration measures is what the teacher does, and what it predicts is what places do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model.config import AnchorConfig, ModelConfig
from dijiang_model.conversion.calibration.contexts import Recalled, random_contexts
from dijiang_model.conversion.calibration.far_attention import far_attention, recall_attention
from dijiang_model.conversion.calibration.fit import Geometry, fit_layers
from dijiang_model.conversion.calibration.head_losses import answer_losses, priorities, ranks
from dijiang_model.conversion.calibration.ridge import RidgeSums, total
from dijiang_model.conversion.calibration.teacher_pass import LayerInputs, teacher_layers
from dijiang_model.conversion.training.distill import output_weight
from dijiang_model.families import build_model
from dijiang_model.ops.training.attention import SoftmaxAttention
from dijiang_model.reference.anchors import AnchorRules, eviction_times, shared_scores
from dijiang_model.segments import run_segments
from tests.tiny_models import (
    HYBRID,
    gpt_neox_config,
    llama_config,
    olmo2_config,
    opt_config,
    qwen2_config,
    qwen3_config,
    tiny_model,
)

CONFIGS: dict[str, ModelConfig] = {
    "llama": llama_config(HYBRID, HYBRID),
    "gpt_neox": gpt_neox_config(HYBRID, HYBRID),
    "qwen2": qwen2_config(HYBRID, HYBRID),
    "qwen3": qwen3_config(HYBRID, HYBRID),
    "olmo2": olmo2_config(HYBRID, HYBRID),
    "opt 350m": opt_config(HYBRID, HYBRID, pre_norm=False, embedding_size=24),
}
RULE = AnchorConfig((10,), (8,))


def inputs(length: int = 40, *, seed: int = 0) -> LayerInputs:
    """Of 2 groups of 3 heads of 16, 24 wide."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return LayerInputs(
        x=random(length, 24),
        energy=random(length).square() + 1,
        q=random(length, 2, 3, 16),
        k=random(length, 2, 16),
        v=random(length, 2, 16),
    )


def dense(read: LayerInputs) -> Tensor:
    """[G, R, T, T], all probabilities."""
    scores = torch.einsum("tgrd,jgd->grtj", read.q, read.k) / 4
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_read_what_the_teacher_reads_and_weights_are_let_go(name: str) -> None:
    config = CONFIGS[name]
    loaded = tiny_model(config)
    seen: list[Tensor] = []
    hooks = [
        attention.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for attention in loaded.attentions
    ]
    tokens = random_contexts(vocab_size=config.vocab_size, num=1, length=50, seed=0)[0].token_ids
    run_segments(loaded, tokens[None], SoftmaxAttention())
    for hook in hooks:
        hook.remove()
    empty, state = build_model(config, device="meta", dtype=torch.float32), loaded.state_dict()
    read = [list(layer) for _, layer in teacher_layers(empty, state.__getitem__, [tokens, tokens[:20]])]
    for expected, (whole, part) in zip(seen, read, strict=True):
        torch.testing.assert_close(whole.x, expected)
        torch.testing.assert_close(part.x, expected[:20])
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


def test_no_more_than_one_layer_is_in_memory() -> None:
    config = llama_config(HYBRID, HYBRID, HYBRID)
    state = tiny_model(config).state_dict()
    empty = build_model(config, device="meta", dtype=torch.float32)
    for layer, (_, inputs) in enumerate(teacher_layers(empty, state.__getitem__, [torch.arange(20)])):
        for _ in inputs:
            loaded = {name for name, tensor in empty.state_dict().items() if not tensor.is_meta}
            assert loaded
            assert all(name.startswith(f"model.layers.{layer}.") for name in loaded)


def test_far_attention_is_the_largest_and_the_mean_of_later_rows() -> None:
    read, window = inputs(), 8
    found, probability = far_attention(read, window=window), dense(read)
    rows = range(window, 40, 4)
    for token in range(40):
        later = [row for row in rows if row >= token + window]
        assert found.queries[token] == len(later)
        column = probability[:, :, later, token]
        wanted = column.amax((1, 2)) if later else torch.zeros(2)
        torch.testing.assert_close(found.largest[:, token], wanted)
        torch.testing.assert_close(found.mean[:, token], column.mean((1, 2)) if later else torch.zeros(2))


def test_recall_is_attention_to_facts_that_lie_beyond_the_window() -> None:
    read = inputs()
    facts = [Recalled((3, 5), (30, 32)), Recalled((28, 29), (33, 34))]
    expected = dense(read)[:, :, 29:31, 3:5].sum(-1).mean((1, 2))
    torch.testing.assert_close(recall_attention(read, facts, window=8), expected)


def test_ridge_finds_a_linear_law_and_its_correlation_in_any_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0])
    law = torch.randn(2, 5, generator=generator)
    y = x @ law.T + 3 + 0.1 * torch.randn(900, 2, generator=generator)
    whole = RidgeSums.of(x, y)
    parts = total([RidgeSums.of(x[:100], y[:100]), RidgeSums.of(x[100:], y[100:])])
    weight, bias = parts.solve()
    torch.testing.assert_close(weight, whole.solve()[0], rtol=1e-5, atol=1e-6)
    # The penalty shrinks by its share.
    torch.testing.assert_close(weight.float(), law, rtol=0.1, atol=0.1)
    predicted = x.double() @ weight.T + bias
    for output in range(2):
        expected = torch.corrcoef(torch.stack([predicted[:, output], y[:, output].double()]))[0, 1]
        torch.testing.assert_close(whole.correlation(weight, bias)[output], expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(0, 12), st.integers(0, 3))
def test_ranks_evict_whom_the_reference_evicts(seed: int, window: int, anchors: int, sinks: int) -> None:
    length = 30
    # Few values, so that ties decide too.
    scores = torch.randint(0, 4, (length,), generator=torch.Generator().manual_seed(seed)).float()
    rules = AnchorRules(sinks, (window,), (anchors,), RULE.age, RULE.span)
    shared = shared_scores(scores.tolist(), RULE.span)
    priority = torch.tensor([score + RULE.age * token for token, score in enumerate(shared)], dtype=torch.float64)
    torch.testing.assert_close(priorities(scores[:, None], RULE)[0], priority)
    rank, times = ranks(priority, sinks=sinks), eviction_times(scores, rules, 0)
    for token in range(sinks, length):
        for now in range(token + window, length):
            assert (rank[token, now - window] < anchors) == (now < times[token])


def test_losses_are_errors_after_the_projection_and_nothing_with_all_tokens() -> None:
    read, window, sinks = inputs(), 8, 2
    generator = torch.Generator().manual_seed(1)
    priority = torch.randn(1, 2, 40, generator=generator).double()
    weight = torch.randn(24, 2 * 3 * 16, generator=generator)
    rows = torch.tensor([20, 39])
    losses = answer_losses(read, priority, rows, output_weight=weight, sizes=(0, 5, 40), window=window, sinks=sinks)
    assert losses[..., 2].abs().max() < 1e-6
    probability = dense(read)
    token = torch.arange(40)
    for head in range(2):
        expected = 0.0
        for row in rows.tolist():
            left = range(sinks, row - window + 1)
            best = sorted(left, key=lambda other: float(priority[0, head, other]))[-5:]
            held = (token < sinks) | ((token > row - window) & (token <= row))
            held[best] = True
            own = probability[head, :, row]
            kept = own * held
            error = (kept / kept.sum(-1, keepdim=True) - own) @ read.v[:, head]
            projected = weight.unflatten(1, (2, 3, 16))[:, head].flatten(1) @ error.flatten()
            expected += float(projected.square().sum() / read.energy[row])
        torch.testing.assert_close(float(losses[0, head, 1]), expected, rtol=1e-4, atol=1e-7)


def test_a_layer_is_fitted_whatever_it_reads_facts_or_none() -> None:
    config = CONFIGS["llama"]
    loaded = tiny_model(config)
    state = loaded.state_dict()
    contexts = random_contexts(vocab_size=config.vocab_size, num=6, length=300, seed=0)
    contexts[1] = type(contexts[1])(contexts[1].token_ids, (Recalled((20, 22), (200, 202)),))
    done: list[int] = []
    fits = fit_layers(
        build_model(config, device="meta", dtype=torch.float32),
        state.__getitem__,
        contexts,
        Geometry(RULE, 8, 2, (0, 20, 300)),
        on_layer=done.append,
    )
    assert done == [1, 2]
    for fit, attention in zip(fits, loaded.attentions, strict=True):
        assert output_weight(attention).shape[0] == fit.weight.shape[-1] == config.hidden_size
        assert fit.correlation.shape == (2, 2)
        assert fit.losses.shape == (2, 2, 3)
        assert (fit.losses[..., 0] > fit.losses[..., 1]).all()
        assert fit.losses[..., 2].max() < 1e-8
        assert (fit.recall > 0).all()
