"""From the engine's packed tables to log-probabilities on the wire.

Tables stay packed while they wait, and only become lists of objects when they are written.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from dijiang_model.text.vocabulary import Vocabulary
from server.engine.types.logprobs import LogprobRow, LogprobTable
from server.errors import InvalidRequestError
from server.protocol.logprobs import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
)

NOT_FINITE = -9999.0
MAX_WHOLE_ENTRIES = 1_000_000
"""Log-probabilities in an answer that is not streamed; a stream may carry any number."""


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Consecutive tokens and what was likely in their place.

    Attributes:
        token_ids: the tokens.
        offsets: of each, characters of the text before it.
        table: a row for each token, or for each but the first (the first of a prompt has none); None: no row.
    """

    token_ids: tuple[int, ...]
    offsets: tuple[int, ...]
    table: LogprobTable | None

    @property
    def num_entries(self) -> int:
        """Log-probabilities in the table."""
        return 0 if self.table is None else self.table.num_rows * self.table.num_columns

    def rows(self) -> Iterator[LogprobRow | None]:
        """A row for each token; None for one that has none."""
        rows = [] if self.table is None else self.table.rows()
        if len(rows) < len(self.token_ids):
            yield None
        yield from rows


class LogprobFormat:
    """Writes the tables of one request."""

    def __init__(self, vocabulary: Vocabulary | None, *, names_tokens: bool, as_token_ids: bool) -> None:
        """
        Args:
            vocabulary: texts of tokens; None: the model has no tokenizer.
            names_tokens: whether the request names the tokens to report of its answer; else the most likely ones are.
            as_token_ids: write `token_id:7` for the text of token 7, as without a tokenizer.
        """
        self._vocabulary = vocabulary
        self._names_tokens = names_tokens
        self._as_token_ids = as_token_ids or vocabulary is None
        self._text = cache(self._decode)

    def completion(
        self, prompt: Iterable[ScoredTokens], output: Iterable[ScoredTokens], *, num_top: int
    ) -> CompletionLogprobs:
        """The parallel lists of a completion."""
        answer = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for part, columns in [(part, _likeliest) for part in prompt] + [(part, self._of_output) for part in output]:
            answer.tokens += map(self._text, part.token_ids)
            answer.text_offset += part.offsets
            for row in part.rows():
                answer.token_logprobs.append(None if row is None else finite(row.values[0]))
                answer.top_logprobs.append(None if row is None else self._by_text(columns(row, num_top)))
        return answer

    def chat(self, places: Iterable[ScoredTokens], *, num_top: int) -> ChatLogprobs:
        """The list of a chat answer."""
        content = []
        for part in places:
            for row in part.rows():
                assert row is not None
                columns = self._of_output(row, num_top)
                top = [self._top(*entry) for entry in (columns if self._names_tokens else columns[1:])]
                token = self._top(row.token_ids[0], row.values[0])
                content.append(ChatTokenLogprob.model_construct(**token.__dict__, top_logprobs=top))
        return ChatLogprobs(content=content, refusal=None)

    def prompt(self, places: Iterable[ScoredTokens], *, num_top: int) -> PromptLogprobs:
        """The list of dictionaries by token id."""
        return [None if row is None else self._by_token_id(row, num_top) for part in places for row in part.rows()]

    def _of_output(self, row: LogprobRow, num_top: int) -> list[tuple[int, float]]:
        """The token itself and what is reported beside it; named tokens once each."""
        if not self._names_tokens:
            return _likeliest(row, num_top)
        return list(dict(zip(row.token_ids, row.values, strict=True)).items())

    def _by_text(self, columns: Iterable[tuple[int, float]]) -> dict[str, float]:
        values: dict[str, float] = {}
        for token_id, value in columns:
            text, value = self._text(token_id), finite(value)
            values[text] = max(value, values.get(text, value))
        return values

    def _by_token_id(self, row: LogprobRow, num_top: int) -> dict[str, PromptLogprob]:
        entries: dict[str, PromptLogprob] = {}
        for place, (token_id, value) in enumerate(_likeliest(row, num_top)):
            rank = place or row.rank
            entry = PromptLogprob.model_construct(logprob=finite(value), rank=rank, decoded_token=self._text(token_id))
            entries.setdefault(str(token_id), entry)
        return entries

    def _top(self, token_id: int, value: float) -> ChatTopLogprob:
        spelling = b"" if self._vocabulary is None else self._vocabulary.bytes_of(token_id)
        return ChatTopLogprob.model_construct(token=self._text(token_id), logprob=finite(value), bytes=list(spelling))

    def _decode(self, token_id: int) -> str:
        if self._as_token_ids or self._vocabulary is None:
            return f"token_id:{token_id}"
        return self._vocabulary.bytes_of(token_id).decode("utf-8", "replace")


def _likeliest(row: LogprobRow, num_top: int) -> list[tuple[int, float]]:
    """The token itself and the most likely ones, of which it may be one."""
    return list(zip(row.token_ids, row.values, strict=True))[: 1 + num_top]


def finite(value: float) -> float:
    """JSON has no -inf and no NaN."""
    return value if math.isfinite(value) else NOT_FINITE


def check_num_entries(num_entries: int) -> None:
    """Raises a 400 for more log-probabilities than an answer that is not streamed may have."""
    if num_entries > MAX_WHOLE_ENTRIES:
        raise InvalidRequestError(
            f"an answer that is not streamed carries at most {MAX_WHOLE_ENTRIES:,} log-probabilities; "
            "use `stream: true`, or ask for fewer",
            param="logprobs",
            code="invalid_value",
        )
