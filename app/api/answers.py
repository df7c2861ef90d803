"""Answers of every dialect: what the headers say, and bytes in the format that the request asks for."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.responses import StreamingResponse

from app.errors import NotAcceptable
from app.negotiation import MediaType, media_type
from app.render import base64_text, in_blocks, json_bytes, raw_rows, safetensors
from app.service import Service, Stats
from model.vectors import Array

BINARY: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            name: {"schema": {"type": "string", "format": "binary"}}
            for name in ("application/octet-stream", "application/safetensors")
        }
    }
}
"""What FastAPI's page says of routes that answer in arrays."""


def _accepted(request: Request) -> MediaType:
    return media_type(request.headers.get("accept", ""))


Accepted = Annotated[MediaType, Depends(_accepted)]


def json_answer(service: Service, value: Any, stats: Stats | None = None) -> Response:
    """One JSON value."""
    return answer(service, map(json_bytes, [value]), headers_of(stats) if stats else {})


def array_answer(service: Service, arrays: Sequence[Array], stats: Stats, accepted: MediaType) -> Response:
    """Arrays, one per text, as octets or safetensors. Raises NotAcceptable for octets of arrays of several shapes."""
    headers = headers_of(stats)
    if accepted == "application/safetensors":
        return answer(service, safetensors(arrays), headers, accepted)
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise NotAcceptable(
            "the texts have different numbers of tokens, and octets have one shape; send Accept: application/safetensors"
        )
    shape = ",".join(map(str, (len(arrays), *shapes.pop())))
    return answer(service, raw_rows(arrays), {**headers, "x-shape": shape, "x-dtype": arrays[0].dtype.name}, accepted)


def answer(
    service: Service, chunks: Iterable[bytes], headers: Mapping[str, str], media: MediaType = "application/json"
) -> Response:
    """The bytes of an answer; a large one is rendered and sent block by block."""
    blocks = _observed(service, in_blocks(chunks))
    first = list(islice(blocks, 2))
    if len(first) == 1:
        return Response(first[0], media_type=media, headers=headers)
    return StreamingResponse(chain(first, blocks), media_type=media, headers=headers)


def _observed(service: Service, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same blocks; the time that it takes to make them is counted."""
    seconds = 0.0
    start = time.perf_counter()
    for block in blocks:
        seconds += time.perf_counter() - start
        yield block
        start = time.perf_counter()
    service.metrics.stages["render"].observe(seconds + time.perf_counter() - start)


def number_list(array: Array, encoding_format: str | None) -> Array | str:
    """An array as a JSON value: nested lists, or one base64 text."""
    return base64_text(array) if encoding_format == "base64" else array


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
