"""Log-probabilities on the wire, of a real tiny model, against what the model itself computes."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from dijiang_model.serving.network import FrozenModel
from server.text.tokenizer import Tokenizer
from tests.read_at_once import log_probabilities
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.generation.conftest import completed
from tests.server.tiny_engine import TinyEngine

TOLERANCE = 2e-5
"""Between prompts in chunks of 16 tokens and at once: roundings of fp32 sums."""
PROMPT = "naïve 東京, twice: naïve 東京."


def complete(server: Loopback, **fields: Any) -> dict[str, Any]:
    """One choice of a completion."""
    return completed(server, **{"prompt": PROMPT, **fields})


def events(tiny_server: Loopback, path: str, **body: Any) -> list[dict[str, Any]]:
    with tiny_server.http.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def token_text(token_id: int) -> str:
    return bytes([token_id]).decode("utf-8", "replace") if token_id < 256 else "special"


def test_a_completion_carries_parallel_lists(tiny_server: Loopback, tiny_model: FrozenModel) -> None:
    choice = complete(tiny_server, logprobs=3)
    tokens, logprobs = choice["token_ids"], choice["logprobs"]
    expected = log_probabilities(tiny_model, [*PROMPT.encode(), *tokens])[len(PROMPT.encode()) - 1 : -1]
    assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert all(len(values) == 8 for values in logprobs.values())
    for token_id, text, value, top, row in zip(
        tokens, logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], expected, strict=True
    ):
        assert value == pytest.approx(row[token_id].item(), abs=TOLERANCE)
        assert text == token_text(token_id) or token_id > 255
        assert top[text] == value or top[text] > value  # bytes that are no character look alike
        assert max(top.values()) == pytest.approx(row.max().item(), abs=TOLERANCE)
        assert len(top) <= 4


def test_the_sampled_token_is_always_in_its_dictionary_bit_for_bit(tiny_server: Loopback) -> None:
    choice = complete(tiny_server, logprobs=2, temperature=2, seed=5, max_tokens=40, return_tokens_as_token_ids=True)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    for text, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[text] == value
        assert 2 <= len(top) <= 3
    assert any(len(top) == 3 for top in logprobs["top_logprobs"])


def test_zero_means_the_sampled_token_alone(tiny_server: Loopback) -> None:
    logprobs = complete(tiny_server, logprobs=0, return_tokens_as_token_ids=True)["logprobs"]
    for text, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top == {text: value}
    assert complete(tiny_server)["logprobs"] is None


def test_an_echo_begins_with_the_prompt_and_its_first_token_has_no_value(
    tiny_server: Loopback, tiny_model: FrozenModel
) -> None:
    choice = complete(tiny_server, echo=True, logprobs=1)
    prompt = list(PROMPT.encode())
    assert choice["text"].startswith(PROMPT)
    logprobs, tokens = choice["logprobs"], [*prompt, *choice["token_ids"]]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    expected = log_probabilities(tiny_model, tokens)
    assert len(logprobs["tokens"]) == len(tokens)
    for place in range(1, len(tokens)):
        value = expected[place - 1, tokens[place]].item()
        assert logprobs["token_logprobs"][place] == pytest.approx(value, abs=TOLERANCE)
    for place, offset in enumerate(logprobs["text_offset"]):
        assert offset == len(bytes(tokens[:place]).decode("utf-8", "ignore")) or place > len(prompt)


def test_an_echo_of_nothing_but_the_prompt(tiny_server: Loopback) -> None:
    choice = complete(tiny_server, echo=True, logprobs=1, max_tokens=0)
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == (PROMPT, "length", [])
    assert len(choice["logprobs"]["tokens"]) == len(PROMPT.encode())
    assert complete(tiny_server, echo=True, max_tokens=0)["logprobs"] is None
    one = complete(tiny_server, echo=True, logprobs=0, max_tokens=0, prompt="x")
    assert one["logprobs"] == {"tokens": ["x"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}


def test_an_echo_looks_for_no_stop_string_in_the_prompt(tiny_server: Loopback) -> None:
    plain = complete(tiny_server)
    choice = complete(tiny_server, echo=True, stop=["naïve"])
    assert choice["text"] == PROMPT + plain["text"]


def test_a_prompt_is_scored_by_token_id_with_ranks(tiny_server: Loopback, tiny_model: FrozenModel) -> None:
    prompt = list(PROMPT.encode())
    choice = complete(tiny_server, prompt_logprobs=2, max_tokens=1)
    expected = log_probabilities(tiny_model, prompt)
    assert len(choice["prompt_logprobs"]) == len(prompt)
    assert choice["prompt_logprobs"][0] is None
    for place, entries in enumerate(choice["prompt_logprobs"][1:], start=1):
        own = entries[str(prompt[place])]
        row = expected[place - 1]
        assert own["logprob"] == pytest.approx(row[prompt[place]].item(), abs=TOLERANCE)
        assert abs(own["rank"] - 1 - int((row > row[prompt[place]]).sum())) <= 1
        assert own["decoded_token"] == token_text(prompt[place])
        assert sorted(entry["rank"] for entry in entries.values())[:2] == [1, 2]
        assert len(entries) <= 3


def test_named_tokens_stand_in_place_of_the_most_likely_ones(tiny_server: Loopback, tiny_model: FrozenModel) -> None:
    plain = complete(tiny_server, max_tokens=2)
    first, second = plain["token_ids"]
    named = [65, second, 65, 66]
    fields: dict[str, Any] = {"logprob_token_ids": named, "max_tokens": 2, "return_tokens_as_token_ids": True}
    expected = log_probabilities(tiny_model, [*PROMPT.encode(), first])[-2:]
    shown = [[first, 65, second, 66], [second, 65, 66]]  # the token itself, then the others, each once
    for num_top in (0, 3):
        tops = complete(tiny_server, **fields, logprobs=num_top)["logprobs"]["top_logprobs"]
        for place, tokens in enumerate(shown):
            values = {f"token_id:{token_id}": expected[place, token_id].item() for token_id in tokens}
            assert list(tops[place]) == list(values)
            assert tops[place] == pytest.approx(values, abs=TOLERANCE)


def test_named_tokens_of_a_chat_and_of_an_echo(tiny_server: Loopback) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    body |= {"logprob_token_ids": [65, 66], "return_tokens_as_token_ids": True, "logprobs": True}
    answer = tiny_server.http.post("/v1/chat/completions", json={**body, "top_logprobs": 5}).json()
    for entry in answer["choices"][0]["logprobs"]["content"]:
        itself, *others = entry["top_logprobs"]
        assert (itself["token"], itself["logprob"]) == (entry["token"], entry["logprob"])
        assert {"token_id:65", "token_id:66"} <= {other["token"] for other in others} | {itself["token"]}
        assert len(others) <= 2
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True, "max_tokens": 1}
    tops = complete(tiny_server, **fields, logprob_token_ids=[65, 66])["logprobs"]["top_logprobs"]
    plain = complete(tiny_server, **fields)["logprobs"]["top_logprobs"]
    assert tops[:-1] == plain[:-1]
    assert {"token_id:65", "token_id:66"} <= tops[-1].keys() <= {"token_id:65", "token_id:66", *plain[-1]}


@pytest.mark.parametrize("fields", [{}, {"logprobs": None}, {"logprobs": 1, "echo": True, "max_tokens": 0}], ids=str)
def test_named_tokens_need_an_answer_with_log_probabilities(tiny_server: Loopback, fields: dict[str, Any]) -> None:
    body = {"prompt": "x", "logprob_token_ids": [65], **fields}
    answer = tiny_server.http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprob_token_ids")


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 2},
        {"logprobs": 2, "echo": True},
        {"logprobs": 0, "echo": True, "max_tokens": 0},
        {"echo": True},
        {"prompt_logprobs": 1, "logprobs": 4, "echo": True, "n": 2, "seed": 3, "temperature": 1.5},
        {"logprobs": 1, "stop": ["\ufffd\ufffd"], "temperature": 1, "seed": 1, "max_tokens": 60},
        {"logprobs": 1, "echo": True, "prompt": [list("東京".encode())[:4], [7]]},
    ],
)
def test_a_stream_carries_exactly_what_the_whole_answer_does(tiny_server: Loopback, fields: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    whole = tiny_server.http.post("/v1/completions", json=body).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events(tiny_server, "/v1/completions", **body)]
    for choice in whole:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        assert [chunk["finish_reason"] for chunk in mine if chunk["finish_reason"]] == [choice["finish_reason"]]
        streamed: dict[str, list[Any]] = {}
        for chunk in mine:
            for name, values in (chunk["logprobs"] or {}).items():
                streamed.setdefault(name, []).extend(values)
        assert streamed == (choice["logprobs"] or {})
        prompt = [entry for chunk in mine for entry in chunk.get("prompt_logprobs", [])]
        assert prompt == choice.get("prompt_logprobs", [])


def test_a_chat_answer_carries_its_tokens(tiny_server: Loopback, tiny_model: FrozenModel) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = tiny_server.http.post(
        "/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 0}
    ).json()
    choice, prompt = answer["choices"][0], answer["prompt_token_ids"]
    expected = log_probabilities(tiny_model, [*prompt, *choice["token_ids"]])
    assert choice["logprobs"]["refusal"] is None
    for place, entry in enumerate(choice["logprobs"]["content"]):
        row, token_id = expected[len(prompt) - 1 + place], choice["token_ids"][place]
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] == pytest.approx(row[token_id].item(), abs=TOLERANCE)
        assert entry["bytes"] == [token_id] or token_id > 255
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(
            row.topk(2).values.tolist(), abs=TOLERANCE
        )
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
    assert len(answer["prompt_logprobs"]) == len(prompt)
    bare = tiny_server.http.post("/v1/chat/completions", json={**body, "logprobs": True}).json()["choices"][0]
    assert [entry["top_logprobs"] for entry in bare["logprobs"]["content"]] == [[]] * 6


def test_a_streamed_chat_answer_carries_the_same(tiny_server: Loopback) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 20,
        "temperature": 1,
        "seed": 11,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 3,
        "prompt_logprobs": 1,
    }
    whole = tiny_server.http.post("/v1/chat/completions", json=body).json()
    chunks = events(tiny_server, "/v1/chat/completions", **body)
    for choice in whole["choices"]:
        mine = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        content = [entry for part in mine if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert content == choice["logprobs"]["content"]
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]
    prompt = [entry for chunk in chunks for entry in chunk.get("prompt_logprobs", [])]
    assert prompt == whole["prompt_logprobs"]


def test_the_official_client_reads_both_forms(tiny_server: Loopback) -> None:
    completion = tiny_server.openai.completions.create(
        model="org/tiny", prompt="Hello", max_tokens=3, logprobs=2, echo=True, temperature=0
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[:5] == list("Hello")
    chat = tiny_server.openai.chat.completions.create(
        model="org/tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in chat.choices[0].logprobs.content] == [2, 2, 2]


def test_a_long_prompt_is_scored_in_a_stream_of_many_chunks(tiny_server: Loopback, tiny_model: FrozenModel) -> None:
    prompt = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    chunks = events(tiny_server, "/v1/completions", prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    values = [value for chunk in chunks for value in (chunk["choices"][0]["logprobs"] or {}).get("token_logprobs", [])]
    expected = log_probabilities(tiny_model, prompt)[torch.arange(999), prompt[1:]]
    assert len(chunks) > 50
    torch.testing.assert_close(torch.tensor(values[1:]), expected, atol=TOLERANCE, rtol=0)


def test_too_many_for_one_answer_are_refused_before_anything_runs(tiny_server: Loopback) -> None:
    body = {"prompt": [65] * 60_000, "prompt_logprobs": 20, "max_tokens": 1}
    with pytest.raises(openai.BadRequestError) as caught:
        tiny_server.openai.post("/completions", cast_to=object, body=body)
    assert caught.value.param == "logprobs"
    assert "stream" in caught.value.message


def test_one_prefill_of_scored_prompts_uses_no_cached_prefix(
    tiny_model: FrozenModel, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    engine = TinyEngine(tiny_model, str(tmp_path), prefix_cache_host_bytes=1 << 24)
    with serve(engine, OPTIONS, byte_tokenizer) as tiny_server:  # type: ignore[arg-type]
        first = complete(tiny_server, prompt=PROMPT * 3, echo=True, logprobs=0)
        again = complete(tiny_server, prompt=PROMPT * 3, echo=True, logprobs=0)
    assert first["logprobs"]["tokens"] == again["logprobs"]["tokens"]
    assert first["logprobs"]["token_logprobs"][1:] == pytest.approx(
        again["logprobs"]["token_logprobs"][1:], abs=TOLERANCE
    )


def test_a_stream_can_be_read_by_clients_that_break_lines_at_any_line_break(tiny_server: Loopback) -> None:
    text = "a\x85b\u2028c\u2029d\ne"
    body = {"prompt": text, "echo": True, "max_tokens": 0, "stream": True}
    answer = tiny_server.http.post("/v1/completions", json=body)
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
