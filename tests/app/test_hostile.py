"""Hostile requests, byte by byte: each is answered as it is documented, or is no HTTP; none costs anything that lasts."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hostile_requests import CLIENT_TEXT, FAMILIES, MAX_BODY, SCHEMA, TEXT, VALID, Case
from raw_http import SECONDS, Answer, connect, descriptors, exchange, promptness
from servers import RunningServer, running_server, until

pytestmark = pytest.mark.system

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENTED = {200, 405} | {int(status) for status in re.findall(r"^\| (\d{3}) \|", API, re.M)}
CASES = [case for cases in FAMILIES.values() for case in cases]


@dataclass
class Outcome:
    """What a case came to."""

    case: Case
    answers: list[Answer]
    seconds: float

    def __str__(self) -> str:
        sent = b"".join(self.case.pieces)
        return f"{sent[:200]!r} ({len(sent)} bytes), wanted {sorted(self.case.statuses)} -> {self.answers}"


def play(server: RunningServer, case: Case) -> Outcome:
    start = time.monotonic()
    answers = exchange(server, *case.pieces, count=case.count)
    return Outcome(case, answers, time.monotonic() - start)


@pytest.fixture(scope="module")
def hurried(make_checkpoint, tmp_path_factory) -> Iterator[RunningServer]:
    """A server that waits for its clients for a moment only. Its exit code tells of a request that never ended."""
    options = {"header_timeout": 0.4, "body_timeout": 0.4, "max_body_bytes": MAX_BODY, "grace_period": 15}
    data_dir = tmp_path_factory.mktemp("data")
    with promptness(), running_server(model=make_checkpoint(), data_dir=data_dir, **options) as server:
        yield server


@pytest.fixture(scope="module")
def outcomes(hurried) -> dict[Case, Outcome]:
    """The whole table, eight cases at once. The server is as it was before."""
    vector = hurried.client.post("/embed", content=TEXT).content
    before = descriptors(hurried)
    with ThreadPoolExecutor(8) as pool:
        played = list(pool.map(lambda case: play(hurried, case), CASES))
    assert hurried.client.post("/embed", content=TEXT).content == vector
    until(lambda: descriptors(hurried) <= before)
    assert hurried.client.get("/classifiers").json() == {"classifiers": []}
    return {outcome.case: outcome for outcome in played}


def assert_none(bad: list[Outcome]) -> None:
    assert not bad, f"{len(bad)}, the first are\n" + "\n".join(map(str, bad[:10]))


def test_the_table_knows_every_route_and_is_large():
    described = {f"{method.upper()} {path}" for path, methods in SCHEMA["paths"].items() for method in methods}
    reading = {route for route in described if route.startswith(("POST", "PUT"))} - {"POST /admin/reload"}
    assert {route.replace("/x", "/{name}") for route in VALID} == reading
    assert len(set(CASES)) > 2000


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_has_a_status_that_is_documented_and_expected(outcomes, family):
    assert_none([outcomes[case] for case in FAMILIES[family] if not is_expected(outcomes[case])])


def is_expected(outcome: Outcome) -> bool:
    wanted = outcome.case.statuses & DOCUMENTED
    answers = outcome.answers
    return bool(answers) == bool(wanted) and all(answer.whole and answer.status in wanted for answer in answers)


def test_every_refusal_is_json_and_repeats_nothing(outcomes):
    assert_none([outcome for outcome in outcomes.values() if not all(map(is_kind, outcome.answers))])


def is_kind(answer: Answer) -> bool:
    if answer.status == 200:
        return True
    content = json.loads(answer.body) if answer.headers["content-type"] == "application/json" else None
    return isinstance(content, dict) and len(answer.body) < 1000 and CLIENT_TEXT not in repr(answer).lower()


def test_no_answer_takes_long(outcomes):
    assert_none([outcome for outcome in outcomes.values() if outcome.seconds > SECONDS])


def test_an_answer_to_head_has_no_body(hurried):
    with connect(hurried) as connection:
        connection.sendall(b"HEAD /embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 405")
    assert answer.endswith(b"\r\n\r\n")
