"""For operators: `/health`, `/ready`, `/version`, `/metrics`, `/v1/capacity`."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.json_body import ServiceDependency
from server.generation.streaming import json_response
from server.protocol.models import Capacity
from server.service import Service

router = APIRouter(tags=["operations"])


def _state(service: Service, content: dict[str, object], *, is_good: bool) -> JSONResponse:
    headers = None if is_good else {"Retry-After": str(service.retry_after_s)}
    return JSONResponse(content, 200 if is_good else 503, headers)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(service: ServiceDependency) -> JSONResponse:
    """200 while the engine works (also while draining); else 503 with the engine's state.

    `steps` is what computes (`native`, `triton` or `torch`), `slow_because` why it is not the compiled kernels.
    """
    status, info = service.status, service.engine.info
    content: dict[str, object] = {"status": status, "engine_restarts": service.engine.num_restarts}
    if info is not None:
        content |= {"steps": info.steps, "slow_because": info.slow_because}
    return _state(service, content, is_good=status in {"ok", "draining"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(service: ServiceDependency) -> JSONResponse:
    """200 when new requests are to be sent here; 503 while loading, restarting or draining, and from SIGTERM on."""
    status = "draining" if service.leaving or service.draining or service.paused else service.status
    return _state(service, {"status": status}, is_good=status == "ok")


@router.get("/v1/capacity", responses={200: {"model": Capacity}}, response_class=Response)
async def capacity(service: ServiceDependency) -> Response:
    """How many conversations the server holds; the numbers of what runs are up to a second old."""
    info, stats = service.require_open(), service.engine.stats
    return json_response(
        Capacity(
            slots=info.num_slots,
            free=info.num_slots if stats is None else stats.num_free_slots,
            running=0 if stats is None else stats.num_running,
            waiting=0 if stats is None else stats.num_waiting,
            state_bytes=info.state_bytes_per_slot,
            total_state_bytes=info.num_slots * info.state_bytes_per_slot,
            kv_cache_bytes_per_token=info.kv_cache_bytes_per_token,
            max_prompt_tokens=service.options.max_prompt_tokens if service.options.max_prompt_tokens > 0 else None,
        )
    )


@router.get("/version")
async def version(service: ServiceDependency) -> JSONResponse:
    """Version of the server."""
    return JSONResponse({"version": service.options.version})


@router.get("/metrics")
async def metrics(request: Request, service: ServiceDependency) -> Response:
    """Prometheus's text format, or OpenMetrics with exemplars for those who accept it."""
    content, content_type = service.metrics.render(request.headers.get("accept", ""))
    return Response(content, headers={"content-type": content_type, "vary": "accept"})
