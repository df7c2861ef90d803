"""The composition root: an app around a service."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from app.api import chunks, classify, dispatch, openai, ops, rerank, tei, vllm
from app.api.json_route import DirectRoutes, JsonRoute
from app.auth import RequireKey
from app.classification import Classification
from app.compression import Compress
from app.errors import NotFound, ServiceError
from app.metrics import Metrics
from app.middleware import BodyLimit, CancelOnDisconnect, Observe, PlainPaths, Refuse, path_of
from app.render import json_bytes
from app.service import VERSION, Service, running_service
from app.settings import Settings

ROUTERS = (
    tei.router,
    chunks.router,
    openai.router,
    openai.model_router,
    rerank.router,
    vllm.router,
    classify.router,
    classify.classifiers,
    dispatch.router,
    ops.router,
)
JSON_ROUTES = [
    route
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, JsonRoute) and route.methods == {"POST"} and not route.param_convertors
]

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


def create_app(settings: Settings, service: Service | None = None) -> ASGIApp:
    """The whole server as an ASGI app. Its service starts and stops with it, unless one is handed in.

    Ours surrounds FastAPI's, and not the other way round: a refusal then costs as little as possible, and a JSON
    route is reached without the dozen layers that only other routes need.
    """
    metrics = service.metrics if service else Metrics()

    def refuse(error: ServiceError, scope: Scope) -> Response:
        metrics.refused.labels(error.word).inc()
        return refusal(error, scope)

    metrics.expect(route.path for router in ROUTERS for route in router.routes if isinstance(route, APIRoute))
    api = create_api(settings, metrics, service, refuse)
    app: ASGIApp = DirectRoutes(api, JSON_ROUTES, refuse)
    app = CancelOnDisconnect(app)
    app = BodyLimit(app, settings.max_body_bytes, refuse)
    if settings.api_key is not None:
        app = RequireKey(app, settings.api_key.get_secret_value(), refuse)
    app = PlainPaths(Compress(app), settings.url_prefix or "", refuse)
    return Observe(app, metrics, refuse)


def create_api(settings: Settings, metrics: Metrics, service: Service | None, refuse: Refuse) -> FastAPI:
    """Every route, documented: what stands at /docs and /openapi.json."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with nullcontext(service) if service else running_service(settings, metrics) as started:
            app.state.service = started
            app.state.classification = Classification(started)
            await asyncio.to_thread(app.state.classification.store.open)
            yield

    async def on_service_error(request: Request, error: ServiceError) -> ASGIApp:
        return refuse(error, request.scope)

    api: FastAPI = FastAPIOffline(
        title="bertd",
        version=VERSION,
        description="Text to BERT representations: token matrices, vectors, similarity, classes.",
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_parameters={"tryItOutEnabled": True},
        exception_handlers={ServiceError: on_service_error, HTTPException: _on_http_exception},
    )
    for router in ROUTERS:
        api.include_router(router)
    return api


def refusal(error: ServiceError, scope: Scope) -> Response:
    """An error as the answer of the dialect that the path belongs to."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _answer(path_of(scope), error.status, error.word, error.message, headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """No such route, wrong method: the same shape as every other refusal."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} on this path: {error.detail}; see /docs"
    return _answer(path_of(request.scope), error.status_code, NotFound.word, message, error.headers or {})


def _answer(path: str, status: int, word: str, message: str, headers: Mapping[str, str]) -> Response:
    refuse = next((refuse for start, refuse in _DIALECTS.items() if path.startswith(start)), tei.refusal)
    status, body = refuse(status, word, message)
    return Response(json_bytes(body), status, headers, media_type="application/json")
