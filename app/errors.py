"""The closed tree of what the service refuses or fails to do. Each knows its HTTP status and its word on TEI's routes.

ServiceError              500 Internal
├── EmptyInput            400 Empty
├── MalformedRequest      400 Validation
├── Unauthorized          401 Unauthorized
├── NotFound              404 NotFound
├── NotAcceptable         406 Validation
├── RequestTimeout        408 Timeout
├── Conflict              409 Conflict
├── BodyTooLarge          413 Validation
├── TooManyTokens         413 Validation
├── InvalidInput          422 Validation
├── WrongKind             424 Backend
├── BadCheckpoint         424 Backend
├── Overloaded            429 Overloaded   Retry-After
├── HeadTooLarge          431 Validation
├── EngineError           500 Backend
├── NotReady              503 Unhealthy    Retry-After
│   └── Recovering        503 Unhealthy    Retry-After
├── DeadlineExceeded      504 Timeout
└── StorageFailed         507 Storage
"""

from typing import ClassVar


class ServiceError(Exception):
    """Root of the tree. The message is for the client: what was found, what was wanted, what to do."""

    status: ClassVar[int] = 500
    word: ClassVar[str] = "Internal"

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class EmptyInput(ServiceError):
    status = 400
    word = "Empty"


class MalformedRequest(ServiceError):
    status = 400
    word = "Validation"


class Unauthorized(ServiceError):
    status = 401
    word = "Unauthorized"


class NotFound(ServiceError):
    status = 404
    word = "NotFound"


class NotAcceptable(ServiceError):
    status = 406
    word = "Validation"


class RequestTimeout(ServiceError):
    status = 408
    word = "Timeout"


class Conflict(ServiceError):
    status = 409
    word = "Conflict"


class BodyTooLarge(ServiceError):
    status = 413
    word = "Validation"


class TooManyTokens(ServiceError):
    status = 413
    word = "Validation"


class InvalidInput(ServiceError):
    status = 422
    word = "Validation"


class WrongKind(ServiceError):
    status = 424
    word = "Backend"


class BadCheckpoint(ServiceError):
    status = 424
    word = "Backend"


class Overloaded(ServiceError):
    status = 429
    word = "Overloaded"


class HeadTooLarge(ServiceError):
    status = 431
    word = "Validation"


class EngineError(ServiceError):
    status = 500
    word = "Backend"


class NotReady(ServiceError):
    status = 503
    word = "Unhealthy"


class Recovering(NotReady):
    """The engine starts again and the queue is full: whoever can wait gets in."""


class DeadlineExceeded(ServiceError):
    status = 504
    word = "Timeout"


class StorageFailed(ServiceError):
    status = 507
    word = "Storage"
