"""Tools that an answer may call: what a request offers, and the calls in messages and answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.protocol.wire import RequestModel, ResponseModel

MAX_TOOLS = 128
NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"
FunctionName = Annotated[str, Field(pattern=NAME_PATTERN)]


class FunctionDefinition(RequestModel):
    """What can be called."""

    name: FunctionName
    """Its name: letters, digits, `_` and `-`, at most 64."""
    description: str | None = None
    """What it does, for the model."""
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments, an object; none if absent."""
    strict: bool | None = None
    """Have arguments follow the schema wherever it is called; keywords that cannot be kept to are an error."""

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is None:
            return None
        schema = {key: value for key, value in schema.items() if value is not None}  # null: as if it were not there
        if schema.get("type", "object") != "object":
            raise PydanticCustomError("parameters", "must be the schema of an object")
        return schema


class Tool(RequestModel):
    """One tool."""

    type: Literal["function"]
    """Only functions."""
    function: FunctionDefinition
    """The function."""


class NamedFunction(RequestModel):
    """A function by its name."""

    name: FunctionName
    """Of one of the tools."""


class NamedToolChoice(RequestModel):
    """This tool and no other, exactly once."""

    type: Literal["function"]
    """Only functions."""
    function: NamedFunction
    """Which one."""


class AllowedTools(RequestModel):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    """Whether one of them must be called."""
    tools: list[NamedToolChoice] = Field(min_length=1, max_length=MAX_TOOLS)
    """Which ones."""


class AllowedToolsChoice(RequestModel):
    """These tools and no others; the prompt still names all."""

    type: Literal["allowed_tools"]
    """Kind of the choice."""
    allowed_tools: AllowedTools
    """Which ones, and whether they must be called."""


def _tool_choice(value: object) -> object:
    if value is None or isinstance(value, NamedToolChoice | AllowedToolsChoice):
        return value
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return NamedToolChoice.model_validate(value)
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return AllowedToolsChoice.model_validate(value)
    raise PydanticCustomError(
        "tool_choice", 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None,
    BeforeValidator(_tool_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                {
                    "type": "object",
                    "properties": {"type": {"const": "function"}, "function": {"type": "object"}},
                    "required": ["type", "function"],
                },
                {"type": "null"},
            ]
        }
    ),
]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that an answer may or must call.

    Attributes:
        offered: what the model sees.
        callable: what it may call; fewer if one is named.
        is_forced: whether the answer is calls and nothing else.
        is_parallel: whether there may be several calls.
    """

    offered: tuple[FunctionDefinition, ...]
    callable: tuple[FunctionDefinition, ...]
    is_forced: bool
    is_parallel: bool

    @property
    def is_free(self) -> bool:
        """Whether calls need not be valid: nothing is forced, strict or limited."""
        return not self.is_forced and self.is_parallel and not any(tool.strict for tool in self.callable)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of the tools an answer may or must call.

    Attributes:
        mode: `none`, `auto` or `required`.
        names: the only ones that may be called; empty: all.
        is_one: whether exactly one is called.
    """

    mode: str = "auto"
    names: tuple[str, ...] = ()
    is_one: bool = False


def check_tools(names: Sequence[str], choice: Choice) -> None:
    """Refuses tools of one name, and a choice that there is not.

    Args:
        names: of the tools offered.

    Raises:
        InvalidRequestError: 400.
    """
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequestError(f"two tools are called {name!r}", param="tools", code="invalid_value")
    if not names and (choice.mode == "required" or choice.names):
        raise InvalidRequestError("`tool_choice` needs `tools`", param="tool_choice", code="invalid_value")
    for name in choice.names:
        if name not in names:
            raise InvalidRequestError(f"there is no tool called {name!r}", param="tool_choice", code="invalid_value")


def tool_use_of(offered: tuple[FunctionDefinition, ...], choice: Choice, *, is_parallel: bool) -> ToolUse | None:
    """How tools are used; None: not at all."""
    if not offered or choice.mode == "none":
        return None
    callable_ = tuple(function for function in offered if not choice.names or function.name in choice.names)
    is_forced = choice.mode == "required"
    return ToolUse(offered, callable_, is_forced=is_forced, is_parallel=is_parallel and not choice.is_one)


class ToolFields(RequestModel):
    """Tools, and how they are used."""

    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    """Functions that the answer may call."""
    tool_choice: ToolChoice = None
    """`auto` (default): text, calls or both; `none`: only text; `required`: calls; or one function by its name."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls (default true)."""

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        check_tools([tool.function.name for tool in self.tools or ()], self._choice)
        return self

    @property
    def _choice(self) -> Choice:
        choice = self.tool_choice
        if isinstance(choice, NamedToolChoice):
            return Choice("required", (choice.function.name,), is_one=True)
        if isinstance(choice, AllowedToolsChoice):
            allowed = choice.allowed_tools
            return Choice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))
        return Choice("auto" if choice is None else choice)

    @property
    def tool_use(self) -> ToolUse | None:
        """How tools are used; None: not at all."""
        offered = tuple(tool.function for tool in self.tools or ())
        return tool_use_of(offered, self._choice, is_parallel=self.parallel_tool_calls is not False)


class FunctionCallIn(RequestModel):
    """A call that was made earlier in the conversation."""

    name: FunctionName
    """What was called."""
    arguments: str
    """Its arguments, as the text of a JSON object."""

    @property
    def arguments_value(self) -> Any:
        """The arguments; the text itself if it is not JSON, for models do not always write JSON."""
        try:
            return json.loads(self.arguments)
        except (ValueError, RecursionError):
            return self.arguments


class ToolCallIn(RequestModel):
    """A call in a message of the assistant."""

    id: str = Field(max_length=256)
    """Its id, which the tool's answer names."""
    type: Literal["function"]
    """Only functions."""
    function: FunctionCallIn
    """The call."""


class FunctionCallOut(ResponseModel):
    """What is called, and how."""

    name: str = ""
    """Which function; in a stream only in the call's first delta."""
    arguments: str
    """Its arguments, the text of a JSON object; in a stream the next piece of it."""


class ToolCallOut(ResponseModel):
    """A call of a tool in an answer."""

    index: int = 0
    """Number of the call, from 0; only in a stream."""
    id: str = ""
    """`call_...`; in a stream only in the call's first delta."""
    type: Literal["function"] = "function"
    """Only functions."""
    function: FunctionCallOut
    """The call."""
