"""What FastAPI's page says of answers: statuses, headers, and the bodies that several dialects share."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """Every refusal on these routes; with `partial`, also what stands in the place of a bad text."""

    error: str
    error_type: str


class Usage(BaseModel):
    """Tokens as they were encoded, special ones included."""

    prompt_tokens: int
    total_tokens: int


class TextDetail(BaseModel):
    """What was done to a text, with `details`."""

    tokens: int
    truncated: bool
    pieces: int


Responses = dict[int | str, dict[str, Any]]
"""What FastAPI's page says of answers, by their status."""

ANYWHERE = (401, 408, 413, 429, 431, 500, 503, 504)  # refusals of what surrounds every route that is not public
READ = (400, 422)  # of a body; a bad x-request-timeout is 422 too, and 400 in dialects without that
ENCODED = (424,)  # of routes that use the encoder

_REFUSED: Mapping[int | str, str] = {
    400: "an input is empty",
    401: "the key is missing or wrong",
    404: "there is nothing of that name",
    406: "octets or safetensors are asked for, and what else is asked for has no place in them",
    408: "the request did not arrive in time",
    409: "the classifier is broken or belongs to other vectors, or the name is taken in another case",
    413: "the body is too large, or its texts have too many tokens",
    422: "the request is invalid",
    424: "the model is of another kind",
    429: "overloaded; Retry-After says when to come back",
    431: "the head is too large",
    500: "the encoder failed, or the server has a defect",
    503: "not ready; Retry-After says when to come back",
    504: "the deadline passed",
    507: "the folder of classifiers can't be written",
    "default": "any other refusal",
}


def _header(description: str, kind: str = "integer") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


_ID = {"x-request-id": _header("as sent, or made here", "string")}
_REFUSED_HEADERS: Mapping[int | str, dict[str, Any]] = {
    401: {"www-authenticate": _header("Bearer", "string")},
    429: {"retry-after": _header("seconds")},
    503: {"retry-after": _header("seconds, where the server comes back by itself")},
}
_CUT = {**_ID, "x-truncated": _header("texts that were cut")}
_COST = {
    **_CUT,
    "x-compute-type": _header("the device", "string"),
    "x-compute-tokens": _header("tokens that were encoded, special ones included"),
    "x-compute-characters": _header("characters of the texts"),
    **{f"x-{stage}-time": _header("milliseconds") for stage in ("total", "compute", "tokenization", "queue", "inference")},
}
_ARRAY = {
    "x-shape": _header("of octets, texts first, with commas", "string"),
    "x-dtype": _header("of octets", "string"),
}


def errors(body: type[BaseModel], *groups: Iterable[int | str], changed: Mapping[int | str, str] | None = None) -> Responses:
    """Refusals of these statuses in that shape; what is `changed` has words of its own."""
    said = {**_REFUSED, **(changed or {})}
    return {
        status: {"model": body, "description": said[status], "headers": {**_ID, **_REFUSED_HEADERS.get(status, {})}}
        for group in groups
        for status in group
    }


CUT: Responses = {200: {"headers": _CUT}}
"""The headers of routes on which a text could be cut."""

ANSWERED: Responses = {200: {"headers": _COST}}
"""Those of routes that encode texts for the client."""

BINARY: Responses = {
    200: {
        "headers": {**_COST, **_ARRAY},
        "content": {
            name: {"schema": {"type": "string", "format": "binary"}}
            for name in ("application/octet-stream", "application/safetensors")
        },
    }
}
"""The same, and that they answer in arrays too."""
