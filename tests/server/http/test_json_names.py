"""Names that stand twice in an object: no answer has any; of a request's the last one counts, as with other servers."""

import json
from typing import Any

import pytest

from tests.server.conftest import Loopback

MESSAGES = [{"role": "user", "content": "x"}]
CHAT = {
    "messages": MESSAGES,
    "logprobs": True,
    "top_logprobs": 3,
    "n": 2,
    "return_token_ids": True,
    "prompt_logprobs": 2,
}
COMPLETION = {"prompt": ["x", "y"], "logprobs": 3, "echo": True, "prompt_logprobs": 2, "return_token_ids": True}
REQUESTS: list[tuple[str, dict[str, Any] | None]] = [
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, "stream": True}),
    ("/v1/responses", {"input": "x", "metadata": {"a": "b"}, "include": ["message.output_text.logprobs"]}),
    ("/v1/responses", {"input": "x", "metadata": {"a": "b"}, "stream": True}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5, "stream": True}),
    ("/v1/messages/count_tokens", {"messages": MESSAGES}),
    ("/v1/messages", {"messages": MESSAGES}),
    ("/api/chat", {"messages": MESSAGES}),
    ("/api/show", {}),
    ("/tokenize", {"prompt": "x" * 20_000, "return_token_strs": True}),
    ("/detokenize", {"tokens": [120] * 20_000, "return_token_texts": True}),
    ("/apply-template", {"messages": MESSAGES}),
    ("/v1/chat/completions", {"messages": 5}),
    *(
        (path, None)
        for path in ("/v1/models", "/v1/capacity", "/health", "/version", "/tokenizer_info", "/openapi.json")
    ),
    ("/v1/nothing", None),
]


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), names
    return dict(pairs)


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=str)
def test_no_answer_has_a_name_twice(server: Loopback, path: str, body: dict[str, Any] | None) -> None:
    answer = server.http.get(path) if body is None else server.http.post(path, json=body)
    texts = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith(("data: {", "{"))]
    assert texts
    for text in texts:
        json.loads(text, object_pairs_hook=once)


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "no", "max_tokens": 9, "max_tokens": 3, "prompt": "xy"}',
        '{"prompt": 5, "max_tokens": "x", "prompt": "xy", "max_tokens": 3}',
        '{"max_tok\\u0065ns": 9, "prompt": "xy", "max_tokens": 3}',
        '{"prompt": "xy", "stop": 9, "stop": null, "max_tokens": 3, "seed": "a", "seed": null}',
    ],
)
def test_of_a_name_that_stands_twice_in_a_request_the_last_one_counts(server: Loopback, body: str) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    submitted = server.engine.submitted[-1]
    assert (submitted.prompt_token_ids, submitted.sampling.max_tokens) == (tuple(b"xy"), 3)


def test_within_messages_too(server: Loopback) -> None:
    body = '{"messages": [{"role": "system", "content": "no", "role": "user", "content": "yes"}]}'
    answer = server.http.post("/apply-template", content=body, headers={"content-type": "application/json"})
    assert "no" not in answer.json()["prompt"]
    assert "yes" in answer.json()["prompt"]
