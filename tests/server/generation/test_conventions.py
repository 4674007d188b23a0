"""What docs/api.md says of sampling and stopping where servers differ, on a tiny model through a socket."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_model.serving.network import FrozenModel
from tests.read_at_once import logits_of
from tests.server.conftest import Loopback
from tests.server.generation.conftest import completed

PROMPT = list(b"One prompt.")


def ask(server: Loopback, **fields: Any) -> dict[str, Any]:
    """One choice."""
    return completed(server, **{"prompt": PROMPT, **fields})


def next_logits(model: FrozenModel) -> Tensor:
    """[vocab] behind the prompt."""
    return logits_of(model, PROMPT)[-1]


def penalised(logits: Tensor, penalty: float) -> Tensor:
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[PROMPT] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def test_a_bias_comes_before_the_penalties(tiny_server: Loopback, tiny_model: FrozenModel) -> None:
    logits = next_logits(tiny_model)
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
                choice = ask(tiny_server, logit_bias={str(token_id): bias}, repetition_penalty=2.0, max_tokens=1)
                assert choice["token_ids"] == [before]
    assert told_apart >= 3


@pytest.mark.parametrize("more", [{}, {"include_stop_str_in_output": True}, {"skip_special_tokens": False}], ids=str)
def test_a_stop_token_ends_the_answer_and_its_text_is_no_part_of_it(
    tiny_server: Loopback, more: dict[str, Any]
) -> None:
    plain = ask(tiny_server)
    *before, stop = plain["token_ids"][:3]
    assert stop not in before
    stopped = ask(tiny_server, stop_token_ids=[stop], **more)
    assert (stopped["token_ids"], stopped["finish_reason"]) == ([*before, stop], "stop")
    assert stopped["text"] == ask(tiny_server, max_tokens=2, **more)["text"]


def test_a_bad_word_that_begins_in_the_prompt_is_not_caught(tiny_server: Loopback) -> None:
    first, second = ask(tiny_server)["token_ids"][:2]
    if max(first, second) > 126:
        pytest.fail("the model's first tokens must be ASCII here")
    assert ask(tiny_server, bad_words=[f".{chr(first)}"])["token_ids"][0] == first
    assert ask(tiny_server, bad_words=[chr(first)])["token_ids"][0] != first
    without = ask(tiny_server, bad_words=[chr(first) + chr(second)])["token_ids"]
    assert (without[0], without[1] == second) == (first, False)
