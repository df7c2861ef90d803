"""The headers of a request, and what Accept and Accept-Encoding ask for."""

from functools import lru_cache
from typing import Literal

from starlette.types import Scope

MediaType = Literal["application/json", "application/octet-stream", "application/safetensors"]
Coding = Literal["gzip", "zstd"]

_MEDIA_TYPES: tuple[MediaType, ...] = ("application/safetensors", "application/octet-stream", "application/json")
_CODINGS: tuple[Coding, ...] = ("gzip", "zstd")
_KEPT = 32  # headers: nearly all clients send one of a few


def header_of(scope: Scope, name: bytes) -> str | None:
    """The first header of that name, in small letters. Starlette's Headers costs ten times as much, and each request is asked
    for half a dozen."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


@lru_cache(_KEPT)
def media_type(accept: str) -> MediaType:
    """The media type of ours that is preferred among those named; JSON where none is."""
    weights = _weights(accept)
    named = [media for media in _MEDIA_TYPES if weights.get(media)]
    return max(named, key=lambda media: weights[media], default="application/json")


@lru_cache(_KEPT)
def content_coding(accept_encoding: str) -> Coding | None:
    """The coding that is asked for: gzip or zstd, where it is preferred above every other coding that is named.

    A list of equals, as `gzip, deflate`, is what HTTP libraries send of themselves; it asks for nothing.
    """
    weights = _weights(accept_encoding)
    best = max(weights.values(), default=0.0)
    preferred = [name for name, weight in weights.items() if weight == best > 0]
    return next((coding for coding in _CODINGS if preferred == [coding]), None)


def _weights(header: str) -> dict[str, float]:
    """Each name of a header with its q-value (RFC 9110, 12.4.2)."""
    weights = {}
    for item in header.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        values = [value for key, _, value in (parameter.partition("=") for parameter in parameters) if key.strip() == "q"]
        if name:
            weights[name] = _weight(values[0]) if values else 1.0
    return weights


def _weight(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0
