"""`n` answers through the whole service, on a tiny model: those of separate requests, for the price of one prefill."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.text.tokenizer import Tokenizer
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.tiny_engine import TinyEngine
from tests.tiny_models import tiny_network

PROMPT = "One prompt, many answers. " * 6


@pytest.fixture(scope="module")
def server(byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    engine = TinyEngine(tiny_network(), str(tmp_path_factory.mktemp("model")), max_num_slots=4)
    with serve(engine, OPTIONS, byte_tokenizer) as running:  # type: ignore[arg-type]
        yield running


def ask(server: Loopback, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 10, "ignore_eos": True, "return_token_ids": True, "seed": 7, **fields}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


@pytest.mark.parametrize("num", [2, 4, 7])
def test_answers_are_those_of_requests_with_the_following_seeds(server: Loopback, num: int) -> None:
    together = ask(server, n=num)
    alone = [ask(server, seed=7 + number)["choices"][0]["token_ids"] for number in range(num)]
    assert [choice["token_ids"] for choice in together["choices"]] == alone
    assert [choice["index"] for choice in together["choices"]] == list(range(num))
    assert together["usage"]["prompt_tokens"] == len(PROMPT)
    assert together["usage"]["completion_tokens"] == 10 * num
    assert together["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_prompt_is_computed_once(server: Loopback) -> None:
    engine = server.engine.engine  # type: ignore[attr-defined]
    before = engine.stats.num_prefill_tokens
    ask(server, n=4)
    assert engine.stats.num_prefill_tokens - before == len(PROMPT) - 1 + 4


def test_each_answer_ends_by_itself(server: Loopback) -> None:
    plain = [choice["text"] for choice in ask(server, n=3, max_tokens=30)["choices"]]
    stop = plain[1][12]
    stopped = ask(server, n=3, max_tokens=30, stop=[stop])["choices"]
    assert [choice["text"] for choice in stopped] == [text.split(stop)[0] for text in plain]
    reasons = ["stop" if stop in text else "length" for text in plain]
    assert [choice["finish_reason"] for choice in stopped] == reasons
    server.wait_until(lambda: server.engine.engine.stats.num_free_slots == 4)  # type: ignore[attr-defined]


def test_two_prompts_share_nothing_with_each_other(server: Loopback) -> None:
    both = ask(server, prompt=[PROMPT, PROMPT[::-1]], n=2)["choices"]
    first, second = ask(server, n=2)["choices"], ask(server, prompt=PROMPT[::-1], n=2, seed=9)["choices"]
    assert [choice["token_ids"] for choice in both] == [choice["token_ids"] for choice in first + second]


SCORED: list[dict[str, Any]] = [
    {"echo": True, "logprobs": 2},
    {"prompt_logprobs": 1},
    {"prompt_logprobs": 0, "echo": True, "logprobs": 1, "logprob_token_ids": [3, 3]},
    {"echo": True, "logprobs": 0, "max_tokens": 0},
]


@pytest.mark.parametrize("fields", SCORED)
def test_a_scored_prompt_is_computed_once_and_told_in_every_answer(server: Loopback, fields: dict[str, Any]) -> None:
    engine = server.engine.engine  # type: ignore[attr-defined]
    before = engine.stats.num_prefill_tokens
    together = ask(server, n=3, **fields)["choices"]
    assert engine.stats.num_prefill_tokens - before == len(PROMPT) - 1 + 3
    for number, choice in enumerate(together):
        alone = ask(server, seed=7 + number, **fields)["choices"][0]
        assert (choice["text"], choice["token_ids"]) == (alone["text"], alone["token_ids"])
        for name in ("logprobs", "prompt_logprobs"):
            assert near(choice.get(name), alone.get(name))


def near(left: Any, right: Any) -> bool:
    """Equal but for the rounding of a prompt that is cut into other chunks."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(near(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(near, left, right))
    return bool(left == (pytest.approx(right, abs=1e-5) if isinstance(left, float) else right))


@pytest.mark.parametrize("prompt", [PROMPT, "x", [PROMPT, "ab"]])
def test_streams_of_scored_prompts_say_the_same(server: Loopback, prompt: Any) -> None:
    fields = {"prompt": prompt, "n": 2, "echo": True, "logprobs": 1}
    whole = ask(server, **fields)["choices"]
    body = {"max_tokens": 10, "ignore_eos": True, "seed": 7, **fields, "stream": True}
    lines = server.http.post("/v1/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    for choice in whole:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert near([value for chunk in mine if chunk["logprobs"] for value in chunk["logprobs"][name]], values)
