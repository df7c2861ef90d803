"""Answers of every dialect: bytes, and what the headers say."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse

from app.render import json_bytes
from app.service import Service, Stats


def json_answer(service: Service, value: Any, stats: Stats | None = None) -> Response:
    """One JSON value."""
    start = time.perf_counter()
    content = json_bytes(value)
    service.metrics.stages["render"].observe(time.perf_counter() - start)
    return Response(content, media_type="application/json", headers=headers_of(stats) if stats else None)


def json_stream(chunks: Iterable[bytes], stats: Stats) -> Response:
    """JSON that is rendered and sent piece by piece."""
    return StreamingResponse(chunks, media_type="application/json", headers=headers_of(stats))


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
