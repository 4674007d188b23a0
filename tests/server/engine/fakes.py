"""A runner without a model: it keeps each slot's history and checks every promise of the scheduler."""

import zlib
from collections import deque
from collections.abc import Iterator

from server.engine.batch import Batch, StepResult
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.sequence import Chunk, Sequence
from server.engine.speculation.cost_model import StepCosts
from server.engine.speculation.drafts import OwnTextDrafter
from server.engine.speculation.rules import Speculation
from server.engine.types.requests import EngineInfo, GenerationRequest, SamplingParams

VOCAB_SIZE = 50
EOS_TOKEN_ID = 49


def request(request_id: str, *prompt: int, **sampling: object) -> GenerationRequest:
    """A greedy request; the prompt is [1, 2, 3] unless given."""
    params = SamplingParams(**{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return GenerationRequest(request_id, prompt or (1, 2, 3), params)


def scheduler(**changes: object) -> Scheduler:
    """Two slots, eight tokens a step, plenty of room to wait."""
    values: dict[str, object] = {"num_slots": 2, "max_step_tokens": 8, "max_waiting": 100, "vocab_size": VOCAB_SIZE}
    return Scheduler(**{**values, "eos_token_ids": (EOS_TOKEN_ID,), **changes})  # type: ignore[arg-type]


def next_token(history: list[int]) -> int:
    """What the fake model says after these tokens; never the end of a sequence."""
    return zlib.crc32(bytes(history)) % EOS_TOKEN_ID


def expected_output(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What a request of this prompt must get, alone or not."""
    history = list(prompt)
    for _ in range(num_tokens):
        history.append(next_token(history))
    return history[len(prompt) :]


class FakeRunner:
    """Slots hold the list of tokens that were fed to them.

    Attributes:
        faulty: ids of requests whose next sampled row is reported as faulty.
        scripted: tokens to sample for a request instead of the model's.
        released: sequences that were given back, in order.
        batches: everything that was launched.
    """

    def __init__(self, *, max_step_tokens: int = 8) -> None:
        self.faulty: set[str] = set()
        self.scripted: dict[str, list[int]] = {}
        self.released: list[Sequence] = []
        self.batches: list[Batch] = []
        self._max_step_tokens = max_step_tokens
        self._histories: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}
        self._parked: dict[Sequence, tuple[list[int], int]] = {}
        self._results: deque[StepResult] = deque()

    def launch(self, batch: Batch) -> None:
        self._check(batch)
        self.batches.append(batch)
        for sequence, slot in batch.preempted:
            self._parked[sequence] = (self._histories.pop(slot, []), self._last.pop(slot, 0))
        for sequence in batch.resumed:
            self._histories[sequence.slot], self._last[sequence.slot] = self._parked.pop(sequence)
        for chunk in batch.chunks:
            source_slot = chunk.sequence.start.source_slot
            if chunk.is_first and source_slot is not None:
                self._histories[chunk.slot] = list(self._histories[source_slot])
        tokens: list[int] = []
        for chunk in batch.chunks:
            if chunk.verified:
                tokens += self._verify(chunk)
            else:
                self._feed(chunk)
                tokens += [self._sample(chunk)] if chunk.output_index is not None else []
        faults = [chunk.sequence.request_id in self.faulty for chunk in batch.sampled]
        self._results.append(StepResult(tokens, faults))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def complete(self) -> None:
        """Every step is complete when it is launched."""

    def release(self, sequence: Sequence) -> None:
        assert sequence not in self.released
        self.released.append(sequence)

    def _check(self, batch: Batch) -> None:
        slots = [chunk.slot for chunk in batch.chunks]
        assert len(set(slots)) == len(slots)
        assert 0 not in slots
        assert 0 < sum(chunk.length for chunk in batch.chunks) <= self._max_step_tokens
        num_known = batch.num_decode + batch.num_verified
        assert all(chunk.is_decode == (row < batch.num_decode) for row, chunk in enumerate(batch.chunks))
        assert all(
            bool(chunk.verified) == (batch.num_decode <= row < num_known) for row, chunk in enumerate(batch.chunks)
        )
        samples = [sample for chunk in batch.chunks for sample in chunk.samples]
        assert [(s.slot, s.output_index) for s in samples] == [(s.slot, s.output_index) for s in batch.sampled]
        assert not any(chunk.sequence in self.released for chunk in batch.chunks)

    def _feed(self, chunk: Chunk) -> None:
        if chunk.start == 0:
            self._histories[chunk.slot] = []
        history = self._histories[chunk.slot]
        assert len(history) == chunk.start
        history.extend(chunk.token_ids or (self._last[chunk.slot],))
        assert len(history) == chunk.start + chunk.length

    def _verify(self, chunk: Chunk) -> list[int]:
        """Feeds one token after the other as long as they are right; what is behind a wrong one is void."""
        history = self._histories[chunk.slot]
        assert len(history) == chunk.start
        assert chunk.verified[0] == self._last[chunk.slot]
        tokens: list[int] = []
        for token_id in chunk.verified:
            if tokens and (tokens[-1] != token_id or chunk.sequence.request_id in self.faulty):
                break
            history.append(token_id)
            tokens.append(self._sample(chunk))
        return tokens + [0] * (chunk.length - len(tokens))

    def _sample(self, chunk: Chunk) -> int:
        script = self.scripted.get(chunk.sequence.request_id)
        token = script.pop(0) if script else next_token(self._histories[chunk.slot])
        self._last[chunk.slot] = token
        return token


class FixedCosts(StepCosts):
    """Learns nothing, so that no test depends on a clock."""

    def observe(self, num_rows: int, seconds: float) -> None:
        pass


FREE = FixedCosts({1: 1.0})
"""A step costs the same, however many rows it has."""


class GivenDrafts(Speculation):
    """Proposes drafts of which the first ones are right, as many as the next number says, then a wrong one."""

    def __init__(self, num_right: Iterator[int], *, max_drafts: int = 3) -> None:
        super().__init__(max_drafts, FREE)
        self._num_right = num_right

    def begin(self, sequence: Sequence) -> None:
        super().begin(sequence)
        sequence.keep_outputs()

    def _guess(self, sequence: Sequence, drafter: OwnTextDrafter, most: int, *, num_rows: int) -> tuple[int, ...]:
        history = (*sequence.request.prompt_token_ids, *sequence.outputs)
        assert drafter.last_token_id == history[-1]
        right = expected_output(history, next(self._num_right))
        return (*right, (next_token([*history, *right]) + 1) % EOS_TOKEN_ID)[:most]


def engine(runner: FakeRunner, *, num_ahead: int = 0, **changes: object) -> Engine:
    """An engine around a fake runner; `changes` go to the scheduler."""
    return Engine(scheduler=scheduler(**changes), runner=runner, info=engine_info(), num_ahead=num_ahead)


def engine_info() -> EngineInfo:
    return EngineInfo(
        num_slots=2,
        state_bytes_per_slot=64,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS_TOKEN_ID,),
        device="cpu",
        device_name="fake",
        weights_dtype="float32",
        num_parameters=0,
        load_s=0.0,
    )
