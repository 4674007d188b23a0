"""What is stored of a response in the background, so that any server can go on with it, or make it anew."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from server.responses.events import PIECES
from server.responses.output import Pieces
from server.states.store import REPLAY_KEY, SnapshotRecord, TurnEnd

NOTHING_YET: Mapping[str, Any] = {"items": [], "pending": []}
"""Output that has not begun; see `ResponseOutput.suspend`."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """See the module.

    Attributes:
        source: the request as it came, JSON.
        seed: of its tokens.
        base: the conversation that it goes on from, which may be gone; None: it begins one.
        prompt_token_ids: what comes after that. Not made again: a template may tell the time.
        token_ids: put out so far.
        num_cached_tokens: of the prompt, as `usage` counts them.
        output: of `ResponseOutput.suspend`.
        pieces: in which it came.
        num_failures: engines that failed under it.
        resumes_at: the file of the snapshot behind `token_ids`; None: it is made anew, from its prompt.
    """

    source: str
    seed: int = 0
    base: SnapshotRecord | None = None
    prompt_token_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0
    output: Mapping[str, Any] = field(default_factory=dict)
    pieces: Pieces = field(default_factory=Pieces)
    resumes_at: str | None = None
    num_failures: int = 0

    def anew(self, prompt_token_ids: tuple[int, ...]) -> "Unfinished":
        """What is needed to make it anew, with the same tokens."""
        num = self.num_failures
        return Unfinished(self.source, self.seed, self.base, prompt_token_ids, output=NOTHING_YET, num_failures=num)

    @property
    def num_past_cached_tokens(self) -> int:
        """Tokens of the conversation before it that are not fed again."""
        return 0 if self.base is None else self.base.position

    def stored(self) -> dict[str, Any]:
        """As a part of the stored response; the pieces are stored there anyway."""
        values = asdict(self)
        del values["pieces"]
        return {REPLAY_KEY: values}

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Unfinished":
        """What `stored` has stored."""
        values: dict[str, Any] = dict(body[REPLAY_KEY])
        if (base := values.pop("base")) is not None:
            base = SnapshotRecord(**{**base, "pending": tuple(base["pending"]), "turn": TurnEnd(base["turn"])})
        values |= {name: tuple(values[name]) for name in ("prompt_token_ids", "token_ids")}
        return cls(**values, base=base, pieces=Pieces(*body[PIECES]))
