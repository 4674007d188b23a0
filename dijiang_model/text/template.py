"""Chat templates as Hugging Face models carry them: Jinja in a sandbox, with bounded time and output.

One engine for whoever renders a template: the service, self-distillation, training on chats, the check at conversion.
The template comes with the model, never from a request.
"""

import json
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDER_S = 2.0
MAX_MESSAGE_CHARACTERS = 300

# Of the rendering in progress: several may run in threads at once.
_deadline: ContextVar[float] = ContextVar("template_deadline", default=float("inf"))


class TemplateFailure(ValueError):
    """The template refuses these messages, or cannot render them within its limits."""


class TemplateSyntaxFailure(ValueError):
    """The model's template is not valid Jinja."""


class Template:
    """A compiled chat template.

    Attributes:
        variables: names that it asks for.
    """

    def __init__(self, source: str) -> None:
        """Raises `TemplateSyntaxFailure`."""
        self._environment = _BoundedEnvironment()
        try:
            self._template = self._environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(self._environment.parse(source)))
        except (TemplateError, RecursionError) as error:
            raise TemplateSyntaxFailure(f"the model's chat template is not valid: {error}") from error

    def render(self, variables: Mapping[str, Any], *, max_characters: int) -> str:
        """Returns the text for these variables.

        Raises:
            TemplateFailure: the template raised an exception, or went over its time or `max_characters`.
        """
        _deadline.set(time.monotonic() + MAX_RENDER_S)
        room = max_characters
        pieces: list[str] = []
        try:
            for piece in self._template.generate(variables):
                _check_clock()
                room -= len(piece)
                if room < 0:
                    raise TemplateFailure("the chat template writes too much text for these messages")
                pieces.append(piece)
        except TemplateFailure:
            raise
        except Exception as error:  # a template can raise anything: TypeError, RecursionError, ...
            text = f"the chat template cannot render these messages: {error}"
            raise TemplateFailure(text[:MAX_MESSAGE_CHARACTERS]) from error
        return "".join(pieces)


def _check_clock() -> None:
    if time.monotonic() > _deadline.get():
        raise TemplateFailure(f"the chat template needs more than {MAX_RENDER_S:g} s for these messages")


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the helpers that templates expect, and a clock read at every step that can loop."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_clock()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: str | Any) -> Any:
        _check_clock()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_clock()
        return super().call(context, obj, *args, **kwargs)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateFailure(str(message)[:MAX_MESSAGE_CHARACTERS])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter this one does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
