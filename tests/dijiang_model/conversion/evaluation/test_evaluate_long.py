"""Long texts are scored as whole ones are, in fixed memory; ablations are what they say; steps are timed as served."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.conversion.evaluation import long_texts as evaluate_long
from dijiang_model.conversion.evaluation.ablations import silenced
from dijiang_model.conversion.evaluation.long_texts import long_score, stream_losses, streams, tokens_to_read
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp
from dijiang_model.ops.training.attention import HybridAttention, WindowAttention
from dijiang_model.segments import run_segments
from tests.tiny_models import HYBRID, llama_config, tiny_model

EDGES = (16, 32, 64, 150)


def tokens(length: int) -> Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(2))


def whole(model: DiJiangForCausalLM, text: Tensor, op: AttentionOp) -> Tensor:
    """[T - 1] losses in one go."""
    with torch.no_grad():
        logits = model.logits(run_segments(model, text[None], op))[:-1]
    return functional.cross_entropy(logits, text[1:], reduction="none").double()


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
@pytest.mark.parametrize("first", [1, 33, 90])
def test_reading_in_chunks_gives_the_losses_of_the_whole_text(
    monkeypatch: pytest.MonkeyPatch, chunk: int, first: int
) -> None:
    monkeypatch.setattr(evaluate_long, "CHUNK_TOKENS", chunk)
    model, text = tiny_model(llama_config(HYBRID, HYBRID)), tokens(120)
    seen: list[int] = []
    losses = stream_losses(model, text, first=first, on_tokens=seen.append)
    assert sum(seen) == 120
    assert losses.shape == (120 - first,)
    torch.testing.assert_close(losses, whole(model, text, HybridAttention())[first - 1 :], rtol=1e-4, atol=1e-4)


def test_ranges_and_fresh_starts_cover_the_tokens_that_they_name() -> None:
    model, text = tiny_model(llama_config(HYBRID, HYBRID)), tokens(200)
    found = long_score(model, [text], with_fresh=True, edges=EDGES)
    losses = whole(model, text, HybridAttention())
    expected = [losses[low - 1 : high - 1].mean() for low, high in ((16, 32), (32, 64), (64, 150))]
    assert found.means == pytest.approx([float(mean) for mean in expected], rel=1e-5)
    starts = range(64, 150, 16)
    fresh = [whole(model, text[max(start - 16, 0) : min(start + 16, 150)], HybridAttention())[15:] for start in starts]
    assert sum(map(len, fresh)) == 150 - 64
    assert found.fresh == pytest.approx(float(torch.cat(fresh).mean()), rel=1e-5)
    assert long_score(model, [text], with_fresh=False, edges=EDGES).fresh is None


def test_the_tokens_to_read_are_those_that_are_read() -> None:
    model, seen = tiny_model(llama_config(HYBRID, HYBRID)), []
    long_score(model, [tokens(150)] * 2, with_fresh=True, edges=EDGES, on_tokens=seen.append)
    assert sum(seen) == tokens_to_read(2, with_fresh=True, edges=EDGES)


def test_a_silenced_model_is_its_window() -> None:
    model, text = tiny_model(llama_config(HYBRID, HYBRID)), tokens(100)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for quiet, op in (
        (silenced(model), WindowAttention()),
        (silenced(model, window=13, sinks=3), WindowAttention(13, 3)),
    ):
        torch.testing.assert_close(stream_losses(quiet, text), whole(model, text, op), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_long_texts_compare_the_model_its_ablation_and_the_window_of_equal_bytes() -> None:
    model, teacher = tiny_model(llama_config(HYBRID, HYBRID)), tiny_model(llama_config(HYBRID, HYBRID), seed=1)
    assert list(streams(model, teacher)) == ["ours", "ours, linear part off", "window 13+2, no training"]
