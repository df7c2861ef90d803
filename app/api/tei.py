"""The dialect of Hugging Face text-embeddings-inference, and what we add to it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from app.api.answers import BINARY, Accepted, answer, array_answer, headers_of, json_answer, number_list
from app.api.fields import Ids, Inputs, Output, as_list
from app.api.json_route import JsonRoute, ServiceOf
from app.render import json_list
from app.service import Embedding, Encoding, Token
from model.config import PoolingMode
from model.vectors import Array, Metric

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

_NOT_ACCEPTABLE: dict[int | str, dict[str, Any]] = {
    406: {"model": ErrorBody, "description": "octets of matrices of several shapes"}
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


class EmbedRequest(Pooled, Output):
    inputs: Inputs
    normalize: StrictBool | None = Field(None, description="scale each vector to length 1; default true")
    dimensions: StrictInt | None = Field(None, description="keep this many numbers of each vector, then normalise")


class EmbedAllRequest(Common, Output):
    inputs: Inputs
    return_tokens: StrictBool | None = Field(None, description="name the token that each row stands for")


class PlacedToken(BaseModel):
    text: str
    start: int | None
    end: int | None


class TokenMatrix(BaseModel):
    """A matrix with what was asked for beside it."""

    tokens: list[PlacedToken] | None = None
    embeddings: list[list[float]] | str
    shape: tuple[int, int] | None = None


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


@router.post("/embed", response_model=list[list[float]] | list[str], responses=BINARY)
async def embed(request: EmbedRequest, service: ServiceOf, accepted: Accepted) -> Response:
    """One vector per text, as a list also for one text. In base64, one text per vector."""
    options = Embedding(
        **request.encoding(),
        pooling=request.pooling,
        normalize=request.normalize is not False,
        dimensions=request.dimensions,
        output_dtype=request.dtype,
    )
    vectors, stats = await service.embed(as_list(request.inputs), options)
    if accepted != "application/json":
        return array_answer(service, list(vectors), stats, accepted)
    return answer(service, json_list(number_list(row, request.encoding_format) for row in vectors), headers_of(stats))


@router.post("/embed_all", response_model=list[list[list[float]] | TokenMatrix], responses=BINARY | _NOT_ACCEPTABLE)
async def embed_all(request: EmbedAllRequest, service: ServiceOf, accepted: Accepted) -> Response:
    """One matrix per text: a row per token, special tokens included.

    With `return_tokens` an object that names the tokens; in base64 an object with the shape [tokens, numbers].
    """
    with_tokens = bool(request.return_tokens) and accepted == "application/json"
    options = Encoding(**request.encoding())
    matrices, tokens, stats = await service.embed_tokens(as_list(request.inputs), options, with_tokens, request.dtype)
    if accepted != "application/json":
        return array_answer(service, matrices, stats, accepted)
    rows = tokens if with_tokens else [None] * len(matrices)
    items = (_matrix(matrix, row, request.encoding_format) for matrix, row in zip(matrices, rows, strict=True))
    return answer(service, json_list(items), headers_of(stats))


@router.post("/similarity", response_model=list[float] | list[list[float]])
async def similarity(request: SimilarityRequest, service: ServiceOf) -> Response:
    """One text against many: a list of scores. Many against many (`a`, `b`): the whole matrix."""
    parameters = request.parameters or SimilarityParameters()
    metric = parameters.metric or "cosine"
    options = Embedding(**parameters.encoding(), pooling=parameters.pooling, normalize=False)  # the metric does it
    if isinstance(request.inputs, OneToMany):
        source, sentences = [request.inputs.source_sentence], request.inputs.sentences
        scores, stats = await service.similarity(source, sentences, options, metric)
        return json_answer(service, scores[0], stats)
    scores, stats = await service.similarity(request.inputs.a, request.inputs.b, options, metric)
    return answer(service, json_list(scores), headers_of(stats))


@router.post("/tokenize", response_model=list[list[SimpleToken]])
async def tokenize(request: TokenizeRequest, service: ServiceOf) -> Response:
    """The tokens of each text with their places in it, in characters; nothing is cut."""
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    rows = await service.tokenize(texts, request.add_special_tokens is not False, request.prompt_name)
    return json_answer(
        service,
        [[{"id": t.id, "text": t.text, "special": t.special, "start": t.start, "stop": t.end} for t in row] for row in rows],
    )


@router.post("/decode", response_model=list[str])
async def decode(request: DecodeRequest, service: ServiceOf) -> Response:
    """The text of each list of token ids."""
    rows: list[Any] = [request.ids] if request.ids and isinstance(request.ids[0], int) else request.ids
    return json_answer(service, await service.decode(rows, request.skip_special_tokens is not False))


def _matrix(matrix: Array, tokens: list[Token] | None, encoding_format: str | None) -> Any:
    """A matrix, or an object of it where there is more to say."""
    if tokens is None and encoding_format != "base64":
        return matrix
    item: dict[str, Any] = {"embeddings": number_list(matrix, encoding_format)}
    if tokens is not None:
        item = {"tokens": [{"text": token.text, "start": token.start, "end": token.end} for token in tokens], **item}
    return {**item, "shape": matrix.shape} if encoding_format == "base64" else item


def refusal(status: int, word: str, message: str) -> tuple[int, Mapping[str, Any]]:
    """The body of an error."""
    return status, {"error": message, "error_type": word}
