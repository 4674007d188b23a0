"""What docs/api.md says of sampling and stopping where servers differ, on a tiny model through a socket."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_model.batch import prefill
from dijiang_model.serving.network import FrozenModel
from dijiang_model.state import StateBuffer
from server.text.tokenizer import Tokenizer
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.tiny_engine import TinyEngine
from tests.tiny_models import tiny_network

PROMPT = list(b"One prompt.")


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return tiny_network()


@pytest.fixture(scope="module")
def server(
    model: FrozenModel, byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loopback]:
    engine = TinyEngine(model, str(tmp_path_factory.mktemp("model")))
    with serve(engine, OPTIONS, byte_tokenizer) as running:  # type: ignore[arg-type]
        yield running


def ask(server: Loopback, **fields: Any) -> dict[str, Any]:
    """One choice."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]  # type: ignore[no-any-return]


def next_logits(model: FrozenModel) -> Tensor:
    """[vocab] behind the prompt."""
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    with torch.inference_mode():
        logits = prefill(
            model,
            torch.tensor(PROMPT),
            lengths=[len(PROMPT)],
            slots=torch.tensor([1]),
            starts=torch.tensor([0]),
            state=state,
        )
    return logits[-1]


def penalised(logits: Tensor, penalty: float) -> Tensor:
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[PROMPT] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def test_a_bias_comes_before_the_penalties(server: Loopback, model: FrozenModel) -> None:
    logits = next_logits(model)
    told_apart = 0
    for token_id in sorted({*PROMPT}):
        for bias in (2.0, 4.0, 6.0, 8.0):
            biased = logits.clone()
            biased[token_id] += bias
            before = penalised(biased, 2.0).argmax().item()
            after = penalised(logits, 2.0)
            after[token_id] += bias
            if before != after.argmax().item():
                told_apart += 1
                choice = ask(server, logit_bias={str(token_id): bias}, repetition_penalty=2.0, max_tokens=1)
                assert choice["token_ids"] == [before]
    assert told_apart >= 3


@pytest.mark.parametrize("more", [{}, {"include_stop_str_in_output": True}, {"skip_special_tokens": False}], ids=str)
def test_a_stop_token_ends_the_answer_and_its_text_is_no_part_of_it(server: Loopback, more: dict[str, Any]) -> None:
    plain = ask(server)
    *before, stop = plain["token_ids"][:3]
    assert stop not in before
    stopped = ask(server, stop_token_ids=[stop], **more)
    assert (stopped["token_ids"], stopped["finish_reason"]) == ([*before, stop], "stop")
    assert stopped["text"] == ask(server, max_tokens=2, **more)["text"]


def test_a_bad_word_that_begins_in_the_prompt_is_not_caught(server: Loopback) -> None:
    first, second = ask(server)["token_ids"][:2]
    if max(first, second) > 126:
        pytest.fail("the model's first tokens must be ASCII here")
    assert ask(server, bad_words=[f".{chr(first)}"])["token_ids"][0] == first
    assert ask(server, bad_words=[chr(first)])["token_ids"][0] != first
    without = ask(server, bad_words=[chr(first) + chr(second)])["token_ids"]
    assert (without[0], without[1] == second) == (first, False)
