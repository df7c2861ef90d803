"""Lines of the log: what is in them, what can't be, and that nobody waits for their reader."""

import asyncio
import json
import logging
import os
import select
import subprocess
import sys
import time

import httpx
import pytest
from servers import running_server

from app import logs
from app.logs import JsonFormatter, TextFormatter, Writer
from app.main import refusal
from app.metrics import Metrics
from app.observe import Observe
from app.record import RequestRecord, current_record

SECRET = "what nobody but the client may know"
REQUESTS = logging.getLogger("bertd.request")
FORGED = 'x\n{"level":"info","message":"forged"}\r\x1b[2J\u2028\x9b\u202e\x00'


@pytest.fixture
def lines(monkeypatch):
    """The lines that the logger of requests writes, in either format."""
    written = {"json": [], "text": []}
    formatters = {"json": JsonFormatter(), "text": TextFormatter()}

    class Keep(logging.Handler):
        def emit(self, record):
            for name, formatter in formatters.items():
                written[name].append(formatter.format(record))

    monkeypatch.setattr(REQUESTS, "handlers", [Keep()])
    REQUESTS.setLevel(logging.DEBUG)
    yield written
    REQUESTS.setLevel(logging.NOTSET)


def record_of(message, *arguments, name="bertd.test", error=None):
    return logging.LogRecord(name, logging.INFO, "", 0, message, arguments, error and (type(error), error, error.__traceback__))


async def observed(app, **options):
    """The answer of an app under `Observe`."""
    transport = httpx.ASGITransport(Observe(app, Metrics(), refusal, **options))
    async with httpx.AsyncClient(transport=transport, base_url="http://bertd") as client:
        return await client.post(f"/{SECRET}", content=SECRET)


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_nothing_in_a_record_can_end_its_line_or_command_a_terminal(formatter):
    mapping = {"route": FORGED, "request_id": FORGED, "input": FORGED}
    for record in (record_of("%s", FORGED), record_of(FORGED), record_of("%(route)s", mapping)):
        line = formatter.format(record)
        assert line.isprintable()
        assert "forged" in line


def test_a_json_line_gives_back_what_was_logged():
    line = json.loads(JsonFormatter().format(record_of("%(route)s", {"route": FORGED, "count": 3, "text": "我 \U000e0001"})))
    assert (line["message"], line["count"], line["text"]) == (FORGED, 3, "我 \U000e0001")
    assert (line["level"], line["logger"]) == ("info", "bertd.test")


def test_a_lone_surrogate_is_no_reason_to_lose_a_line():
    assert json.loads(JsonFormatter().format(record_of("%s", "\udc80")))["message"] == "\udc80"
    assert "\\udc80" in TextFormatter().format(record_of("%s", "\udc80"))


def test_a_value_can_not_pass_for_another_field():
    line = TextFormatter().format(record_of("m", {"request_id": "a status=200", "next": 'a"b'}))
    assert line.endswith('m request_id="a status=200" next="a\\"b"')


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_an_exception_is_told_by_its_kind_and_place_only(formatter):
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        line = formatter.format(record_of("failed", error=error))
    assert "ValueError" in line
    assert "test_logs.py" in line
    assert SECRET not in line


def test_asyncio_tells_no_values():
    async def fail():
        raise ValueError(SECRET)

    async def forget_a_failure():
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        del task

    written = []
    handler = logging.Handler()
    handler.emit = lambda record: written.append((record.getMessage(), JsonFormatter().format(record)))
    logging.getLogger("asyncio").addHandler(handler)
    try:
        asyncio.run(forget_a_failure())
    finally:
        logging.getLogger("asyncio").removeHandler(handler)
    ((told, line),) = written
    assert SECRET in told
    assert "Task exception was never retrieved" in line
    assert SECRET not in line


