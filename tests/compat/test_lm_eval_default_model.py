"""lm-evaluation-harness on the default model: its scores are those of the same model in our own code."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.conversion.default_model import ensure_default_model
from dijiang_model.serving.network import FrozenModel, freeze
from tests.compat.harness import Samples, greedy, likelihood, recorded
from tests.e2e.serving import Server, serving

pytestmark = [pytest.mark.clients, pytest.mark.slow, pytest.mark.timeout(1800)]
TOLERANCE = 2e-3
"""Of a sum over up to ten tokens in fp32 through 30 layers: kernels in C++ in the server, torch's here."""
QUESTIONS = [
    ("The capital of France is", ["Paris", "Berlin", "the colour blue", "seven"], 0),
    ("Water freezes at a temperature of", ["zero degrees Celsius", "ninety degrees", "a cat"], 0),
    ("Q: How many legs does a spider have?\nA:", ["two", "four", "eight", "one hundred"], 2),
    ("The opposite of hot is", ["warm", "cold", "table"], 1),
    ("Shakespeare wrote the play", ["Hamlet", "the telephone", "Oslo"], 0),
    ("2, 4, 6, 8,", ["10", "9", "banana"], 0),
]
DOCUMENTS = [{"question": question, "endings": endings, "label": label} for question, endings, label in QUESTIONS]


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def samples(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return recorded(server, tmp_path_factory.mktemp("lm_eval"), DOCUMENTS)


@pytest.fixture(scope="module")
def model(folder: Path) -> FrozenModel:
    return freeze(load_model(folder))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_log_likelihoods_and_accuracy_are_those_of_the_model(
    samples: Samples, model: FrozenModel, tokenizer: tokenizers.Tokenizer
) -> None:
    assert len(samples["tiny_choice"]) == len(QUESTIONS)
    for sample in samples["tiny_choice"]:
        question, endings = sample["doc"]["question"], sample["doc"]["endings"]
        prompt = tokenizer.encode(question).ids
        wholes = [tokenizer.encode(f"{question} {ending}").ids for ending in endings]
        assert all(whole[: len(prompt)] == prompt for whole in wholes)
        scores = [likelihood(model, prompt, whole[len(prompt) :]) for whole in wholes]
        for (value, is_greedy), [[given, given_greedy]] in zip(scores, sample["resps"], strict=True):
            assert float(given) == pytest.approx(value, abs=TOLERANCE)
            assert str(given_greedy) == str(is_greedy)
        best = max(range(len(endings)), key=lambda number: scores[number][0])
        assert sample["acc"] == float(best == sample["doc"]["label"])
    assert sum(sample["acc"] for sample in samples["tiny_choice"]) >= 3  # it knows more than chance does


def test_generations_are_the_greedy_ones(samples: Samples, model: FrozenModel, tokenizer: tokenizers.Tokenizer) -> None:
    assert len(samples["tiny_answer"]) == len(QUESTIONS)
    for sample in samples["tiny_answer"]:
        prompt = tokenizer.encode(sample["doc"]["question"]).ids
        tokens = greedy(model, prompt, num_tokens=12, ends=frozenset(model.config.eos_token_ids))
        assert sample["resps"] == [[tokenizer.decode(tokens).split("\n")[0]]]
