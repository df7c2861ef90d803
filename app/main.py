"""The composition root: an app around a service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from app.api import classify, ops, tei
from app.api.json_route import DirectRoutes
from app.auth import RequireKey
from app.classification import Classification
from app.errors import ServiceError
from app.metrics import Metrics
from app.middleware import BodyLimit, CancelOnDisconnect, Observe, Refuse
from app.render import json_bytes
from app.service import VERSION, Service, running_service
from app.settings import Settings


def create_app(settings: Settings, service: Service | None = None) -> ASGIApp:
    """The whole server as an ASGI app. Its service starts and stops with it, unless one is handed in.

    Ours surrounds FastAPI's, and not the other way round: a refusal then costs as little as possible, and a JSON
    route is reached without the dozen layers that only other routes need.
    """
    metrics = service.metrics if service else Metrics()

    def refuse(error: ServiceError, scope: Scope) -> Response:
        metrics.refused.labels(error.word).inc()
        return refusal(error, scope)

    api = create_api(settings, metrics, service, refuse)
    app: ASGIApp = DirectRoutes(api, [*tei.router.routes, *classify.router.routes], refuse)
    app = CancelOnDisconnect(app)
    app = BodyLimit(app, settings.max_body_bytes, refuse)
    if settings.api_key is not None:
        app = RequireKey(app, settings.api_key.get_secret_value(), refuse)
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
    api.include_router(tei.router)
    api.include_router(classify.router)
    api.include_router(classify.classifiers)
    api.include_router(ops.router)
    return api


def refusal(error: ServiceError, scope: Scope) -> Response:
    """An error as the answer of the dialect that the path belongs to."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    content = json_bytes({"error": error.message, "error_type": error.word})
    return Response(content, error.status, headers, media_type="application/json")


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """No such route, wrong method: the same shape as every other refusal."""
    assert isinstance(error, HTTPException)
    content = json_bytes({"error": f"{request.method} on this path: {error.detail}; see /docs", "error_type": "NotFound"})
    return Response(content, error.status_code, dict(error.headers or {}), media_type="application/json")
