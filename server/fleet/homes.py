"""Which replica has what: states that it wrote, beginnings of prompts that it has read.

A replica that has a state, or the prefix of a prompt, need not copy or compute it. All of that is a hint: states are in
the store that replicas share, and prefixes are computed again.
"""

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.fleet.exchange import Exchange

MAX_HOMES = 200_000
MAX_KEYS, TEXT_STEP = 32, 1024
_ID = re.compile(rb'"((?:state|resp|conv)_[0-9a-f]{32})"')
_STATE_FIELDS = ("state_id", "previous_response_id", "conversation")
_GENERATING = ("/completions", "/responses", "/messages", "/api/chat", "/api/generate", "tokenize", "/apply-template")


class Homes:
    """The replica of each key that was seen last; used by several threads."""

    def __init__(self, max_keys: int = MAX_HOMES) -> None:
        self._max_keys = max_keys
        self._replicas: OrderedDict[str, str] = OrderedDict()
        self._guard = threading.Lock()
        self.running: frozenset[str] = frozenset()

    def note(self, keys: Iterable[str], replica: str) -> None:
        """A replica has these."""
        with self._guard:
            for key in keys:
                self._replicas[key] = replica
                self._replicas.move_to_end(key)
            while len(self._replicas) > self._max_keys:
                self._replicas.popitem(last=False)

    def of(self, keys: Iterable[str]) -> str | None:
        """The replica of the first key that has one that runs."""
        with self._guard:
            homes = (self._replicas.get(key) for key in keys)
            return next((home for home in homes if home is not None and home in self.running), None)


_HERE = Homes()


def homes_here() -> Homes:
    """Those of this process: the router of a handle, and whoever reads the answers of its requests, are in the same."""
    return _HERE


def ids_in(data: bytes) -> list[str]:
    """Ids of states, responses and conversations in a piece of an answer."""
    return [found.decode() for found in _ID.findall(data)]


def exchange_of(scope: Mapping[str, object], body: bytes, *, key: str) -> Exchange:
    """A request, read as far as routing needs; what is wrong with it, the engine says.

    Args:
        key: of the client, so that one client's prefixes are no hint for another's.
    """
    path, method = str(scope["path"]), scope["method"]
    ids = re.findall(r"(?:state|resp|conv)_[0-9a-f]{32}", path)
    if method != "POST":
        return Exchange(scope, body, tuple(ids), may_repeat=method in ("GET", "HEAD"))
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return Exchange(scope, body, tuple(ids), may_repeat=False)
    given = [fields[name] for name in _STATE_FIELDS if isinstance(fields.get(name), str)]
    keeps = fields.get("return_state")
    is_once = isinstance(keeps, dict) and bool(keeps.get("update") or keeps.get("name"))
    state = fields.get("state_id")
    return Exchange(
        scope,
        body,
        (*given, *ids, *_prefixes(fields, key)),
        may_repeat=any(part in path for part in _GENERATING) and not is_once,
        state_id=state if isinstance(state, str) else None,
    )


def _prefixes(fields: Mapping[str, Any], key: str) -> list[str]:
    """Digests of the beginnings of a prompt, the longest first."""
    messages = fields.get("messages", fields.get("input"))
    pieces: Sequence[object] = ()
    if isinstance(messages, list):
        pieces = messages[:MAX_KEYS]
    else:
        prompt = fields.get("prompt", messages)
        if isinstance(prompt, str | list):
            pieces = [prompt[start : start + TEXT_STEP] for start in range(0, len(prompt), TEXT_STEP)][:MAX_KEYS]
    digest = hashlib.sha256(f"{key}\n{fields.get('cache_salt')}\n{fields.get('system')}".encode("utf-8", "replace"))
    found: list[str] = []
    for piece in pieces:
        digest.update(json.dumps(piece).encode())
        found.append(digest.hexdigest())
    return found[::-1]
