"""A running server and transformers say the same of one folder; so does lm-evaluation-harness."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.serving.network import freeze
from tests.compat.harness import greedy, likelihood
from tests.dijiang_model.hf.conftest import load
from tests.e2e.serving import Server, serving

PROMPT = "What is a river?"
TOLERANCE = 1e-4
"""Of a log-probability."""


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Serves a folder that `save_pretrained` has written."""
    out = tmp_path_factory.mktemp("saved") / "model"
    load(folders["llama with anchors"]).save_pretrained(out)
    AutoTokenizer.from_pretrained(folders["llama with anchors"]).save_pretrained(out)
    with serving(out) as running:
        yield running, out


def test_200_greedy_tokens_and_their_log_probabilities_are_the_servers(server: tuple[Server, Path]) -> None:
    running, folder = server
    model, prompt = load(folder), torch.tensor([list(PROMPT.encode())])
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = running.client.completions.create(
        model=running.model, prompt=PROMPT, max_tokens=200, temperature=0, logprobs=0, extra_body=extra
    )
    (choice,) = answer.choices
    found = model.generate(
        prompt, max_new_tokens=200, do_sample=False, eos_token_id=-1, output_logits=True, return_dict_in_generate=True
    )
    ids = found.sequences[0, prompt.shape[1] :]
    assert ids.tolist() == choice.model_extra["token_ids"]  # type: ignore[index]
    logprobs = torch.cat(found.logits).log_softmax(-1)[range(200), ids]
    assert choice.logprobs is not None
    torch.testing.assert_close(logprobs, torch.tensor(choice.logprobs.token_logprobs), atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("default")
def test_the_evaluation_harness_scores_as_the_model_does(folder: Path) -> None:
    models = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    harness = models.HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3)
    frozen = freeze(load_model(folder))
    pairs = [(f"Question {number}:", f" answer {'x' * number}") for number in range(7)]

    def requests(kind: str, arguments: list[tuple[object, ...]]) -> list[object]:
        return [instance.Instance(kind, {}, given, index) for index, given in enumerate(arguments)]

    scores = harness.loglikelihood(requests("loglikelihood", list(pairs)), disable_tqdm=True)
    for (prompt, ending), (score, is_greedy) in zip(pairs, scores, strict=True):
        expected, expected_greedy = likelihood(frozen, list(prompt.encode()), list(ending.encode()))
        assert (score, is_greedy) == (pytest.approx(expected, abs=TOLERANCE), expected_greedy)
    wanted = [(prompt, {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}) for prompt, _ in pairs]
    answers = harness.generate_until(requests("generate_until", list(wanted)), disable_tqdm=True)
    for (prompt, _), answer in zip(pairs, answers, strict=True):
        tokens = greedy(frozen, list(prompt.encode()), num_tokens=9, ends=frozenset({258}))
        text = bytes(token for token in tokens if token < 256).decode("utf-8", "replace")
        assert answer == text.split("\n")[0]
