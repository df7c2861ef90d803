"""The dialect of the OpenAI API: embeddings and models."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field, StrictInt, StrictStr

from app.api.answers import (
    Accepted,
    answer,
    array_answer,
    check_json_only,
    detail_field,
    headers_of,
    in_places,
    number_list,
    usage_of,
)
from app.api.fields import PROMPT_NAME, Inputs, Output, Overflow, PerTextQuery, as_list, examples
from app.api.json_route import JsonRoute, ServiceOf
from app.api.responses import ANYWHERE, BINARY, TextDetail, Usage, errors
from app.embedding import Embedding, embed
from app.errors import InvalidInput, NotFound, ServiceError
from app.inputs import NO_PROMPT, Input
from app.render import json_bytes, json_list
from app.service import Service
from model.vectors import Array

_CODES: Mapping[int, str] = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
_PROMPTS: Mapping[str, Sequence[str]] = {
    "query": ("query", "search_query"),
    "document": ("document", "passage", "search_document", "corpus"),
}
"""Names that checkpoints give to the prompt of a kind of text, the most usual first."""


class Problem(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Every refusal on these routes."""

    error: Problem


_ERRORS = errors(
    ErrorEnvelope,
    ANYWHERE,
    [400, "default"],
    changed={400: "the request is invalid, or the model of another kind"},
)


class EmbeddingRequest(Overflow, Output):
    model_config = examples(
        {"input": ["hello", "world"], "encoding_format": "float"},
        {"input": "hello", "encoding_format": "base64", "dimensions": 16},
    )

    input: Inputs
    model: StrictStr | None = Field(None, description="of no effect: one model is served, and answers name it")
    dimensions: StrictInt | None = Field(None, description="keep this many numbers, then normalise; 0 is the same as null")
    prompt_name: StrictStr | None = Field(None, description=PROMPT_NAME)
    input_type: StrictStr | None = Field(
        None, description="query or document: the checkpoint's prompt for it, or none where it has none; prompt_name wins"
    )


class EmbeddingItem(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Unembedded(ErrorEnvelope):
    """A text that failed, with `partial`. Its vector is empty and not absent: clients decode what stands there."""

    object: Literal["error"]
    index: int
    embedding: list[float] = Field(max_length=0)


class EmbeddingList(BaseModel):
    object: Literal["list"]
    model: str
    usage: Usage
    details: list[TextDetail] | None = None
    data: list[EmbeddingItem | Unembedded]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bertd"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


router = APIRouter(tags=["openai"], responses=_ERRORS, route_class=JsonRoute)
model_router = APIRouter(
    tags=["openai"], responses=errors(ErrorEnvelope, ANYWHERE, [400, "default"], changed={400: "the request is invalid"})
)


@router.post("/embeddings", include_in_schema=False)
@router.post("/v1/embeddings", response_model=EmbeddingList, responses=BINARY)
async def embeddings(request: EmbeddingRequest, service: ServiceOf, query: PerTextQuery, accepted: Accepted) -> Response:
    """One vector of length 1 per text."""
    check_json_only(query, accepted)
    inputs = as_list(request.input)
    _check_ids(inputs, service)
    options = Embedding(
        on_overflow=request.habit,
        prompt_name=_prompt_for(request, service.config.prompts),
        dimensions=request.dimensions or None,
        output_dtype=request.dtype,
        partial=query.partial,
    )
    vectors, stats = await embed(service, inputs, options)
    if accepted != "application/json":
        return array_answer(service, list(vectors), stats, accepted)
    head = {"object": "list", "model": service.name, "usage": usage_of(stats), **detail_field(stats, query)}
    items = in_places(_items(vectors, request.encoding_format), stats.errors, _unembedded)
    return answer(service, _embedding_list(head, items), headers_of(stats))


@model_router.get("/models", include_in_schema=False)
@model_router.get("/v1/models")
async def models(service: ServiceOf) -> ModelList:
    """The model that is served."""
    return ModelList(data=[_model(service)])


@model_router.get("/models/{name:path}", include_in_schema=False)
@model_router.get("/v1/models/{name:path}", responses=errors(ErrorEnvelope, [404]))
async def model(name: str, service: ServiceOf) -> Model:
    """The model of that name."""
    if name.strip("/") != service.name.strip("/"):
        raise NotFound("no model of that name is served; GET /v1/models names the one that is")
    return _model(service)


def refusal(status: int, word: str, message: str) -> tuple[int, Mapping[str, Any]]:
    """The envelope of an error. What is wrong with a request is 400 here, as its clients expect."""
    status = 400 if status in (406, 422, 424) else status
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": _CODES.get(status)}}


def _check_ids(inputs: Sequence[Input], service: Service) -> None:
    """Ids of another vocabulary would give a vector of some other text: only those that can be no other's are taken."""
    for place, item in enumerate(inputs):
        if item and isinstance(item, list) and not service.reader.owns(item):
            raise InvalidInput(
                f"input[{place}] holds token ids that are not this model's; wanted text (LangChain sends it with "
                "check_embedding_ctx_length=False), or ids of this model's tokenizer with its special tokens"
            )


def _prompt_for(request: EmbeddingRequest, prompts: Mapping[str, str]) -> str | None:
    """The prompt of that name, or the one for that type of text; without one for it, such a text gets none: the checkpoint's
    default may be that of the other type."""
    wanted = (request.input_type or "").lower()
    names = next((names for kind, names in _PROMPTS.items() if wanted in (kind, *names)), None)
    if request.prompt_name is not None or names is None:
        return request.prompt_name
    return next((name for name in (wanted, *names) if name in prompts), NO_PROMPT)


def _items(vectors: Array, encoding_format: str | None) -> Iterator[dict[str, Any]]:
    for index, vector in enumerate(vectors):
        yield {"object": "embedding", "index": index, "embedding": number_list(vector, encoding_format)}


def _unembedded(place: int, error: ServiceError) -> dict[str, Any]:
    return {"object": "error", "index": place, "embedding": [], **refusal(error.status, error.word, error.message)[1]}


def _embedding_list(head: Mapping[str, Any], items: Iterable[Any]) -> Iterator[bytes]:
    yield json_bytes(head)[:-1] + b',"data":'
    yield from json_list(items)
    yield b"}"


def _model(service: Service) -> Model:
    return Model(id=service.name, created=service.started)
