"""Typed reading of a JSON object that goes on after a problem, so that one error can list them all.

Every getter records what is wrong and returns a stand-in of the right type; nothing that was read may
be used before `raise_if_any` has passed.
"""

import json
from collections.abc import Collection, Mapping
from math import isfinite
from pathlib import Path
from typing import cast

from dijiang_model.errors import ConfigError
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.stub_files import stub_problem

MAX_FILE_BYTES = 16 * 2**20

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class Fields:
    """The members of one JSON object.

    Attributes:
        problems: what was found wrong so far; shared by nested objects.
    """

    def __init__(self, document: Mapping[str, object], *, prefix: str = "", problems: list[str] | None = None) -> None:
        self._document = document
        self._prefix = prefix
        self.problems: list[str] = [] if problems is None else problems

    def __contains__(self, name: str) -> bool:
        """True where the field is there and not null."""
        return self._document.get(name) is not None

    def report(self, problem: str) -> None:
        """Adds a problem that concerns several fields."""
        self.problems.append(problem)

    def value(self, name: str) -> object:
        return self._document.get(name)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number >= `minimum`; absent or null: `default`, a problem where that is None."""
        value = self._value_or(name, default)
        if value is None:
            return minimum
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self._wrong(name, value, f"a whole number of at least {minimum}")
            return minimum
        return value

    def integers(self, name: str, *, minimum: int = 1) -> tuple[int, ...]:
        """A list of whole numbers >= `minimum`; absent or null: a problem."""
        value = self._value_or(name, None)
        if value is None:
            return ()
        whole = isinstance(value, list | tuple) and all(
            isinstance(item, int) and not isinstance(item, bool) and item >= minimum for item in value
        )
        if not whole:
            self._wrong(name, value, f"a list of whole numbers of at least {minimum}")
            return ()
        return tuple(cast("list[int]", value))

    def number(self, name: str, default: float | None = None, *, minimum: float | None = None) -> float:
        """A finite number >= `minimum`, or > 0; absent or null: `default`, a problem where that is None."""
        value = self._value_or(name, default)
        if value is None:
            return 1.0
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not is_number or (cast(float, value) <= 0 if minimum is None else cast(float, value) < minimum):
            self._wrong(
                name, value, "a finite number above 0" if minimum is None else f"a number of at least {minimum}"
            )
            return 1.0
        return float(cast(float, value))

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value_or(name, default)
        if not isinstance(value, bool):
            self._wrong(name, value, "true or false")
            return default
        return value

    def text(self, name: str, default: str | None = None, *, choices: Collection[str] | None = None) -> str:
        """A string, one of `choices` where given; absent or null: `default`, a problem where that is None."""
        value = self._value_or(name, default)
        if value is None:
            return ""
        if not isinstance(value, str) or (choices is not None and value not in choices):
            self._wrong(name, value, "a string" if choices is None else "one of " + ", ".join(sorted(choices)))
            return ""
        return value

    def optional_text(self, name: str) -> str | None:
        return self.text(name, "") if name in self else None

    def nested(self, name: str) -> "Fields":
        """An object; absent, null or of another type: an empty one, and a problem unless absent or null."""
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            self._wrong(name, value, "an object")
        members = value if isinstance(value, dict) else {}
        return Fields(members, prefix=f"{self._prefix}{name}.", problems=self.problems)

    def names(self) -> list[str]:
        return list(self._document)

    def only(self, known: Collection[str]) -> None:
        """A member outside `known` is a problem."""
        for name in self._document:
            if name not in known:
                self.report(f"unknown field {self._prefix}{name}")

    def raise_if_any(self, title: str) -> None:
        """Raises a ConfigError that lists every problem."""
        if self.problems:
            raise ConfigError(problem_list(title, list(dict.fromkeys(self.problems))))

    def _value_or(self, name: str, default: object) -> object:
        value = self.value(name)
        if value is None:
            if default is None:
                self.report(f"{self._prefix}{name} is missing")
            return default
        return value

    def _wrong(self, name: str, value: object, wanted: str) -> None:
        self.report(f"{self._prefix}{name} is {json.dumps(value, default=str)[:100]}, must be {wanted}")


def read_json_object(path: Path) -> dict[str, object]:
    """The object in a UTF-8 JSON file of at most 16 MiB.

    Raises:
        ConfigError: unreadable, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
        problem = stub_problem(path)
        if problem is not None:
            raise ConfigError(problem)
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds {type(document).__name__}, must be a JSON object")
    return document
