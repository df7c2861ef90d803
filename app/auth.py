"""Who may ask: a key, compared in constant time, before the body is read."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import Unauthorized
from app.middleware import Refuse, path_of

PUBLIC = ("/health", "/ready", "/metrics", "/docs", "/openapi.json", "/static-offline-docs/")


class RequireKey:
    """Refuses requests without `Authorization: Bearer KEY`, except on public paths."""

    def __init__(self, app: ASGIApp, key: str, refuse: Refuse) -> None:
        self._app = app
        self._wanted = f"Bearer {key}".encode()
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_public(path_of(scope)) or self._knows_key(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = Unauthorized("the key is missing or wrong; send the header Authorization: Bearer KEY")
        await self._refuse(error, scope)(scope, receive, send)

    def _knows_key(self, headers: Headers) -> bool:
        return hmac.compare_digest(headers.get("authorization", "").encode(), self._wanted)


def _is_public(path: str) -> bool:
    return any(path == public or (public.endswith("/") and path.startswith(public)) for public in PUBLIC)
