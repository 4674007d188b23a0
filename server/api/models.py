"""`GET /v1/models` and `GET /v1/models/{id}`."""

from fastapi import APIRouter, Response

from server.api.json_body import ServiceDependency
from server.generation.streaming import json_response
from server.protocol.models import ModelCard, ModelList
from server.service import Service

router = APIRouter(tags=["models"])


@router.get("/v1/models", responses={200: {"model": ModelList}}, response_class=Response)
async def list_models(service: ServiceDependency) -> Response:
    """The models that can be asked."""
    return json_response(ModelList(object="list", data=[_card(service)]))


@router.get("/v1/models/{model_id:path}", responses={200: {"model": ModelCard}}, response_class=Response)
async def get_model(model_id: str, service: ServiceDependency) -> Response:
    """One of them."""
    service.require_model(model_id)
    return json_response(_card(service))


def _card(service: Service) -> ModelCard:
    limit = service.options.max_prompt_tokens
    return ModelCard(
        id=service.options.model_name,
        object="model",
        created=service.created,
        owned_by="dijiang",
        max_model_len=limit if limit > 0 else None,
    )
