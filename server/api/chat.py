"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Request, Response

from server.api.json_body import JsonRoute, ServiceDependency
from server.generation.chat_answers import ChatWriter
from server.generation.streaming import answer
from server.protocol.chat import ChatCompletion, ChatRequest

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post(
    "/v1/chat/completions",
    responses={200: {"model": ChatCompletion, "content": {"text/event-stream": {}}}},
    response_class=Response,
)
async def create_chat_completion(body: ChatRequest, request: Request, service: ServiceDependency) -> Response:
    """Answers a conversation."""
    return await answer(request, service, body, ChatWriter)
