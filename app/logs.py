"""The log: one line a record on standard error, JSON or text, written by a thread so that nobody waits for a reader."""

import json
import logging
import os
import queue
import select
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from app.record import RequestRecord

LogFormat = Literal["auto", "json", "text"]

INPUT_CHARACTERS = 1000  # of a body that are logged where that is asked for

_MOST_LINES = 10_000  # that wait for the writer: seconds of the heaviest load, and a few megabytes
_GATHER_SECONDS = 0.05  # that lines wait for others: each time that the writer wakes, it interrupts the event loop
_LAST_SECONDS = 1.0  # that an exit waits for the last lines to be written

_requests = logging.getLogger("bertd.request")


def set_up(level: str, form: LogFormat) -> None:
    """Send every logger of this process through one formatter to standard error."""
    handler = logging.NullHandler() if sys.stderr is None else Writer(sys.stderr.fileno())
    is_text = form == "text" or (form == "auto" and sys.stderr is not None and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if is_text else JsonFormatter())
    # Nothing prints these, and finding them out is most of what a record costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # see "Optimization" in the documentation of logging
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())


def log_request(record: RequestRecord) -> None:
    """The line of a request that has ended: probes at debug level, what we failed to do as a warning."""
    level = logging.DEBUG if record.is_probe else logging.WARNING if record.status >= 500 else logging.INFO
    if _requests.isEnabledFor(level):
        _requests.log(level, "%(method)s %(route)s %(status)d", _fields(record))


def _fields(record: RequestRecord) -> dict[str, Any]:
    """What is known of a request, times in milliseconds."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "total_ms": _milliseconds(record.seconds),
        "bytes_out": record.bytes_out,
    }
    if record.error:
        fields["error"] = record.error
    if record.stages:
        fields |= {"texts": record.texts, "tokens": record.tokens, "truncated": record.truncated}
    for stage in record.stages:
        name = f"{stage.name}_ms"
        fields[name] = round(fields.get(name, 0.0) + _milliseconds(stage.seconds), 3)
    if record.traceparent:
        fields["trace_id"] = record.trace_id
    if record.body:
        fields["input"] = record.body.decode(errors="replace")[:INPUT_CHARACTERS]
    return fields


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


class JsonFormatter(logging.Formatter):
    """An object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_known(record),
        }
        if failure := _failure(record):
            line["traceback"] = failure
        try:
            return _printable(orjson.dumps(line).decode())
        except TypeError:  # a lone surrogate, as in the name of a file that is not UTF-8
            return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """For eyes: time, level and logger, the message, then what else is known as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        others = (f"{name}={_value(value)}" for name, value in _known(record).items() if f"%({name})" not in str(record.msg))
        message = " ".join((_message(record), *others))
        failure = _failure(record)
        return _printable(f"{time} {record.levelname} {record.name}: {message}") + (failure and "\n" + failure)


def _known(record: logging.LogRecord) -> Mapping[str, Any]:
    """What we tell beside the message: the mapping that a message of named places is filled from."""
    return record.args if isinstance(record.args, Mapping) and record.name.startswith("bertd.") else {}


def _value(value: object) -> str:
    """A value as one word; quoted where it has blanks or quotes, so that it can't pass for another field."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text or '"' in text else text


def _message(record: logging.LogRecord) -> str:
    """Of asyncio only the first line: what follows shows the values of whatever went wrong, texts of clients perhaps."""
    message = record.getMessage()
    return message.partition("\n")[0] if record.name == "asyncio" else message


def _failure(record: logging.LogRecord) -> str:
    """Where an exception came from and its kind. Never its own text, which may hold that of a client."""
    error = record.exc_info[1] if record.exc_info else None
    return "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__ if error else ""


def _printable(line: str) -> str:
    """The line with escapes (as JSON's) for everything that could end it, or tell a terminal to do something."""
    if line.isprintable():
        return line
    return "".join(character if character.isprintable() else _escaped(character) for character in line)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


class Writer(logging.Handler):
    """Hands lines to a thread that writes them. Where nobody reads, lines are dropped, and their number is told later."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= _MOST_LINES:
            self._dropped += 1
        else:
            self._lines.put(self._line(record))

    def close(self) -> None:
        """Write what waits; at exit `logging` calls this."""
        self._lines.put(None)
        self._closing.set()
        self._thread.join(_LAST_SECONDS)
        super().close()

    def _run(self) -> None:
        """Write all that waits at once, again and again."""
        told = 0
        lines: list[str | None] = []
        while None not in lines:
            lines = [self._lines.get()]
            self._closing.wait(_GATHER_SECONDS)
            lines += [self._lines.get() for _ in range(self._lines.qsize())]
            if self._dropped > told:  # since the queue was full: they came after all of these
                lines.append(self._note(f"{self._dropped - told} lines are missing here: standard error was not read in time"))
                told = self._dropped
            self._write("".join(f"{line}\n" for line in lines if line is not None).encode(errors="backslashreplace"))

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:  # whoever logs something that can't be put together must not fail for it
            return self._note(f"a line of {record.name} is missing here: {type(error).__name__}")

    def _note(self, message: str) -> str:
        """A line of our own."""
        return self.format(logging.LogRecord("bertd.log", logging.WARNING, "", 0, "%s", (message,), None))

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # whoever shares it with us has made it non-blocking
                select.select([], [self._descriptor], [])
            except OSError:  # its reader is gone for good: there is nobody to tell
                return
