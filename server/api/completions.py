"""`POST /v1/completions`."""

from fastapi import APIRouter, Request, Response

from server.api.json_body import JsonRoute, ServiceDependency
from server.generation.completion_answers import CompletionWriter
from server.generation.streaming import answer
from server.protocol.completions import Completion, CompletionRequest

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post(
    "/v1/completions",
    responses={200: {"model": Completion, "content": {"text/event-stream": {}}}},
    response_class=Response,
)
async def create_completion(body: CompletionRequest, request: Request, service: ServiceDependency) -> Response:
    """Continues a text or token ids."""
    return await answer(request, service, body, CompletionWriter)
