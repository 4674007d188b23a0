"""Tools over HTTP with a scripted engine: what the model is told, and what becomes of what it says."""

import json
from typing import Any

import pytest

from dijiang_model.text.folder import TokenizerFiles
from server.generation.chat_answers import ChatAnswer
from server.text.continuation import encode_continuation
from server.text.reasoning import AnswerParser
from server.text.template import ChatMessage, ChatTemplate
from server.text.tokenizer import Tokenizer
from server.tools.tool_calls import ToolCallParser
from server.tools.tool_grammar import Callable, tool_grammar
from tests.server.conftest import Loopback
from tests.server.fake_engine import EOS_TOKEN_ID
from tests.server.text.test_chat_template import CHATML, template, text_of
from tests.server.text.test_tokenizer import byte_level

MODEL = "org/tiny"
HELLO: list[Any] = [{"role": "user", "content": "Weather?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def say(server: Loopback, text: str) -> None:
    server.engine.script = lambda _: [*text.encode(), EOS_TOKEN_ID]


def ask(server: Loopback, **fields: Any) -> Any:
    arguments = {"model": MODEL, "messages": HELLO, "tools": [WEATHER, TIME], **fields}
    return server.openai.chat.completions.create(**arguments)


def prompt_of(server: Loopback) -> str:
    return bytes(token for token in server.engine.submitted[-1].prompt_token_ids if token < 256).decode()


def test_a_call_becomes_a_tool_call(server: Loopback) -> None:
    say(server, CALL)
    [choice] = ask(server).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.id.startswith("call_")
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}


def test_text_and_several_calls_come_together(server: Loopback) -> None:
    say(server, f"Let me see.\n{CALL}\n{SECOND}")
    message = ask(server).choices[0].message
    assert message.content == "Let me see."
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "get_time"]
    assert len({call.id for call in message.tool_calls}) == 2


def test_plain_text_stays_plain_text(server: Loopback) -> None:
    for text in ("No <tool> needed.\n", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'):
        say(server, text)
        [choice] = ask(server).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


def test_without_tools_calls_are_text(server: Loopback) -> None:
    say(server, CALL)
    for fields in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        [choice] = ask(server, **fields).choices
        assert (choice.message.content, choice.finish_reason) == (CALL, "stop")


def test_calls_are_streamed_in_the_shape_of_the_api(server: Loopback) -> None:
    say(server, f"Let me see. {CALL}{SECOND}")
    body = {"messages": HELLO, "tools": [WEATHER, TIME], "stream": True}
    events = server.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "tool_calls",
        "stop_reason": None,
    }
    deltas = [choice["delta"] for choice in choices[1:-1]]
    assert "".join(delta["content"] for delta in deltas if "content" in delta) == "Let me see."
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert all(len(delta["tool_calls"]) == 1 for delta in deltas if "tool_calls" in delta)
    heads = [call for call in calls if "id" in call]
    assert [(head["index"], head["type"], head["function"]) for head in heads] == [
        (0, "function", {"name": "get_weather", "arguments": ""}),
        (1, "function", {"name": "get_time", "arguments": ""}),
    ]
    pieces = [call for call in calls if "id" not in call]
    assert all(set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"} for piece in pieces)
    assert "".join(piece["function"]["arguments"] for piece in pieces if piece["index"] == 0) == '{"city": "Oslo"}'
    assert len([piece for piece in pieces if piece["index"] == 0]) > 3


@pytest.mark.parametrize("text", [f"Hm. {CALL} {SECOND}", CALL[:-20], "plain \n", '<tool_call>{"name": "get'])
def test_a_stream_says_the_same_as_the_whole_answer(server: Loopback, text: str) -> None:
    say(server, text)
    whole = ask(server).choices[0]
    with server.openai.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER, TIME]) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.message.content or "") == (whole.message.content or "")
    assert final.finish_reason == whole.finish_reason
    told = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in final.message.tool_calls or ()] == told


