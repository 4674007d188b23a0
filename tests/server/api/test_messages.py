"""`POST /v1/messages` over a real socket: what the model reads, blocks, events, stop reasons, errors, token counts."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.keys import hash_key
from server.text.tokenizer import Tokenizer
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.fake_engine import ANSWER, FakeEngine
from tests.server.tools.test_tools import CALL, SECOND, prompt_of, say

HELLO: list[Any] = [{"role": "user", "content": "Weather?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"name": "get_weather", "description": "Weather of a city", "input_schema": SCHEMA},
    {"type": "custom", "name": "get_time", "input_schema": {"type": "object"}},
]


def post(server: Loopback, **fields: Any) -> httpx.Response:
    body = {"model": "org/tiny", "max_tokens": 1000, "messages": HELLO, **fields}
    return server.http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream; the name of each event is its type."""
    told = []
    for block in answer.text.strip().split("\n\n"):
        name, _, data = block.partition("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told


def test_an_answer_is_a_message(server: Loopback) -> None:
    answer = post(server).json()
    assert answer["content"] == [{"type": "text", "text": ANSWER, "citations": []}]
    assert (answer["stop_details"], answer["container"]) == (None, None)
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "org/tiny")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["id"].startswith("msg_")
    usage = answer["usage"]
    assert usage.keys() >= {"cache_creation", "output_tokens_details", "server_tool_use", "service_tier"}
    assert (usage["output_tokens"], usage["cache_read_input_tokens"]) == (len(ANSWER.encode()) + 1, 0)
    count = server.http.post("/v1/messages/count_tokens", json={"model": "org/tiny", "messages": HELLO}).json()
    assert count == {"input_tokens": usage["input_tokens"]}


def test_stop_reasons_say_why(server: Loopback) -> None:
    cut = post(server, max_tokens=3).json()
    assert (cut["stop_reason"], cut["stop_sequence"], cut["content"][0]["text"]) == ("max_tokens", None, ANSWER[:3])
    stopped = post(server, stop_sequences=["never", " is"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " is")
    assert stopped["content"][0]["text"] == ANSWER.partition(" is")[0]


def test_calls_are_blocks(server: Loopback) -> None:
    say(server, f"Let me see.\n{CALL}\n{SECOND}")
    answer = post(server, tools=TOOLS).json()
    text, first, second = answer["content"]
    assert text == {"type": "text", "text": "Let me see.", "citations": []}
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "get_weather", {"city": "Oslo"})
    assert (second["name"], second["input"], answer["stop_reason"]) == ("get_time", {}, "tool_use")
    assert first["id"].startswith("toolu_")
    assert first["id"] != second["id"]


@pytest.mark.parametrize("text", ["", "Hi", f"Let me see.\n{CALL}\n{SECOND}", CALL])
def test_a_stream_says_what_the_whole_answer_does(server: Loopback, text: str) -> None:
    say(server, text)
    whole = post(server, tools=TOOLS).json()
    told = events(post(server, tools=TOOLS, stream=True))
    assert [told[0]["type"], told[1]["type"]] == ["message_start", "ping"]
    assert [told[-2]["type"], told[-1]["type"]] == ["message_delta", "message_stop"]
    assert told[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in told[2:-2]:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"] | {"json": ""})
                is_open = True
            case "content_block_delta":
                assert is_open
                assert event["index"] == len(blocks) - 1
                blocks[-1]["text"] = blocks[-1].get("text", "") + event["delta"].get("text", "")
                blocks[-1]["json"] += event["delta"].get("partial_json", "")
            case "content_block_stop":
                is_open = False
    assert not is_open
    assert [block["type"] for block in blocks] == [block["type"] for block in whole["content"]]
    for block, expected in zip(blocks, whole["content"], strict=True):
        if block["type"] == "text":
            assert block["text"] == expected["text"]
        else:
            assert (block["name"], json.loads(block["json"])) == (expected["name"], expected["input"])
    assert told[-2]["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    assert told[-2]["usage"] == whole["usage"]


def test_the_model_reads_system_tools_results_and_thoughts(server: Loopback) -> None:
    say(server, "It is cold.")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "cold"}]},
                {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    answer = post(server, messages=messages, system=[{"type": "text", "text": "Be brief."}], tools=TOOLS)
    assert answer.status_code == 200
    read = prompt_of(server)
    places = [read.index(text) for text in ("Be brief.", "Weather?", "Let me see.", "Oslo", "cold", "So?")]
    assert places == sorted(places)


def test_a_last_message_of_the_assistant_is_continued(server: Loopback) -> None:
    post(server, messages=[*HELLO, {"role": "assistant", "content": "It is <"}])
    assert prompt_of(server).endswith("It is <")


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"model": "claude"}, 404, "not_found_error"),
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error"),
        ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error"),
        ({"temperature": 9}, 400, "invalid_request_error"),
    ],
    ids=str,
)
def test_errors_have_the_dialects_envelope(server: Loopback, fields: dict[str, Any], status: int, kind: str) -> None:
    answer = post(server, **fields)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["error"].keys() == {"type", "message"}


def test_an_error_after_the_200_is_an_event(server: Loopback) -> None:
    server.engine.fail_after = 3
    *_, last = events(post(server, stream=True))
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")


def test_keys_come_in_the_header_of_the_dialect(byte_tokenizer: Tokenizer) -> None:
    with serve(FakeEngine(), replace(OPTIONS, key_hashes=frozenset({hash_key(b"k")})), byte_tokenizer) as server:
        body = {"max_tokens": 1, "messages": HELLO}
        for header, status in (({}, 401), ({"x-api-key": "k"}, 200), ({"x-api-key": "no"}, 401)):
            answer = server.http.post("/v1/messages", json=body, headers=header)
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["type"] == "authentication_error"


def test_thinking_is_a_block(byte_tokenizer: Tokenizer) -> None:
    with serve(FakeEngine(), replace(OPTIONS, reasoning_parser="think"), byte_tokenizer) as server:
        say(server, "<think>Hm, 4.</think>It is 4.")
        thought, text = post(server).json()["content"]
        assert (thought["type"], thought["thinking"], text["text"]) == ("thinking", "Hm, 4.", "It is 4.")
        kinds = [
            event["content_block"]["type"] for event in events(post(server, stream=True)) if "content_block" in event
        ]
        assert kinds == ["thinking", "text"]
