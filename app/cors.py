"""Who may ask from a web page of another origin: nobody, unless it is set."""

from collections.abc import Callable, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

_METHODS = ("GET", "POST", "PUT", "DELETE")
_ANSWERED = (
    "Retry-After",
    "Traceparent",
    "X-Compute-Characters",
    "X-Compute-Time",
    "X-Compute-Tokens",
    "X-Compute-Type",
    "X-Dtype",
    "X-Inference-Time",
    "X-Queue-Time",
    "X-Request-Id",
    "X-Shape",
    "X-Tokenization-Time",
    "X-Total-Time",
    "X-Truncated",
)
"""Headers that a page may read beside those that every page may."""


def cross_origin(origins: Sequence[str]) -> Callable[[ASGIApp], ASGIApp]:
    """What lets pages of these origins, or of all with `*`, use an app; without any, the app as it is.

    Around everything that asks for a key: a browser sends its first question, the preflight, without one. A page may send any
    header, since clients in a browser send some of their own, as those of OpenAI do.
    """
    if not origins:
        return lambda app: app
    return lambda app: CORSMiddleware(
        app, allow_origins=origins, allow_methods=_METHODS, allow_headers=("*",), expose_headers=_ANSWERED
    )
