"""The service's side of the engine process: starts it, watches it, restarts it, and carries requests to it.

Promises:
    - Every submitted request's stream ends with exactly one terminal event: the engine's own, ABORT when
      the caller leaves first or the client is closed, or ERROR `engine_restarting` when the process dies in which it
      had begun. One that waited goes to the next process, once.
    - Leaving `async with client.submit(...)`, in whichever way and phase, frees the request's slot.
    - A process that dies, or is silent for too long (`watchdog`), is started again. After several failures in a row to
      load, or one that cannot get better (a damaged checkpoint), the client gives up and says why.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum

from server.engine.process.messages import (
    AbortRequest,
    AddRequests,
    Alive,
    Begun,
    Command,
    EngineReady,
    Heartbeat,
    LoadFailed,
    Report,
    ResetCache,
    StepDone,
    SuspendRequest,
)
from server.engine.types.requests import (
    EngineConfig,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from server.engine_client.candidate import Candidate
from server.engine_client.link import EngineEndedError, EngineLink
from server.engine_client.submissions import EventStream, Submissions, TenantLoad, engine_died
from server.engine_client.watchdog import Watchdog, end_when_silent
from server.errors import EngineUnavailableError

MAX_LOAD_FAILURES = 3
CUDA_PATIENCE = 10
_ENGINE_MODULE = "server.engine.process.main"
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 10.0
_DEFAULT_RETRY_AFTER_S, _MAX_RETRY_AFTER_S = 2, 30

_log = logging.getLogger(__name__)


class EngineStatus(StrEnum):
    """What the engine can do now."""

    LOADING = "loading"
    """The first load goes on."""
    READY = "ready"
    """It takes requests."""
    RESTARTING = "restarting"
    """It was ready once, has died, and is being loaded again."""
    FAILED = "failed"
    """It could not be loaded, and nobody tries any more."""
    STOPPED = "stopped"
    """Not started, or closed."""


@dataclass(frozen=True, slots=True)
class _End:
    """How one engine process ended."""

    was_ready: bool
    reason: str
    is_permanent: bool = False


class EngineClient:
    """See the module. Used on one event loop, by any number of tasks."""

    def __init__(self, config: EngineConfig, *, module: str = _ENGINE_MODULE) -> None:
        """
        Args:
            config: what the engine gets.
            module: the process, run with `python -m`.
        """
        self._config = config
        self._module = module
        self._status = EngineStatus.STOPPED
        self._status_changed = asyncio.Event()
        self._failure: str | None = None
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._num_restarts = 0
        self._is_reloading = False
        self._candidate: Candidate | None = None
        self._link: EngineLink | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._submissions = Submissions(config)

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def failure(self) -> str | None:
        """Why the engine could not be loaded, for the operator; None unless the status is failed."""
        return self._failure

    @property
    def info(self) -> EngineInfo | None:
        """What the engine said about itself when it was last ready."""
        return self._info

    @property
    def stats(self) -> EngineStats | None:
        """The engine's latest numbers, about a second old at most; None until it has worked."""
        return self._stats

    @property
    def num_restarts(self) -> int:
        """How often a process was started again after one had died."""
        return self._num_restarts

    @property
    def num_requests(self) -> int:
        """Requests that have not had their terminal event."""
        return len(self._submissions)

    @property
    def loads(self) -> dict[str, TenantLoad]:
        """The requests of each tenant that has any."""
        return self._submissions.loads

    @property
    def pid(self) -> int | None:
        """The engine process; None while there is none."""
        return None if self._link is None else self._link.pid

    async def start(self) -> None:
        """Starts the process and returns at once; loading goes on."""
        assert self._supervisor is None, "an engine client is started once"
        self._set_status(EngineStatus.LOADING)
        self._supervisor = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> EngineInfo:
        """Waits until requests can be submitted.

        Raises:
            EngineUnavailableError: it cannot be loaded, with the reason, or was closed.
        """
        while self._status in (EngineStatus.LOADING, EngineStatus.RESTARTING):
            await self._status_changed.wait()
        if self._status is not EngineStatus.READY or self._info is None:
            raise self._unavailable(self._failure)
        return self._info

    async def close(self) -> None:
        """Ends the process; what still runs ends with ABORT. May be called twice."""
        self._set_status(EngineStatus.STOPPED)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._submissions.end_all(TokenEvent("", finish_reason=FinishReason.ABORT))

    def suspend(self, request_id: str, *, save_to: str | None, note: str, in_prompt: bool) -> None:
        """Lets a request end with `SUSPENDED`; see `SuspendRequest`. Nothing happens to one that has ended."""
        name = self._submissions.name_of(request_id)
        if name is None:
            return
        if self._status is EngineStatus.RESTARTING:  # it waits for the next process, and has nothing to save
            self._submissions.end(name, TokenEvent(name, finish_reason=FinishReason.SUSPENDED))
        elif self._link is not None:
            with suppress(EngineEndedError):  # and the request with it
                self._link.send(SuspendRequest(name, save_to, note, in_prompt))

    def reset_cache(self) -> None:
        """Forgets every cached prefix.

        Raises:
            EngineUnavailableError: loading, restarting, failed or stopped.
        """
        self._require_ready()
        self._send(ResetCache())

    async def reload(self, until_idle: Callable[[], Awaitable[None]], *, beside: bool = True) -> EngineInfo:
        """Loads the model again, as it is on the disk now, in a process that takes the place of the one there is.

        Args:
            until_idle: awaited before the change; what still runs after it ends with an error.
            beside: load first, and change nothing if that fails; else the old process ends before the load begins.

        Raises:
            EngineUnavailableError: not loaded now, or (not `beside`) it cannot be loaded again.
            EngineLoadError: it cannot be loaded; the one that serves is as it was.
        """
        self._require_ready()
        candidate = None
        if beside:
            candidate = await Candidate.load(self._config, module=self._module, beside=self.pid)
        try:
            await until_idle()
            self._require_ready()
            assert self._link is not None
            self._candidate, candidate = candidate, None
            self._is_reloading = True
            self._set_status(EngineStatus.RESTARTING)
            self._link.kill()
            return await self.wait_ready()
        finally:
            if candidate is not None:
                await candidate.link.close()

    @asynccontextmanager
    async def submit(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        """One request of `generate`, its events as an iterator."""
        stream = EventStream()
        async with self.generate((request,), stream.push):
            yield stream

    @asynccontextmanager
    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_event: Callable[[TokenEvent], None],
        on_begun: Callable[[str], None] = lambda request_id: None,
    ) -> AsyncIterator[Callable[[str], None]]:
        """Runs requests, all or none, for as long as the context is open.

        Args:
            on_event: called with each event of any of them, on the event loop. It must not raise.
            on_begun: called likewise with the id of each that gets its first slot.

        Yields:
            A function that ends one of them before, by its id; nothing happens if it has ended.

        Raises:
            EngineUnavailableError: loading, restarting, failed or stopped.
            OverloadedError: as many requests wait as may.
            RateLimitError: as many of this key.
            InvalidRequestError: another request of this id is running.
        """
        info = self._require_ready()
        names: dict[str, str] = {}

        def abort(request_id: str) -> None:
            if self._submissions.end(names[request_id], TokenEvent(request_id, finish_reason=FinishReason.ABORT)):
                self._send_abort(names[request_id])

        try:
            added = []
            for request in requests:
                self._submissions.check(request, num_slots=info.num_slots)
                added.append(self._submissions.add(request, on_event, on_begun))
                names[request.request_id] = added[-1].name
            for message in AddRequests.of(submission.named for submission in added):
                self._send(message)
            yield abort
        finally:
            for request_id in names:
                abort(request_id)

    def _require_ready(self) -> EngineInfo:
        if self._status is not EngineStatus.READY or self._info is None:
            raise self._unavailable()  # without the reason: it may name files, and goes to any client
        return self._info

    def _send(self, command: Command) -> None:
        assert self._link is not None
        try:
            self._link.send(command)
        except EngineEndedError:
            raise self._unavailable("the engine has just stopped and is being restarted") from None

    def _send_abort(self, name: str) -> None:
        if self._link is None:
            return
        try:
            self._link.send(AbortRequest(name))
        except EngineEndedError:
            return  # and the request with it

    async def _supervise(self) -> None:
        try:
            reason = await self._keep_running()
        except Exception:
            _log.exception("the engine's supervision failed")
            reason = "the engine's supervision failed; the log says more"
        finally:
            if self._candidate is not None:  # which nobody will take over any more
                await self._candidate.link.close()
        self._submissions.end_all(engine_died())
        if self._status is not EngineStatus.STOPPED:
            self._set_status(EngineStatus.FAILED, reason)

    async def _keep_running(self) -> str:
        """Runs one process after another; returns why it gives up."""
        num_failures = 0
        while True:
            end = await self._run_process()
            num_failures = 0 if end.was_ready else num_failures + 1
            if end.is_permanent or num_failures >= MAX_LOAD_FAILURES:
                _log.error("engine process ended, giving up: %s", end.reason)
                return end.reason
            if self._is_reloading:
                self._is_reloading = False
                continue
            _log.error("engine process ended, starting another: %s", end.reason)
            await asyncio.sleep(min(_FIRST_BACKOFF_S * 2**num_failures, _MAX_BACKOFF_S))
            self._num_restarts += 1

    async def _run_process(self) -> _End:
        """One process from start to end."""
        candidate, self._candidate = self._candidate, None
        try:
            self._link = candidate.link if candidate else await EngineLink.open(self._config, module=self._module)
        except Exception as error:
            return _End(was_ready=False, reason=f"the engine process cannot be started: {error}")
        try:
            if candidate is None:
                return await self._follow(self._link, self._link.reports())
            self._take_over(self._link, candidate.info)
            return await self._follow(self._link, candidate.reports)
        finally:
            link, self._link = self._link, None
            self._stats = None
            await link.close()

    async def _follow(self, link: EngineLink, reports: AsyncIterator[Report]) -> _End:
        failure: LoadFailed | None = None
        watchdog = Watchdog(
            self._silence_s, ask=lambda: link.send(Heartbeat()), longest_step_s=lambda: self._longest_step_s
        )
        watching: asyncio.Task[None] | None = None
        try:
            async for report in reports:
                watchdog.heard()
                if isinstance(report, EngineReady):
                    self._take_over(link, report.info)
                elif isinstance(report, LoadFailed):
                    failure = report
                else:
                    self._take(report)
                if watching is None and self._status is EngineStatus.READY and self._config.heartbeat_s > 0:
                    watching = asyncio.create_task(end_when_silent(link, watchdog))
        finally:
            if watching is not None:
                watching.cancel()
        was_ready = self._is_reloading or self._status is EngineStatus.READY
        if was_ready:
            self._set_status(EngineStatus.RESTARTING)
        self._submissions.end_all(engine_died(), begun_only=True)
        if failure is not None:
            return _End(was_ready, failure.reason, failure.is_permanent)
        return _End(was_ready, f"exit status {link.returncode}")

    def _take_over(self, link: EngineLink, info: EngineInfo) -> None:
        """Lets a process that has loaded serve, requests that the one before it had not begun first."""
        self._info = info
        with suppress(EngineEndedError):  # which is seen to when its reports end
            for message in AddRequests.of(self._submissions.take_again()):
                link.send(message)
        self._set_status(EngineStatus.READY)

    def _take(self, report: Begun | Alive | StepDone) -> None:
        if isinstance(report, Begun):
            self._submissions.begun(report.request_ids)
        elif isinstance(report, StepDone):
            for event in report.events:
                self._submissions.pass_on(event)
            if report.stats is not None:
                self._stats = report.stats

    @property
    def _silence_s(self) -> float:
        """How long the engine may be silent; where a kernel may be compiled in a step, much longer."""
        return self._config.heartbeat_s * (CUDA_PATIENCE if self._config.device.startswith("cuda") else 1)

    @property
    def _longest_step_s(self) -> float:
        return 0.0 if self._stats is None else self._stats.longest_step_s

    def _set_status(self, status: EngineStatus, failure: str | None = None) -> None:
        self._status, self._failure = status, failure
        self._status_changed.set()
        self._status_changed = asyncio.Event()

    @property
    def _retry_after_s(self) -> int:
        """About as long as the last load took."""
        if self._info is None:
            return _DEFAULT_RETRY_AFTER_S
        return min(max(1, math.ceil(self._info.load_s)), _MAX_RETRY_AFTER_S)

    def _unavailable(self, message: str | None = None) -> EngineUnavailableError:
        message = f"the engine is not ready: {self._status}" if message is None else message
        return EngineUnavailableError(message, code=f"engine_{self._status}", retry_after_s=self._retry_after_s)
