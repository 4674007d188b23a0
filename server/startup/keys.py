"""Who is let in: keys from settings and files, and what each may have, from a TOML file (`keys_file`):

    [[keys]]
    name = "ann"                 # in logs
    key = "sha256:HEX"           # or the key itself
    role = "user"                # or "admin": for /admin/ alone
    weight = 2                   # beside others of 1
    max_running = 8              # 0: no limit
    priority_across_keys = true

Further limits: `max_queue`, `max_queue_tokens`, `rate_limit_requests`, `rate_limit_tokens`. Everything but `name` and
`key` may be left out.
"""

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from server.keys import KeyFacts, hash_key
from server.startup.errors import StartError
from server.startup.settings import Settings

HASHED_KEY = "sha256:"


class KeyOptions(TypedDict):
    """The part of `ServiceOptions` that is about keys."""

    key_hashes: frozenset[bytes]
    admin_key_hashes: frozenset[bytes]
    keys: tuple[KeyFacts, ...]


def key_options(settings: Settings) -> KeyOptions:
    """Every key that is let in, and what is known of those in `keys_file`.

    Raises:
        StartError: a `sha256:` entry that is no SHA-256, a file without keys, or one that cannot be used.
    """
    facts = () if settings.keys_file is None else read_keys_file(settings.keys_file)
    users = {one.digest for one in facts if not one.is_admin}
    admins = {one.digest for one in facts if one.is_admin}
    return {
        "key_hashes": _digests(settings.api_keys, settings.api_keys_file, name="api_keys") | users,
        "admin_key_hashes": _digests(settings.admin_keys, settings.admin_keys_file, name="admin_keys") | admins,
        "keys": facts,
    }


def _digests(given: Sequence[SecretStr], file: Path | None, *, name: str) -> frozenset[bytes]:
    keys = [key.get_secret_value() for key in given]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except OSError as error:
            raise StartError(f"{name}_file: {file} cannot be read: {error.strerror}") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise StartError(f"{name}_file: {file} holds no key")
        keys += found
    return frozenset(key_digest(key, name) for key in keys)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=100, pattern=r"^[\x21-\x7e]+$")
    key: str = Field(min_length=1)
    role: str = Field("user", pattern="^(user|admin)$")
    weight: int = Field(1, ge=1, le=1_000)
    max_running: int | None = Field(None, ge=0)
    max_queue: int | None = Field(None, ge=0)
    max_queue_tokens: int | None = Field(None, ge=0)
    rate_limit_requests: int | None = Field(None, ge=0)
    rate_limit_tokens: int | None = Field(None, ge=0)
    priority_across_keys: bool | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: list[_Entry] = Field(min_length=1)


def read_keys_file(path: Path) -> tuple[KeyFacts, ...]:
    """The keys of a file.

    Raises:
        StartError: it cannot be read, says something unknown, or names a key or a name twice.
    """
    try:
        entries = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).keys
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartError(f"keys_file: {path} cannot be read: {error}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise StartError(f"keys_file: {path}: {place}: {problem['msg']}") from error
    facts = tuple(_facts(entry) for entry in entries)
    for what, values in (("name", [one.name for one in facts]), ("key", [one.digest for one in facts])):
        if len(set(values)) < len(values):
            raise StartError(f"keys_file: {path}: the same {what} is there twice")
    return facts


def _facts(entry: _Entry) -> KeyFacts:
    limits = entry.model_dump(exclude={"name", "key", "role"})
    return KeyFacts(key_digest(entry.key, "keys_file"), entry.name, entry.role == "admin", **limits)


def key_digest(key: str, name: str) -> bytes:
    """SHA-256 of a key, which may be written as that already.

    Raises:
        StartError: it begins with `sha256:` and is none; `name` says where.
    """
    if not key.startswith(HASHED_KEY):
        return hash_key(key.encode())
    try:
        digest = bytes.fromhex(key.removeprefix(HASHED_KEY))
    except ValueError:
        digest = b""
    if len(digest) != len(hash_key(b"")):
        raise StartError(f"{name}: an entry that begins with sha256: is not followed by 64 hexadecimal digits")
    return digest


class Files:
    """Some files, and whether any was written since the last look."""

    def __init__(self, paths: Iterable[Path | None]) -> None:
        self._paths = tuple(path for path in paths if path is not None)
        self._seen = self._look()

    def have_changed(self) -> bool:
        """Since the last call."""
        seen, self._seen = self._seen, self._look()
        return seen != self._seen

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_state(path) for path in self._paths]


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
