"""What an operator asks: is it alive, is it ready, what is it, how is it doing."""

from fastapi import APIRouter, Request, Response

from app.api.json_route import ServiceOf
from app.api.responses import ANYWHERE, ErrorBody, Responses, errors
from app.errors import NotReady
from app.info import Info, info_of

router = APIRouter(tags=["operations"])

_TEXT = {"schema": {"type": "string"}}
_EXPOSITIONS: Responses = {200: {"content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT}}}
_GUARDED = errors(ErrorBody, ANYWHERE, [422])
_PUBLIC: Responses = {status: refused for status, refused in _GUARDED.items() if status != 401}
_DOWN = _PUBLIC | errors(ErrorBody, [503], changed={503: "not able to answer"})


@router.head("/ping", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.get("/ping", response_class=Response, responses=_DOWN)
@router.get("/health", response_class=Response, responses=_DOWN)
async def health(service: ServiceOf) -> Response:
    """200 as long as the process can recover by itself; 503 when only a restart helps. SageMaker asks /ping."""
    if service.scheduler.failed:
        raise NotReady("the engine died and does not start again; restart the server")
    return Response()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_class=Response, responses=_DOWN)
async def ready(service: ServiceOf) -> Response:
    """200 while requests are answered; 503 while the engine starts again or the server stops."""
    if service.closing.is_set() or not service.scheduler.ready:
        raise NotReady("the engine is not ready, or the server stops; try again soon", retry_after=1)
    return Response()


@router.get("/metrics", response_class=Response, responses=_EXPOSITIONS | _GUARDED)
async def metrics(request: Request, service: ServiceOf) -> Response:
    """Prometheus's text format, or OpenMetrics where Accept asks for it, as Prometheus does."""
    body, content_type = service.metrics.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})


@router.get("/info", responses=_GUARDED)
async def info(service: ServiceOf) -> Info:
    """What is served and what was decided at start."""
    return info_of(service)
