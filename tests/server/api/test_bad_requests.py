"""Each bad request -> status, type, param and code, as the official client sees it; and the next one is right."""

import json
from typing import Any

import openai
import pytest

from tests.server.conftest import Loopback, raw_exchange
from tests.server.fake_engine import ANSWER

HUGE = 2**63


def error_of(server: Loopback, path: str, body: dict[str, Any]) -> openai.APIStatusError:
    """The exception that the official client raises for a body; the body goes out exactly as it is."""
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai.post(path, body=body, cast_to=object)
    return caught.value


def assert_still_right(server: Loopback) -> None:
    answer = server.openai.completions.create(model="org/tiny", prompt="x", max_tokens=3)
    assert answer.choices[0].text == ANSWER[:3]


COMPLETION_ERRORS = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [260]}, "prompt"),
    ({"prompt": [HUGE]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [[[1]]]}, "prompt"),
    ({"prompt": ["x"] * 9}, "prompt"),
    ({"prompt": ["x"] * 8, "n": 8}, "n"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 9}, "n"),
    ({"n": HUGE}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"logit_bias": {"260": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {"1": "5"}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(number): 0 for number in range(5000)}}, "logit_bias"),
    ({"stop_token_ids": [260]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 1000}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": HUGE}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"temperature": 1e308}, "temperature"),
    ({"temperature": -1e-320}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-320}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -1e308}, "frequency_penalty"),
    ({"seed": HUGE}, "seed"),
    ({"seed": -HUGE - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"timeout": 0}, "timeout"),
    ({"logprobs": 10**6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 20, "echo": True, "prompt": [[65] * 50_000], "max_tokens": 1}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"echo": True, "state_id": "state_0123"}, "state_id"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"logprobs": 0, "logprob_token_ids": [260]}, "logprob_token_ids"),
    ({"logprob_token_ids": [1] * 129}, "logprob_token_ids"),
    ({"suffix": "x"}, "suffix"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": "x" * 1_000_000}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "structural_tag": "x"}}, "structural_tag"),
    ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format"),
    ({"nvext": {"top_k": 3}}, "nvext.top_k"),
    ({"grammar_lazy": True}, "grammar_lazy"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"state_id": "../x"}, "state_id"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"grammar": 'root ::= "a"', "regex": "a"}, "regex"),
    ({"guided_json": {}, "guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "guided_json"),
    ({"guided_regex": {}, "guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "guided_choice"),
    ({"mirostat": 2}, "mirostat"),
    ({"repeat_penalty": 1.1}, "repeat_penalty"),
    ({"n_predict": 5}, "n_predict"),
    ({"xtc_probability": 0.5}, "xtc_probability"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETION_ERRORS, ids=lambda value: str(value)[:40])
def test_a_bad_completion_request_is_a_400_that_names_the_field(
    server: Loopback, fields: dict[str, Any], param: str
) -> None:
    body = fields if "prompt" in fields or not fields else {"prompt": "x", **fields}
    error = error_of(server, "/completions", body)
    assert isinstance(error, openai.BadRequestError)
    assert (error.type, error.param) == ("invalid_request_error", param)
    assert error.code in (None, "invalid_value", "unsupported_parameter", "states_unavailable")
    assert len(error.response.content) < 3000
    assert not server.engine.submitted


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT_ERRORS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "a king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        "messages[0].content",
    ),
    ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{**CALL, "type": "custom"}]}]},
        "messages[0].tool_calls[0].type",
    ),
    ({"messages": [{"role": "assistant", "content": "x", "function_call": {}}]}, "function_call"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"echo": True}, "echo"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 10**6}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"$ref": "http://x"}}},
        "response_format.json_schema",
    ),
    ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_ERRORS, ids=lambda value: str(value)[:40])
