"""Plain values about log-probabilities that cross the engine's process boundary. Standard library only.

They are those of the model itself: before penalties, bias, temperature and whatever else shapes sampling.
Tables are packed, for 21 numbers at each of 200,000 places are too many Python objects.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """Whose log-probabilities a request wants.

    Attributes:
        num_output: how many most likely tokens at each place of the output, beside the sampled one; None: nothing.
        num_prompt: the same at each place of the prompt but the first; None: nothing.
        token_ids: further tokens, at each place of the output that is reported.
    """

    num_output: int | None = None
    num_prompt: int | None = None
    token_ids: tuple[int, ...] = ()


NO_LOGPROBS = LogprobOptions()


@dataclass(frozen=True, slots=True)
class LogprobTable:
    """Log-probabilities at R consecutive places, C columns each, row by row, in this machine's byte order.

    The first column is the token that is there, then come the most likely in order, then, of the output,
    `LogprobOptions.token_ids`.

    Attributes:
        num_columns: C >= 1.
        token_ids: R * C times int32.
        values: R * C times float32; natural logarithms, possibly -inf or NaN.
        ranks: R times int32: place of the first column's token among all tokens, from 1.
    """

    num_columns: int
    token_ids: bytes
    values: bytes
    ranks: bytes

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int]], values: Sequence[Sequence[float]]) -> "LogprobTable":
        """A table from rows of plain numbers, all of one length; each row's rank is counted within the row."""
        ranks = [1 + sum(value > row[0] for value in set(row[1:])) for row in values]
        return cls(
            len(token_ids[0]),
            array("i", [token_id for row in token_ids for token_id in row]).tobytes(),
            array("f", [value for row in values for value in row]).tobytes(),
            array("i", ranks).tobytes(),
        )

    @property
    def num_rows(self) -> int:
        return len(self.ranks) // array("i").itemsize

    def rows(self) -> list["LogprobRow"]:
        """The places one by one."""
        token_ids, values, ranks = array("i", self.token_ids), array("f", self.values), array("i", self.ranks)
        width = self.num_columns
        return [
            LogprobRow(
                tuple(token_ids[row * width : (row + 1) * width]), tuple(values[row * width : (row + 1) * width]), rank
            )
            for row, rank in enumerate(ranks)
        ]

    @classmethod
    def joined(cls, tables: Sequence["LogprobTable"]) -> "LogprobTable | None":
        """Tables of as many columns one below the other; None without any."""
        if len(tables) < 2:
            return tables[0] if tables else None
        return cls(
            tables[0].num_columns,
            b"".join(table.token_ids for table in tables),
            b"".join(table.values for table in tables),
            b"".join(table.ranks for table in tables),
        )

    def head(self, num_rows: int) -> "LogprobTable":
        """The first places alone."""
        end = num_rows * self.num_columns * array("i").itemsize
        return LogprobTable(
            self.num_columns,
            self.token_ids[:end],
            self.values[:end],
            self.ranks[: num_rows * array("i").itemsize],
        )


@dataclass(frozen=True, slots=True)
class LogprobRow:
    """One place of a table.

    Attributes:
        token_ids: [C]; the first is the token that is there.
        values: [C] their log-probabilities.
        rank: of the first.
    """

    token_ids: tuple[int, ...]
    values: tuple[float, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """A step's tables: of sampled tokens by place in `Batch.sampled`, of prompts by place in `Batch.chunks`."""

    sampled: Mapping[int, LogprobTable]
    prompts: Mapping[int, LogprobTable]


NO_STEP_LOGPROBS = StepLogprobs({}, {})
