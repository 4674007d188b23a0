"""The HTTP server that finishes its answers before it stops."""

import socket
import time
from types import FrameType
from typing import Protocol

import uvicorn

from server.service import Service


class ClosableEngine(Protocol):
    """What is needed of the engine client here."""

    @property
    def status(self) -> str: ...
    async def close(self) -> None: ...


class DrainingServer(uvicorn.Server):
    """Uvicorn that finishes its answers: the first signal drains, the second one ends at once."""

    def __init__(
        self, config: uvicorn.Config, service: Service, engine: ClosableEngine, *, drain_timeout_s: float
    ) -> None:
        super().__init__(config)
        self._service = service
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGTERM and SIGINT."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._service.draining = True
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._drain_timeout_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn at the end, when no answer is given any more."""
        await super().shutdown(sockets)
        await self._service.close()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to stop."""
        if self._engine.status == "failed":
            self.should_exit = True
        if self._drain_until is not None and self._service.num_active == 0:
            self.should_exit = True
        elif self._drain_until is not None and time.monotonic() > self._drain_until:
            await self._engine.close()  # what still runs gets a clean error
            self.should_exit = True
        return await super().on_tick(counter)
