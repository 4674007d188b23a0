"""What becomes of states beyond their slots: begun from a file or a cached prefix, cached on the way, saved at the end.

One copy of one slot is behind all of it. Files are read and written on a thread of their own, so that a step
never waits for a disk: a request that begins from a file is scheduled once it was read, and the terminal
event of one that saves its state comes once the file is on the disk. A fault with a file ends that request alone.

Knows no torch: snapshots are opaque, and `SlotAccess` takes them.
"""

import errno
import logging
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from server.engine.batch import Batch
from server.engine.sequence import Sequence, StartState
from server.engine.stages import OpenStage, Prepared, failed
from server.engine.state.prefix_cache import CacheRead, PrefixCache
from server.engine.state.snapshot_files import (
    FILE_NAME,
    MAX_PENDING,
    Bytes,
    Snapshot,
    SnapshotError,
    num_outputs_in,
    read_snapshot,
    with_num_outputs,
    write_snapshot,
)
from server.engine.types.requests import EngineError, FinishReason, GenerationRequest, TokenEvent
from server.engine.types.state import NO_PREFIX_CACHE, PrefixCacheStats, SavedState, StateLayout

NO_STATES = EngineError("states_unavailable", "this server saves no states")
_log = logging.getLogger(__name__)


class SlotAccess(Protocol):
    """Copies of slots, in the order of the steps that are launched."""

    def take(self, slot: int) -> object:
        """A copy of a slot, where it lies; without waiting."""
        ...

    def to_row(self, snapshot: object) -> Bytes:
        """The copy as bytes on the host, [bytes_per_slot] uint8."""
        ...

    def from_row(self, row: Bytes) -> object:
        """Bytes as a snapshot, for `StartState`."""
        ...


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """Which prefixes are worth a snapshot.

    Attributes:
        min_tokens: shorter prefixes are computed again.
        spacing: a snapshot after every so many tokens of a prompt; 0: none but at its ends.
    """

    min_tokens: int = 32
    spacing: int = 0


class NoSnapshots(OpenStage):
    """Of an engine that neither reads, caches nor saves states."""

    cache_stats = NO_PREFIX_CACHE

    def refusal(self, request: GenerationRequest) -> EngineError | None:
        return NO_STATES if request.states.load_from is not None or request.states.save_to is not None else None

    def is_saving(self, request_id: str) -> bool:
        return False

    def launched(self, batch: Batch) -> None:
        """Keeps nothing."""

    def end(self, sequence: Sequence, event: TokenEvent) -> bool:
        return False

    def reset_cache(self) -> None:
        """There is none."""