def test_a_call_cut_by_the_limit_says_length(server: Loopback) -> None:
    say(server, CALL)
    [choice] = ask(server, max_tokens=70).choices
    assert choice.finish_reason == "length"
    assert '{"city": "Oslo"}'.startswith(choice.message.tool_calls[0].function.arguments)


def test_every_choice_has_its_own_calls(server: Loopback) -> None:
    say(server, CALL)
    chunks = list(ask(server, n=2, stream=True))
    for index in range(2):
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices[0].index == index]
        arguments = "".join(
            call.function.arguments for delta in deltas for call in delta.tool_calls or () if call.function.arguments
        )
        assert json.loads(arguments) == {"city": "Oslo"}


def test_token_ids_come_with_every_piece(server: Loopback) -> None:
    say(server, CALL)
    body = {"messages": HELLO, "tools": [WEATHER], "stream": True, "return_token_ids": True}
    events = server.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    assert bytes(token for choice in choices for token in choice["token_ids"] if token < 256) == CALL.encode()


def test_tools_are_told_in_the_system_message_where_the_template_has_no_place_for_them(server: Loopback) -> None:
    ask(server, messages=[{"role": "system", "content": "Be brief."}, *HELLO])
    prompt = prompt_of(server)
    assert prompt.startswith("system\nBe brief.\n\n# Tools\n")
    told = prompt.partition("<tools>\n")[2].partition("\n</tools>")[0].split("\n")
    assert json.loads(told[0]) == WEATHER
    assert json.loads(told[1])["function"]["parameters"] == {"type": "object", "properties": {}}
    ask(server)
    assert prompt_of(server).startswith("system\n# Tools\n")
    ask(server, tool_choice="none")
    assert "Tools" not in prompt_of(server)


def test_the_tokens_of_a_conversation_count_its_tools(server: Loopback) -> None:
    ask(server)
    told = server.http.post("/tokenize", json={"messages": HELLO, "tools": [WEATHER, TIME]}).json()["tokens"]
    assert tuple(told) == server.engine.submitted[-1].prompt_token_ids
    refused = server.http.post("/tokenize", json={"prompt": "x", "tools": [TIME]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize("source", ["KNOWING", "CHATML"])
def test_after_a_saved_conversation_tools_are_not_told_again(source: str) -> None:
    chat = template({"KNOWING": KNOWING, "CHATML": CHATML}[source])
    answer = [ChatMessage("tool", "cold", tool_call_id="c1")]
    going_on = encode_continuation(chat, answer, ends_open=False, last_token=0, tools=[WEATHER])
    assert text_of(chat, going_on) == text_of(chat, encode_continuation(chat, answer, ends_open=False, last_token=0))
    assert "cold" in text_of(chat, going_on)


def conversation() -> list[Any]:
    arguments = json.dumps({"city": "Oslo"})
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        for number in range(2)
    ]
    return [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_0", "content": "cold"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "wet"}]},
        {"role": "assistant", "content": "Cold and wet."},
        {"role": "user", "content": "Thanks"},
    ]


def test_calls_and_their_answers_are_told_as_text_where_the_template_has_no_place_for_them(server: Loopback) -> None:
    ask(server, messages=conversation(), tools=None)
    assert prompt_of(server) == (
        f"user\nWeather?\nassistant\n{CALL}\n{CALL}\nuser\n"
        "<tool_response>\ncold\n</tool_response>\n<tool_response>\nwet\n</tool_response>\n"
        "assistant\nCold and wet.\nuser\nThanks\nassistant\n"
    )


KNOWING = (
    "{% if tools %}[{% for tool in tools %}{{ tool | tojson }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}{% if m.tool_call_id is defined %} {{ m.tool_call_id }}{% endif %}>"
    "{% if m.content is not none %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ call.function.name }}({{ call.function.arguments.city }}){% endfor %}"
    "{% endfor %}"
)


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    chat = template(KNOWING)
    assert chat.knows_tools
    assert not template("{{ messages[0].content }}").knows_tools
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    messages = [
        ChatMessage("user", "hi"),
        ChatMessage("assistant", "", tool_calls=(call,)),
        ChatMessage("tool", "cold", tool_call_id="c1"),
    ]
    text = text_of(chat, chat.encode(messages, tools=[TIME]))
    assert text == f"[{json.dumps(TIME)}]<user>hi<assistant>get_weather(Oslo)<tool c1>cold"


def test_special_tokens_in_tools_and_calls_stay_text() -> None:
    chat: ChatTemplate = template(KNOWING)
    tokenizer: Tokenizer = Tokenizer(TokenizerFiles(byte_level().to_str(), {}, KNOWING))
    [special] = tokenizer.encode("<|end|>")
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"city": "<|end|>"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"<|end|>": {}}}}}
    messages = [ChatMessage("assistant", "", tool_calls=(call,)), ChatMessage("tool", "x", tool_call_id="<|end|>")]
    assert special not in chat.encode(messages, tools=[tool])


