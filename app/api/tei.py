"""The dialect of Hugging Face text-embeddings-inference, and what we add to it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from app.api.answers import json_answer, json_stream
from app.api.fields import Ids, Inputs, as_list
from app.api.json_route import JsonRoute, ServiceOf
from app.errors import EmptyInput, InvalidInput
from app.render import json_matrices, json_sparse
from app.service import Embedding, Encoding, Input, Scoring
from model.config import PoolingMode
from model.vectors import FloatArray, Metric

Side = Annotated[Literal["left", "right"], BeforeValidator(lambda side: side.lower() if isinstance(side, str) else side)]


class ErrorBody(BaseModel):
    """Every refusal on these routes."""

    error: str
    error_type: str


def refusal(status: int, word: str, message: str) -> tuple[int, Mapping[str, Any]]:
    """An error as TEI's clients read it: status and body."""
    return status, {"error": message, "error_type": word}


ERRORS: dict[int | str, dict[str, Any]] = {
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

router = APIRouter(tags=["embed"], responses=ERRORS, route_class=JsonRoute)


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


class EmbedSparseRequest(Common):
    inputs: Inputs


class Weight(BaseModel):
    """A token of the vocabulary that a text stands for."""

    index: int
    value: float


class Scored(BaseModel):
    """Options of routes that score texts."""

    truncate: StrictBool | None = Field(None, description="false refuses a text or pair that is too long; default: cut it")
    truncation_direction: Side | None = Field(None, description="the side on which a long text is cut")
    raw_scores: StrictBool | None = Field(None, description="true: what the classifier gives, without sigmoid or softmax")

    def scoring(self) -> Scoring:
        return Scoring(self.truncate, self.truncation_direction or "right", raw=bool(self.raw_scores))


class PredictRequest(Scored):
    inputs: StrictStr | list[StrictStr] | list[list[StrictStr]] = Field(
        description="a text, a list of one text, a list of two: one pair, or a list of such lists"
    )


class Prediction(BaseModel):
    score: float
    label: str


class RerankRequest(Scored):
    query: StrictStr
    texts: list[StrictStr]
    return_text: StrictBool | None = None


class Rank(BaseModel):
    index: int
    text: str | None = None
    score: float


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
    return json_answer(service, vectors, stats)


@router.post("/embed_all", response_model=list[list[list[float]]])
async def embed_all(request: EmbedAllRequest, service: ServiceOf) -> Response:
    """One matrix per text: a row per token, special tokens included. With `return_tokens`, objects that name the tokens."""
    with_tokens = bool(request.return_tokens)
    inputs = as_list(request.inputs)
    matrices, tokens, stats = await service.embed_tokens(inputs, Encoding(**request.encoding()), with_tokens)
    if with_tokens:
        named = [[{"text": token.text, "start": token.start, "end": token.end} for token in row] for row in tokens]
        return json_answer(service, [{"tokens": row, "embeddings": m} for row, m in zip(named, matrices, strict=True)], stats)
    return json_stream(json_matrices(matrices), stats)


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
    return json_answer(service, scores, stats)


@router.post("/embed_sparse", response_model=list[list[Weight]])
async def embed_sparse(request: EmbedSparseRequest, service: ServiceOf) -> Response:
    """The tokens of the vocabulary that each text stands for, with their weights; zeros are left out."""
    rows, stats = await service.embed_sparse(as_list(request.inputs), Encoding(**request.encoding()))
    return json_stream(json_sparse(rows), stats)


@router.post("/predict", response_model=list[Prediction] | list[list[Prediction]])
async def predict(request: PredictRequest, service: ServiceOf) -> Response:
    """The score of each label, the highest first: a list for one text or pair, a list of lists for a list of lists."""
    batch = isinstance(request.inputs, list) and not all(isinstance(item, str) for item in request.inputs)
    inputs: Sequence[Any] = request.inputs if batch else [request.inputs]
    scores, stats = await service.predict([_text_or_pair(item) for item in inputs], request.scoring())
    rows = [_predictions(service.config.labels, row) for row in scores]
    return json_answer(service, rows if batch else rows[0], stats)


def _text_or_pair(item: str | Sequence[str]) -> Input:
    texts = [item] if isinstance(item, str) else item
    if not texts:
        raise EmptyInput("an input is empty; wanted a text, or a list of one or two")
    if len(texts) > 2:
        raise InvalidInput(f"a list holds {len(texts)} texts; wanted one, or the two of a pair; give each its own list")
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _predictions(labels: Sequence[str], row: FloatArray) -> list[dict[str, Any]]:
    return [{"score": row[place], "label": labels[place]} for place in (-row).argsort(kind="stable")]


async def rerank(request: RerankRequest, service: ServiceOf) -> Response:
    """The texts by how well they answer the query, the best first."""
    scores, stats = await service.rerank(request.query, request.texts, request.scoring())
    ranks = [{"index": place, "score": scores[place]} for place in (-scores).argsort(kind="stable")]
    if request.return_text:
        ranks = [{**rank, "text": request.texts[rank["index"]]} for rank in ranks]
    return json_answer(service, ranks, stats)


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
