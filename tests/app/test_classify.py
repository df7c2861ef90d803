"""Classifiers over HTTP: fitted on examples, or from the names of labels alone."""

import asyncio
import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from raw_http import read, request
from servers import held, run_bertd, running_server, until
from sklearn.linear_model import LogisticRegression
from test_refusals import content_of
from test_scheduler import turns

from app.bulk import embed_many
from app.classification import Classification, Example
from app.classifiers import Classifier
from app.embedding import Embedding
from app.errors import Overloaded
from app.metrics import Metrics
from app.scheduler import Answer
from app.service import Service, Space
from app.settings import Settings
from model.config import BertConfig, ModelConfig
from model.finetune import _INVERSE_PENALTY, Fitted, Head

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TICKETS = ROOT / "docs/examples/tickets.csv"
UNSEEN = ["Where is my parcel?", "I was billed twice", "It crashes when I start it", "Why?" * 500]


def tickets():
    with TICKETS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def words(seed, count, labels):
    """Examples of nonsense for the small random checkpoints."""
    random = np.random.default_rng(seed)
    letters = random.choice(list("abcdefghijklmnopqrstuvwxyz "), size=(count, 12))
    return [{"text": "".join(row), "label": f"label {place % labels}"} for place, row in enumerate(letters)]


def put(server, name, examples, status=200, **options):
    response = server.client.put(f"/classifiers/{name}", json={"examples": examples, **options})
    assert response.status_code == status, response.text
    return response.json()


def probabilities(server, texts, **options):
    response = server.post("/classify", input=texts, **options)
    assert response.status_code == 200, response.text
    return np.array([row["probs"] for row in response.json()["data"]])


def embedded(server, texts, **options):
    return np.array(server.post("/embed", inputs=texts, **options).json())


@pytest.fixture(scope="module")
def fitted(server):
    """The answer to a fit on the tickets, under the name `tickets`."""
    return put(server, "tickets", tickets())


@pytest.mark.parametrize("options", [{}, {"class_weight": "balanced", "pooling": "cls"}])
def test_probabilities_are_those_of_scikit_learn_on_the_vectors_of_embed(server, options):
    examples = tickets()[:40]
    pooling = options.get("pooling")
    put(server, "some", examples, **options)
    reference = LogisticRegression(C=_INVERSE_PENALTY, class_weight=options.get("class_weight"), max_iter=1000)
    reference.fit(embedded(server, [e["text"] for e in examples], pooling=pooling), [e["label"] for e in examples])
    wanted = reference.predict_proba(embedded(server, UNSEEN, pooling=pooling))
    np.testing.assert_allclose(probabilities(server, UNSEEN, classifier="some"), wanted, rtol=0, atol=1e-5)


def test_a_fit_says_what_it_made_and_how_good_it_is(server, fitted):
    assert fitted["name"] == "tickets"
    assert fitted["labels"] == ["billing", "delivery", "technical"]
    assert fitted["counts"] == {"billing": 20, "delivery": 20, "technical": 20}
    assert fitted["cross_validation"]["folds"] == 5
    assert fitted["cross_validation"]["accuracy"] == pytest.approx(0.93, abs=0.03)
    assert fitted["cross_validation"]["macro_f1"] == pytest.approx(0.93, abs=0.03)
    assert fitted["model"] == server.client.get("/info").json()["model_sha"]
    assert (fitted["pooling"], fitted["prompt_name"], fitted["truncated"]) == ("mean", None, 0)
    assert fitted["seconds"] > 0


