"""Chunks of long texts, each with its vector and its place in the text: a dialect of ours."""

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

from app import chunking
from app.api.answers import answer, headers_of, in_places, with_details
from app.api.fields import Finished, Many, PerTextQuery, examples
from app.api.json_route import JsonRoute, ServiceOf
from app.api.responses import ANSWERED, ANYWHERE, ENCODED, READ, ErrorBody, TextDetail, errors
from app.chunking import Chunk, Chunking

router = APIRouter(tags=["embed"], responses=ANSWERED | errors(ErrorBody, ANYWHERE, READ, ENCODED), route_class=JsonRoute)


class EmbedChunksRequest(Finished):
    model_config = examples(
        {"inputs": "The river rose. It flooded the bank.", "chunk_tokens": 6},
        {"inputs": ["a b c d e f"], "chunk_tokens": 2, "overlap_tokens": 1, "late": True},
    )

    inputs: StrictStr | Many[StrictStr]
    chunk_tokens: StrictInt = Field(description="the most tokens of a chunk, special ones not counted")
    overlap_tokens: StrictInt | None = Field(
        None, description="the most tokens that a chunk shares with the one before; default 0"
    )
    late: StrictBool | None = Field(
        None, description="true: the mean over the chunk's rows of the whole text's token matrix; default: a text of its own"
    )


class EmbeddedChunk(BaseModel):
    """`text[start:end]` in code points, and its vector."""

    start: int
    end: int
    embedding: list[float]


class Chunks(BaseModel):
    """The answer with `details`."""

    chunks: list[list[EmbeddedChunk] | ErrorBody]
    details: list[TextDetail]


@router.post("/embed_chunks", response_model=list[list[EmbeddedChunk] | ErrorBody] | Chunks)
async def embed_chunks(request: EmbedChunksRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """The chunks of each text, of any length: they end at sentence ends where possible, else at word ends."""
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    options = Chunking(
        **request.embedding(query),
        chunk_tokens=request.chunk_tokens,
        overlap_tokens=request.overlap_tokens or 0,
        late=bool(request.late),
    )
    chunks, stats = await chunking.embed_chunks(service, texts, options)
    results = in_places([[_described(chunk) for chunk in its] for its in chunks], stats.errors)
    return answer(service, with_details("chunks", results, stats, query), headers_of(stats))


def _described(chunk: Chunk) -> dict[str, Any]:
    return {"start": chunk.start, "end": chunk.end, "embedding": chunk.embedding}
