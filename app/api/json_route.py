"""Routes that read a JSON body: one model in, rendered bytes out."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, get_type_hints

from fastapi import Depends, FastAPI, Request, Response, params
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import InvalidInput, ServiceError
from app.middleware import Refuse, path_of
from app.service import Service

_PROBLEMS = 3  # that one refusal names


class JsonRoute(APIRoute):
    """A route whose endpoint is `async def (request: Model, …) -> Response`.

    FastAPI documents it from its signature. What else it takes is `Annotated[…, Depends(of)]`, each a plain function of
    the request, as `ServiceOf`, `Annotated[Model, Query()]`, or a part of the path. The body goes from bytes to the model in
    one step, whatever its content type, without FastAPI's json.loads (which lets lone surrogates pass) and its solving of
    dependencies.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        endpoint = self.endpoint
        hints = get_type_hints(endpoint, include_extras=True)
        read = TypeAdapter(hints["request"]).validate_json
        given = {name: of for name, hint in hints.items() if (of := _source(hint)) is not None}

        async def answer(request: Request) -> Response:
            try:
                body = read(await request.body())
                others = {name: of(request) for name, of in given.items()}
            except ValidationError as error:
                raise InvalidInput(describe(error)) from None
            response: Response = await endpoint(body, **others, **request.path_params)
            return response

        return answer


class DirectRoutes:
    """Sends a POST to a JSON route straight to its handler, and everything else to the app.

    Nothing between them concerns such a request: its path has no parameters and its body is read by the handler.
    """

    def __init__(self, app: FastAPI, routes: Iterable[JsonRoute], refuse: Refuse) -> None:
        self._app = app
        self._routes = {route.path: (route, route.get_route_handler()) for route in routes}
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get(path_of(scope)) if scope["method"] == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        scope["route"], handler = found
        scope["app"] = self._app
        try:
            response: ASGIApp = await handler(Request(scope, receive))
        except ServiceError as error:
            response = self._refuse(error, scope)
        await response(scope, receive, send)


def _source(hint: Any) -> Callable[[Request], Any] | None:
    """Where a parameter with this annotation comes from; None for the body."""
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, params.Depends):
            return note.dependency
        if isinstance(note, params.Query):
            read = TypeAdapter(hint.__origin__).validate_python
            return lambda request: read(dict(request.query_params) if request.scope["query_string"] else {})
    return None


def service_of(request: Request) -> Service:
    """The service that answers this request."""
    service: Service = request.state.current.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]


def describe(error: ValidationError) -> str:
    """The problems of a body in short: where and what, never the input itself."""
    details: list[Any] = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return f"the body is not JSON: {details[0]['msg']}; send UTF-8 JSON"
    named = list(dict.fromkeys(f"{_place(detail['loc'])}: {detail['msg']}" for detail in details))
    more = f" (and {len(named) - _PROBLEMS} more)" if len(named) > _PROBLEMS else ""
    return "; ".join(named[:_PROBLEMS]).encode("ascii", "backslashreplace").decode() + more


def _place(loc: tuple[int | str, ...]) -> str:
    """Where in the body, without pydantic's names for the members of a union."""
    parts = [part for part in loc if isinstance(part, int) or part.isidentifier()]
    return ".".join(str(part)[:40] for part in parts if part not in ("str", "int")) or "body"