def test_classes_come_in_the_shape_of_vllm_with_the_order_of_the_labels(server, fitted):
    response = server.post("/classify", input=UNSEEN, classifier="tickets", model="ignored")
    body = response.json()
    assert set(body) == {"id", "object", "created", "model", "labels", "data", "usage"}
    assert (body["object"], body["model"], body["labels"]) == (
        "list",
        server.client.get("/info").json()["model_id"],
        fitted["labels"],
    )
    assert [row["label"] for row in body["data"]][:3] == ["delivery", "billing", "technical"]
    for index, row in enumerate(body["data"]):
        assert set(row) == {"index", "label", "probs", "num_classes"}
        assert (row["index"], row["num_classes"]) == (index, 3)
        assert row["label"] == body["labels"][int(np.argmax(row["probs"]))]
        assert sum(row["probs"]) == pytest.approx(1, abs=1e-6)
    assert body["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), int(response.headers["x-compute-tokens"]))
    assert response.headers["x-truncated"] == "1"
    one = server.post("/classify", input=UNSEEN[0], classifier="tickets").json()["data"]
    assert len(one) == 1
    np.testing.assert_allclose(one[0]["probs"], body["data"][0]["probs"], atol=1e-6)


def test_classifiers_are_listed_shown_and_deleted(server, fitted):
    known = {key: value for key, value in fitted.items() if key != "seconds"}
    assert server.client.get("/classifiers/tickets").json() == known
    put(server, "short-lived", tickets())
    assert server.client.delete("/classifiers/short-lived").json() == {"name": "short-lived", "deleted": True}
    assert server.client.get("/classifiers/short-lived").status_code == 404
    listed = server.client.get("/classifiers").json()["classifiers"]
    assert known in listed
    assert [entry["name"] for entry in listed] == sorted(entry["name"] for entry in listed)
    assert "short-lived" not in [entry["name"] for entry in listed]


def test_a_label_with_one_example_is_not_judged_and_any_string_is_a_label(server):
    labels = ["苹果", "é\n\0", "🙂", " "]
    body = put(server, "lone", [{"text": f"text {label}", "label": label} for label in labels])
    assert body["labels"] == sorted(labels)
    judged = body["cross_validation"]
    assert (judged["folds"], judged["accuracy"], judged["macro_f1"]) == (0, None, None)
    assert "4 of 4 labels have one example" in judged["reason"]
    assert probabilities(server, "x", classifier="lone").shape == (1, 4)


@pytest.mark.parametrize("choice", [{"classifier": "tickets"}, {"labels": ["billing", "delivery"]}])
def test_token_ids_are_the_text_that_they_stand_for(server, fitted, choice):
    texts = UNSEEN[:2]
    framed = [[token["id"] for token in row] for row in server.post("/tokenize", inputs=texts).json()]
    for ids in (framed, [framed[0], texts[1]], [framed[0][1:-1], framed[1]]):
        np.testing.assert_array_equal(probabilities(server, ids, **choice), probabilities(server, texts, **choice))
    alone = probabilities(server, framed[0], **choice)
    np.testing.assert_allclose(alone, probabilities(server, texts[:1], **choice), atol=1e-6)


@pytest.mark.parametrize("choice", [{"classifier": "tickets"}, {"labels": ["billing", "delivery"]}])
def test_details_and_errors_stand_in_the_places_of_texts(server, fitted, choice):
    body = {"input": ["Why?", "", [30522]], **choice}
    answer = server.client.post("/classify?details=true&partial=true", json=body).json()
    good, *bad = answer["data"]
    np.testing.assert_allclose(good["probs"], probabilities(server, "Why?", **choice)[0], atol=1e-6)
    assert [(one["index"], one["error_type"]) for one in bad] == [(1, "Empty"), (2, "Validation")]
    assert [detail["tokens"] for detail in answer["details"]] == [4, 0, 0]


LONG_TEXTS = [text * 30 for text in ("so very happy ", "sad, so sad ", "glad of it all ", "it makes me cry ")]


@pytest.mark.parametrize("habit", ["truncate", "split"])
def test_a_long_text_is_read_in_a_fit_as_in_a_question(make_checkpoint, tmp_path, habit):
    model = make_checkpoint(max_position_embeddings=64, initializer_range=0.3)
    examples = [{"text": text, "label": label} for text, label in zip(LONG_TEXTS, "xyxy", strict=True)]
    with running_server(model=model, data_dir=tmp_path, on_overflow=habit) as server:
        cut = 4 if habit == "truncate" else 0
        by_habit = put(server, "habit", examples)
        assert (by_habit["on_overflow"], by_habit["truncated"]) == (habit, cut)
        assert put(server, "asked", examples, on_overflow=habit)["truncated"] == cut
    with running_server(model=model, data_dir=tmp_path) as server:  # whatever its own habit is
        reference = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000)
        reference.fit(embedded(server, LONG_TEXTS, on_overflow=habit), list("xyxy"))
        wanted = reference.predict_proba(embedded(server, LONG_TEXTS, on_overflow=habit))
        for name in ("habit", "asked"):
            np.testing.assert_allclose(probabilities(server, LONG_TEXTS, classifier=name), wanted, rtol=0, atol=1e-5)
        other = probabilities(server, LONG_TEXTS, classifier="habit", on_overflow="split" if cut else "truncate")
        assert abs(other - wanted).max() > 1e-3
        refused = server.client.put("/classifiers/habit", json={"examples": examples[:2], "on_overflow": "error"})
        is_refused(refused, 422, "examples[0].text: the text has")
        is_refused(server.post("/classify", input=LONG_TEXTS, classifier="habit", truncate=False), 422, "text 0 has")


