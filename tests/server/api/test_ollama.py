"""`/api/`, Ollama's dialect, over a real socket."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.text.tokenizer import Tokenizer
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.fake_engine import ANSWER, FakeEngine
from tests.server.tools.test_tools import CALL, SECOND, TIME, WEATHER, prompt_of, say

HELLO: list[Any] = [{"role": "user", "content": "Weather?"}]


def post(server: Loopback, path: str, **fields: Any) -> httpx.Response:
    return server.http.post(f"/api/{path}", json={"model": "org/tiny:latest", **fields})


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines() if line]


def test_a_chat_comes_whole_or_line_by_line(server: Loopback) -> None:
    whole = post(server, "chat", messages=HELLO, stream=False).json()
    assert whole["message"] == {"role": "assistant", "content": ANSWER}
    assert (whole["done"], whole["done_reason"], whole["model"]) == (True, "stop", "org/tiny")
    assert whole["eval_count"] == len(ANSWER.encode()) + 1
    *told, last = lines(post(server, "chat", messages=HELLO))
    assert "".join(line["message"]["content"] for line in told) == ANSWER
    assert not any(line["done"] for line in told)
    assert (last["done"], last["eval_count"], last["prompt_eval_count"]) == (
        True,
        whole["eval_count"],
        whole["prompt_eval_count"],
    )


def test_a_text_is_answered_or_continued(server: Loopback) -> None:
    assert post(server, "generate", prompt="x", system="Be brief.", stream=False).json()["response"] == ANSWER
    assert "Be brief." in prompt_of(server)
    post(server, "generate", prompt="x", raw=True, stream=False)
    assert prompt_of(server) == "x"
    assert "".join(line["response"] for line in lines(post(server, "generate", prompt="x"))) == ANSWER


def test_options_have_their_effect(server: Loopback) -> None:
    options = {"temperature": 0.5, "top_k": 3, "seed": 7, "num_predict": 4, "repeat_penalty": 1.5, "num_ctx": 4096}
    answer = post(server, "chat", messages=HELLO, stream=False, options=options).json()
    assert (answer["message"]["content"], answer["done_reason"]) == (ANSWER[:4], "length")
    sampling = server.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.repetition_penalty) == (0.5, 3, 7, 1.5)
    post(server, "chat", messages=HELLO, stream=False, options={"num_predict": -1, "stop": " is"})
    assert server.engine.submitted[-1].sampling.max_tokens is None


def test_calls_come_whole_and_their_results_are_read(server: Loopback) -> None:
    say(server, CALL + SECOND)
    expected = [
        {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "get_time", "arguments": {}}},
    ]
    whole = post(server, "chat", messages=HELLO, tools=[WEATHER, TIME], stream=False).json()
    assert whole["message"]["tool_calls"] == expected
    *_, last = lines(post(server, "chat", messages=HELLO, tools=[WEATHER, TIME]))
    assert last["message"]["tool_calls"] == expected
    results = [{"role": "tool", "tool_name": "get_time", "content": "noon"}, {"role": "tool", "content": "cold"}]
    messages = [*HELLO, whole["message"], *results]
    assert post(server, "chat", messages=messages, tools=[WEATHER, TIME], stream=False).status_code == 200
    assert prompt_of(server).index("noon") < prompt_of(server).index("cold")


def test_thoughts_are_split_out(byte_tokenizer: Tokenizer) -> None:
    with serve(FakeEngine(), replace(OPTIONS, reasoning_parser="think"), byte_tokenizer) as server:
        say(server, "<think>Hm</think>It is 4.")
        message = post(server, "chat", messages=HELLO, stream=False).json()["message"]
        assert (message["thinking"], message["content"]) == ("Hm", "It is 4.")


def test_the_model_is_listed_and_described(server: Loopback) -> None:
    assert [model["name"] for model in server.http.get("/api/tags").json()["models"]] == ["org/tiny"]
    assert server.http.get("/api/version").json() == {"version": "1.2.3"}
    shown = post(server, "show").json()
    assert shown["capabilities"] == ["completion", "tools"]
    assert shown["model_info"]["dijiang.context_length"] == 1 << 20
    loaded = post(server, "generate").json()
    assert (loaded["done"], loaded["done_reason"], loaded["response"]) == (True, "load", "")
    assert post(server, "chat", messages=[]).json()["done_reason"] == "load"


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("chat", {"model": "llama3", "messages": HELLO}, 404),
        ("show", {"model": "llama3"}, 404),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aa"]}]}, 400),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, 400),
        ("chat", {"messages": 5}, 400),
        ("chat", {"messages": HELLO, "options": {"mirostat": 2}}, 400),
        ("chat", {"messages": HELLO, "options": {"temperature": 9}}, 400),
        ("generate", {"prompt": "x", "suffix": "y"}, 400),
    ],
    ids=str,
)
def test_errors_have_the_dialects_envelope(server: Loopback, path: str, fields: dict[str, Any], status: int) -> None:
    answer = post(server, path, **fields)
    assert (answer.status_code, [*answer.json()]) == (status, ["error"])
    assert isinstance(answer.json()["error"], str)


def test_an_error_after_the_200_is_a_line(server: Loopback) -> None:
    server.engine.fail_after = 3
    assert lines(post(server, "chat", messages=HELLO))[-1].keys() == {"error"}


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_is_json_whatever_its_type_as_with_ollamas_curl_commands(server: Loopback, kind: str | None) -> None:
    body = json.dumps({"model": "org/tiny", "messages": HELLO, "stream": False})
    headers = {} if kind is None else {"content-type": kind}
    answer = server.http.post("/api/chat", content=body, headers=headers)
    assert answer.json()["message"]["content"] == ANSWER
    from_page = server.http.post("/api/chat", content=body, headers={**headers, "origin": "https://evil.example"})
    assert (from_page.status_code, "content type" in from_page.json()["error"]) == (415, True)
