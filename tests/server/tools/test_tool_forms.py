"""Forms of calls: which one a chat template asks for, calls in them found and kept to, told and answered over HTTP."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dijiang_model.text.folder import TokenizerFiles
from server.engine.grammars.grammar import GrammarCompiler
from server.grammar_check.sources import GrammarKind, GrammarSource, schema_text
from server.options import ServiceOptions
from server.text.template import ChatMessage
from server.text.tokenizer import Tokenizer
from server.tools.tool_calls import ArgumentsPart, CallPart, Part, TextPart
from server.tools.tool_forms import HERMES, LLAMA, MISTRAL, ToolForm, tool_form
from server.tools.tool_grammar import MOST_FORCED_CALLS, tool_grammar
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import EOS_TOKEN_ID, FakeEngine
from tests.server.text.test_chat_template import template
from tests.server.tools.test_tools import HELLO, TIME, WEATHER, ask, prompt_of, say
from tests.server.tools.test_tools_grammar import ADD, CLOCK, VOCABULARY, accepts

NAMES = ("get_weather", "get_time")
LLAMA_TEMPLATE = (
    '{% if tools %}Respond with {"name": function name, "parameters": dictionary of argument name and its value}.\n'
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if 'tool_calls' in m %}{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}'
    "{% endfor %}{% else %}{{ m.content | trim }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
OSLO = '{"name": "get_weather", "parameters": {"city": "Oslo }"}}'
NOW = '{"name": "get_time", "parameters": {}}'
IN_LIST = '{"name": "get_weather", "arguments": {"city": "Oslo ]"}, "id": "x"}'
NOW_IN_LIST = '{"name": "get_time", "arguments": {}}'


def parse(form: ToolForm, *pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """The text beside the calls; name and arguments of each call."""
    parser = form.parser(NAMES)
    parts: list[Part] = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    text, calls = "", []
    for part in parts:
        match part:
            case TextPart(more):
                text += more
            case CallPart(_, name):
                calls.append((name, ""))
            case ArgumentsPart(index, more):
                calls[index] = (calls[index][0], calls[index][1] + more)
    return text, calls


WEATHER_CALL, TIME_CALL = ("get_weather", '{"city": "Oslo }"}'), ("get_time", "{}")
LISTED_CALL = ("get_weather", '{"city": "Oslo ]"}')


@pytest.mark.parametrize(
    ("form", "answer", "text", "calls"),
    [
        (LLAMA, OSLO, "", [WEATHER_CALL]),
        (LLAMA, f"\n\n<|python_tag|>{OSLO}", "", [WEATHER_CALL]),
        (LLAMA, f"{OSLO}; {NOW}", "", [WEATHER_CALL, TIME_CALL]),
        (LLAMA, f"{OSLO}\n{NOW}\n", "", [WEATHER_CALL, TIME_CALL]),
        (LLAMA, '{"parameters": {"city": "x"}, "name": "get_weather"}', "", [("get_weather", '{"city": "x"}')]),
        (LLAMA, '{"type": "function", "name": "get_time", "parameters": null}', "", [TIME_CALL]),
        (LLAMA, f"It is: {OSLO}", f"It is: {OSLO}", []),
        (LLAMA, '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
        (LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        (LLAMA, "  plain", "  plain", []),
        (LLAMA, "", "", []),
        (LLAMA, " ", " ", []),
        (LLAMA, f"{OSLO} and so on {NOW}", f"and so on {NOW}", [WEATHER_CALL]),
        (MISTRAL, f"[TOOL_CALLS] [{IN_LIST}]", "", [LISTED_CALL]),
        (MISTRAL, f"[TOOL_CALLS][{IN_LIST}, {NOW_IN_LIST}]", "", [LISTED_CALL, TIME_CALL]),
        (MISTRAL, f"Wait. [TOOL_CALLS] [{NOW_IN_LIST}] Done.", "Wait.Done.", [TIME_CALL]),
        (MISTRAL, f"[TOOL_CALLS]{NOW_IN_LIST}", "", [TIME_CALL]),
        (MISTRAL, "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
        (MISTRAL, "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
        (MISTRAL, "a [TOOL", "a [TOOL", []),
        (MISTRAL, OSLO, OSLO, []),
    ],
)
def test_calls_are_found_in_their_form(form: ToolForm, answer: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert parse(form, answer) == (text, calls)
    assert parse(form, *answer) == (text, calls)


FRAGMENTS = [
    OSLO,
    NOW,
    IN_LIST,
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "; ",
    " ",
    "\n",
    "text",
    '"',
]


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from([LLAMA, MISTRAL]),
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=8),
    cuts=st.lists(st.integers(0, 300), max_size=10),
)
def test_what_comes_out_does_not_depend_on_the_cuts(form: ToolForm, fragments: list[str], cuts: list[int]) -> None:
    answer = "".join(fragments)
    places = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    whole = parse(form, answer)
    assert parse(form, *(answer[begin:end] for begin, end in itertools.pairwise(places))) == whole
    assert parse(form, *answer) == whole


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (None, HERMES),
        ("{{ messages }}", HERMES),
        ('... <tool_call> ... {"name": "parameters": ', HERMES),
        (LLAMA_TEMPLATE, LLAMA),
        ("{{ '<|python_tag|>' }}", LLAMA),
        (MISTRAL_TEMPLATE, MISTRAL),
    ],
)
def test_the_template_says_which_form(source: str | None, form: ToolForm) -> None:
    assert tool_form(source) is form


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY, vocab_size=259, eos_token_ids=(256,))


def written(form: ToolForm, *calls: tuple[str, Any]) -> str:
    """Calls as a model writes them that was told of the form."""
    objects = [f"{form.head(name)}{json.dumps(arguments)}}}" for name, arguments in calls]
    return f"[TOOL_CALLS][{', '.join(objects)}]" if form.in_list else "; ".join(objects)


@pytest.mark.parametrize("form", [LLAMA, MISTRAL])
def test_forced_calls_are_valid_and_found_again(compiler: GrammarCompiler, form: ToolForm) -> None:
    one, two = written(form, ("add", {"n": 5})), written(form, ("add", {"n": 5}), ("clock", {}))
    for is_parallel in (True, False):
        source = tool_grammar([ADD, CLOCK], is_forced=True, is_parallel=is_parallel, form=form)
        assert accepts(compiler, source, list(one.encode()))
        assert accepts(compiler, source, list(two.encode())) is is_parallel
        for bad in ("", "text", written(form, ("add", {"n": "5"})), written(form, ("minus", {})), f"text {one}"):
            assert not accepts(compiler, source, list(bad.encode())), bad
    source = tool_grammar([ADD, CLOCK], is_forced=True, is_parallel=True, form=form)
    for count, is_good in ((MOST_FORCED_CALLS, True), (MOST_FORCED_CALLS + 1, False)):
        many = written(form, *[("add", {"n": 5})] * count)
        assert accepts(compiler, source, list(many.encode())) is is_good, "a model may repeat itself without end"
    parser = form.parser(["add", "clock"])
    assert len([part for part in parser.push(two) if isinstance(part, CallPart)]) == 2


@pytest.mark.parametrize("form", [LLAMA, MISTRAL])
def test_free_answers_are_text_or_valid_calls(compiler: GrammarCompiler, form: ToolForm) -> None:
    source = tool_grammar([ADD, CLOCK], is_forced=False, is_parallel=True, form=form)
    call = written(form, ("add", {"n": 5}))
    for good in ("", "some text, 日本\n", call):
        assert accepts(compiler, source, list(good.encode())), good
    for bad in (written(form, ("add", {})), call[:-3]):
        assert not accepts(compiler, source, list(bad.encode())), bad
    content = GrammarSource(GrammarKind.JSON_SCHEMA, schema_text({"enum": [1]}, strict=True))
    beside = tool_grammar([CLOCK], is_forced=False, is_parallel=True, content=content, form=form)
    for answer, is_good in (("1", True), (written(form, ("clock", {})), True), ("text", False)):
        assert accepts(compiler, beside, list(answer.encode())) is is_good


@pytest.fixture(params=[(LLAMA, LLAMA_TEMPLATE), (MISTRAL, MISTRAL_TEMPLATE)], ids=["llama", "mistral"])
def formed(
    request: pytest.FixtureRequest, byte_tokenizer: Tokenizer, options: ServiceOptions
) -> Iterator[tuple[ToolForm, Loopback]]:
    form, source = request.param
    files = TokenizerFiles(byte_tokenizer._raw.to_str(), byte_tokenizer.special_tokens, source)
    with serve(FakeEngine(), options, Tokenizer(files)) as server:
        yield form, server


def test_calls_come_over_http_whole_and_streamed(formed: tuple[ToolForm, Loopback]) -> None:
    form, server = formed
    say(server, written(form, ("get_weather", {"city": "Oslo"}), ("get_time", {})))
    [choice] = ask(server).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    told = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert told == [("get_weather", {"city": "Oslo"}), ("get_time", {})]
    with server.openai.chat.completions.stream(model="org/tiny", messages=HELLO, tools=[WEATHER, TIME]) as stream:
        final = stream.get_final_completion().choices[0]
    assert [call.function.name for call in final.message.tool_calls or ()] == ["get_weather", "get_time"]
    assert WEATHER["function"]["description"] in prompt_of(server)
    say(server, "No need.")
    assert ask(server).choices[0].message.content == "No need."


def test_calls_that_were_made_are_told_in_the_same_form(formed: tuple[ToolForm, Loopback]) -> None:
    form, server = formed
    call = {"id": "c", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    ask(server, messages=messages)
    prompt = prompt_of(server)
    assert f'"get_time", "{form.key}": {{}}' in prompt or '"arguments": {}, "name": "get_time"' in prompt
    assert parse(form, written(form, ("get_time", {})))[1] == [TIME_CALL]


def test_marks_that_are_special_tokens_are_seen(options: ServiceOptions, byte_tokenizer: Tokenizer) -> None:
    raw = json.loads(byte_tokenizer._raw.to_str())
    raw["added_tokens"][3]["content"] = "[TOOL_CALLS]"  # in place of the unused one
    raw["model"]["vocab"].pop("<|unused|>", None)
    files = TokenizerFiles(json.dumps(raw), byte_tokenizer.special_tokens, MISTRAL_TEMPLATE)
    engine = FakeEngine(script=lambda _: [259, *b'[{"name": "get_time", "arguments": {}}]', EOS_TOKEN_ID])
    with serve(engine, options, Tokenizer(files)) as server:
        [call] = ask(server).choices[0].message.tool_calls
        assert call.function.name == "get_time"
        assert ask(server, tools=None).choices[0].message.content == '[{"name": "get_time", "arguments": {}}]'


def test_a_template_that_cannot_have_no_content_gets_an_empty_one() -> None:
    chat = template("{% for m in messages %}{{ m.role }}{{ 'x' if 'y' in m.content }};{% endfor %}")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert chat.render([ChatMessage("assistant", "", tool_calls=(call,))]) == "assistant;"