def test_an_example_that_no_question_may_have_is_refused(make_checkpoint, tmp_path):
    options = {"model": make_checkpoint(max_position_embeddings=64), "max_request_tokens": 100, "max_queue_tokens": 200}
    with running_server(data_dir=tmp_path, on_overflow="split", **options) as server:
        few = [{"text": "a b c " * 10, "label": label} for label in "xyxyxyxyxyxyxy"]  # of more tokens than a request's together
        put(server, "few", few)
        refused = server.client.put("/classifiers/few", json={"examples": [*few, {"text": "a " * 101, "label": "x"}]})
        is_refused(refused, 413, "examples[14].text: the text has more than 100 tokens")
        assert server.client.get("/classifiers/few").json()["counts"] == {"x": 7, "y": 7}


def test_labels_by_their_names_are_a_softmax_of_scaled_cosines(server):
    labels, texts = ["billing", "delivery", "technical problem"], [ticket["text"] for ticket in tickets()]
    for options in ({}, {"template": "A text about {}!", "pooling": "cls"}):
        pooling = {"pooling": options.get("pooling")}
        phrases = [options.get("template", "{}").replace("{}", label) for label in labels]
        logits = 20 * embedded(server, texts, **pooling) @ embedded(server, phrases, **pooling).T
        wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities(server, texts, labels=labels, **options), wanted, rtol=0, atol=1e-5)


def test_the_quality_of_labels_by_their_names_is_as_documented(server):
    truth = [ticket["label"] for ticket in tickets()]
    figures = []
    for technical in ("technical", "technical problem"):
        labels = ["billing", "delivery", technical]
        best = probabilities(server, [ticket["text"] for ticket in tickets()], labels=labels).argmax(axis=1)
        figures.append(np.mean([labels[place].split()[0] == label for place, label in zip(best, truth, strict=True)]))
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    stated = re.search(r"of the 60 tickets it gets (\d+) % right, and (\d+) %", page)
    assert [round(100 * figure) for figure in figures] == [int(number) for number in stated.groups()]


def texts_encoded(server):
    return float(re.search(r"^bertd_texts_total (.*)$", server.client.get("/metrics").text, re.M)[1])


def test_the_vectors_of_labels_are_kept(server):
    counts = [texts_encoded(server)]
    for labels in (
        ["first new label", "second new label"],
        ["second new label", "first new label"],
        ["first new label", "third"],
    ):
        probabilities(server, "text", labels=labels)
        counts.append(texts_encoded(server))
    assert np.diff(counts).tolist() == [3, 1, 2]


PAIR = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]

