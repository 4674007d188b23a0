"""Markdown as a tree of nodes, and the process that makes it."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidRequestError
from server.keys import hash_key
from server.options import ServiceOptions
from server.playground.markdown import MAX_CHARACTERS, MAX_COLOURED_CHARACTERS, Node, render
from server.playground.renderer import Renderer
from server.text.tokenizer import Tokenizer
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine

ELEMENTS = frozenset(
    (
        *(
            "p",
            "h3",
            "h4",
            "h5",
            "h6",
            "ul",
            "ol",
            "li",
            "blockquote",
            "hr",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
        ),
        *("em", "strong", "s", "br", "code", "pre", "a", "math", "span"),
    )
)
LINKED = ("https:", "http:", "mailto:")


def block(text: str) -> Node:
    """The only block of a text."""
    (node,) = render(text).blocks
    return node


def words(node: object) -> str:
    return node if isinstance(node, str) else "".join(words(child) for child in node[2:])  # type: ignore[index]


def elements(node: object) -> Iterator[tuple[str, dict[str, object]]]:
    if isinstance(node, list):
        yield node[0], node[1]
        for child in node[2:]:
            yield from elements(child)


def test_everything_that_markdown_has_is_an_element() -> None:
    assert block("# A *b*") == ["h3", {}, "A ", ["em", {}, "b"]]
    assert block("###### A") == ["h6", {}, "A"]
    assert block("a **b** `c` ~~d~~\ne") == [
        *("p", {}, "a ", ["strong", {}, "b"], " ", ["code", {}, "c"], " ", ["s", {}, "d"], "\n", "e")
    ]
    assert block("- a\n- b\n  - c") == ["ul", {}, ["li", {}, "a"], ["li", {}, "b", ["ul", {}, ["li", {}, "c"]]]]
    assert block("3. x\n4. y") == ["ol", {"start": 3}, ["li", {}, "x"], ["li", {}, "y"]]
    assert block("> q") == ["blockquote", {}, ["p", {}, "q"]]
    assert block("---") == ["hr", {}]
    table = block("| a | b |\n|:--|--:|\n| 1 | 2 |")
    head = ["tr", {}, ["th", {"align": "left"}, "a"], ["th", {"align": "right"}, "b"]]
    row = ["tr", {}, ["td", {"align": "left"}, "1"], ["td", {"align": "right"}, "2"]]
    assert table == ["table", {}, ["thead", {}, head], ["tbody", {}, row]]


def test_code_has_colours_and_keeps_every_character() -> None:
    code = 'def f(x):\n    return "s" + str(1)  # é\n\n'
    node = block(f"```python\n{code}```")
    assert words(node) == code
    assert node[:2] == ["pre", {"language": "python"}]
    assert ["span", {"class": "comment"}, "# é\n\n"] in node
    assert {attributes["class"] for name, attributes in elements(node) if name == "span"} == {
        *("keyword", "name", "string", "builtin", "number", "comment")
    }
    assert block("```nonsense\nx < y\n```") == ["pre", {"language": "nonsense"}, "x < y\n"]
    assert block("    four\n") == ["pre", {"language": ""}, "four\n"]
    long = "x = 1\n" * MAX_COLOURED_CHARACTERS
    assert block(f"```python\n{long}```") == ["pre", {"language": "python"}, long]


def test_mathematics_stays_text() -> None:
    assert block(r"So \(a_1 * b_2\) and $x_i*y_i*z$.") == [
        *("p", {}, "So ", ["math", {"display": False}, "a_1 * b_2"], " and "),
        *(["math", {"display": False}, "x_i*y_i*z"], "."),
    ]
    for text in (r"\[ \frac{a}{b} \]", "$$\n\\frac{a}{b}\n$$"):
        assert block(text) == ["math", {"display": True}, r"\frac{a}{b}"]
    assert block("It costs $5, or $6.") == ["p", {}, "It costs $5, or $6."]


def test_links_lead_to_the_web_alone_and_pictures_are_links() -> None:
    assert block("[x](https://example.com/a?b)") == ["p", {}, ["a", {"href": "https://example.com/a?b"}, "x"]]
    assert block("see https://example.com") == [
        *("p", {}, "see ", ["a", {"href": "https://example.com"}, "https://example.com"])
    ]
    assert block("![a cat](https://example.com/cat.png)") == [
        "p",
        {},
        ["a", {"href": "https://example.com/cat.png"}, "a cat"],
    ]
    for address in ("javascript:alert(1)", "data:text/html,x", "file:///etc/passwd", "/v1/states", "#x", "vbscript:x"):
        nodes = [*elements(block(f"[x]({address}) <{address}> ![y]({address})"))]
        assert not [name for name, _ in nodes if name == "a"], address


def test_markup_is_text() -> None:
    attack = '<img src=x onerror="alert(1)"><script>alert(1)</script> <b>x</b>'
    assert block(attack) == ["p", {}, attack]
    assert block(f"```html\n{attack}\n```")[0] == "pre"
    assert words(block(f"```html\n{attack}\n```")) == f"{attack}\n"


@given(st.text(st.sampled_from("a1 \n\t*_`~#>-+.|:$\\[]()<!&=é\u202e\x00/h"), max_size=200))
def test_any_text_gives_known_elements_alone(text: str) -> None:
    for node in render(text).blocks:
        for name, attributes in elements(node):
            assert name in ELEMENTS
            assert attributes.keys() <= {"href", "language", "class", "align", "start", "display"}
            assert str(attributes.get("href", "https:")).lower().startswith(LINKED)


@given(st.lists(st.sampled_from(["# a", "text *b*", "- x", "  - y", "", "```", "| a |", "|--|", "$$", "> q", "1. z"])))
def test_what_comes_before_the_last_block_does_not_change_while_the_text_grows(lines: list[str]) -> None:
    """So the page sends the last block alone again, with what has come behind it."""
    for number in range(1, len(lines)):
        begun, whole = "\n".join(lines[:number]), "\n".join(lines)
        cut = render(begun).last_line
        rest = render("\n".join(whole.split("\n")[cut:]))
        blocks = render(begun).blocks[:-1] if render(begun).blocks else []
        assert [*blocks, *rest.blocks] == render(whole).blocks


def test_a_text_that_breaks_the_renderer_costs_its_process_and_nothing_else() -> None:
    async def main() -> None:
        renderer = Renderer()
        assert json.loads(await renderer.render("*a*")) == {"blocks": [["p", {}, ["em", {}, "a"]]], "last_line": 0}
        pid = renderer.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InvalidRequestError, match="too hard"):
            await renderer.render("b")
        assert json.loads(await renderer.render("\n\nc"))["last_line"] == 2
        assert renderer.pid != pid
        renderer.close()
        renderer.close()
        assert renderer.pid is None

    anyio.run(main)


def test_a_text_that_takes_too_long_is_given_up() -> None:
    async def main() -> None:
        renderer = Renderer()
        await renderer.render("a")
        assert renderer.pid is not None
        os.kill(renderer.pid, signal.SIGSTOP)
        renderer.timeout_s = 0.05
        with pytest.raises(InvalidRequestError, match="show it as it is"):
            await renderer.render("b")
        assert renderer.pid is None

    anyio.run(main)


def test_the_page_asks_with_its_key(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    options = replace(options, key_hashes=frozenset({hash_key(b"secret")}))
    with serve(FakeEngine(), options, byte_tokenizer) as server:
        path, key = "/playground/markdown", {"authorization": "Bearer secret"}
        assert server.http.post(path, json={"text": "*a*"}).status_code == 401
        assert server.http.post(path, json={"text": "*a*"}, headers=key).json()["blocks"] == [
            ["p", {}, ["em", {}, "a"]]
        ]
        for body in ({}, {"text": None}, {"text": 5}, {"text": "x" * (MAX_CHARACTERS + 1)}):
            refused = server.http.post(path, json=body, headers=key)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text")
        server.service.renderer.close()


def test_without_the_page_nothing_is_rendered(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    with serve(FakeEngine(), replace(options, playground=False), byte_tokenizer) as server:
        assert server.http.post("/playground/markdown", json={"text": "a"}).status_code == 404


def test_texts_of_tokens_are_given_one_by_one(server: Loopback) -> None:
    body = {"tokens": [72, 195, 169], "return_token_texts": True}
    assert server.http.post("/detokenize", json=body).json() == {
        "prompt": "Hé",
        "token_texts": ["H", "\ufffd", "\ufffd"],
    }
    assert server.http.post("/detokenize", json={"tokens": [72]}).json() == {"prompt": "H"}
