"""What an answer says in its headers about the texts behind it."""

from collections.abc import Mapping

from app.service import Stats


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