@pytest.mark.anyio
async def test_a_defect_is_logged_under_the_request_id_without_any_text(lines):
    async def broken(scope, receive, send):
        raise RuntimeError((await receive())["body"].decode())

    answer = await observed(broken)
    assert answer.status_code == 500
    failed, ended = map(json.loads, lines["json"])
    assert failed["request_id"] == ended["request_id"] == answer.headers["x-request-id"]
    assert failed["traceback"].endswith("RuntimeError")
    assert (ended["level"], ended["status"], ended["error"], ended["route"]) == ("warning", 500, "Internal", "none")
    assert SECRET not in answer.text + "".join(lines["json"] + lines["text"])


@pytest.mark.anyio
@pytest.mark.parametrize(("log_inputs", "wanted"), [(True, ("a我" * 10_000)[:1000]), (False, None)])
async def test_the_start_of_a_body_is_logged_where_it_is_asked_for(lines, log_inputs, wanted):
    async def reading(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"12345"})

    async def parts():
        yield b"a"
        for _ in range(10_000):
            yield "我a".encode()

    transport = httpx.ASGITransport(Observe(reading, Metrics(), refusal, log_inputs=log_inputs))
    async with httpx.AsyncClient(transport=transport, base_url="http://bertd") as client:
        await client.post("/", content=parts())
    (line,) = map(json.loads, lines["json"])
    assert line.get("input") == wanted
    assert line["bytes_out"] == 5


def test_stages_of_several_runs_are_summed():
    record = RequestRecord(route="/classify", status=200)
    for _ in range(2):
        record.encoded(3, 30, 1, [("tokenize", 0.001), ("infer", 0.25)])
    fields = logs._fields(record)
    assert (fields["texts"], fields["tokens"], fields["truncated"]) == (6, 60, 2)
    assert (fields["tokenize_ms"], fields["infer_ms"]) == (2.0, 500.0)


def test_what_is_encoded_outside_of_a_request_is_nobodys():
    current_record().encoded(1, 1, 0, [])
    assert current_record().texts == 0


@pytest.mark.parametrize(
    ("route", "status", "level"),
    [
        ("/embed", 200, logging.INFO),
        ("/embed", 422, logging.INFO),
        ("/embed", 503, logging.WARNING),
        ("/health", 200, logging.DEBUG),
        ("/ready", 503, logging.DEBUG),
        ("/metrics", 200, logging.DEBUG),
    ],
)
def test_the_level_of_a_request(lines, route, status, level, monkeypatch):
    logs.log_request(RequestRecord(route=route, status=status))
    assert json.loads(lines["json"][0])["level"] == logging.getLevelName(level).lower()
    REQUESTS.setLevel(level + 1)
    monkeypatch.setattr(logs, "_fields", None)  # a line that is off is not even put together
    logs.log_request(RequestRecord(route=route, status=status))
    assert len(lines["json"]) == 1