FIT_REFUSED = [
    ("{", 422, "not JSON"),
    (b'{"examples": [{"text": "\xed\xa0\x80", "label": "x"}]}', 422, "not JSON"),
    ({}, 422, "examples: Field required"),
    ({"examples": None}, 422, "examples"),
    ({"examples": []}, 400, "empty"),
    ({"examples": PAIR[:1]}, 422, "there are 1 examples; wanted 2 to 100000"),
    ({"examples": [PAIR[0], PAIR[0]]}, 422, "1 different labels; wanted 2 to 1000"),
    ({"examples": [*PAIR, {"text": "c"}]}, 422, "examples.2.label: Field required"),
    ({"examples": [*PAIR, {"label": "x"}]}, 422, "examples.2.text: Field required"),
    ({"examples": [*PAIR, {"text": "", "label": "x"}]}, 400, "examples[2].text is empty"),
    ({"examples": [*PAIR, {"text": "c", "label": ""}]}, 400, "examples[2].label is empty"),
    ({"examples": [*PAIR, {"text": "c", "label": 1}]}, 422, "examples.2.label: Input should be a valid string"),
    ({"examples": [*PAIR, {"text": None, "label": "x"}]}, 422, "examples.2.text"),
    ({"examples": [*PAIR, {"text": ["c", "d"], "label": "x"}]}, 422, "examples.2.text"),
    ({"examples": [*PAIR, {"text": "c", "label": "l" * 201}]}, 422, "at most 200"),
    ({"examples": [*PAIR, "c"]}, 422, "examples.2"),
    ({"examples": [{"text": "a", "label": str(n)} for n in range(1001)]}, 422, "1001 different labels"),
    ({"examples": PAIR, "pooling": "sum"}, 422, "pooling"),
    ({"examples": PAIR, "prompt_name": "query"}, 422, "Available prompts: []"),
    ({"examples": PAIR, "class_weight": {"x": 2}}, 422, "class_weight"),
    ({"examples": [{"text": "a" * 200_000, "label": "x"}, PAIR[1]]}, 413, "BERTD_MAX_BODY_BYTES"),
]

CLASSIFY_REFUSED = [
    ({}, 422, "input: Field required"),
    ({"input": "a"}, 422, "wanted either classifier"),
    ({"input": "a", "template": "{}"}, 422, "wanted either classifier"),
    ({"input": "a", "classifier": "tickets", "labels": ["x", "y"]}, 422, "wanted either classifier"),
    ({"input": "a", "classifier": "tickets", "template": "{}"}, 422, "wanted either classifier"),
    ({"input": "a", "classifier": "nobody"}, 404, "'nobody' is not known"),
    ({"input": "a", "classifier": "../tickets"}, 422, "wanted 1 to 64"),
    ({"input": "a", "classifier": 3}, 422, "classifier"),
    ({"input": "", "classifier": "tickets"}, 400, "empty"),
    ({"input": [], "classifier": "tickets"}, 400, "empty"),
    ({"input": ["a", ""], "classifier": "tickets"}, 400, "empty"),
    ({"input": ["a", None], "classifier": "tickets"}, 422, "input"),
    ({"input": [["a", "b"]], "classifier": "tickets"}, 422, "input"),
    ({"input": ["a"] * 3001, "classifier": "tickets"}, 422, "at most 3000"),
    ({"input": "a", "classifier": "tickets", "pooling": "cls"}, 409, "fitted with pooling 'mean'"),
    ({"input": "a", "classifier": "tickets", "prompt_name": "query"}, 409, "fitted with prompt_name None"),
    ({"input": "a b " * 300, "classifier": "tickets", "truncate": False}, 422, "wanted at most 256"),
    ({"input": "a", "labels": []}, 422, "labels names 0; wanted 2"),
    ({"input": "a", "labels": ["x"]}, 422, "labels names 1; wanted 2"),
    ({"input": "a", "labels": ["x", "y", "x"]}, 422, "labels[2] stands there twice"),
    ({"input": "a", "labels": ["x", ""]}, 400, "labels[1] is empty"),
    ({"input": "a", "labels": ["x", 1]}, 422, "labels.1"),
    ({"input": "a", "labels": ["x", "y" * 201]}, 422, "at most 200"),
    ({"input": "a", "labels": [str(n) for n in range(1001)]}, 422, "labels names 1001"),
    ({"input": "a", "labels": ["x", "y"], "template": "no place"}, 422, "{} once"),
    ({"input": "a", "labels": ["x", "y"], "template": "{} {}"}, 422, "{} once"),
    ({"input": "a", "labels": ["x", "y"], "template": "a " * 400 + "{}", "truncate": False}, 422, "more than 256 tokens"),
    ({"input": "a", "labels": ["x", "y"], "template": "{}" + "a" * 999}, 422, "at most 1000 characters"),
    ({"input": "a", "labels": ["x", "y"], "prompt_name": "query"}, 422, "Available prompts"),
]


