"""The dialect of Cohere's and Jina's rerank APIs."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from app import scoring
from app.api.answers import best_first, detail_field, failed_last, json_answer, usage_of
from app.api.fields import Many, Overflow, PerText, PerTextQuery, Raw, examples
from app.api.json_route import JsonRoute, ServiceOf
from app.api.responses import ANSWERED, ANYWHERE, ENCODED, READ, TextDetail, Usage, errors
from app.errors import InvalidInput, ServiceError
from app.scoring import Scoring
from app.service import Service


class RerankError(BaseModel):
    """Every refusal on these routes."""

    message: str
    error_type: str


def refusal(status: int, word: str, message: str) -> tuple[int, Mapping[str, Any]]:
    """An error as Cohere's clients read it: status and body."""
    return status, {"message": message, "error_type": word}


_SAID: Mapping[int | str, str] = {400: "the query or a document is empty", 424: "the model is no reranker"}

router = APIRouter(
    tags=["rerank"], responses=ANSWERED | errors(RerankError, ANYWHERE, READ, ENCODED, changed=_SAID), route_class=JsonRoute
)

Positive = Annotated[StrictInt, Field(ge=1)]


class Document(BaseModel):
    """A document with whatever the client keeps beside its text, which comes back as it was."""

    model_config = ConfigDict(extra="allow")

    text: StrictStr


class DocumentsRequest(Overflow, Raw):
    model_config = examples({"query": "a fruit", "documents": ["apple", {"text": "car"}], "top_n": 2, "return_documents": True})

    query: StrictStr
    documents: Many[StrictStr | Document]
    top_n: Positive | None = Field(None, description="how many of the best to answer; default: all")
    return_documents: StrictBool | None = Field(None, description="answer each document with its score; default false")
    rank_fields: list[StrictStr] | None = Field(None, description='["text"] or nothing: only the text of a document is ranked')
    max_tokens_per_doc: Positive | None = Field(None, description="cut each document to so many tokens")
    model: StrictStr | None = Field(None, description="of no effect: one model is served, and answers name it")


class Result(BaseModel):
    index: int
    relevance_score: float
    document: Document | None = None


class UnrankedDocument(RerankError):
    """A document that failed, with `partial`: after those that have a score."""

    index: int


class ApiVersion(BaseModel):
    version: Literal["1", "2"]


class BilledUnits(BaseModel):
    search_units: int


class Meta(BaseModel):
    api_version: ApiVersion = Field(description="that of Cohere's API whose route was asked")
    billed_units: BilledUnits = Field(description="of no effect: what Cohere's clients expect")


class Results(BaseModel):
    id: str
    results: list[Result | UnrankedDocument]
    meta: Meta
    usage: Usage
    model: str
    details: list[TextDetail] | None = None


@router.post("/v1/rerank", response_model=Results)
async def rerank_v1(request: DocumentsRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """The documents by how well they answer the query, the best first."""
    return await rerank(request, service, query, "1")


@router.post("/v2/rerank", response_model=Results)
async def rerank_v2(request: DocumentsRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """The same in version 2 of Cohere's API."""
    return await rerank(request, service, query, "2")


async def rerank(request: DocumentsRequest, service: Service, query: PerText, version: str) -> Response:
    if request.rank_fields not in (None, ["text"]):
        raise InvalidInput('rank_fields names other fields than "text", which alone is ranked; put what is to count into it')
    texts = [item if isinstance(item, str) else item.text for item in request.documents]
    how = Scoring(request.habit, partial=query.partial, max_second=request.max_tokens_per_doc, raw=request.raw)
    scores, stats = await scoring.rerank(service, request.query, texts, how)
    best = best_first(scores, stats.errors)[: request.top_n]
    results = [_result(place, scores[place], request.documents if request.return_documents else None) for place in best]
    answer = {
        "id": str(uuid.uuid4()),
        "results": failed_last(results, stats.errors, _unranked),
        "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}},
        "usage": usage_of(stats),
        "model": service.name,
        **detail_field(stats, query),
    }
    return json_answer(service, answer, stats)


def _result(place: int, score: Any, documents: Sequence[str | Document] | None) -> dict[str, Any]:
    result = {"index": place, "relevance_score": score}
    if documents is None:
        return result
    document = documents[place]
    return {**result, "document": {"text": document} if isinstance(document, str) else document.model_dump()}


def _unranked(place: int, error: ServiceError) -> dict[str, Any]:
    return {"index": place, **refusal(error.status, error.word, error.message)[1]}
