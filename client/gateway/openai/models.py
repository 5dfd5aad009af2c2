"""GET /v1/models; and /v1/embeddings, which is refused in a way that says why."""

from __future__ import annotations

from fastapi import APIRouter

from client.gateway.json_route import JsonRoute
from client.gateway.openai import translate
from client.gateway.openai.documents import ERRORS
from client.gateway.openai.requests import EmbeddingRequest
from client.gateway.openai.responses import ModelBody, ModelList
from client.gateway.services import Services, ServicesOf
from python_backends.errors import UnsupportedFeatureError

router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["openai"])


@router.get("/models", responses=ERRORS)
async def list_models(services: ServicesOf) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[_model(services)])


@router.get("/models/{name}", responses=ERRORS)
async def retrieve_model(name: str, services: ServicesOf) -> ModelBody:
    """A model by its name."""
    translate.check_model(name, services)
    return _model(services)


@router.post("/embeddings", responses=ERRORS, response_model=None)
async def create_embedding(body: EmbeddingRequest) -> None:
    """Not offered: always an error."""
    raise UnsupportedFeatureError(
        "this server makes no embeddings: Gemma 3 is a model for chat; use /v1/chat/completions"
    )


def _model(services: Services) -> ModelBody:
    settings = services.settings
    return ModelBody(id=settings.model, created=settings.created, max_model_len=settings.max_model_len)