def test_a_bad_chat_request_is_a_400_that_names_the_field(server: Loopback, fields: dict[str, Any], param: str) -> None:
    body = fields if "messages" in fields or not fields else {"messages": [{"role": "user", "content": "x"}], **fields}
    error = error_of(server, "/chat/completions", body)
    assert isinstance(error, openai.BadRequestError)
    assert (error.type, error.param) == ("invalid_request_error", param)
    assert not server.engine.submitted


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": None, "echo": False, "best_of": 1, "suffix": None, "response_format": {"type": "text"}},
        {"user": "x\ny", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "no_such_field": [1]},
        {"mirostat": 0, "xtc_probability": 0.0, "grammar": "", "repeat_penalty": 1.0, "tfs_z": 1, "vllm_xargs": {}},
        {"temperature": None, "top_p": None, "n": None, "seed": None, "stop": None, "logit_bias": None, "stream": None},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(server: Loopback, fields: dict[str, Any]) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **fields})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("field", "instead"),
    [("n_predict", "max_tokens"), ("repeat_penalty", "repetition_penalty"), ("n_probs", "logprobs")],
)
def test_a_field_of_another_server_is_refused_with_its_name_here(server: Loopback, field: str, instead: str) -> None:
    error = error_of(server, "/chat/completions", {"messages": [{"role": "user", "content": "x"}], field: 5})
    assert (error.code, error.param) == ("unsupported_parameter", field)
    assert f"use `{instead}`" in error.message


def test_an_unknown_model_is_a_404(server: Loopback) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.completions.create(model="gpt-9\nforged", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "\n" not in caught.value.message.replace("\\n", "")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b"\xef\xbb\xbf{}",
        '{"prompt": "x"}'.encode("utf-16"),
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\x00b"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_no_json_object_is_a_400(server: Loopback, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.content) < 3000
    assert_still_right(server)


@pytest.mark.parametrize(("body", "words"), [(b"", "the body is missing"), (b"[]", "the body must be a JSON object")])
def test_what_a_body_must_be_is_told_in_words(server: Loopback, body: bytes, words: str) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.json()["error"]["message"] == words


def test_broken_json_is_told_with_its_place_and_no_field(server: Loopback) -> None:
    headers = {"content-type": "application/json"}
    error = server.http.post("/v1/completions", content=b'{"prompt": "x",}', headers=headers).json()["error"]
    assert (error["param"], error["code"]) == (None, None)
    assert "not valid JSON" in error["message"]
    assert "(at character 14)" in error["message"]


def test_a_small_body_cannot_provoke_a_huge_error(server: Loopback) -> None:
    body = {"messages": [{"role": 1, "content": {"x" * 1000: 1}, "name": 5}] * 9000, "stop_token_ids": ["x"] * 200}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.count(";") <= 10
    assert len(message) <= 2300


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_another_content_type_is_a_415(server: Loopback, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = server.http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_a_charset_is_no_other_content_type(server: Loopback) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    assert server.http.post("/v1/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "//v1/models", 404, "not_found"),
        ("GET", "/v1/../admin", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
    ],
)
def test_unknown_routes_and_methods_are_in_the_envelope(
    server: Loopback, method: str, path: str, status: int, code: str
) -> None:
    answer = server.http.request(method, f"{server.url}{path}", json={} if method == "POST" else None)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_ten_thousand_headers_are_a_431(server: Loopback) -> None:
    headers = b"".join(b"x-%d: y\r\n" % number for number in range(10_000))
    answer = raw_exchange(server, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n", headers, b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431")
    assert b"headers_too_large" in answer


def test_an_unreadable_request_line_closes_with_a_400(server: Loopback) -> None:
    assert raw_exchange(server, b"\x00\x01\x02\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_body_over_the_limit_is_a_413_announced_or_not(server: Loopback) -> None:
    limit = server.service.options.max_body_bytes
    big = b'{"prompt": "' + b"x" * limit + b'"}'
    headers = {"content-type": "application/json"}
    for content in (big, iter([big[: limit // 2], big[limit // 2 :]])):
        answer = server.http.post("/v1/completions", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert_still_right(server)
