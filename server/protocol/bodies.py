"""From the bytes of a body to a validated request, in a time that no body up to the size limit makes long.

Lengths come before items, unknown keys are dropped before anything looks at them, and what is only many small values
is refused before it becomes objects. Nesting has a limit here, so that no later encoder of a client's JSON meets more.
"""

import gc
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args

import annotated_types
import orjson
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.errors import InvalidRequestError

MAX_DEPTH = 100
MAX_CONTAINERS = 100_000
MAX_TEXTS = 200_000
EXACT_INTEGERS = 2.0**53
SMALL_BYTES = 64 << 10
"""Bodies up to here have too few values to matter."""
M = TypeVar("M", bound=BaseModel)
_collecting = threading.Lock()
_num_without = 0


def parse_body(content: bytes, model: type[M]) -> M:
    """A validated request.

    Raises:
        orjson.JSONDecodeError: not JSON in UTF-8 (no NaN, no lone surrogates).
        pydantic.ValidationError: not this request.
        InvalidRequestError: not this request, or too many values, or nested too deeply.
    """
    with _without_collector():
        if len(content) > SMALL_BYTES:
            _check_counts(content)
        body = orjson.loads(content)
        check_depth(body)
        return model.model_validate(_prepared(body, model) if isinstance(body, dict) else body)


def check_depth(value: object, param: str | None = None) -> None:
    """Raises `InvalidRequestError` for JSON that is nested more than 100 levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
    if not level:
        return
    where = "the body" if param is None else f"`{param}`"
    raise InvalidRequestError(f"{where} is nested more than {MAX_DEPTH} levels deep", param=param, code="invalid_value")


def _check_counts(content: bytes) -> None:
    """Counts lists, objects and texts without making any."""
    bare = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_texts = bare.count(b'"') // 2
    _at_most(num_texts, MAX_TEXTS, "texts")
    outside = b"".join(bare.split(b'"')[::2])
    _at_most(outside.count(b"[") + outside.count(b"{"), MAX_CONTAINERS, "lists and objects")


def _at_most(count: int, limit: int, noun: str) -> None:
    if count > limit:
        raise InvalidRequestError(f"the body has {count:,} {noun}, the limit is {limit:,}", code="invalid_value")


def _prepared(body: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The known fields, whole numbers as integers, no list longer than it may be."""
    known, extra = _fields(model)
    kept = {name: value for name, value in body.items() if name in known or name in extra}
    for name, value in kept.items():
        limit, is_integer = known.get(name, (None, False))
        if limit is not None and isinstance(value, list | dict) and len(value) > limit:
            raise InvalidRequestError(
                f"{name}: has {len(value):,} items, the limit is {limit:,}", param=name, code="invalid_value"
            )
        if is_integer:
            kept[name] = _integers(name, value) if isinstance(value, list) else _whole(value)
    return kept


def _integers(name: str, values: list[Any]) -> list[Any]:
    """The list, unless something in it is no integer: one error, not one for each item."""
    values = [_whole(item) for item in values]
    wrong = next((number for number, item in enumerate(values) if type(item) is not int), None)
    if wrong is not None:
        param = f"{name}[{wrong}]"
        raise InvalidRequestError(f"{param}: must be an integer", param=param, code="invalid_value")
    return values


def _whole(value: object) -> object:
    """`100.0` is an integer to JSON; beyond 2^53 nobody can tell which one."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= EXACT_INTEGERS
    return int(value) if is_whole else value  # type: ignore[call-overload]


@cache
def _fields(model: type[BaseModel]) -> tuple[Mapping[str, tuple[int | None, bool]], frozenset[str]]:
    """Of each field its greatest length, if there is one, and whether it is an integer; names that it knows besides."""
    known = {}
    for name, field in model.model_fields.items():
        known[field.alias or name] = (_max_length(field), _is_integer(field.annotation))
    others = {*getattr(model, "refused", ()), *getattr(model, "other_names", ())}
    return known, frozenset(others)


def _max_length(field: FieldInfo) -> int | None:
    lengths = [item.max_length for item in field.metadata if isinstance(item, annotated_types.MaxLen)]
    for part in get_args(field.annotation):
        for item in getattr(part, "__metadata__", ()):
            found = item.metadata if isinstance(item, FieldInfo) else [item]
            lengths += [each.max_length for each in found if isinstance(each, annotated_types.MaxLen)]
    return min(lengths, default=None)


def _is_integer(annotation: object) -> bool:
    parts = get_args(annotation) if NoneType in get_args(annotation) else (annotation,)
    return [kind for kind in parts if kind is not NoneType] in ([int], [list[int]])


@contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of new objects and no garbage: the collector would look through all of them again and again."""
    global _num_without
    with _collecting:
        _num_without += 1
        gc.disable()
    try:
        yield
    finally:
        with _collecting:
            _num_without -= 1
            if _num_without == 0:
                gc.enable()
