"""The dialect of Hugging Face text-embeddings-inference, and what we add to it."""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from app.api.headers import headers_of
from app.api.json_route import JsonRoute, ServiceOf
from app.render import json_bytes, json_matrices
from app.service import Embedding, Encoding, Input, Service, Stats
from model.config import PoolingMode
from model.vectors import Metric

Ids = list[StrictInt]
Inputs = Annotated[StrictStr | Ids | list[StrictStr | Ids], Field(union_mode="left_to_right")]
Side = Annotated[Literal["left", "right"], BeforeValidator(lambda side: side.lower() if isinstance(side, str) else side)]


class ErrorBody(BaseModel):
    """Every refusal on these routes."""

    error: str
    error_type: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "an input is empty"},
    401: {"model": ErrorBody, "description": "the key is missing or wrong"},
    413: {"model": ErrorBody, "description": "the body is too large"},
    422: {"model": ErrorBody, "description": "the request is invalid"},
    424: {"model": ErrorBody, "description": "the model is of another kind"},
    429: {"model": ErrorBody, "description": "overloaded; Retry-After says when to come back"},
    500: {"model": ErrorBody, "description": "the encoder failed"},
    503: {"model": ErrorBody, "description": "not ready; Retry-After says when to come back"},
    504: {"model": ErrorBody, "description": "the deadline passed"},
}

router = APIRouter(tags=["embed"], responses=_ERRORS, route_class=JsonRoute)


class Common(BaseModel):
    """Options of every route that encodes texts; null is the same as absent."""

    truncate: StrictBool | None = Field(None, description="false refuses a text that is too long; default: cut it")
    truncation_direction: Side | None = Field(None, description="the side on which a long text is cut")
    prompt_name: StrictStr | None = Field(None, description="a prompt of the checkpoint to put before each text")

    def encoding(self) -> dict[str, Any]:
        return {"truncate": self.truncate, "side": self.truncation_direction or "right", "prompt_name": self.prompt_name}


class Pooled(Common):
    """Options of routes that make one vector of a text."""

    pooling: PoolingMode | None = Field(None, description="default: the checkpoint's own")


class EmbedRequest(Pooled):
    inputs: Inputs
    normalize: StrictBool | None = Field(None, description="scale each vector to length 1; default true")
    dimensions: StrictInt | None = Field(None, description="keep this many numbers of each vector, then normalise")


class EmbedAllRequest(Common):
    inputs: Inputs
    return_tokens: StrictBool | None = Field(None, description="name the token that each row stands for")


class OneToMany(BaseModel):
    source_sentence: StrictStr
    sentences: list[StrictStr]


class ManyToMany(BaseModel):
    a: list[StrictStr]
    b: list[StrictStr]


class SimilarityParameters(Pooled):
    metric: Metric | None = Field(
        None, description="cosine (default), dot or euclidean; dot and euclidean compare vectors as pooled"
    )


class SimilarityRequest(BaseModel):
    inputs: OneToMany | ManyToMany
    parameters: SimilarityParameters | None = None


class TokenizeRequest(BaseModel):
    inputs: StrictStr | list[StrictStr]
    add_special_tokens: StrictBool | None = None
    prompt_name: StrictStr | None = None


class DecodeRequest(BaseModel):
    ids: Ids | list[Ids]
    skip_special_tokens: StrictBool | None = None


class SimpleToken(BaseModel):
    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


@router.post("/embed", response_model=list[list[float]])
async def embed(request: EmbedRequest, service: ServiceOf) -> Response:
    """One vector per text, as a list also for one text."""
    options = Embedding(
        **request.encoding(),
        pooling=request.pooling,
        normalize=request.normalize is not False,
        dimensions=request.dimensions,
    )
    vectors, stats = await service.embed(as_list(request.inputs), options)
    return _json(service, vectors, stats)


@router.post("/embed_all", response_model=list[list[list[float]]])
async def embed_all(request: EmbedAllRequest, service: ServiceOf) -> Response:
    """One matrix per text: a row per token, special tokens included. With `return_tokens`, objects that name the tokens."""
    with_tokens = bool(request.return_tokens)
    inputs = as_list(request.inputs)
    matrices, tokens, stats = await service.embed_tokens(inputs, Encoding(**request.encoding()), with_tokens)
    if with_tokens:
        named = [[{"text": token.text, "start": token.start, "end": token.end} for token in row] for row in tokens]
        return _json(service, [{"tokens": row, "embeddings": m} for row, m in zip(named, matrices, strict=True)], stats)
    return StreamingResponse(json_matrices(matrices), media_type="application/json", headers=headers_of(stats))


@router.post("/similarity", response_model=list[float] | list[list[float]])
async def similarity(request: SimilarityRequest, service: ServiceOf) -> Response:
    """One text against many: a list of scores. Many against many (`a`, `b`): the whole matrix."""
    parameters = request.parameters or SimilarityParameters()
    metric = parameters.metric or "cosine"
    options = Embedding(**parameters.encoding(), pooling=parameters.pooling, normalize=False)  # the metric does it
    if isinstance(request.inputs, OneToMany):
        source, sentences = [request.inputs.source_sentence], request.inputs.sentences
        scores, stats = await service.similarity(source, sentences, options, metric)
        return _json(service, scores[0], stats)
    scores, stats = await service.similarity(request.inputs.a, request.inputs.b, options, metric)
    return _json(service, scores, stats)


@router.post("/tokenize", response_model=list[list[SimpleToken]])
async def tokenize(request: TokenizeRequest, service: ServiceOf) -> Response:
    """The tokens of each text with their places in it, in characters; nothing is cut."""
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    rows = await service.tokenize(texts, request.add_special_tokens is not False, request.prompt_name)
    return _json(
        service,
        [[{"id": t.id, "text": t.text, "special": t.special, "start": t.start, "stop": t.end} for t in row] for row in rows],
    )


@router.post("/decode", response_model=list[str])
async def decode(request: DecodeRequest, service: ServiceOf) -> Response:
    """The text of each list of token ids."""
    rows: list[Any] = [request.ids] if request.ids and isinstance(request.ids[0], int) else request.ids
    return _json(service, await service.decode(rows, request.skip_special_tokens is not False))


def as_list(inputs: str | list[Any]) -> list[Input]:
    """A single text, or the token ids of one, is a list of one from here on."""
    lone = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
    return [inputs] if lone else inputs  # type: ignore[return-value]


def _json(service: Service, value: Any, stats: Stats | None = None) -> Response:
    start = time.perf_counter()
    content = json_bytes(value)
    service.metrics.stages["render"].observe(time.perf_counter() - start)
    return Response(content, media_type="application/json", headers=headers_of(stats) if stats else None)
