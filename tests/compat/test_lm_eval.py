"""lm-evaluation-harness, `local-completions`: its scores are those of the same model computed directly."""

import pytest

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.serving.network import FrozenModel, freeze
from tests.compat.conftest import Tiny
from tests.compat.harness import Samples, greedy, likelihood, recorded
from tests.tiny_models import EOS_TOKEN_ID

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
TOLERANCE = 1e-4
"""Of a sum over some twenty tokens, in chunks and at once, in fp32."""
QUESTIONS = [
    {
        "question": f"Question {number}: naïve or wise?\nAnswer:",
        "endings": ["naïve", "wise", f"{number}", "東京 " * number],
        "label": number % 4,
    }
    for number in range(1, 9)
]


@pytest.fixture(scope="module")
def samples(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return recorded(tiny.server, tmp_path_factory.mktemp("lm_eval"), QUESTIONS)


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> FrozenModel:
    return freeze(load_model(tiny.folder))


def test_log_likelihoods_are_those_of_the_model(samples: Samples, model: FrozenModel) -> None:
    assert len(samples["tiny_choice"]) == len(QUESTIONS)
    for sample in samples["tiny_choice"]:
        question, endings = sample["doc"]["question"], sample["doc"]["endings"]
        # The tokenizer's tokens are bytes.
        scores = [likelihood(model, list(question.encode()), list(f" {ending}".encode())) for ending in endings]
        for (value, is_greedy), [[given, given_greedy]] in zip(scores, sample["resps"], strict=True):
            assert float(given) == pytest.approx(value, abs=TOLERANCE)
            assert str(given_greedy) == str(is_greedy)
        best = max(range(len(endings)), key=lambda number: scores[number][0])
        assert sample["acc"] == float(best == sample["doc"]["label"])


def test_generations_are_the_greedy_ones(samples: Samples, model: FrozenModel) -> None:
    assert len(samples["tiny_answer"]) == len(QUESTIONS)
    for sample in samples["tiny_answer"]:
        prompt = list(sample["doc"]["question"].encode())
        tokens = greedy(model, prompt, num_tokens=12, ends=frozenset({EOS_TOKEN_ID}))
        text = bytes(token for token in tokens if token < 256).decode("utf-8", "replace")
        assert sample["resps"] == [[text.split("\n")[0]]]