def is_refused(response, status, message):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "error_type"}
    assert message in response.json()["error"]
    assert len(response.content) < 1000


@pytest.mark.parametrize(("body", "status", "message"), FIT_REFUSED)
def test_a_bad_fit_is_refused_by_name_and_leaves_what_was_there(server, fitted, body, status, message):
    before = server.client.get("/classifiers").json()
    is_refused(server.client.put("/classifiers/tickets", content=content_of(body)), status, message)
    assert server.client.get("/classifiers").json() == before


@pytest.mark.parametrize(("body", "status", "message"), CLASSIFY_REFUSED)
def test_a_bad_question_is_refused_by_name(server, fitted, body, status, message):
    is_refused(server.post("/classify", **body), status, message)


@pytest.mark.parametrize("null", ["classifier", "truncate", "pooling", "prompt_name"])
def test_null_is_the_same_as_absent(server, null):
    assert probabilities(server, "a", labels=["x", "y"], **{null: None, "template": None}).shape == (1, 2)


@pytest.mark.parametrize("method", ["get", "delete"])
def test_an_unknown_classifier_is_not_found(server, method):
    is_refused(getattr(server.client, method)("/classifiers/nobody"), 404, "'nobody' is not known")


TRICKS = [
    "..%2f..",
    "..",
    "%2e%2e",
    "%2e%2e%2ftickets",
    "a%00b",
    "tickets%0a",
    ".hidden",
    "%2fetc%2fpasswd",
    "..%5ca",
    "con",
    "%C3%A4",
    "%FF",
]


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
@pytest.mark.parametrize("name", [*TRICKS, "a" * 65])
def test_a_path_that_leads_elsewhere_leads_nowhere(make_checkpoint_server, name, method):
    server, data = make_checkpoint_server
    before = sorted(data.parent.rglob("*"))
    body = json.dumps({"examples": PAIR}).encode()
    head = f"{method} /classifiers/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(head.encode() + body)
        answer = connection.makefile("rb").read()
    assert answer.split(b" ", 2)[1] in (b"404", b"422"), answer
    assert b'"error_type"' in answer
    assert sorted(data.parent.rglob("*")) == before


@pytest.fixture(scope="module")
def make_checkpoint_server(make_checkpoint, tmp_path_factory):
    """A small server that leaves texts little room and time, and its folder of data."""
    data = tmp_path_factory.mktemp("around") / "data"
    limits = {"max_queue_tokens": 60, "request_timeout": 0.5, "engine_timeout": 60}
    with running_server(model=make_checkpoint(), data_dir=data, **limits) as server:
        yield server, data


