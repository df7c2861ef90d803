"""Paths that several routes stand behind: told apart by the model's kind, or by what the body holds."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Discriminator, Tag, ValidationError

from app.api import rerank, tei
from app.api.json_route import JsonRoute, ServiceOf, describe
from app.errors import InvalidInput
from app.service import Service
from model.config import Kind

router = APIRouter(tags=["embed"], responses=tei.ERRORS, route_class=JsonRoute)

RerankRequest = Annotated[
    Annotated[tei.RerankRequest, Tag("TEI")] | Annotated[rerank.DocumentsRequest, Tag("Cohere")],
    Discriminator(lambda body: "Cohere" if isinstance(body, dict) and "documents" in body else "TEI"),
]
Body = dict[str, Any]
Answer = (
    list[list[float]]
    | list[float]
    | list[list[tei.Weight]]
    | list[tei.Prediction]
    | list[list[tei.Prediction]]
    | list[tei.Rank]
    | rerank.Results
)


@router.post("/rerank", response_model=list[tei.Rank] | rerank.Results)
async def reranked(request: RerankRequest, service: ServiceOf) -> Response:
    """The texts by how well they answer the query, the best first; with `documents` in place of `texts`, as /v1/rerank."""
    if isinstance(request, rerank.DocumentsRequest):
        return await rerank.rerank(request, service, "1")
    return await tei.rerank(request, service)


@router.post("/", response_model=Answer)
async def root(request: Body, service: ServiceOf) -> Response:
    """/embed, /similarity, /embed_sparse, /predict or /rerank, by the model's kind; a lone text is a list of one to /predict.

    Hugging Face's clients post here, and of predictions they read a list of lists only.
    """
    if isinstance(request.get("inputs"), str) and service.config.labels:
        request["inputs"] = [[request["inputs"]]]
    return await invocations(request, service)


@router.post("/invocations", response_model=Answer)
async def invocations(request: Body, service: ServiceOf) -> Response:
    """The same for SageMaker, which posts here; a lone text gets one list, as from /predict."""
    wanted, answer = _target(service.config.kind, request)
    try:
        read = wanted.model_validate(request)
    except ValidationError as error:
        raise InvalidInput(describe(error)) from None
    return await answer(read, service)


def _target(kind: Kind, body: Body) -> tuple[type[BaseModel], Callable[[Any, Service], Awaitable[Response]]]:
    """What a body is to be read as, and the route that answers it."""
    if kind == "sparse":
        return tei.EmbedSparseRequest, tei.embed_sparse
    if kind == "embedder":
        one_to_many = isinstance(body.get("inputs"), dict)
        return (tei.SimilarityRequest, tei.similarity) if one_to_many else (tei.EmbedRequest, tei.embed)
    if kind == "reranker" and "query" in body:
        return tei.RerankRequest, tei.rerank
    return tei.PredictRequest, tei.predict
