"""One step as it is planned, and what it sampled. Standard library only."""

from dataclasses import dataclass

from server.engine.sequence import Chunk, Sequence
from server.engine.types.logprobs import NO_STEP_LOGPROBS, StepLogprobs


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    Attributes:
        chunks: decoding sequences first, then those whose drafts are verified, then prompt chunks.
        num_decode: how many of the chunks decode.
        num_verified: how many chunks behind them verify drafts.
        sampled: for each token that is sampled, in order, its chunk (of a verification the beginning up to it).
        preempted: sequences whose state is to be copied before the step, from the slot that they have lost.
        resumed: sequences whose state and last token are to be put into their new slot before the step.
    """

    chunks: tuple[Chunk, ...]
    num_decode: int
    sampled: tuple[Chunk, ...]
    num_verified: int = 0
    preempted: tuple[tuple[Sequence, int], ...] = ()
    resumed: tuple[Sequence, ...] = ()

    @classmethod
    def of(cls, decoding: list[Chunk], verifying: list[Chunk], prompts: list[Chunk]) -> "Batch | None":
        """A step of these chunks; None without any."""
        chunks = (*decoding, *verifying, *prompts)
        if not chunks:
            return None
        sampled = (*decoding, *(sample for chunk in (*verifying, *prompts) for sample in chunk.samples))
        return cls(chunks, len(decoding), sampled, len(verifying))

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens in this step."""
        return sum(chunk.length for chunk in self.chunks[self.num_decode + self.num_verified :])


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled: one token and one fault flag for each of `Batch.sampled`, in order; what was scored."""

    token_ids: list[int]
    faults: list[bool]
    logprobs: StepLogprobs = NO_STEP_LOGPROBS
