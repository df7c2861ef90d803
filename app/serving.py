"""The service that answers now, and how another takes its place while requests go on."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.child import Child
from app.classification import Classification
from app.errors import BadCheckpoint, Conflict, ServiceError
from app.memory import pass_over_what_stays
from app.metrics import Metrics
from app.service import Service, running_service
from app.settings import Settings
from model.errors import ModelError

log = logging.getLogger("bertd.serving")


class Current:
    """A running service, what stands on it, and the requests on their way through both."""

    def __init__(self, service: Service, classification: Classification, running: AsyncExitStack) -> None:
        self.service = service
        self.classification = classification
        self._running = running
        self._requests = 0
        self._left = asyncio.Event()
        self._left.set()

    @contextmanager
    def entered(self) -> Iterator["Current"]:
        """Nothing of this ends before the block does."""
        self._requests += 1
        self._left.clear()
        try:
            yield self
        finally:
            self._requests -= 1
            if not self._requests:
                self._left.set()

    async def stop(self, patience: float = 0.0) -> None:
        """End it once every request has left, or after so many seconds; work that takes long is given up."""
        self.service.closing.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), patience)
        await self._running.aclose()


@dataclass(frozen=True)
class Replacement:
    """One service in the place of another: the SHA-256 of their weights, and what the change took."""

    service: Service
    former: str
    seconds: float


class Serving:
    """Holds the current service; every request goes through one service from its start to its end."""

    def __init__(self, settings: Settings, metrics: Metrics, current: Current) -> None:
        self.metrics = metrics
        self.current = current
        self.closing = asyncio.Event()  # set when the server stops
        self._settings = settings
        self._turn = asyncio.Lock()  # one reload at a time: each holds a second model in memory
        self._retiring: set[asyncio.Task[None]] = set()
        self._show()

    async def reload(self) -> Replacement:
        """Serve what BERTD_MODEL names now. Raises Conflict, or BadCheckpoint when that can't be served: then nothing changes."""
        if self._turn.locked():
            raise Conflict("a reload is under way; wait for its end")
        async with self._turn:
            start = time.perf_counter()
            try:
                following = await _start(self._settings, self.metrics)
            except (ModelError, ServiceError) as error:
                raise BadCheckpoint(f"the checkpoint can't be served: {error}; the one before it goes on") from None
            former, self.current = self.current, following
            if self.closing.is_set():  # since it began
                following.service.closing.set()
            self._show()
            retiring = asyncio.ensure_future(self._retire(former))
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)
            return Replacement(following.service, former.service.facts["sha256"], time.perf_counter() - start)

    async def _retire(self, former: Current) -> None:
        await former.stop(self._settings.request_timeout)
        pass_over_what_stays()

    async def reload_or_log(self) -> None:
        """What a signal asks for."""
        try:
            done = await self.reload()
        except ServiceError as error:
            log.error("reload: %s", error)
        else:
            log.info("reload: weights %s in the place of %s", done.service.facts["sha256"], done.former)

    def check_room(self) -> None:
        """Raises Overloaded or NotReady while almost any text would be refused because the queue is full."""
        self.current.service.scheduler.check_room()

    def close(self) -> None:
        """Take no new work: the first word of a stop."""
        self.closing.set()
        self.current.service.closing.set()

    async def stop(self) -> None:
        """End everything; what was accepted should have been answered."""
        await asyncio.gather(self.current.stop(), *self._retiring)

    def _show(self) -> None:
        """Have the metrics tell of the current service."""
        self.current.service.scheduler.show()
        facts = self.current.service.facts
        self.metrics.model_info.clear()
        self.metrics.model_info.labels(facts["model"], facts["sha256"], facts["dtype"], facts["device"]).set(1)


@asynccontextmanager
async def running_serving(
    settings: Settings, metrics: Metrics, early: Child | None = None, meanwhile: Callable[[], None] = lambda: None
) -> AsyncIterator[Serving]:
    """Start a service that can be replaced, as `running_service` does.

    Raises ModelError or ServiceError when the model cannot be served.
    """
    serving = Serving(settings, metrics, await _start(settings, metrics, early, meanwhile))
    try:
        yield serving
    finally:
        await serving.stop()


async def _start(
    settings: Settings, metrics: Metrics, early: Child | None = None, meanwhile: Callable[[], None] = lambda: None
) -> Current:
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(running_service(settings, metrics, early, meanwhile))
        classification = Classification(service)
        await asyncio.to_thread(classification.store.open)
        return Current(service, classification, stack.pop_all())


class EnterCurrent:
    """Gives each request the service of the moment: `request.state.current`."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app = app
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._serving.current.entered() as current:
            state: dict[str, Any] = scope.setdefault("state", {})
            state |= {"current": current, "serving": self._serving}
            await self._app(scope, receive, send)
