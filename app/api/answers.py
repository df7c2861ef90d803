"""What the routes of TEI's dialect and ours answer with: refusals, headers, JSON, and a word on each text."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import Response
from pydantic import BaseModel

from app.errors import ServiceError
from app.render import json_bytes
from app.service import Detail, Service, Stats
from model.vectors import FloatArray


class ErrorBody(BaseModel):
    """Every refusal on these routes; with `partial`, also what stands in the place of a bad text."""

    error: str
    error_type: str


class TextDetail(BaseModel):
    """What was done to a text, with `details`."""

    tokens: int
    truncated: bool
    pieces: int


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "an input is empty"},
    401: {"model": ErrorBody, "description": "the key is missing or wrong"},
    413: {"model": ErrorBody, "description": "the body is too large, or its texts have too many tokens"},
    422: {"model": ErrorBody, "description": "the request is invalid"},
    424: {"model": ErrorBody, "description": "the model is of another kind"},
    429: {"model": ErrorBody, "description": "overloaded; Retry-After says when to come back"},
    500: {"model": ErrorBody, "description": "the encoder failed"},
    503: {"model": ErrorBody, "description": "not ready; Retry-After says when to come back"},
    504: {"model": ErrorBody, "description": "the deadline passed"},
}


def headers_of(stats: Stats) -> Mapping[str, str]:
    """TEI's headers, in whole milliseconds, and how many texts were cut."""
    compute = stats.tokenize + stats.queue + stats.infer
    return {
        "x-compute-type": stats.device,
        "x-compute-time": _milliseconds(compute),
        "x-compute-characters": str(stats.characters),
        "x-compute-tokens": str(stats.tokens),
        "x-total-time": _milliseconds(compute),
        "x-tokenization-time": _milliseconds(stats.tokenize),
        "x-queue-time": _milliseconds(stats.queue),
        "x-inference-time": _milliseconds(stats.infer),
        "x-truncated": str(stats.truncated),
    }


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def json_answer(service: Service, value: Any, stats: Stats | None = None) -> Response:
    """A JSON answer with its headers; without `stats` no text was encoded, and none cut."""
    start = time.perf_counter()
    content = json_bytes(value)
    service.metrics.stages["render"].observe(time.perf_counter() - start)
    headers = headers_of(stats) if stats else {"x-truncated": "0"}
    return Response(content, media_type="application/json", headers=headers)


def error_body(error: ServiceError) -> dict[str, str]:
    return {"error": error.message, "error_type": error.word}


def in_places(results: Sequence[Any] | FloatArray, details: Sequence[Detail]) -> Any:
    """The result of each text, or the error that stands in its place."""
    if not any(detail.error for detail in details):
        return results
    return [error_body(detail.error) if detail.error else result for result, detail in zip(results, details, strict=True)]


def with_details(name: str, results: Any, stats: Stats) -> dict[str, Any]:
    """The results under their name, and a word on each text."""
    return {name: results, "details": details_of(stats)}


def details_of(stats: Stats) -> list[dict[str, Any]]:
    return [{"tokens": d.tokens, "truncated": d.truncated, "pieces": d.pieces} for d in stats.details]


def stream_with_details(name: str, results: Iterator[bytes], stats: Stats) -> Iterator[bytes]:
    """`with_details` in bytes, of results that are rendered one at a time."""
    yield b'{"%b":' % name.encode()
    yield from results
    yield b',"details":' + json_bytes(details_of(stats)) + b"}"
