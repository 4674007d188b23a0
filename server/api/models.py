"""`GET /v1/models` and `GET /v1/models/{id}`."""

from dataclasses import asdict

from fastapi import APIRouter, Response

from server.api.json_body import ServiceDependency
from server.generation.streaming import json_response
from server.protocol.models import ModelCard, ModelList
from server.service import Service

router = APIRouter(tags=["models"])


@router.get("/v1/models", responses={200: {"model": ModelList}}, response_class=Response)
async def list_models(service: ServiceDependency) -> Response:
    """The names under which the model can be asked."""
    names = (service.options.model_name, *service.options.other_names)
    return json_response(ModelList(object="list", data=[_card(service, name) for name in names]))


@router.get("/v1/models/{model_id:path}", responses={200: {"model": ModelCard}}, response_class=Response)
async def get_model(model_id: str, service: ServiceDependency) -> Response:
    """One of them."""
    service.require_model(model_id)
    return json_response(_card(service, model_id))


def _card(service: Service, name: str) -> ModelCard:
    limit = service.options.max_prompt_tokens
    length = limit if limit > 0 else service.options.context_length
    return ModelCard(
        id=name,
        object="model",
        created=service.created,
        owned_by="dijiang",
        max_model_len=length,
        context_length=length,
        max_prompt_tokens=limit if limit > 0 else None,
        default_sampling=asdict(service.options.sampling),
    )
