"""`/admin/`: what only operators may do. Who gets here has an admin key; see `server.http.middleware`."""

import asyncio
import time

from fastapi import APIRouter, Request, Response

from server.api.json_body import JsonRoute, ServiceDependency
from server.errors import EngineUnavailableError
from server.generation.streaming import json_response
from server.http.sse import unless_disconnected
from server.protocol.admin import (
    AdminStatus,
    DrainRequest,
    ReloadRequest,
    SelfCheckFinding,
    SelfCheckReport,
    SelfCheckRequest,
)
from server.selfcheck import SelfCheck, largest_difference
from server.service import Service

POLL_S = 0.05
SAVE_S, LAST_ERRORS_S = 15.0, 5.0
"""How long saving what still runs may take, and telling the clients of it."""
router = APIRouter(route_class=JsonRoute, prefix="/admin", tags=["admin"])


@router.get("/status", responses={200: {"model": AdminStatus}}, response_class=Response)
async def get_status(service: ServiceDependency) -> Response:
    """How the server is."""
    return _status(service)


@router.post("/drain", responses={200: {"model": AdminStatus}}, response_class=Response)
async def drain(service: ServiceDependency, body: DrainRequest | None = None) -> Response:
    """Takes no new work from now on: `/ready` says 503, what runs is finished. `/admin/resume` ends it."""
    wish = DrainRequest() if body is None else body
    service.paused = True
    await _idle(service, timeout_s=wish.wait_s)
    if wish.hand_over:
        await service.suspend(timeout_s=SAVE_S)
        await _idle(service, timeout_s=LAST_ERRORS_S)
    return _status(service)


@router.post("/resume", responses={200: {"model": AdminStatus}}, response_class=Response)
async def resume(service: ServiceDependency) -> Response:
    """Takes new work again."""
    service.paused = False
    return _status(service)


@router.post("/cache/reset", responses={200: {"model": AdminStatus}}, response_class=Response)
async def reset_cache(service: ServiceDependency) -> Response:
    """Forgets every cached prefix, of all keys and on all tiers; saved states stay."""
    service.engine.reset_cache()
    return _status(service)


@router.post("/reload", responses={200: {"model": AdminStatus}}, response_class=Response)
async def reload(service: ServiceDependency, body: ReloadRequest | None = None) -> Response:
    """Loads the model again, as its folder is now, beside the one that serves, and lets it take over; answers then.

    A model that cannot be loaded is a 409, and the old one keeps serving.
    """
    wish = ReloadRequest() if body is None else body
    _require_loaded(service)
    was_paused = service.paused

    async def until_idle() -> None:
        service.paused = True
        await _idle(service, timeout_s=wish.timeout_s)

    try:
        await service.reload(until_idle, beside=wish.beside)
    finally:
        service.paused = was_paused
    return _status(service)


@router.post("/selfcheck", responses={200: {"model": SelfCheckReport}}, response_class=Response)
async def self_check(request: Request, service: ServiceDependency, body: SelfCheckRequest | None = None) -> Response:
    """Measures on the running engine that decoding, reading in any chunks, caching and batching change no answer."""
    wish = SelfCheckRequest() if body is None else body
    return json_response(await unless_disconnected(request.receive, _checked(service, wish)))


async def _checked(service: Service, wish: SelfCheckRequest) -> SelfCheckReport:
    async with service.checking:
        info = service.require_open()
        check = SelfCheck(
            service.engine,
            vocab_size=info.vocab_size,
            num_prompt=wish.num_prompt_tokens,
            num_generated=wish.num_generated_tokens,
        )
        begin = time.perf_counter()
        with service.generating():
            findings = await check.run()
        largest = largest_difference(findings)
        return SelfCheckReport(
            object="selfcheck",
            model=service.options.model_name,
            passed=largest <= wish.tolerance,
            tolerance=wish.tolerance,
            largest_difference=largest,
            num_tokens=wish.num_prompt_tokens + wish.num_generated_tokens,
            duration_s=round(time.perf_counter() - begin, 3),
            findings=[
                SelfCheckFinding(name=item.name, num_values=item.num_values, largest_difference=item.largest)
                for item in findings
            ],
        )


def _require_loaded(service: Service) -> None:
    """Raises `EngineUnavailableError` where there is nothing to load again."""
    if str(service.engine.status) != "ready":
        raise EngineUnavailableError(
            f"the engine is not ready: {service.engine.status}", code=f"engine_{service.engine.status}"
        )


async def _idle(service: Service, *, timeout_s: float) -> None:
    """Waits until nothing is generated any more, at most that long."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while service.num_active > 0 and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 (a plain number)
        await asyncio.sleep(POLL_S)


def _status(service: Service) -> Response:
    return json_response(
        AdminStatus(
            status="draining" if service.paused or service.draining else service.status,
            active=service.num_active,
            engine_restarts=service.engine.num_restarts,
        )
    )
