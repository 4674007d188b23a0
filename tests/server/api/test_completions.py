"""Completions: prompts in four forms, choices, streams equal to whole answers."""

import pytest

from tests.server.conftest import Loopback
from tests.server.fake_engine import ANSWER

MODEL = "org/tiny"


def test_a_text_prompt_is_answered_with_sixteen_tokens_by_default(server: Loopback) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="Hello")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == ANSWER[:16]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 16, 21)
    assert server.engine.submitted[0].prompt_token_ids == tuple(b"Hello")
    assert server.engine.submitted[0].sampling.max_tokens == 16


def test_the_wire_shape_is_that_of_the_api(server: Loopback) -> None:
    body = server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).json()
    assert body["id"].startswith("cmpl-")
    assert body["system_fingerprint"].startswith("fp_")
    del body["id"], body["created"], body["system_fingerprint"]
    assert body == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [{"index": 0, "text": "T", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "total_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_all_four_prompt_forms_reach_the_engine(
    server: Loopback, prompt: object, expected: list[tuple[int, ...]]
) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
    assert answer.status_code == 200
    assert [request.prompt_token_ids for request in server.engine.submitted] == expected
    assert len(answer.json()["choices"]) == len(expected)
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choice_index_is_prompt_times_n_plus_number_and_seeds_count_up(server: Loopback) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt=["a", "b"], n=3, seed=7, max_tokens=1)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [request.prompt_token_ids for request in server.engine.submitted] == [(97,)] * 3 + [(98,)] * 3
    assert [request.sampling.seed for request in server.engine.submitted] == [7, 8, 9, 10, 11, 12]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2


def test_without_a_seed_every_choice_gets_a_random_one(server: Loopback) -> None:
    server.openai.completions.create(model=MODEL, prompt="a", n=4, max_tokens=1)
    assert len({request.sampling.seed for request in server.engine.submitted}) == 4


@pytest.mark.parametrize("tokens_per_event", [1, 3, 1000])
@pytest.mark.parametrize("stop", [None, "Paris", ["東京 n", "zzz"], "😀!"])
def test_a_stream_carries_the_text_and_usage_of_the_whole_answer(
    server: Loopback, tokens_per_event: int, stop: object
) -> None:
    server.engine.tokens_per_event = tokens_per_event
    fields = {"model": MODEL, "prompt": ["Hello", "you"], "max_tokens": 100, "n": 2, "stop": stop}
    whole = server.openai.completions.create(**fields)
    stream = server.openai.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    texts, reasons, usage = [""] * 4, [[], [], [], []], None
    for chunk in stream:
        if chunk.usage is not None:
            usage = chunk.usage
            assert chunk.choices == []
        for choice in chunk.choices:
            assert not reasons[choice.index], "nothing comes after the end"
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                reasons[choice.index].append(choice.finish_reason)
    assert texts == [choice.text for choice in whole.choices]
    assert [reason for [reason] in reasons] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_stop_string_ends_the_answer_and_aborts_the_engine_request(server: Loopback) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="x", max_tokens=1000, stop=["Paris"])
    assert answer.choices[0].text == ANSWER[: ANSWER.index("Paris")]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == ANSWER.index("Paris") + len("Paris")
    assert [str(reason) for reason in server.engine.ended.values()] == ["abort"]


def test_include_stop_str_in_output_keeps_it(server: Loopback) -> None:
    body = {"prompt": "x", "max_tokens": 1000, "stop": "Paris", "include_stop_str_in_output": True}
    assert server.http.post("/v1/completions", json=body).json()["choices"][0]["text"].endswith("is Paris")


def test_falsy_values_are_honoured(server: Loopback) -> None:
    body = {"prompt": "x", "max_tokens": 1, "temperature": 0, "seed": 0, "top_k": 0, "stop": [], "logit_bias": {}}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.0, 0, 1)


def test_sampling_fields_reach_the_engine(server: Loopback) -> None:
    fields = {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.25,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "min_tokens": 2,
        "stop_token_ids": [9],
        "ignore_eos": True,
    }
    body = {"prompt": "x", "max_tokens": 4, "logit_bias": {"7": -100, "3": 1.5}, **fields}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    sampling = server.engine.submitted[0].sampling
    assert sampling.logit_bias == ((3, 1.5), (7, -100.0))
    for name, value in fields.items():
        assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value)


def test_top_p_zero_means_the_most_likely_token_and_minus_one_means_no_top_k(server: Loopback) -> None:
    body = {"prompt": "x", "max_tokens": 1, "top_p": 0, "top_k": -1, "temperature": -0.0}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    sampling = server.engine.submitted[0].sampling
    assert 0 < sampling.top_p < 1e-5
    assert sampling.top_k == 0
    assert str(sampling.temperature) == "0.0"


def test_token_ids_are_returned_on_request(server: Loopback) -> None:
    body = {"prompt": "hi", "max_tokens": 3, "return_token_ids": True}
    [choice] = server.http.post("/v1/completions", json=body).json()["choices"]
    assert choice["token_ids"] == list(b"The")
    assert choice["prompt_token_ids"] == list(b"hi")


def test_truncate_prompt_tokens_keeps_the_last_ones(server: Loopback) -> None:
    body = {"prompt": "hello", "max_tokens": 1, "truncate_prompt_tokens": 2}
    assert server.http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens"] == 2
    assert server.engine.submitted[0].prompt_token_ids == tuple(b"lo")


def test_a_prompt_that_ends_inside_a_character_leaks_nothing_of_it(server: Loopback) -> None:
    euro = list("€".encode())
    server.engine.script = lambda _: [euro[2], *b"ok"]
    body = {"prompt": euro[:2], "max_tokens": 3}
    assert server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "\ufffdok"


def test_half_a_character_at_the_limit_is_left_out(server: Loopback) -> None:
    server.engine.script = lambda _: list("a€".encode())
    body = {"prompt": "x", "max_tokens": 3}
    choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a", "length")
