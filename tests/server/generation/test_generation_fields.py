"""Fields that shape an answer: each reaches the engine, or does what it says."""

from dataclasses import asdict, replace
from typing import Any

import openai
import pytest

from dijiang_model.checkpoints.default_sampling import DefaultSampling
from server.generation.sampling import bad_word_tokens
from server.options import ServiceOptions
from server.text.tokenizer import Tokenizer
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine


def submitted(server: Loopback, **fields: Any) -> list[Any]:
    """What the engine gets of a completion request."""
    answer = server.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1, **fields})
    assert answer.status_code == 200, answer.text
    return server.engine.submitted


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"typical_p": 0.5}, {"typical_p": 0.5}),
        ({"typical_p": None}, {"typical_p": 1.0}),
        ({"allowed_token_ids": [9, 7, 9]}, {"allowed_token_ids": (7, 9)}),
        ({"bad_words": ["a", "xy"]}, {"bad_words": ((97,), (120, 121))}),
        ({"bad_words": []}, {"bad_words": ()}),
        ({}, {"typical_p": 1.0, "allowed_token_ids": (), "bad_words": ()}),
    ],
)
def test_sampling_fields_reach_the_engine(server: Loopback, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    sampling = submitted(server, **fields)[0].sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_a_priority_reaches_the_engine(server: Loopback) -> None:
    assert submitted(server, priority=-3)[0].priority == -3
    assert submitted(server)[1].priority == 0


def test_answers_to_one_prompt_share_its_prefill(server: Loopback) -> None:
    requests = submitted(server, prompt=["ab", "cd"], n=3)
    groups = [request.group for request in requests]
    assert groups[:3] == [groups[0]] * 3
    assert groups[3:] == [groups[3]] * 3
    assert groups[0] != groups[3]


def test_single_answers_share_nothing_and_scored_prompts_their_prompt(server: Loopback) -> None:
    assert [request.group for request in submitted(server)] == [None]
    first, second = [request.group for request in submitted(server, n=2, prompt_logprobs=0)][1:]
    assert first is not None
    assert first == second


def test_the_prompt_is_cut_to_its_last_tokens(server: Loopback) -> None:
    assert submitted(server, prompt="abcdef", truncate_prompt_tokens=2)[0].prompt_token_ids == tuple(b"ef")


def test_a_request_id_is_part_of_the_answer_and_names_one_request_at_a_time(server: Loopback) -> None:
    body = {"prompt": "abc", "request_id": "job-7:a.b", "max_tokens": 1}
    assert server.http.post("/v1/completions", json=body).json()["id"] == "cmpl-job-7:a.b"
    chat = {"messages": [{"role": "user", "content": "x"}], "request_id": "job-8", "max_tokens": 1}
    assert server.http.post("/v1/chat/completions", json=chat).json()["id"] == "chatcmpl-job-8"
    assert [request.request_id for request in server.engine.submitted] == ["job-7:a.b-0", "job-8-0"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"typical_p": 1.1}, "typical_p"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [260]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1.5]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": [5], "response_format": {"type": "json_object"}}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["x" * 257]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"bad_words": "x"}, "bad_words"),
        ({"priority": 2**31}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"request_id": "two\nlines"}, "request_id"),
        ({"request_id": "x" * 65}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_what_a_field_cannot_mean_is_refused_by_name(server: Loopback, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.post("/completions", cast_to=object, body={"prompt": "abc", **fields})
    if "response_format" not in fields:  # this service compiles no grammars, and says so first
        assert caught.value.param == param


@pytest.mark.parametrize(
    ("kwargs", "fits"),
    [
        ({"enable_thinking": False, "level": 2, "style": "short", "none": None}, True),
        ({"messages": "x"}, False),
        ({"add_generation_prompt": False}, False),
        ({"_private": 1}, False),
        ({"a b": 1}, False),
        ({"nested": {"a": 1}}, False),
        ({"long": "x" * 1025}, False),
        ({f"v{number}": number for number in range(17)}, False),
    ],
)
def test_only_plain_variables_reach_a_chat_template(server: Loopback, kwargs: dict[str, Any], fits: bool) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "chat_template_kwargs": kwargs}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == (200 if fits else 400)
    if not fits:
        assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_a_template_is_applied_without_an_answer(server: Loopback) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Wel"}]
    rendered = server.http.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert "Hi" in rendered
    assert rendered.endswith("<|im_start|>assistant\n")
    open_end = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert server.http.post("/apply-template", json=open_end).json()["prompt"].endswith("Wel")
    tokens = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    again = server.http.post("/tokenize", json={"prompt": rendered, "add_special_tokens": False}).json()["tokens"]
    assert tokens == again
    assert server.http.post("/apply-template", json={"messages": []}).status_code == 400


def test_capacity_tells_how_many_conversations_there_is_room_for(server: Loopback) -> None:
    capacity = server.http.get("/v1/capacity").json()
    assert capacity == {
        "slots": 8,
        "free": 8,
        "running": 0,
        "waiting": 0,
        "state_bytes": 4096,
        "total_state_bytes": 8 * 4096,
        "kv_cache_bytes_per_token": 96,
        "max_prompt_tokens": None,
    }


def test_usage_so_far_is_in_every_chunk_if_wanted(server: Loopback) -> None:
    stream = server.openai.completions.create(
        model="org/tiny",
        prompt="abc",
        max_tokens=4,
        n=2,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )
    usages = [chunk.usage for chunk in stream]
    assert all(usage is not None and usage.prompt_tokens == 3 for usage in usages)
    counts = [usage.completion_tokens for usage in usages if usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_bad_words_are_spelled_with_and_without_a_space_before(byte_tokenizer: Tokenizer) -> None:
    # Behind a space the byte tokenizer's word is a token longer, and covered by the word itself.
    assert bad_word_tokens(byte_tokenizer, ["no", "no", " no"]) == ((110, 111), (32, 110, 111))


def test_fields_that_a_request_leaves_out_are_the_models_own(
    options: ServiceOptions, byte_tokenizer: Tokenizer
) -> None:
    own = DefaultSampling(temperature=0.2, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1)
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with serve(FakeEngine(), replace(options, sampling=own), byte_tokenizer) as server:
        for path, body in (
            ("/v1/completions", {"prompt": "abc", "max_tokens": 1}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"temperature": None, "top_p": None}),
            ("/v1/responses", {"input": "abc", "max_output_tokens": 16, "store": False}),
        ):
            assert server.http.post(path, json=body).status_code == 200
            sampling = server.engine.submitted[-1].sampling
            assert {name: getattr(sampling, name) for name in asdict(own)} == asdict(own)
        assert (
            server.http.post("/v1/completions", json={"prompt": "a", "temperature": 1, "top_k": 0}).status_code == 200
        )
        sampling = server.engine.submitted[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 0.9)
        assert server.http.get("/v1/models").json()["data"][0]["default_sampling"] == asdict(own)
