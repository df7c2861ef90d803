"""Answers of every dialect: what the headers say, bytes in the format that the request asks for, and a word on each text."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.responses import StreamingResponse

from app.api.fields import PerText
from app.errors import NotAcceptable, ServiceError
from app.negotiation import MediaType, header_of, media_type
from app.outcomes import Stats
from app.record import current_record
from app.render import base64_text, in_blocks, json_bytes, json_list, raw_rows, safetensors
from app.service import Service
from model.vectors import Array, FloatArray


def _accepted(request: Request) -> MediaType:
    return media_type(header_of(request.scope, b"accept") or "")


Accepted = Annotated[MediaType, Depends(_accepted)]


def json_answer(service: Service, value: Any, stats: Stats | None = None) -> Response:
    """One JSON value; without `stats` no text was encoded, and none cut."""
    return answer(service, map(json_bytes, [value]), headers_of(stats) if stats else {"x-truncated": "0"})


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
    record, seconds = current_record(), 0.0
    start = time.perf_counter()
    for block in blocks:
        seconds += time.perf_counter() - start
        yield block
        start = time.perf_counter()
    seconds += time.perf_counter() - start
    service.metrics.stages["render"].observe(seconds)
    record.rendered(seconds)


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


def usage_of(stats: Stats) -> dict[str, int]:
    """The fields of a `Usage`."""
    return {"prompt_tokens": stats.tokens, "total_tokens": stats.tokens}


def vllm_list(what: str, data: Iterable[Any], service: Service, stats: Stats, query: PerText) -> dict[str, Any]:
    """What vLLM puts around the results of each of its routes; with `details` also a word on each text."""
    return {
        "id": f"{what}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": list(data),
        "usage": usage_of(stats),
        **detail_field(stats, query),
    }


def error_body(error: ServiceError) -> dict[str, str]:
    return {"error": error.message, "error_type": error.word}


def check_json_only(query: PerText, accepted: MediaType) -> None:
    """Raises NotAcceptable where errors or details are asked for in a format that has no place for them."""
    if accepted != "application/json" and (query.details or query.partial):
        raise NotAcceptable(f"details and partial have no place in {accepted}; send Accept: application/json, or neither")


ErrorItem = Callable[[int, ServiceError], Any]
"""What stands in the place of a text that failed."""


def in_places(
    results: Iterable[Any],
    errors: Sequence[ServiceError | None],
    item: ErrorItem = lambda place, error: error_body(error),
) -> Iterable[Any]:
    """The result of each text, or what stands in its place where it failed."""
    if not any(errors):
        return results
    return [item(place, error) if error else result for place, (result, error) in enumerate(zip(results, errors, strict=True))]


def best_first(scores: FloatArray, errors: Sequence[ServiceError | None]) -> list[int]:
    """Places by their score [N], the highest first and of equals the first, without those that failed."""
    return [place for place in (-scores).argsort(kind="stable").tolist() if errors[place] is None]


def failed_last(results: Iterable[Any], errors: Sequence[ServiceError | None], item: ErrorItem) -> list[Any]:
    """Results that are sorted, so that no place is left for what failed: it comes after them, in order."""
    return [*results, *(item(place, error) for place, error in enumerate(errors) if error)]


def with_details(name: str, results: Iterable[Any], stats: Stats, query: PerText) -> Iterator[bytes]:
    """A JSON list of the results; with `details` an object of them under a name, and of a word on each text."""
    if not query.details:
        yield from json_list(results)
        return
    yield b'{"%b":' % name.encode()
    yield from json_list(results)
    yield b',"details":' + json_bytes(details_of(stats)) + b"}"


def detail_field(stats: Stats, query: PerText) -> dict[str, Any]:
    """`details` beside the results, in an answer that is an object anyway."""
    return {"details": details_of(stats)} if query.details else {}


def details_of(stats: Stats) -> list[dict[str, Any]]:
    return [{"tokens": d.tokens, "truncated": d.truncated, "pieces": d.pieces} for d in stats.details]
