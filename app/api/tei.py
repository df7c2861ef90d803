"""The dialect of Hugging Face text-embeddings-inference, and what we add to it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Response

from app import embedding, scoring
from app.api.answers import (
    Accepted,
    answer,
    array_answer,
    best_first,
    check_json_only,
    error_body,
    failed_last,
    headers_of,
    in_places,
    json_answer,
    number_list,
    with_details,
)
from app.api.fields import PerText, PerTextQuery, as_list
from app.api.json_route import JsonRoute, ServiceOf
from app.api.responses import ANSWERED, ANYWHERE, BINARY, CUT, ENCODED, READ, ErrorBody, errors
from app.api.tei_bodies import (
    DecodeRequest,
    EmbedAllRequest,
    Embeddings,
    EmbedRequest,
    EmbedSparseRequest,
    ManyToMany,
    Matrices,
    OneToMany,
    Predictions,
    PredictionsWithDetails,
    PredictRequest,
    RerankRequest,
    Scores,
    ScoresWithDetails,
    SimilarityParameters,
    SimilarityRequest,
    SimpleToken,
    SparseEmbeddings,
    TokenizeRequest,
    TokenMatrix,
    Vector,
    Vectors,
    Weight,
)
from app.embedding import Embedding
from app.errors import EmptyInput, InvalidInput
from app.inputs import Encoding, Input, Token
from app.render import json_sparse
from model.vectors import Array, FloatArray

_NOT_ACCEPTABLE = errors(ErrorBody, [406])

router = APIRouter(tags=["embed"], responses=ANSWERED | errors(ErrorBody, ANYWHERE, READ, ENCODED), route_class=JsonRoute)
tokenizer_router = APIRouter(tags=["embed"], responses=CUT | errors(ErrorBody, ANYWHERE, READ), route_class=JsonRoute)


@router.post("/embed", response_model=Vectors | Embeddings, responses=BINARY | _NOT_ACCEPTABLE)
async def embed(request: EmbedRequest, service: ServiceOf, query: PerTextQuery, accepted: Accepted) -> Response:
    """One vector per text, as a list also for one text. In base64, one text per vector."""
    check_json_only(query, accepted)
    options = Embedding(**request.embedding(query), output_dtype=request.dtype)
    vectors, stats = await embedding.embed(service, as_list(request.inputs), options)
    if accepted != "application/json":
        return array_answer(service, list(vectors), stats, accepted)
    rows = in_places([number_list(row, request.encoding_format) for row in vectors], stats.errors)
    return answer(service, with_details("embeddings", rows, stats, query), headers_of(stats))


@router.post(
    "/embed_all", response_model=list[list[Vector] | TokenMatrix | ErrorBody] | Matrices, responses=BINARY | _NOT_ACCEPTABLE
)
async def embed_all(request: EmbedAllRequest, service: ServiceOf, query: PerTextQuery, accepted: Accepted) -> Response:
    """One matrix per text: a row per token, special tokens included.

    With `return_tokens` an object that names the tokens; in base64 an object with the shape [tokens, numbers].
    """
    check_json_only(query, accepted)
    with_tokens = bool(request.return_tokens) and accepted == "application/json"
    options = Encoding(**request.encoding(query))
    matrices, tokens, stats = await embedding.embed_tokens(service, as_list(request.inputs), options, with_tokens, request.dtype)
    if accepted != "application/json":
        return array_answer(service, matrices, stats, accepted)
    rows = tokens if with_tokens else [None] * len(matrices)
    items = (_matrix(matrix, row, request.encoding_format) for matrix, row in zip(matrices, rows, strict=True))
    return answer(service, with_details("embeddings", in_places(items, stats.errors), stats, query), headers_of(stats))


@router.post("/similarity", response_model=Scores | ScoresWithDetails)
async def similarity(request: SimilarityRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """One text against many: a list of scores. Many against many (`a`, `b`): the whole matrix."""
    parameters = request.parameters or SimilarityParameters()
    options = Embedding(**parameters.encoding(query), pooling=parameters.pooling, normalize=False)  # the metric does it
    inputs = request.inputs
    a, b = ([inputs.source_sentence], inputs.sentences) if isinstance(inputs, OneToMany) else (inputs.a, inputs.b)
    scores, stats = await embedding.similarity(service, a, b, options, parameters.metric or "cosine")
    of_a, of_b = stats.errors[: len(a)], stats.errors[len(a) :]
    if isinstance(inputs, ManyToMany):
        results = in_places((in_places(row, of_b) for row in scores), of_a)
    elif of_a[0]:
        raise of_a[0]  # without it there is no score, and it has no place of its own
    else:
        results = in_places(scores[0], of_b)
    return answer(service, with_details("scores", results, stats, query), headers_of(stats))


@router.post("/embed_sparse", response_model=list[list[Weight] | ErrorBody] | SparseEmbeddings)
async def embed_sparse(request: EmbedSparseRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """The tokens of the vocabulary that each text stands for, with their weights; zeros are left out."""
    rows, stats = await scoring.embed_sparse(service, as_list(request.inputs), Encoding(**request.encoding(query)))
    results = in_places(map(json_sparse, rows), stats.errors)
    return answer(service, with_details("embeddings", results, stats, query), headers_of(stats))


@router.post("/predict", response_model=Predictions | PredictionsWithDetails)
async def predict(request: PredictRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """The score of each label, the highest first: a list for one text or pair, a list of lists for a list of lists."""
    batch = isinstance(request.inputs, list) and not all(isinstance(item, str) for item in request.inputs)
    inputs: Sequence[Any] = request.inputs if batch else [request.inputs]
    how = request.scoring(query if batch else PerText(details=query.details))  # a lone text has no place in its answer
    scores, stats = await scoring.predict(service, [_text_or_pair(item) for item in inputs], how)
    rows = [_predictions(service.config.labels, row) for row in scores]
    results = in_places(rows, stats.errors) if batch else rows[0]
    return answer(service, with_details("predictions", results, stats, query), headers_of(stats))


def _text_or_pair(item: str | Sequence[str]) -> Input:
    texts = [item] if isinstance(item, str) else item
    if not texts:
        raise EmptyInput("an input is empty; wanted a text, or a list of one or two")
    if len(texts) > 2:
        raise InvalidInput(f"a list holds {len(texts)} texts; wanted one, or the two of a pair; give each its own list")
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _predictions(labels: Sequence[str], row: FloatArray) -> list[dict[str, Any]]:
    return [{"score": row[place], "label": labels[place]} for place in (-row).argsort(kind="stable")]


async def rerank(request: RerankRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """The texts by how well they answer the query, the best first."""
    scores, stats = await scoring.rerank(service, request.query, request.texts, request.scoring(query))
    ranks = [{"index": place, "score": scores[place]} for place in best_first(scores, stats.errors)]
    if request.return_text:
        ranks = [{**rank, "text": request.texts[rank["index"]]} for rank in ranks]
    ranks = failed_last(ranks, stats.errors, lambda place, error: {"index": place, **error_body(error)})
    return answer(service, with_details("ranks", ranks, stats, query), headers_of(stats))


@tokenizer_router.post("/tokenize", response_model=list[list[SimpleToken]])
async def tokenize(request: TokenizeRequest, service: ServiceOf) -> Response:
    """The tokens of each text with their places in it, in characters; nothing is cut."""
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    rows = await service.tokenize(texts, request.add_special_tokens is not False, request.prompt_name)
    return json_answer(
        service,
        [[{"id": t.id, "text": t.text, "special": t.special, "start": t.start, "stop": t.end} for t in row] for row in rows],
    )


@tokenizer_router.post("/decode", response_model=list[str])
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
