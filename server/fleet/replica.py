"""One engine as a replica of Ray Serve: the service of `dijiang serve`, its requests brought by a front."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import ray
from ray import serve

from server.fleet.config import settings_of
from server.fleet.exchange import Exchange, Head
from server.fleet.router import FREE, WAITING
from server.fleet.scaling import BUSY, SLOTS
from server.service import Service
from server.startup.logs import configure_logging
from server.startup.notices import Notices
from server.startup.prepare import Prepared, prepare
from server.startup.started import started

SAVE_S, LOOK_S = 15.0, 0.25
_log = logging.getLogger(__name__)


class EngineReplica:
    """See the module. Ray makes one in each of its processes, and calls the methods below."""

    _service: Service
    _prepared: Prepared

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Returns when the engine is loaded.

        Args:
            settings: of `dijiang serve`, by name.

        Raises:
            StartError, EngineUnavailableError: the model, the device or the store cannot be used.
        """
        name = str(serve.get_replica_context().replica_id.unique_id)
        read = settings_of({**settings, "replica_name": name})
        configure_logging(level=read.log_level, log_format=read.log_format)
        self._prepared = await asyncio.to_thread(prepare, read, Notices(as_json=read.log_format == "json"))
        self._stack = AsyncExitStack()
        self._service, _ = await self._stack.enter_async_context(started(self._prepared))
        from server.app import create_app  # by now it was imported, on a thread

        self._app = create_app(self._service)
        await self._prepared.engine.wait_ready()
        self._leaving = asyncio.create_task(self._leave_in_time())

    async def exchange(self, request: Exchange) -> AsyncIterator[Head | bytes]:
        """Answers a request of HTTP: its head, then its body in pieces, as the application sends them."""
        messages: asyncio.Queue[Any] = asyncio.Queue(maxsize=64)
        is_read = False
        gone = asyncio.Event()

        async def receive() -> Mapping[str, object]:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": request.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self._app({**request.scope, "state": {}}, receive, messages.put)  # type: ignore[arg-type]
            finally:
                await messages.put(None)

        answering = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield Head(
                        message["status"], tuple((bytes(key), bytes(value)) for key, value in message["headers"])
                    )
                elif body := message.get("body", b""):
                    yield body
            await answering
        finally:
            gone.set()  # the client left, or all was said
            while not answering.done() and not messages.empty():
                messages.get_nowait()
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def check_health(self) -> None:
        """Called by Ray; our own watchdog starts an engine that hangs again, and a failed one is for Ray to replace."""
        status = str(self._prepared.engine.status)
        if status in ("failed", "stopped"):
            raise RuntimeError(f"the engine is {status}: {self._prepared.engine.failure}")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray, for the router."""
        stats, info = self._service.engine.stats, self._service.engine.info
        if stats is None or info is None:
            return {WAITING: 0, FREE: 1}
        return {WAITING: stats.num_waiting, FREE: stats.num_free_slots}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray, for the policy that says how many replicas there are."""
        stats, info = self._service.engine.stats, self._service.engine.info
        slots = 1 if info is None else info.num_slots
        busy = 0 if stats is None else slots - stats.num_free_slots + stats.num_waiting
        return {SLOTS: float(slots), BUSY: float(busy)}

    async def _leave_in_time(self) -> None:
        """When Ray stops this replica: finishes what runs, then hands over the rest before Ray's own limit."""
        while not _is_stopping():  # noqa: ASYNC110 (Ray has no event for it)
            await asyncio.sleep(LOOK_S)
        self._service.leaving = True
        deadline = time.monotonic() + self._prepared.settings.drain_timeout_s
        while self._service.num_active > 0 and time.monotonic() < deadline:  # noqa: ASYNC110 (a plain number)
            await asyncio.sleep(LOOK_S)
        self._service.draining = True
        await self._service.suspend(timeout_s=SAVE_S)

    async def __del__(self) -> None:
        """Called by Ray when no request runs any more; responses in the background are handed over."""
        if not hasattr(self, "_leaving"):
            return
        self._leaving.cancel()
        self._service.draining = True
        await self._service.suspend(timeout_s=SAVE_S)
        await self._stack.aclose()


def _is_stopping() -> bool:
    """Whether Ray stops this replica. Ray's API does not say so before all requests have ended; its replica knows."""
    worker = ray._private.worker.global_worker
    actor = worker.actors.get(worker.actor_id)
    return bool(getattr(getattr(actor, "_replica_impl", None), "_shutting_down", False))