def test_the_same_examples_give_the_same_file(make_checkpoint_server):
    server, data = make_checkpoint_server
    for name in ("one", "other"):
        put(server, name, words(0, 20, 3))
    one, other = ((data / "classifiers" / f"{name}.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_fit_outlives_the_deadline_and_waits_for_room_in_a_full_queue(make_checkpoint_server):
    server, _ = make_checkpoint_server
    statuses = set()
    stop = threading.Event()

    def others():
        while not stop.is_set():
            statuses.add(server.post("/embed", inputs=["abc def"] * 5).status_code)

    fit = request("/classifiers/patient", json.dumps({"examples": words(0, 20, 2)}).encode(), "PUT", "Connection: close\r\n")
    with ThreadPoolExecutor(2) as pool, socket.create_connection(server.address, timeout=60) as connection:
        try:
            with held(server):
                connection.sendall(fit)
                futures = [pool.submit(others) for _ in range(2)]
                until(lambda: 504 in statuses)  # of a request that came after the fit: the deadline of both is over
            (answer,) = read(connection)
        finally:
            stop.set()
        for future in futures:
            future.result()
    assert answer.status == 200, answer.body
    body = json.loads(answer.body)
    assert body["seconds"] > 0.5
    assert sum(body["counts"].values()) == 20
    assert 200 in statuses
    assert statuses <= {200, 429, 504}


class BusyScheduler:
    """Refuses every other submission; the vector of a row is its number of tokens."""

    max_queue_tokens = 40

    def __init__(self):
        self.submitted = []
        self.refusals = 0

    async def submit(self, rows, task):
        if self.refusals == len(self.submitted):
            self.refusals += 1
            raise Overloaded("full", retry_after=1)
        self.submitted.append(sum(map(len, rows)))
        return Answer([np.full(32, len(row), dtype=np.float32) for row in rows], 0.0, 0.0)


@pytest.mark.anyio
async def test_many_texts_go_in_slices_that_leave_room_and_wait_when_there_is_none(make_checkpoint):
    from model.tokenizer import Tokenizer

    config = ModelConfig(BertConfig(hidden_size=32, num_attention_heads=4, vocab_size=100), max_tokens=12)
    scheduler = BusyScheduler()
    facts = {"tokenization_workers": 1, "poolings": ["cls"], "device": "cpu"}
    settings = Settings(max_client_batch_size=3)
    service = Service(settings, config, Tokenizer.from_folder(make_checkpoint(), config), scheduler, Metrics(), facts)
    texts = ["a " * n for n in (1, 2, 3, 4, 5, 50, 6, 1, 1, 1, 1)]
    counts = []
    vectors, truncated = await embed_many(service, texts, Embedding(normalize=False), counts.append)
    assert vectors[:, 0].tolist() == [3, 4, 5, 6, 7, 12, 8, 3, 3, 3, 3]
    assert truncated == 1
    assert sum(counts) == len(texts)
    assert max(counts) <= 3
    assert max(scheduler.submitted) <= scheduler.max_queue_tokens // 2
    assert scheduler.refusals == len(scheduler.submitted)


def test_two_fits_of_one_name_at_once_leave_one_of_them(make_checkpoint_server):
    server, _ = make_checkpoint_server
    sets = [words(seed, 40, 2 + seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        bodies = list(pool.map(lambda examples: put(server, "contested", examples), sets))
    kept = server.client.get("/classifiers/contested").json()
    assert kept in [{key: value for key, value in body.items() if key != "seconds"} for body in bodies]
    assert probabilities(server, "abc", classifier="contested").shape == (1, len(kept["labels"]))


def save_with_prompts(folder, source, **prompts):
    """A copy of a checkpoint that has these prompts."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def test_classifiers_survive_a_restart_and_are_refused_by_other_models(make_checkpoint, tmp_path):
    data = tmp_path / "data"
    model = save_with_prompts(tmp_path / "model", make_checkpoint(), query="ab ")
    with running_server(model=model, data_dir=data) as server:
        put(server, "plain", words(0, 40, 2), pooling="mean")
        put(server, "prompted", words(0, 40, 2), prompt_name="query")
        before = [probabilities(server, ["abc", "def"], classifier=name) for name in ("plain", "prompted")]
        assert abs(before[0] - before[1]).max() > 1e-4
    (data / "classifiers/broken.safetensors").write_bytes(b"nothing")

    with running_server(model=model, data_dir=data, pooling="max") as server:
        for name, wanted in zip(("plain", "prompted"), before, strict=True):
            np.testing.assert_allclose(probabilities(server, ["abc", "def"], classifier=name), wanted, rtol=0, atol=1e-6)
        is_refused(server.post("/classify", input="a", classifier="plain", pooling="cls"), 409, "fitted with pooling 'mean'")
        is_refused(server.post("/classify", input="a", classifier="broken"), 409, "'broken' is broken")
        assert [entry["usable"] for entry in server.client.get("/classifiers").json()["classifiers"]] == [False, True, True]
        assert "header" in server.client.get("/classifiers/broken").json()["problem"].lower()
        assert server.client.delete("/classifiers/broken").status_code == 200

    changed = save_with_prompts(tmp_path / "changed", make_checkpoint(), query="cd ")
    with running_server(model=changed, data_dir=data) as server:
        is_refused(server.post("/classify", input="a", classifier="prompted"), 409, "another text of the prompt 'query'")
        assert probabilities(server, ["abc", "def"], classifier="plain") == pytest.approx(before[0], abs=1e-6)

    with running_server(model=make_checkpoint(seed=1), data_dir=data) as server:
        is_refused(server.post("/classify", input="a", classifier="plain"), 409, "belongs to another model")
        is_refused(
            server.post("/classify", input="a", classifier="prompted"), 409, "prompt 'query', and can't be used with this model"
        )
        assert [entry["usable"] for entry in server.client.get("/classifiers").json()["classifiers"]] == [False, False]
        put(server, "plain", words(0, 40, 2))
        assert server.client.get("/classifiers/plain").json()["usable"]


def test_a_folder_that_cannot_be_written_is_said_before_the_fit(make_checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with running_server(model=make_checkpoint(), data_dir=tmp_path / "file") as server:
        is_refused(server.client.put("/classifiers/a", json={"examples": PAIR}), 507, "set BERTD_DATA_DIR")
        assert server.client.get("/classifiers").json() == {"classifiers": []}


# As many labels as there are pairs of letters, each to be told from the first two letters of its texts.
LONG_FIT = json.dumps({"examples": [{"text": e["text"], "label": e["text"][:2]} for e in words(0, 12_000, 1)]}).encode()


def start_long_fit(server):
    """Send a fit that takes a quarter of a minute; the connection and the process id of the fit."""
    connection = socket.create_connection(server.address, timeout=60)
    engines = set(server.children())
    connection.sendall(b"PUT /classifiers/long HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(LONG_FIT) + LONG_FIT)
    while not (fits := set(server.children()) - engines):
        time.sleep(0.02)
    (fit,) = fits
    while "sklearn" not in Path(f"/proc/{fit}/maps").read_text():  # it has its examples, and begins
        time.sleep(0.02)
    return connection, fit


def wait_until_gone(pid):
    deadline = time.monotonic() + 5  # far less than the fit would take
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_fit_whose_client_hangs_up_ends_and_others_are_answered_meanwhile(make_checkpoint, tmp_path):
    with running_server(model=make_checkpoint(), data_dir=tmp_path) as server:
        connection, fit = start_long_fit(server)
        assert server.post("/embed", inputs="abc").status_code == 200
        connection.close()
        wait_until_gone(fit)
        put(server, "next", words(0, 20, 2))
        assert [entry["name"] for entry in server.client.get("/classifiers").json()["classifiers"]] == ["next"]


def test_a_fit_that_is_killed_is_an_error_and_the_next_one_works(make_checkpoint, tmp_path):
    with running_server(model=make_checkpoint(), data_dir=tmp_path) as server:
        connection, fit = start_long_fit(server)
        os.kill(fit, signal.SIGKILL)
        assert connection.recv(65536).startswith(b"HTTP/1.1 500")
        connection.close()
        put(server, "next", words(0, 20, 2))


def test_a_fit_does_not_hold_up_a_server_that_stops(make_checkpoint, tmp_path):
    with running_server(model=make_checkpoint(), data_dir=tmp_path) as server:
        connection, fit = start_long_fit(server)
        server.process.send_signal(signal.SIGTERM)
        assert connection.recv(65536).startswith(b"HTTP/1.1 503")
        connection.close()
    assert not os.path.exists(f"/proc/{fit}")
    assert not list(tmp_path.rglob("*.*"))


@dataclass
class SlowDisk:
    """In the place of `Store.save`: the first file stays in the making until it may go on."""

    save: Callable[[str, Classifier], None]
    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __call__(self, name, classifier):
        if not self.begun.is_set():
            self.begun.set()
            assert self.go_on.wait(30)
        self.save(name, classifier)


@pytest.fixture
def fits(tmp_path, monkeypatch):
    """Classifiers without an encoder, on a slow disk."""
    head = Head(np.zeros((2, 4), dtype=np.float32), np.zeros(2, dtype=np.float32))
    monkeypatch.setattr("app.classification.embed_many", lambda *_: asyncio.sleep(0, (np.zeros((2, 4), dtype=np.float32), 0)))
    monkeypatch.setattr("app.classification.fit_in_process", lambda *_: asyncio.sleep(0, Fitted(head, 0, None)))
    settings = Settings(data_dir=str(tmp_path))
    space = Space("ab" * 32, 4, "mean", None, "")
    fits = Classification(SimpleNamespace(settings=settings, closing=asyncio.Event(), space=lambda *_: space))
    monkeypatch.setattr(fits.store, "save", SlowDisk(fits.store.save))
    return fits


def fit_two(fits, *labels):
    return asyncio.ensure_future(fits.fit("x", [Example("a text", label) for label in labels], Embedding()))


async def test_a_fit_that_is_being_saved_when_the_server_stops_is_answered(fits):
    fit = fit_two(fits, "a", "b")
    await asyncio.to_thread(fits.store.save.begun.wait)
    fits._service.closing.set()
    await turns()
    assert not fit.done()
    fits.store.save.go_on.set()
    assert (await fit).card == fits.store.find("x").card


async def test_a_fit_that_is_cancelled_while_it_is_saved_never_replaces_a_later_one(fits):
    fit = fit_two(fits, "a", "b")
    await asyncio.to_thread(fits.store.save.begun.wait)
    fit.cancel()
    await turns()
    assert fits._turn.locked()
    later = fit_two(fits, "c", "d")
    fits.store.save.go_on.set()
    await asyncio.wait((fit, later))
    assert fit.cancelled()
    assert later.result().card == fits.store.find("x").card


def test_a_fit_does_not_outlive_a_server_that_is_killed(make_checkpoint, tmp_path):
    with running_server(exit_code=-signal.SIGKILL, model=make_checkpoint(), data_dir=tmp_path) as server:
        connection, fit = start_long_fit(server)
        server.process.kill()
        wait_until_gone(fit)
        connection.close()


def test_the_three_commands_of_the_readme_lead_from_a_csv_to_answers(tmp_path):
    command = re.search(r"\$ bertd (fit .*)", README)[1]
    question, answer = re.search(r"\$ curl localhost:8080/classify -d '(.*)'\n    (\{.*)…", README).groups()
    done = run_bertd(*shlex.split(command), BERTD_DATA_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"accuracy [\d.]+, macro-F1 [\d.]+", README)[0] == done.stdout.strip().split("\n")[-1]
    with running_server(data_dir=tmp_path) as server:
        body = server.post("/classify", **json.loads(question)).json()
        stated = re.search(r'"data":\[\{"index":0,"label":"(\w+)","probs":\[([\d.,]+)\]', answer)
        assert body["data"][0]["label"] == stated[1]
        np.testing.assert_allclose(body["data"][0]["probs"], [float(digits) for digits in stated[2].split(",")], atol=1e-3)
