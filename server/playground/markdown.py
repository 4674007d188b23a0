"""Markdown as a tree of elements for the page, with code in colours. No HTML is made, and none in the text is obeyed.

A node is a text, or a list: the name of an element, its attributes, its children. The page makes elements of the names
and attributes that it knows, so there is no way from an answer to markup. Mathematics stays text.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments.lexers import get_lexer_by_name
from pygments.token import Token as Kind
from pygments.token import _TokenType
from pygments.util import ClassNotFound

Node: TypeAlias = "str | list[object]"

MAX_CHARACTERS = 64_000
MAX_COLOURED_CHARACTERS = 32_000
"""Longer code stays plain."""
LINKS = ("https:", "http:", "mailto:")
PLAIN = {
    "paragraph": "p",
    "bullet_list": "ul",
    "list_item": "li",
    **{name: name for name in ("blockquote", "em", "strong", "s", "hr", "table", "thead", "tbody", "tr")},
}
CLASSES = (
    (Kind.Comment, "comment"),
    (Kind.Keyword, "keyword"),
    (Kind.Operator.Word, "keyword"),
    (Kind.Name.Tag, "keyword"),
    (Kind.Literal.String, "string"),
    (Kind.Generic.Inserted, "string"),
    (Kind.Literal.Number, "number"),
    (Kind.Generic.Deleted, "number"),
    (Kind.Name.Function, "name"),
    (Kind.Name.Class, "name"),
    (Kind.Name.Decorator, "name"),
    (Kind.Name.Attribute, "name"),
    (Kind.Generic.Heading, "name"),
    (Kind.Name.Builtin, "builtin"),
    (Kind.Name.Exception, "builtin"),
    (Kind.Name.Constant, "builtin"),
)


class Rendered(NamedTuple):
    """A text as nodes.

    Attributes:
        blocks: top-level elements in order.
        last_line: number of the first line of the last one; what comes before it stays as it is while the text grows.
    """

    blocks: list[Node]
    last_line: int


def render(text: str) -> Rendered:
    """Returns `text` (Markdown: CommonMark, tables, strikethrough, bare links, mathematics between `$` or `\\(`)."""
    root = SyntaxTreeNode(_parser().parse(text))
    tops = root.children
    last_line = next((top.map[0] for top in reversed(tops) if top.map), 0)
    return Rendered([node for top in tops for node in _nodes(top)], last_line)


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("js-default", {"html": False, "linkify": True})
    parser.use(texmath_plugin, delimiters="brackets")
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    return parser


def _nodes(node: SyntaxTreeNode) -> Iterator[Node]:
    kind = node.type
    if kind in PLAIN:
        # Paragraphs of tight lists are not marked as such.
        if kind == "paragraph" and node.hidden:
            yield from _children(node)
        else:
            yield [PLAIN[kind], {}, *_children(node)]
    elif kind == "inline":
        yield from _children(node)
    elif kind == "text":
        yield node.content
    elif kind == "softbreak":
        yield "\n"
    elif kind == "hardbreak":
        yield ["br", {}]
    elif kind == "heading":
        yield [f"h{min(6, int(node.tag[1]) + 2)}", {}, *_children(node)]
    elif kind == "ordered_list":
        start = node.attrs.get("start", 1)
        yield ["ol", {} if start == 1 else {"start": start}, *_children(node)]
    elif kind in {"th", "td"}:
        align = str(node.attrs.get("style", "")).removeprefix("text-align:")
        yield [kind, {"align": align} if align else {}, *_children(node)]
    elif kind == "code_inline":
        yield ["code", {}, node.content]
    elif kind in {"fence", "code_block"}:
        language = node.info.split(maxsplit=1)[0] if node.info.strip() else ""
        yield ["pre", {"language": language}, *_coloured(node.content, language)]
    elif kind.startswith("math"):
        yield ["math", {"display": kind != "math_inline"}, node.content.strip()]
    elif kind == "link":
        yield from _link(str(node.attrs.get("href", "")), list(_children(node)))
    elif kind == "image":  # nothing is fetched for an answer
        yield from _link(str(node.attrs.get("src", "")), [node.content or "image"])
    else:
        yield node.content


def _children(node: SyntaxTreeNode) -> Iterator[Node]:
    for child in node.children:
        yield from _nodes(child)


def _link(address: str, children: list[Node]) -> list[Node]:
    return [["a", {"href": address}, *children]] if address.lower().startswith(LINKS) else children


def _is_of(kind: _TokenType, family: _TokenType) -> bool:
    return kind[: len(family)] == family


def _coloured(code: str, language: str) -> Sequence[Node]:
    if not language or len(code) > MAX_COLOURED_CHARACTERS:
        return [code]
    try:
        lexer = get_lexer_by_name(language.lower(), stripnl=False, ensurenl=False)
    except ClassNotFound:
        return [code]
    pieces: list[tuple[str | None, str]] = []
    for kind, text in lexer.get_tokens(code):
        name = next((name for family, name in CLASSES if _is_of(kind, family)), None)
        if pieces and (pieces[-1][0] == name or not text.strip()):
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + text)
        else:
            pieces.append((name, text))
    return [text if name is None else ["span", {"class": name}, text] for name, text in pieces]
