"""Paths that several routes stand behind: told apart by the model's kind, or by what the body holds."""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Discriminator, Field, GetJsonSchemaHandler, Tag, TypeAdapter, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from app.api import rerank, tei, tei_bodies
from app.api.answers import Accepted
from app.api.fields import PerTextQuery
from app.api.json_route import JsonRoute, ServiceOf, describe
from app.api.responses import ANSWERED, ANYWHERE, BINARY, ENCODED, READ, ErrorBody, errors
from app.errors import InvalidInput
from model.config import Kind

router = APIRouter(tags=["embed"], responses=BINARY | errors(ErrorBody, ANYWHERE, READ, ENCODED, [406]), route_class=JsonRoute)

rerankers = APIRouter(tags=["rerank"], responses=ANSWERED | errors(ErrorBody, ANYWHERE, READ, ENCODED), route_class=JsonRoute)

RerankRequest = Annotated[
    Annotated[tei_bodies.RerankRequest, Tag("of TEI")] | Annotated[rerank.DocumentsRequest, Tag("of Cohere")],
    Discriminator(lambda body: "of Cohere" if isinstance(body, dict) and _has_documents(body) else "of TEI"),
]


def _has_documents(body: dict[str, Any]) -> bool:
    """Whether a body speaks of documents, as Cohere's clients do, and not of texts."""
    return body.get("documents") is not None


class _OneOf:
    """Documents an object as one of several models, of which the model that is served decides which it must be."""

    def __init__(self, union: Any) -> None:
        self._union = union

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(TypeAdapter(self._union).core_schema)


Body = Annotated[
    dict[str, Any],
    _OneOf(
        tei_bodies.EmbedRequest
        | tei_bodies.SimilarityRequest
        | tei_bodies.EmbedSparseRequest
        | tei_bodies.PredictRequest
        | tei_bodies.RerankRequest
        | rerank.DocumentsRequest
    ),
    Field(examples=[{"inputs": ["hello"]}]),
]
Ranked = list[tei_bodies.Rank | tei_bodies.Unranked] | tei_bodies.Ranks
Answer = (
    tei_bodies.Vectors
    | tei_bodies.Embeddings
    | tei_bodies.Scores
    | tei_bodies.ScoresWithDetails
    | list[list[tei_bodies.Weight] | ErrorBody]
    | tei_bodies.SparseEmbeddings
    | tei_bodies.Predictions
    | tei_bodies.PredictionsWithDetails
    | Ranked
    | rerank.Results
)


@rerankers.post("/rerank", response_model=Ranked | rerank.Results)
async def reranked(request: RerankRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """The texts by how well they answer the query, the best first; with `documents` in place of `texts`, as /v1/rerank."""
    if isinstance(request, rerank.DocumentsRequest):
        return await rerank.rerank(request, service, query, "1")
    return await tei.rerank(request, service, query)


@router.post("/", response_model=Answer)
async def root(request: Body, service: ServiceOf, query: PerTextQuery, accepted: Accepted) -> Response:
    """/embed, /similarity, /embed_sparse, /predict or /rerank, by the model's kind; a lone text is a list of one to /predict.

    Hugging Face's clients post here, and of predictions they read a list of lists only.
    """
    if isinstance(request.get("inputs"), str) and service.config.labels:
        request["inputs"] = [[request["inputs"]]]
    return await invocations(request, service, query, accepted)


@router.post("/invocations", response_model=Answer)
async def invocations(request: Body, service: ServiceOf, query: PerTextQuery, accepted: Accepted) -> Response:
    """The same for SageMaker, which posts here; a lone text gets one list, as from /predict."""
    wanted = _wanted(service.config.kind, request)
    try:
        read = wanted.model_validate(request)
    except ValidationError as error:
        raise InvalidInput(describe(error)) from None
    match read:
        case tei_bodies.EmbedRequest():
            return await tei.embed(read, service, query, accepted)
        case tei_bodies.SimilarityRequest():
            return await tei.similarity(read, service, query)
        case tei_bodies.EmbedSparseRequest():
            return await tei.embed_sparse(read, service, query)
        case tei_bodies.RerankRequest():
            return await tei.rerank(read, service, query)
        case rerank.DocumentsRequest():
            return await rerank.rerank(read, service, query, "1")
        case tei_bodies.PredictRequest():
            return await tei.predict(read, service, query)
    raise AssertionError(wanted)


def _wanted(kind: Kind, body: Body) -> type[BaseModel]:
    """What a body is to be read as."""
    if kind == "sparse":
        return tei_bodies.EmbedSparseRequest
    if kind == "embedder":
        return tei_bodies.SimilarityRequest if isinstance(body.get("inputs"), dict) else tei_bodies.EmbedRequest
    if kind == "reranker" and "query" in body:
        return rerank.DocumentsRequest if _has_documents(body) else tei_bodies.RerankRequest
    return tei_bodies.PredictRequest
