"""The composition root: an app around a service."""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api import admin, chunks, classify, dispatch, openai, ops, rerank, tei, vllm
from app.api.json_route import DirectRoutes, JsonRoute
from app.auth import KeyName, Keys, RequireKey
from app.compression import Compress
from app.cors import cross_origin
from app.errors import NotFound, ServiceError
from app.metrics import Metrics
from app.middleware import BodyLimit, Deadline, Door, PlainPaths, Refuse, WholeBody, path_of
from app.observe import Observe
from app.record import current_record
from app.render import json_bytes
from app.service import VERSION
from app.serving import EnterCurrent, Serving
from app.settings import Settings
from app.traces import Tracer

ROUTERS = (
    tei.router,
    tei.tokenizer_router,
    chunks.router,
    openai.router,
    openai.model_router,
    rerank.router,
    vllm.router,
    classify.router,
    classify.classifiers,
    dispatch.router,
    dispatch.rerankers,
    ops.router,
    admin.router,
)
JSON_ROUTES = [
    route
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, JsonRoute) and route.methods == {"POST"} and not route.param_convertors
]

_KEYS: Mapping[KeyName, str] = {
    "ApiKey": "one of BERTD_API_KEY or BERTD_API_KEY_FILE",
    "AdminKey": "BERTD_ADMIN_KEY; it opens the routes below /admin/ and no other, and no API key opens these",
}
# FastAPI's own, which environment variables switch on, sends the texts of exceptions and of invalid requests.
_NO_TELEMETRY = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
_DIALECTS: Mapping[str, Callable[[int, str, str], tuple[int, Mapping[str, Any]]]] = {
    "/v1/rerank": rerank.refusal,
    "/v2/rerank": rerank.refusal,
    "/v1/score": vllm.refusal,
    "/score": vllm.refusal,
    "/v1/": openai.refusal,
    "/embeddings": openai.refusal,
    "/models": openai.refusal,
}
"""How the routes below a path refuse: status, word and message of an error -> status and body. The first that fits counts;
below every other path it is TEI's."""


def create_app(settings: Settings, serving: Serving, tracer: Tracer | None = None) -> ASGIApp:
    """The whole server as an ASGI app around a service that runs.

    Ours surrounds FastAPI's, and not the other way round: a refusal then costs as little as possible, and a JSON
    route is reached without the dozen layers that only other routes need.
    """
    refuse = counted_refusal(serving.metrics)
    for route in chain.from_iterable(router.routes for router in ROUTERS):
        if isinstance(route, APIRoute):
            serving.metrics.expect(route.path, works=bool({"POST", "PUT"} & (route.methods or set())))
    keys = Keys(settings)
    app: ASGIApp = DirectRoutes(create_api(refuse, keys, serving.metrics), JSON_ROUTES, refuse)
    app = EnterCurrent(app, serving)
    app = Deadline(app, settings.request_timeout, refuse)
    app = WholeBody(app, settings.body_timeout)
    app = BodyLimit(app, settings.max_body_bytes, refuse)
    app = RequireKey(app, keys, refuse)
    app = Door(Compress(app), serving.closing, serving.check_room, refuse)
    app = PlainPaths(app, settings.url_prefix or "", refuse)
    allow = cross_origin(settings.origins)
    return Observe(allow(app), serving.metrics, lambda error, scope: allow(refuse(error, scope)), tracer, settings.log_inputs)


def create_api(refuse: Refuse, keys: Keys | None = None, metrics: Metrics | None = None) -> FastAPI:
    """Every route, documented: what stands at /docs and /openapi.json, and which of the keys each wants."""

    async def on_service_error(request: Request, error: ServiceError) -> ASGIApp:
        return refuse(error, request.scope)

    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        """No such route, wrong method: the same shape as every other refusal, and counted as they are."""
        if metrics is not None:
            metrics.refused.labels(NotFound.word).inc()
        message = f"{request.method} on this path: {error.detail}; see /docs"
        return _answer(path_of(request.scope), error.status_code, NotFound.word, message, error.headers or {})

    api: FastAPI = FastAPIOffline(
        title="bertd",
        version=VERSION,
        description="Text to BERT representations: token matrices, vectors, similarity, classes.",
        redoc_url=None,
        swagger_ui_parameters={"tryItOutEnabled": True, "validatorUrl": None},  # which would be on another host
        telemetry=_NO_TELEMETRY,
        exception_handlers={
            ServiceError: on_service_error,
            HTTPException: on_http_exception,
            Exception: _on_defect,
        },
    )
    for router in ROUTERS:
        api.include_router(router)
    if keys is not None:
        page = api.openapi
        # Once: FastAPI keeps its page, and this changes it in place.
        api.openapi = cache(lambda: _with_keys(page(), keys))  # type: ignore[method-assign]
    return api


def _with_keys(page: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """The page of a server with these keys: what it answers, and no more."""
    page["paths"] = {path: operations for path, operations in page["paths"].items() if not keys.hides(path)}
    for path, operations in page["paths"].items():
        name = keys.wanted(path)
        if name is not None:
            scheme = {"type": "http", "scheme": "bearer", "description": _KEYS[name]}
            page["components"].setdefault("securitySchemes", {})[name] = scheme
        for operation in operations.values():
            if name is None:
                operation["responses"].pop("401", None)
            else:
                operation["security"] = [{name: []}]
            if name == "AdminKey":
                operation["responses"].pop("404")  # is said of a server without that key
    return page


def refusal(error: ServiceError, scope: Scope) -> Response:
    """An error as the answer of the dialect that the path belongs to."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _answer(path_of(scope), error.status, error.word, error.message, headers)


def counted_refusal(metrics: Metrics) -> Callable[[ServiceError, Scope], Response]:
    """`refusal`, and the metrics hear of each."""

    def refuse(error: ServiceError, scope: Scope) -> Response:
        metrics.refused.labels(error.word).inc()
        return refusal(error, scope)

    return refuse


async def _on_defect(request: Request, error: Exception) -> ASGIApp:
    """Nothing, in the place of Starlette's own words: the exception goes on to Observe, which answers as everywhere."""

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    return nothing


def _answer(path: str, status: int, word: str, message: str, headers: Mapping[str, str]) -> Response:
    refuse = next((refuse for start, refuse in _DIALECTS.items() if path.startswith(start)), tei.refusal)
    current_record().error = word
    status, body = refuse(status, word, message)
    return Response(json_bytes(body), status, headers, media_type="application/json")
