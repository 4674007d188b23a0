"""For operators: `/health`, `/ready`, `/version`, `/metrics`, `/v1/capacity`."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server.protocol.models import Capacity
from server.routes.json_body import ServiceDependency
from server.routes.streaming import json_response

router = APIRouter(tags=["operations"])
RETRY_LATER = {"Retry-After": "2"}


@router.get("/health")
async def health(service: ServiceDependency) -> JSONResponse:
    """200 while the engine works (also while draining); else 503 with the engine's state."""
    status = service.status
    is_well = status in {"ok", "draining"}
    content = {"status": status, "engine_restarts": service.engine.num_restarts}
    return JSONResponse(content, 200 if is_well else 503, headers=None if is_well else RETRY_LATER)


@router.get("/ready")
async def ready(service: ServiceDependency) -> JSONResponse:
    """200 when new requests are taken; 503 while loading, restarting or draining."""
    status = "draining" if service.draining or service.paused else service.status
    is_ready = status == "ok"
    return JSONResponse({"status": status}, 200 if is_ready else 503, headers=None if is_ready else RETRY_LATER)


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
async def metrics(service: ServiceDependency) -> Response:
    """Prometheus text format."""
    return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})
