"""Answers of models that think, over HTTP with a scripted engine: chat, tools, and the Responses API."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from server.responses.output import ResponseOutput, replayed
from server.text.reasoning import AnswerParser, ThoughtStart
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.fake_engine import EOS_TOKEN_ID, FakeEngine
from tests.server.thinking_models import CLOSE_ID, OPEN_ID, OPENING_TEMPLATE, thinking_tokenizer
from tests.server.tools.test_tools import CALL, TIME, WEATHER, prompt_of, say

MODEL = "org/tiny"
HELLO: list[Any] = [{"role": "user", "content": "2+2?"}]
THOUGHT = "Two and two: naïvely 4."
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\nIt is 4."
NUM_THOUGHT = len(f"<think>\n{THOUGHT}\n</think>".encode())


@pytest.fixture(scope="module")
def free(tokenizer_folder: Path) -> Iterator[Loopback]:
    """A model that opens its thoughts itself."""
    options = replace(OPTIONS, reasoning_parser="think")
    with serve(FakeEngine(), options, thinking_tokenizer(tokenizer_folder)) as running:
        yield running


@pytest.fixture(scope="module")
def opening(tokenizer_folder: Path) -> Iterator[Loopback]:
    """A model whose template opens them."""
    with serve(FakeEngine(), OPTIONS, thinking_tokenizer(tokenizer_folder, template=OPENING_TEMPLATE)) as running:
        yield running


def ask(server: Loopback, **fields: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": MODEL, "messages": HELLO, **fields})


def streamed(server: Loopback, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, **fields}
    events = server.http.post(path, json=body).text.split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events if event and event != "data: [DONE]"]


def deltas(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]


def thought_tokens(answer: Any) -> int:
    tokens: int = answer.usage.completion_tokens_details.reasoning_tokens
    return tokens


def test_a_thought_is_told_apart_from_the_answer(free: Loopback) -> None:
    say(free, ANSWER)
    answer = ask(free)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("It is 4.", THOUGHT, THOUGHT)
    assert thought_tokens(answer) == NUM_THOUGHT
    assert answer.usage.completion_tokens == len(ANSWER.encode()) + 1


def test_an_answer_without_a_thought_is_as_ever(free: Loopback, server: Loopback) -> None:
    for text in ("Just 4.", "\n The tag <think> opens.</think>\n", ""):
        say(free, text)
        answer = ask(free)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].message.model_extra == {}
        assert thought_tokens(answer) == 0
    say(server, ANSWER)
    plain = ask(server)
    assert plain.choices[0].message.content == ANSWER
    assert plain.usage.completion_tokens_details is None


@pytest.mark.parametrize("per_event", [1, 3, 1000])
@pytest.mark.parametrize("text", [ANSWER, "<think>cut </thi", "<think>\n\n</think>\n\nHi", "No <think>", "<thi"])
def test_a_stream_says_what_the_whole_answer_says(free: Loopback, text: str, per_event: int) -> None:
    say(free, text)
    whole = ask(free)
    message = whole.choices[0].message
    free.engine.tokens_per_event = per_event
    chunks = streamed(free, stream_options={"include_usage": True})
    free.engine.tokens_per_event = 1
    told = deltas(chunks)
    assert told[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in told) == message.content
    thought = "".join(delta.get("reasoning_content", "") for delta in told)
    assert thought == getattr(message, "reasoning_content", "")
    assert thought == "".join(delta.get("reasoning", "") for delta in told)
    assert not any("content" in delta and "reasoning_content" in delta for delta in told)
    assert chunks[-1]["usage"] == json.loads(whole.usage.model_dump_json(exclude_unset=True))


def test_no_piece_of_a_mark_is_ever_told(free: Loopback) -> None:
    say(free, ANSWER)
    told = deltas(streamed(free))
    assert not any("<" in delta.get(name, "") for delta in told for name in ("content", "reasoning_content"))


def test_a_thought_that_the_template_opens_is_one_too(opening: Loopback) -> None:
    say(opening, f"{THOUGHT}\n</think>\n\nIt is 4.")
    answer = ask(opening)
    assert prompt_of(opening).endswith("assistant\n<think>\n")
    assert answer.choices[0].message.reasoning_content == THOUGHT
    assert answer.choices[0].message.content == "It is 4."
    assert thought_tokens(answer) == len(f"{THOUGHT}\n</think>".encode())


def test_a_request_may_turn_thinking_off(opening: Loopback) -> None:
    say(opening, "It is 4. </think>")
    for fields in (
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"extra_body": {"enable_thinking": False}},
        {"extra_body": {"thinking": {"type": "disabled"}}},
        {"reasoning_effort": "none"},
    ):
        answer = ask(opening, **fields)
        assert prompt_of(opening).endswith("<think>\n</think>\n\n")
        assert answer.choices[0].message.content == "It is 4. </think>"
        assert thought_tokens(answer) == 0


def test_thinking_that_cannot_be_turned_off_or_on_is_refused(free: Loopback, server: Loopback) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    for running, wanted in ((free, False), (server, True)):
        for fields in ({"enable_thinking": wanted}, {"thinking": {"type": "enabled" if wanted else "disabled"}}):
            answer = running.http.post("/v1/chat/completions", json={**body, **fields})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "enable_thinking")
        assert (
            running.http.post("/v1/chat/completions", json={**body, "enable_thinking": not wanted}).status_code == 200
        )


def test_a_user_who_types_a_mark_opens_nothing(opening: Loopback, free: Loopback) -> None:
    say(free, "It opens.")
    asked = [{"role": "user", "content": "What is <think>"}]
    assert ask(free, messages=asked).choices[0].message.content == "It opens."


def test_an_answer_that_is_gone_on_with_knows_whether_it_thinks(free: Loopback) -> None:
    say(free, " so 4.</think>It is 4.")
    for begun, thought, said in (
        ("<think>Two and two,", "so 4.", "It is 4."),
        ("<think>Hm.</think>So", "", " so 4.</think>It is 4."),
    ):
        messages = [*HELLO, {"role": "assistant", "content": begun}]
        extra = {"continue_final_message": True, "add_generation_prompt": False}
        message = ask(free, messages=messages, extra_body=extra).choices[0].message
        assert (getattr(message, "reasoning_content", ""), message.content) == (thought, said)


def test_a_thought_cut_by_the_limit_has_no_answer(free: Loopback) -> None:
    say(free, ANSWER)
    answer = ask(free, max_tokens=20)
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert THOUGHT.startswith(choice.message.reasoning_content)
    assert thought_tokens(answer) == 20


def test_a_thought_may_stay_untold_and_is_counted_all_the_same(free: Loopback) -> None:
    say(free, ANSWER)
    answer = ask(free, extra_body={"include_reasoning": False})
    assert answer.choices[0].message.model_extra == {}
    assert answer.choices[0].message.content == "It is 4."
    assert thought_tokens(answer) == NUM_THOUGHT
    told = deltas(streamed(free, include_reasoning=False))
    assert "".join(delta.get("content", "") for delta in told) == "It is 4."
    assert not any("reasoning" in delta or "reasoning_content" in delta for delta in told)


def test_every_choice_thinks_for_itself(free: Loopback) -> None:
    free.engine.script = lambda request: [
        *(ANSWER if request.request_id.endswith("-0") else "Four.").encode(),
        EOS_TOKEN_ID,
    ]
    answer = ask(free, n=2)
    assert [choice.message.content for choice in answer.choices] == ["It is 4.", "Four."]
    assert thought_tokens(answer) == NUM_THOUGHT


def test_calls_come_behind_a_thought(free: Loopback) -> None:
    say(free, f"<think>I might say {CALL}</think>\n{CALL}")
    [choice] = ask(free, tools=[WEATHER, TIME]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == f"I might say {CALL}"
    assert choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    told = deltas(streamed(free, tools=[WEATHER, TIME]))
    assert "".join(delta.get("reasoning", "") for delta in told) == f"I might say {CALL}"
    assert len([delta for delta in told if "id" in delta.get("tool_calls", [{}])[0]]) == 1


def test_marks_that_are_special_tokens_are_found_too(tokenizer_folder: Path) -> None:
    with serve(FakeEngine(), OPTIONS, thinking_tokenizer(tokenizer_folder, marked=True)) as server:
        server.engine.script = lambda _: [OPEN_ID, *b"Hm.", CLOSE_ID, *b"Yes.", EOS_TOKEN_ID]
        answer = ask(server)
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content, thought_tokens(answer)) == ("Hm.", "Yes.", 5)


def test_thoughts_of_the_past_go_to_templates_under_both_names(tokenizer_folder: Path) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}<think></think>"
    with serve(FakeEngine(), OPTIONS, thinking_tokenizer(tokenizer_folder, template=template)) as server:
        for name in ("reasoning_content", "reasoning"):
            past = [{"role": "assistant", "content": "4", name: "two, two"}]
            ask(server, messages=past)
            assert prompt_of(server).startswith("two, two|4")


# The Responses API


def respond(server: Loopback, **fields: Any) -> Any:
    return server.openai.responses.create(**{"model": MODEL, "input": "2+2?", "store": False, **fields})


def test_a_response_has_an_item_of_reasoning(free: Loopback) -> None:
    say(free, ANSWER)
    response = respond(free)
    thought, message = response.output
    assert (thought.type, thought.status, thought.summary) == ("reasoning", "completed", [])
    assert thought.id.startswith("rs_")
    assert [(part.type, part.text) for part in thought.content] == [("reasoning_text", THOUGHT)]
    assert message.content[0].text == response.output_text == "It is 4."
    assert response.usage.output_tokens_details.reasoning_tokens == NUM_THOUGHT
    say(free, "Just 4.")
    assert [item.type for item in respond(free).output] == ["message"]


def test_events_tell_of_the_thought_first(free: Loopback) -> None:
    say(free, ANSWER)
    events = list(respond(free, stream=True))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    names = [event.type.removeprefix("response.") for event in events]
    kinds = [name for number, name in enumerate(names) if "delta" not in name or name != names[number - 1]]
    around = [
        "output_item.added",
        "content_part.added",
        "{0}.delta",
        "{0}.done",
        "content_part.done",
        "output_item.done",
    ]
    told = [name.format(kind) for kind in ("reasoning_text", "output_text") for name in around]
    assert kinds == ["created", "in_progress", *told, "completed"]
    for index, item in enumerate(events[-1].response.output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        assert mine[0].item.content == []
        assert mine[-1].item == item
        assert "".join(event.delta for event in mine if event.type.endswith(".delta")) == item.content[0].text
    part = next(event.part for event in events if event.type == "response.content_part.done")
    assert (part.type, part.text) == ("reasoning_text", THOUGHT)


def test_a_response_cut_in_its_thought_is_incomplete(free: Loopback) -> None:
    say(free, ANSWER)
    response = respond(free, max_output_tokens=20)
    [thought] = response.output
    assert (response.status, thought.type, thought.status) == ("incomplete", "reasoning", "incomplete")


def test_thoughts_are_taken_back_as_input(free: Loopback, tokenizer_folder: Path) -> None:
    say(free, ANSWER)
    thought, message = (item.model_dump() for item in respond(free).output)
    template = "{% for m in messages %}[{{ m.reasoning_content }}|{{ m.content }}]{% endfor %}<think>{# </think> #}"
    with serve(FakeEngine(), OPTIONS, thinking_tokenizer(tokenizer_folder, template=template)) as server:
        respond(server, input=[{"role": "user", "content": "2+2?"}, thought, message, {"role": "user", "content": "?"}])
        assert prompt_of(server) == f"[|2+2?][{THOUGHT}|It is 4.][|?]<think>"


def test_calls_and_thoughts_are_items_in_their_order(free: Loopback) -> None:
    say(free, f"<think>Hm.</think>{CALL}")
    function = {"type": "function", "strict": False, **WEATHER["function"]}
    response = respond(free, tools=[function])
    assert [item.type for item in response.output] == ["reasoning", "function_call"]


def test_a_stored_stream_is_told_again_as_it_was() -> None:
    output = ResponseOutput(AnswerParser(ThoughtStart.FREE, None), with_logprobs=True)
    events = output.begin()
    for number in range(0, len(ANSWER), 3):
        events += output.push(ANSWER[number : number + 3], [{"token": "x", "logprob": -1.0}])
    events += output.push("", [], "stop") + output.finish("stop")
    assert [item["type"] for item in output.items] == ["reasoning", "message"]
    again = list(replayed(output.items, output.pieces, was_broken_off=False))
    assert [name for name, _ in again] == [name for name, _ in events]
    assert [fields.get("delta") for _, fields in again] == [fields.get("delta") for _, fields in events]
    assert again[-1] == events[-1]


def test_the_wrong_kind_of_wish_is_named(free: Loopback) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(free, extra_body={"include_reasoning": "no"})
    assert caught.value.param == "include_reasoning"
