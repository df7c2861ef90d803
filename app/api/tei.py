"""The dialect of Hugging Face text-embeddings-inference, and what we add to it."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, StrictBool, StrictStr

from app.api.answers import (
    ERRORS,
    ErrorBody,
    TextDetail,
    headers_of,
    in_places,
    json_answer,
    stream_with_details,
    with_details,
)
from app.api.fields import Common, Finished, Ids, Inputs, PerText, Pooled, as_list
from app.api.json_route import JsonRoute, ServiceOf
from app.inputs import Encoding
from app.render import json_matrices
from app.service import Embedding
from model.vectors import Metric

router = APIRouter(tags=["embed"], responses=ERRORS, route_class=JsonRoute)

PerTextQuery = Annotated[PerText, Query()]
Vector = list[float]


class EmbedRequest(Finished):
    inputs: Inputs


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


class Embeddings(BaseModel):
    """The answer of /embed with `details`."""

    embeddings: list[Vector | ErrorBody]
    details: list[TextDetail]


class NamedRow(BaseModel):
    text: str
    start: int | None
    end: int | None


class NamedMatrix(BaseModel):
    tokens: list[NamedRow]
    embeddings: list[Vector]


class Matrices(BaseModel):
    """The answer of /embed_all with `details`."""

    embeddings: list[list[Vector] | NamedMatrix | ErrorBody]
    details: list[TextDetail]


Scores = list[float | ErrorBody] | list[list[float | ErrorBody] | ErrorBody]


class ScoresWithDetails(BaseModel):
    """The answer of /similarity with `details`: those of the source or of `a` come first."""

    scores: Scores
    details: list[TextDetail]


@router.post("/embed", response_model=list[Vector | ErrorBody] | Embeddings)
async def embed(request: EmbedRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """One vector per text, as a list also for one text."""
    vectors, stats = await service.embed(as_list(request.inputs), Embedding(**request.embedding(query)))
    results = in_places(vectors, stats.details)
    return json_answer(service, with_details("embeddings", results, stats) if query.details else results, stats)


@router.post("/embed_all", response_model=list[list[Vector] | NamedMatrix | ErrorBody] | Matrices)
async def embed_all(request: EmbedAllRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """One matrix per text: a row per token, special tokens included. With `return_tokens`, objects that name the tokens."""
    with_tokens = bool(request.return_tokens)
    inputs = as_list(request.inputs)
    results: Sequence[Any]
    results, tokens, stats = await service.embed_tokens(inputs, Encoding(**request.encoding(query)), with_tokens)
    if with_tokens:
        named = [[{"text": token.text, "start": token.start, "end": token.end} for token in row] for row in tokens]
        results = [{"tokens": row, "embeddings": matrix} for row, matrix in zip(named, results, strict=True)]
    content = json_matrices(in_places(results, stats.details))
    if query.details:
        content = stream_with_details("embeddings", content, stats)
    return StreamingResponse(content, media_type="application/json", headers=headers_of(stats))


@router.post("/similarity", response_model=Scores | ScoresWithDetails)
async def similarity(request: SimilarityRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """One text against many: a list of scores. Many against many (`a`, `b`): the whole matrix."""
    parameters = request.parameters or SimilarityParameters()
    options = Embedding(**parameters.encoding(query), pooling=parameters.pooling, normalize=False)  # the metric does it
    inputs = request.inputs
    a, b = ([inputs.source_sentence], inputs.sentences) if isinstance(inputs, OneToMany) else (inputs.a, inputs.b)
    scores, stats = await service.similarity(a, b, options, parameters.metric or "cosine")
    of_a, of_b = stats.details[: len(a)], stats.details[len(a) :]
    if isinstance(inputs, ManyToMany):
        results = in_places([in_places(row, of_b) for row in scores], of_a)
    elif of_a[0].error:
        raise of_a[0].error  # without it there is no score, and it has no place of its own
    else:
        results = in_places(scores[0], of_b)
    return json_answer(service, with_details("scores", results, stats) if query.details else results, stats)


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
