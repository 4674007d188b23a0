"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's dialect, on the same way as every chat."""

from fastapi import APIRouter, Request, Response

from server.api.json_body import JsonRoute, ServiceDependency
from server.generation.anthropic_answers import AnthropicWriter
from server.generation.prompts import encode_messages
from server.generation.streaming import answer, json_response, owner_of
from server.generation.tools import template_tools
from server.http.sse import unless_disconnected
from server.protocol.dialects.anthropic import CountTokensRequest, MessageOut, MessagesRequest, TokenCount
from server.protocol.wire import translated

router = APIRouter(route_class=JsonRoute, prefix="/v1/messages", tags=["generation"])


@router.post("", responses={200: {"model": MessageOut, "content": {"text/event-stream": {}}}}, response_class=Response)
async def create_message(body: MessagesRequest, request: Request, service: ServiceDependency) -> Response:
    """Answers a conversation."""
    with translated():
        chat = body.chat
    return await answer(request, service, chat, AnthropicWriter)


@router.post("/count_tokens", responses={200: {"model": TokenCount}}, response_class=Response)
async def count_tokens(body: CountTokensRequest, request: Request, service: ServiceDependency) -> Response:
    """How many tokens a conversation has."""
    service.require_model(body.model)
    with translated():
        chat = body.chat
    encoding = encode_messages(service, owner_of(request), chat, tools=template_tools(chat.tool_use))
    return json_response(TokenCount(input_tokens=len(await unless_disconnected(request.receive, encoding))))
