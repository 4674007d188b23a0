"""`/api/`: Ollama's dialect, on the same way as every chat; what its clients need."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.json_body import JsonRoute, ServiceDependency
from server.generation.ollama_answers import OllamaTextWriter, OllamaWriter
from server.generation.streaming import answer, json_response
from server.protocol.dialects.ollama import LATEST, OllamaChatRequest, OllamaGenerateRequest, OllamaLine, ShowRequest
from server.protocol.wire import translated
from server.service import Service

router = APIRouter(route_class=JsonRoute, prefix="/api", tags=["ollama"])


@router.post("/chat", responses={200: {"model": OllamaLine}}, response_class=Response)
async def chat(body: OllamaChatRequest, request: Request, service: ServiceDependency) -> Response:
    """Answers a conversation, line by line unless asked otherwise."""
    if not body.messages:
        return _loaded(service, body.name, {"message": {"role": "assistant", "content": ""}})
    with translated():
        wanted = body.chat
    return await answer(request, service, wanted, OllamaWriter)


@router.post("/generate", responses={200: {"model": OllamaLine}}, response_class=Response)
async def generate(body: OllamaGenerateRequest, request: Request, service: ServiceDependency) -> Response:
    """Answers, or continues, a text."""
    if not body.prompt:
        return _loaded(service, body.name, {"response": ""})
    with translated():
        wanted = body.as_request(has_template=service.chat_template is not None)
    return await answer(request, service, wanted, OllamaTextWriter)


@router.get("/version")
async def version(service: ServiceDependency) -> dict[str, str]:
    """The server's version."""
    return {"version": service.options.version}


@router.get("/tags")
@router.get("/ps")
async def tags(service: ServiceDependency) -> dict[str, Any]:
    """The model, under each of its names."""
    names = (service.options.model_name, *service.options.other_names)
    return {"models": [{"name": name, "model": name, **_facts(service)} for name in names]}


@router.post("/show")
async def show(body: ShowRequest, service: ServiceDependency) -> JSONResponse:
    """What the model is and can do."""
    name = body.model if body.model is not None else body.name
    service.require_model(None if name is None else name.removesuffix(LATEST))
    facts, template = _facts(service), service.tokenizer.chat_template if service.tokenizer is not None else None
    tools = ["tools"] if template is not None else []
    thinking = ["thinking"] if service.thoughts is not None else []
    return JSONResponse(
        {
            "modelfile": "",
            "parameters": "",
            "template": template or "",
            "details": facts["details"],
            "modified_at": facts["modified_at"],
            "model_info": {
                "general.architecture": "dijiang",
                "general.parameter_count": None if service.engine.info is None else service.engine.info.num_parameters,
                "dijiang.context_length": service.options.max_prompt_tokens or service.options.context_length,
            },
            "capabilities": ["completion", *tools, *thinking],
        }
    )


def _facts(service: Service) -> dict[str, Any]:
    info = service.engine.info
    return {
        "modified_at": datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z"),
        "size": 0,
        "digest": service.options.fingerprint,
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": "dijiang",
            "families": ["dijiang"],
            "parameter_size": "" if info is None else f"{info.num_parameters / 1e6:.0f}M",
            "quantization_level": "" if info is None else info.weights_dtype,
        },
    }


def _loaded(service: Service, name: str | None, said: dict[str, Any]) -> Response:
    """The answer to nothing: clients look so whether the model is there."""
    service.require_model(name)
    service.require_open()
    created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    model = name or service.options.model_name
    return json_response(OllamaLine(model=model, created_at=created, **said, done=True, done_reason="load"))