@pytest.fixture
def unread(monkeypatch):
    """A writer to a full pipe of which nobody reads, for a while; the pipe's other end."""
    monkeypatch.setattr(logs, "_MOST_LINES", 10)
    reader, descriptor = os.pipe()
    os.set_blocking(descriptor, False)
    while True:
        try:
            os.write(descriptor, b"-" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(descriptor, True)
    writer = Writer(descriptor)
    writer.setFormatter(JsonFormatter())
    yield writer, reader
    os.close(reader)
    writer.close()
    os.close(descriptor)


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_that_nobody_reads_are_dropped_and_counted(unread, blocking):
    writer, reader = unread
    os.set_blocking(writer._descriptor, blocking)
    for number in range(100):
        writer.handle(record_of("line %d", number))
        if number == 0:
            time.sleep(0.02)  # by then the thread hangs on the first line
    told = read_until(reader, b"missing").lstrip(b"-").decode()
    *kept, gap = [json.loads(line)["message"] for line in told.splitlines()]
    assert 10 <= len(kept) <= 20
    assert kept == [f"line {number}" for number in range(len(kept))]
    assert gap.startswith(f"{100 - len(kept)} lines are missing here")


def read_until(reader, word):
    """What a pipe gives, up to a line with that word in it."""
    told = b""
    while word not in told or not told.endswith(b"\n"):
        assert select.select([reader], [], [], 20)[0], "nothing comes any more"
        told += os.read(reader, 65536)
    return told


def test_a_call_that_can_not_be_put_together_fails_nobody(unread):
    writer, reader = unread
    writer.handle(record_of("%d", SECRET))
    told = read_until(reader, b"bertd.test").decode()
    assert "a line of bertd.test is missing here: TypeError" in told
    assert SECRET not in told


def test_an_exit_writes_what_waits_and_does_not_wait_for_a_reader(unread):
    writer, reader = unread
    writer.handle(record_of("the last line"))
    writer.close()
    assert writer._thread.is_alive()
    read_until(reader, b"the last line")
    writer._thread.join(10)
    assert not writer._thread.is_alive()


def test_a_pipe_without_a_reader_is_no_failure(unread):
    writer, reader = unread
    os.dup2(os.open("/dev/null", os.O_RDONLY), reader)  # the last reader is gone
    writer.handle(record_of("unheard"))
    writer.close()
    assert not writer._thread.is_alive()


def test_a_server_whose_log_nobody_reads_answers_all_the_same(make_checkpoint):
    reader, writer = os.pipe()
    with running_server(stderr=writer, model=make_checkpoint()) as server:
        os.close(writer)
        for _ in range(250):  # more than a pipe holds
            answer = server.client.get("/v1/models", headers={"x-request-id": "x" * 128})
            assert answer.status_code == 200
        os.close(reader)
        assert server.client.get("/v1/models").status_code == 200
        assert server.post("/embed", inputs="abc").status_code == 200


def test_the_line_of_a_request(make_checkpoint, tmp_path):
    with (tmp_path / "log").open("wb") as log, running_server(stderr=log.fileno(), model=make_checkpoint()) as server:
        answer = server.client.post("/embed", json={"inputs": ["abc", "a " * 600]}, headers={"x-request-id": "mine"})
        server.client.post("/embed", content="{", headers={"x-request-id": "two words"})
        for path in ("/health", "/ready", "/metrics"):
            server.client.get(path)
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("info", "bertd.request", "POST /embed 200")
    assert (first["request_id"], first["method"], first["route"], first["status"]) == ("mine", "POST", "/embed", 200)
    assert (first["texts"], first["truncated"]) == (2, 1)
    assert str(first["tokens"]) == answer.headers["x-compute-tokens"]
    assert first["bytes_out"] == len(answer.content)
    times = [first[f"{stage}_ms"] for stage in ("tokenize", "queue", "infer", "render")]
    assert all(0 < time < first["total_ms"] for time in times)
    assert sum(times) <= first["total_ms"]
    assert time.strptime(first["time"][:19], "%Y-%m-%dT%H:%M:%S")
    assert (second["request_id"], second["status"], second["error"]) == ("two words", 422, "Validation")
    assert "texts" not in second


@pytest.mark.parametrize(("form", "is_json"), [("auto", False), ("json", True)])
def test_a_terminal_gets_text_unless_told_otherwise(form, is_json):
    ours, terminal = os.openpty()
    code = f"from app import logs; import logging; logs.set_up('info', '{form}'); logging.getLogger('bertd').info('hello')"
    subprocess.run([sys.executable, "-c", code], stderr=terminal, check=True, timeout=60)
    os.close(terminal)
    line = os.read(ours, 65536).decode()
    os.close(ours)
    assert line.startswith("{") == is_json
    assert "hello" in line


def test_a_process_without_standard_error_logs_nowhere(tmp_path):
    code = "from app import logs; import logging; logs.set_up('info', 'auto'); logging.error('x'); open('x', 'w').write('safe')"
    subprocess.run(
        ["sh", "-c", f'cd {tmp_path} && exec {sys.executable} -c "{code}" 2>&-'],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        check=True,
        timeout=60,
    )
    assert (tmp_path / "x").read_text() == "safe"