def test_arguments_that_are_no_json_are_told_as_they_are(server: Loopback) -> None:
    messages = conversation()[:3]
    messages[1]["tool_calls"] = [
        {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": "{broken"}}
    ]
    ask(server, messages=messages)
    assert '"arguments": "{broken"' in prompt_of(server)


def test_one_grammar_holds_every_tool_with_its_own_definitions() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
    source = tool_grammar([Callable("f", schema), Callable("g", None)], is_forced=True, is_parallel=False)
    rules = dict(line.split(": ", 1) for line in source.text.split("\n"))
    assert rules["call"] == "call_0 | call_1"
    assert json.loads(rules["arguments_0"].removeprefix("%json "))["$defs"] == schema["$defs"]


@pytest.mark.parametrize(
    ("fields", "is_constrained"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "none"}, False),
        ({"tool_choice": "required"}, True),
        ({"parallel_tool_calls": False}, True),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, True),
    ],
)
def test_only_what_must_hold_is_constrained(server: Loopback, fields: dict[str, Any], is_constrained: bool) -> None:
    """This server compiles no grammars, so a request that needs one is refused."""
    body = {"messages": HELLO, "tools": [WEATHER], **fields}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == (400 if is_constrained else 200)


@pytest.mark.parametrize("num_tokens", [2, 6, 11, 12, 30])
@pytest.mark.parametrize("stream", [False, True])
def test_of_a_call_that_is_cut_off_nothing_is_text(server: Loopback, num_tokens: int, stream: bool) -> None:
    say(server, CALL)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in ask(server, max_tokens=num_tokens, stream=True)]
        content = "".join(delta.content or "" for delta in deltas)
    else:
        content = ask(server, max_tokens=num_tokens).choices[0].message.content or ""
    assert content == ""


def test_what_only_may_become_a_mark_stays_text_at_a_natural_end(server: Loopback) -> None:
    say(server, "1 <tool")
    assert ask(server).choices[0].message.content == "1 <tool"
    say(server, "1 <")
    assert ask(server, max_tokens=3).choices[0].message.content == "1 <"


@pytest.mark.parametrize("text", ["<", "<tool_", "<tool_call>", '<tool_call>\n{"na', "\n"])
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_forced_answer_has_no_content(text: str, reason: Any) -> None:
    def answer() -> ChatAnswer:
        return ChatAnswer(AnswerParser(None, ToolCallParser(["get_weather"]), is_forced=True))

    assert answer().message(text, reason).content is None
    assert answer().deltas(text, reason) == []
    whole = answer().message(CALL, "stop")
    assert (whole.content, len(whole.tool_calls)) == (None, 1)


def test_only_the_allowed_of_several_tools_can_be_called(server: Loopback) -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    say(server, CALL + SECOND)
    message = ask(server, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_time"]
    assert "get_weather" in prompt_of(server), "the model is told of all"


def test_keywords_that_are_null_are_not_there(server: Loopback) -> None:
    parameters = {"type": "object", "properties": None, "required": None, "description": None}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": None}}
    say(server, "Yes")
    assert ask(server, tools=[tool]).choices[0].message.content == "Yes"
    assert "null" not in prompt_of(server)
