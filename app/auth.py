"""Who may ask: keys, compared in constant time, before the body is read."""

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import NotFound, ServiceError, Unauthorized
from app.middleware import Refuse, path_of
from app.negotiation import header_of
from app.settings import Settings, SettingsError, variable

log = logging.getLogger("bertd.auth")

PUBLIC = ("/health", "/ping", "/ready", "/docs", "/openapi.json", "/static-offline-docs/")

_ADMIN = ("/admin", "/admin/")
_LOOK_SECONDS = 1.0  # between two looks at the file of keys

Digest = bytes
"""SHA-256 of a key: all have one length, so that comparing them tells nothing of a key's own."""

KeyName = Literal["ApiKey", "AdminKey"]
_SAID: Mapping[KeyName, str] = {"ApiKey": "the key", "AdminKey": "the admin key"}


class Keys:
    """The keys that open the service: those of the settings, and those of a file, which is read again when it has changed."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where the file holds no keys, or the admin key is one of them."""
        self._fixed = [_digest(key.encode()) for key in settings.api_keys]
        self.admin = None if settings.admin is None else _digest(settings.admin.encode())
        self._public = (*PUBLIC, "/metrics") if settings.metrics_public else PUBLIC
        self._file = None if settings.api_key_file is None else Path(settings.api_key_file).expanduser()
        self._state = _state(self._file)
        self._filed = self._read() if self._file else []
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def wanted(self, path: str) -> KeyName | None:
        """Which key opens a path; None where it stands open. It is the same at every moment."""
        if self.admin is not None and _is_below(path, _ADMIN):
            return "AdminKey"
        closed = (self._fixed or self._file) and not _is_below(path, self._public)
        return "ApiKey" if closed else None

    def hides(self, path: str) -> bool:
        """Whether nothing is there because no key could open it: without an admin key, what is below /admin."""
        return self.admin is None and _is_below(path, _ADMIN)

    def current(self, name: KeyName) -> list[Digest]:
        """The keys of that name at this moment."""
        if name == "AdminKey":
            return [self.admin] if self.admin is not None else []
        if self._file and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            self._look()
        return self._fixed + self._filed

    def _look(self) -> None:
        state = _state(self._file)
        if state == self._state:
            return
        self._state = state
        try:
            self._filed = self._read()
        except SettingsError as error:
            log.error("%s; until then the keys that were read before are good", error)
        else:
            log.info("read %d keys from %s", len(self._filed), self._file)

    def _read(self) -> list[Digest]:
        name = f"{variable('api_key_file')}: {self._file}"
        try:
            lines = Path(self._file or "").read_bytes().splitlines()
        except OSError as error:
            raise SettingsError(f"{name} can't be read ({error.strerror}); wanted a file with a key in each line") from None
        keys = [_digest(key) for line in lines if (key := line.strip()) and not key.startswith(b"#")]
        if not keys:
            raise SettingsError(f"{name} holds no key; wanted one in each line")
        if self.admin in keys:
            raise SettingsError(f"{name} holds the admin key; wanted a key of its own for {variable('admin_key')}")
        return keys


class RequireKey:
    """Refuses requests without `Authorization: Bearer KEY`, except on public paths; those below /admin want the admin key.

    Without an admin key there is nothing below /admin.
    """

    def __init__(self, app: ASGIApp, keys: Keys, refuse: Refuse) -> None:
        self._app = app
        self._keys = keys
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._objection(scope)
        await (self._refuse(error, scope) if error else self._app)(scope, receive, send)

    def _objection(self, scope: Scope) -> ServiceError | None:
        path = path_of(scope)
        wanted = self._keys.wanted(path)
        if wanted is not None and not _has_one_of(self._keys.current(wanted), scope):
            return Unauthorized(f"{_SAID[wanted]} is missing or wrong; send the header Authorization: Bearer KEY")
        if self._keys.hides(path):
            return NotFound(f"{scope['method']} on this path: Not Found; see /docs")  # as any that is not there
        return None


def _has_one_of(keys: Sequence[Digest], scope: Scope) -> bool:
    scheme, _, key = (header_of(scope, b"authorization") or "").partition(" ")
    sent = _digest(key.strip().encode("latin-1"))  # the bytes as they came
    good = [hmac.compare_digest(sent, known) for known in keys]  # each of them, whichever fits
    return any(good) and scheme.lower() == "bearer"


def _is_below(path: str, places: Sequence[str]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def _digest(key: bytes) -> Digest:
    return hashlib.sha256(key).digest()


def _state(file: Path | None) -> tuple[int, int, int] | None:
    """What tells one version of a file from the next; None where it isn't there."""
    try:
        found = os.stat(file) if file else None
    except OSError:
        return None
    return found and (found.st_ino, found.st_mtime_ns, found.st_size)
