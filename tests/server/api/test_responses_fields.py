"""Fields of the Responses API: null is the default everywhere, and what is named has its effect or is refused."""

from typing import Any

import pytest

from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.responses import ResponseRequest
from server.protocol.tokenization import ApplyTemplateRequest, TokenizeRequest
from tests.server.conftest import Loopback
from tests.server.fake_engine import ANSWER

CHAT: list[Any] = [{"role": "user", "content": "x"}]
REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/responses": (ResponseRequest, {"input": "x"}),
    "/v1/chat/completions": (ChatRequest, {"messages": CHAT}),
    "/v1/completions": (CompletionRequest, {"prompt": "x"}),
    "/tokenize": (TokenizeRequest, {"messages": CHAT}),
    "/apply-template": (ApplyTemplateRequest, {"messages": CHAT}),
}


@pytest.mark.parametrize("path", REQUESTS)
def test_null_is_the_default_of_every_field(server: Loopback, path: str) -> None:
    model, body = REQUESTS[path]
    for name in model.model_fields.keys() - body.keys():
        answer = server.http.post(path, json={**body, name: None})
        assert answer.status_code == 200, (name, answer.text)


def respond(server: Loopback, **fields: Any) -> Any:
    return server.http.post("/v1/responses", json={"input": "x", "store": False, **fields})


def test_sampling_fields_have_their_effect(server: Loopback) -> None:
    fields = {"top_k": 3, "min_p": 0.5, "seed": 7, "presence_penalty": 1, "frequency_penalty": 2, "ignore_eos": True}
    fields |= {"stop_token_ids": [4], "logit_bias": {"5": -1}, "min_tokens": 2, "temperature": 0.5, "top_p": 0.25}
    answer = respond(server, **fields, stop=" is", max_output_tokens=40).json()
    sampling = server.engine.submitted[-1].sampling
    for name in fields.keys() - {"stop_token_ids", "logit_bias"}:
        assert getattr(sampling, name) == fields[name]
    assert (sampling.stop_token_ids, sampling.logit_bias) == ((4,), ((5, -1.0),))
    assert answer["output"][0]["content"][0]["text"] == ANSWER.partition(" is")[0]
    assert (answer["presence_penalty"], answer["frequency_penalty"], answer["temperature"]) == (1, 2, 0.5)


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("max_tokens", 5, "max_output_tokens"),
        ("max_completion_tokens", 5, "max_output_tokens"),
        ("max_new_tokens", 5, "max_output_tokens"),
        ("response_format", {"type": "json_object"}, "text.format"),
        ("messages", CHAT, "input"),
        ("reasoning_effort", "low", "reasoning"),
        ("state_id", "state_1", "previous_response_id"),
        ("logprobs", True, "include"),
        ("n", 2, ""),
        ("echo", True, ""),
        ("best_of", 2, ""),
    ],
)
def test_what_has_another_name_here_is_refused_with_it(server: Loopback, field: str, value: Any, instead: str) -> None:
    answer = respond(server, **{field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, field, "unsupported_parameter")
    assert not instead or f"`{instead}`" in error["message"]


def test_values_that_ask_for_nothing_are_taken(server: Loopback) -> None:
    assert respond(server, n=1, logprobs=False, echo=False, return_state=False, best_of=1).status_code == 200


def test_a_response_has_every_field_of_the_schema(server: Loopback) -> None:
    names = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}
    answer = respond(server, **names, service_tier="auto", metadata={"a": "b"}).json()
    assert {name: answer[name] for name in names} == names
    assert (answer["service_tier"], answer["presence_penalty"], answer["frequency_penalty"]) == ("default", 0, 0)
    assert answer["metadata"] == {"a": "b"}


def test_errors_name_fields_as_this_api_does(server: Loopback) -> None:
    answer = respond(server, input=[{"type": "reasoning", "summary": []}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    answer = respond(server, stop_token_ids=[10**6])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop_token_ids")


def test_the_bad_key_of_a_bias_is_named(server: Loopback) -> None:
    for bias in ({"fifty": 1}, {"5": 101}, {"-1": 0}):
        error = respond(server, logit_bias=bias).json()["error"]
        assert error["param"] == "logit_bias"
        assert repr(next(iter(bias))) in error["message"]