class Snapshots:
    """The stage at which requests wait for files, and what is done with slots on the way and at the end.

    Used by one thread, the engine's.
    """

    def __init__(
        self,
        access: SlotAccess,
        layout: StateLayout,
        *,
        folder: Path | None = None,
        cache: PrefixCache | None = None,
        policy: CachePolicy | None = None,
    ) -> None:
        """
        Args:
            access: the slots.
            layout: what the model's states look like.
            folder: of state files; None: requests for any are refused.
            cache: of prefixes; None: none.
            policy: which prefixes go there.
        """
        self._access = access
        self._layout = layout
        self._folder = folder
        self._cache = PrefixCache(snapshot_bytes=0, host_bytes=0) if cache is None else cache
        self._has_cache = cache is not None
        self._policy = CachePolicy() if policy is None else policy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._loading: dict[str, tuple[GenerationRequest, Future[Snapshot]]] = {}
        self._saving: dict[str, tuple[TokenEvent, Future[SavedState]]] = {}
        self._fetching: dict[str, tuple[GenerationRequest, CacheRead]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a request waits for a file."""
        return bool(self._loading or self._saving or self._fetching)

    @property
    def cache_stats(self) -> PrefixCacheStats:
        return self._cache.stats

    def owns(self, request_id: str) -> bool:
        """Whether this request waits for a file."""
        return request_id in self._loading or request_id in self._saving or request_id in self._fetching

    def is_saving(self, request_id: str) -> bool:
        """Whether this request has ended, and its state is being written."""
        return request_id in self._saving

    def enter(self, request: GenerationRequest) -> Prepared | TokenEvent | None:
        """Keeps a request until the state that it begins from was read."""
        name = request.states.load_from
        if name is None:
            return None if self._fetch(request) else Prepared(request)
        try:
            path = self._path(name)
        except SnapshotError as error:
            return _failed(request.request_id, error)
        self._loading[request.request_id] = (request, self._thread.submit(read_snapshot, path, self._layout))
        return None

    def cancel(self, request_id: str) -> bool:
        """Forgets a request that waits for a file; false if there is none. What it has saved is removed."""
        if self._loading.pop(request_id, None) is not None or self._fetching.pop(request_id, None) is not None:
            return True
        saving = self._saving.pop(request_id, None)
        if saving is None:
            return False
        saving[1].add_done_callback(self._remove_saved)
        return True

    def wait(self, timeout_s: float) -> None:
        """Waits until a file was read or written."""
        futures: list[Future[Any]] = [reading for _, reading in self._loading.values()]
        futures += [writing for _, writing in self._saving.values()]
        futures += [fetch.reading for _, fetch in self._fetching.values()]
        wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED)

    def arrived(self) -> tuple[list[Prepared], list[TokenEvent]]:
        """Requests whose state was read since the last call, and events of those that have ended."""
        prepared: list[Prepared] = []
        events: list[TokenEvent] = []
        for request_id, (request, reading) in [*self._loading.items()]:
            if reading.done():
                del self._loading[request_id]
                try:
                    prepared.append(self._begun(request, reading.result()))
                except SnapshotError as error:
                    events.append(_failed(request_id, error))
        for request_id, (request, fetch) in [*self._fetching.items()]:
            if fetch.reading.done():
                del self._fetching[request_id]
                self._cache.fetched(fetch)
                prepared.append(Prepared(request))
        for request_id, (event, writing) in [*self._saving.items()]:
            if writing.done():
                del self._saving[request_id]
                events.append(_saved(event, writing))
        return prepared, events

    def begin(self, sequence: Sequence) -> None:
        """Lets a sequence that gets its slot start behind the longest prefix that is cached."""
        if self._folder is not None:
            sequence.keep_outputs()  # it may have to be saved at any moment
        namespace = self._namespace(sequence)
        if namespace is None:
            return
        prompt = sequence.request.prompt_token_ids
        # Where the prompt is scored, all of it must be computed; a copy of a leader's slot has all that it can have.
        looks = not sequence.scores_prompt and sequence.start.source_slot is None
        hit = self._cache.find(namespace, prompt, at_most=len(prompt) - 1) if looks else None
        if hit is not None:
            sequence.skip(hit.num_tokens, hit.snapshot)
        sequence.stops = self._stops(sequence)
        sequence.keep_outputs()

    def launched(self, batch: Batch) -> None:
        """Caches the prefixes that end with this step's chunks."""
        if not self._has_cache:
            return
        for chunk in batch.chunks[batch.num_decode + batch.num_verified :]:
            namespace, end = self._namespace(chunk.sequence), chunk.start + chunk.length
            if namespace is not None and end in chunk.sequence.stops and end >= self._policy.min_tokens:
                prefix = chunk.sequence.request.prompt_token_ids[:end]
                if not self._cache.has(namespace, prefix):
                    self._cache.put(namespace, prefix, self._access.take(chunk.slot))

    def end(self, sequence: Sequence, event: TokenEvent) -> bool:
        """Caches and saves what an ended sequence leaves behind, while its slot is still there.

        Returns:
            Whether its terminal event is held back until the state is saved: `arrived` gives it then.
        """
        options = sequence.request.states
        if event.finish_reason is FinishReason.SUSPENDED:
            if options.save_to is None or sequence.start.position + sequence.num_fed == 0:
                return False
            snapshot = sequence.parked if sequence.is_preempted else self._access.take(sequence.slot)
            self._save(sequence, event, options.save_to, sequence.start.snapshot if snapshot is None else snapshot)
            return True
        if event.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            self._distrust(sequence)
            return False
        namespace = None if options.prompt_only else self._namespace(sequence)
        if namespace is None and options.save_to is None:
            return False
        snapshot = self._access.take(sequence.slot)
        if namespace is not None:
            self._cache_end(sequence, namespace, snapshot)
        if options.save_to is not None:
            self._save(sequence, event, options.save_to, snapshot)
        return options.save_to is not None

    def reset_cache(self) -> None:
        """Forgets every cached prefix; requests that wait for one from the disk get it all the same."""
        self._cache.clear()

    def close(self) -> None:
        """Ends the thread; what it has begun is finished."""
        self._thread.shutdown(cancel_futures=True)

    def _fetch(self, request: GenerationRequest) -> bool:
        """Whether a request waits for the longest prefix of its prompt to come from the cache's disk."""
        namespace, prompt = request.states.cache_namespace, request.prompt_token_ids
        if not self._has_cache or namespace is None or request.logprobs.num_prompt is not None:
            return False
        if not prompt or not 0 <= min(prompt) <= max(prompt) < self._layout.vocab_size:
            return False  # the scheduler refuses it
        fetch = self._cache.fetch(namespace, prompt, at_most=len(prompt) - 1)
        if fetch is None:
            return False
        self._fetching[request.request_id] = (request, fetch)
        return True

    def _stops(self, sequence: Sequence) -> frozenset[int]:
        """Lengths of the prompt's prefixes that are to be cached, those not yet fed."""
        num_tokens, spacing = len(sequence.request.prompt_token_ids), self._policy.spacing
        # One token before the end: the same prompt again then has one left to feed.
        wanted = {num_tokens - 1, *sequence.request.states.cache_points}
        if spacing > 0:
            wanted |= {*range(spacing, num_tokens, spacing)}
        least = max(self._policy.min_tokens, sequence.num_fed + 1)
        return sequence.stops | {stop for stop in wanted if least <= stop < num_tokens}

    def _namespace(self, sequence: Sequence) -> str | None:
        """Where its prefixes are cached; None: nowhere."""
        return sequence.request.states.cache_namespace if self._has_cache else None

    def _cache_end(self, sequence: Sequence, namespace: str, snapshot: object) -> None:
        if not sequence.has_all_outputs:
            return
        assert sequence.request.resumed is None  # or its outputs would be in the prompt too
        fed = (*sequence.request.prompt_token_ids, *sequence.outputs)[: sequence.num_fed]
        if len(fed) >= self._policy.min_tokens:
            self._cache.put(namespace, fed, snapshot)

    def _distrust(self, sequence: Sequence) -> None:
        """A sequence that came out as NaN may have left NaN in the cache."""
        if (namespace := self._namespace(sequence)) is not None:
            self._cache.discard(namespace, sequence.request.prompt_token_ids)

    def _save(self, sequence: Sequence, event: TokenEvent, file: str, snapshot: object) -> None:
        options = sequence.request.states
        pending, last = _end_of(sequence)
        saved = Snapshot(
            row=self._access.to_row(snapshot),
            position=sequence.start.position + sequence.num_fed,
            pending=pending,
            last_token=last,
            note=options.note if options.prompt_only else with_num_outputs(options.note, sequence.num_outputs),
        )
        self._saving[event.request_id] = (event, self._thread.submit(self._write, file, saved))

    def _write(self, name: str, snapshot: Snapshot) -> SavedState:
        num_bytes = write_snapshot(self._path(name), snapshot, self._layout)
        return SavedState(name, snapshot.position, snapshot.pending, snapshot.last_token, num_bytes)

    def _remove_saved(self, writing: Future[SavedState]) -> None:
        if not writing.cancelled() and writing.exception() is None:
            self._path(writing.result().file).unlink(missing_ok=True)

    def _begun(self, request: GenerationRequest, snapshot: Snapshot) -> Prepared:
        """The request, to begin from a state that was read."""
        row = self._access.from_row(snapshot.row)
        if request.resumed is not None and request.resumed.num_fed > 0:
            return Prepared(request, StartState(snapshot.position - request.resumed.num_fed, row))
        # Without anything new the answer that ended there goes on, as if it never had ended.
        num_outputs = 0 if request.prompt_token_ids else num_outputs_in(snapshot.note)
        prompt = (*snapshot.pending, *request.prompt_token_ids)
        start = StartState(snapshot.position, row, num_outputs=num_outputs)
        return Prepared(replace(request, prompt_token_ids=prompt, sampling=request.sampling.behind(num_outputs)), start)

    def _path(self, name: str) -> Path:
        if self._folder is None:
            raise SnapshotError(NO_STATES.message, code=NO_STATES.code)
        if not FILE_NAME.fullmatch(name):
            raise SnapshotError("this is no name of a state's file")
        return self._folder / name


def _end_of(sequence: Sequence) -> tuple[tuple[int, ...], int]:
    """Tokens that were not fed, unless they are many, and the last one with these."""
    prompt = sequence.request.prompt_token_ids
    if sequence.request.states.prompt_only:
        return (), prompt[-1]
    if sequence.num_prompt_left > MAX_PENDING:
        return (), prompt[sequence.num_fed - 1]
    pending = prompt[sequence.num_fed :] if sequence.num_prompt_left > 0 else sequence.pending
    return pending, sequence.outputs[-1] if sequence.outputs else prompt[-1]


def _saved(event: TokenEvent, writing: Future[SavedState]) -> TokenEvent:
    try:
        return replace(event, saved=writing.result())
    except (SnapshotError, OSError) as error:
        if event.finish_reason is FinishReason.SUSPENDED:
            _log.error("the state of a suspended request could not be saved: %s", error)
            return event  # it ends as it would have, without a state
        return _not_saved(event, error)


def _not_saved(event: TokenEvent, error: SnapshotError | OSError) -> TokenEvent:
    if isinstance(error, SnapshotError):
        code = "numerical_error" if error.code == "state_invalid" else error.code
        return _failed(event.request_id, SnapshotError(str(error), code=code))
    _log.error("a state could not be saved: %s", error.strerror)
    code = "state_storage_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "state_not_saved"
    return replace(event, save_error=EngineError(code, f"the state could not be saved: {error.strerror}"))


def _failed(request_id: str, error: SnapshotError) -> TokenEvent:
    return failed(request_id, EngineError(error.code, str(error)))
