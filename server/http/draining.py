"""The HTTP server that finishes its answers before it stops, and saves the states of those that it cannot finish."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn

from server.service import Service

SAVE_S = 15.0
"""How long saving what still runs after the drain limit may take."""
LAST_ERRORS_S = 2.0
"""How long the last errors may take to be written after a second signal."""
FORCED_S, MARGIN_S = 5.0, 15.0
"""When the process is ended at the latest: so long after a second signal, or after all other limits."""
_log = logging.getLogger(__name__)


class ClosableEngine(Protocol):
    """What is needed of the engine client here."""

    @property
    def status(self) -> str: ...
    async def close(self) -> None: ...


class DrainingServer(uvicorn.Server):
    """Uvicorn that finishes its answers.

    After the first signal `/ready` says 503, so that balancers send their requests elsewhere; what comes all the same
    is taken for the drain delay. Then no new work is taken, and what runs is finished. At the drain limit the states of
    what still runs are saved, and each client is told which. The second signal ends what runs, each with an error of
    its own, and then at once; what was being saved then is whole or not there.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        engine: ClosableEngine,
        *,
        drain_timeout_s: float,
        drain_delay_s: float = 0.0,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            drain_timeout_s: how long answers may take after the drain delay.
            drain_delay_s: how long new work is still taken after the first signal.
            give_up: called on a thread of its own if the process is still there long after it should have ended: a disk
                or a store that does not answer must not keep it.
        """
        super().__init__(config)
        self._service = service
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._drain_delay_s = drain_delay_s
        self._give_up = give_up
        self._drain_from: float | None = None
        self.ends_at: float | None = None
        self._closing: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGTERM and SIGINT."""
        if self._drain_from is None:
            self._service.leaving = True
            self._service.draining = self._drain_delay_s == 0
            self._drain_from = time.monotonic() + self._drain_delay_s
            last_s = SAVE_S + (self.config.timeout_graceful_shutdown or 0) + MARGIN_S
            self._limit(self._drain_delay_s + self._drain_timeout_s + last_s)
            return
        self._service.draining = True
        if self.ends_at is None:
            self.ends_at = time.monotonic() + LAST_ERRORS_S
            self._limit(FORCED_S)
        else:
            self.should_exit = self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn at the end, when no answer is given any more."""
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.gather(self._saving, return_exceptions=True)
        await super().shutdown(sockets)
        await self._service.close()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to stop."""
        if self.ends_at is not None:
            if self._closing is None:
                self._closing = asyncio.create_task(self._engine.close())  # what runs gets a clean error
            self.should_exit |= self._service.num_active == 0
            if time.monotonic() > self.ends_at:
                self.should_exit = self.force_exit = True
        if self._engine.status == "failed":
            self.should_exit = True
        if self._drain_from is not None and time.monotonic() >= self._drain_from:
            self._drain(self._drain_from)
        return await super().on_tick(counter)

    def _drain(self, since: float) -> None:
        self._service.draining = True
        if self._is_saved and self._service.num_active == 0:
            self.should_exit = True
        elif self._saving is None and time.monotonic() > since + self._drain_timeout_s:
            self._saving = asyncio.create_task(self._save())

    @property
    def _is_saved(self) -> bool:
        return self._saving is None or self._saving.done()

    async def _save(self) -> None:
        _log.info("the drain limit is reached: saving the states of %d requests", self._service.num_active)
        try:
            await self._service.suspend(timeout_s=SAVE_S)
        except Exception:
            _log.exception("the states of what still ran could not be saved")
        await self._engine.close()  # what runs even now gets a clean error
        self.should_exit = True

    def _limit(self, seconds: float) -> None:
        if self._give_up is not None:
            timer = threading.Timer(seconds, self._give_up)
            timer.daemon = True
            timer.start()
