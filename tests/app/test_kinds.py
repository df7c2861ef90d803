"""Checkpoints with heads over HTTP, in every dialect that serves them, against transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import save_checkpoint
from servers import RunningServer, run_bertd, running_server

from app.service import ROUTES

TEXTS = ["abc def", "a", "我在吃苹果", "one text of some more letters"]
QUERY = "which fruit"
PAIRS = [[QUERY, text] for text in TEXTS]
LONG = "abcd efgh " * 200
LABELS = ["bad", "so so", "good", "很好"]


class Reference:
    """transformers' own tokenizer and model on a checkpoint."""

    def __init__(self, folder: Path) -> None:
        architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
        self.model = getattr(transformers, architecture).from_pretrained(folder).eval()
        self.tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))

    def logits(self, *texts: str, **options: Any) -> np.ndarray:
        """Of one text or one pair: [labels], or [L, V]."""
        encoded = self.tokenizer(*texts, return_tensors="pt", truncation=True, max_length=512, **options)
        with torch.inference_mode():
            return self.model(**encoded).logits[0].numpy()


class Served:
    """A server around a random checkpoint, and the reference beside it."""

    def __init__(self, server: RunningServer, folder: Path) -> None:
        self.server = server
        self.reference = Reference(folder)
        self.url = str(server.client.base_url).rstrip("/")

    def ok(self, path: str, **body: Any) -> Any:
        response = self.server.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(architecture: str, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        return save_checkpoint(folder, architecture=architecture, initializer_range=0.3, **options)

    return make


def served(folder: Path, **settings: Any) -> Iterator[Served]:
    with running_server(model=folder, threads=1, **settings) as server:
        yield Served(server, folder)


@pytest.fixture(scope="module")
def single(make: Make) -> Iterator[Served]:
    numbered = dict(enumerate(LABELS))
    options = {"id2label": numbered, "label2id": {label: place for place, label in numbered.items()}}
    yield from served(make("BertForSequenceClassification", **options))


@pytest.fixture(scope="module")
def multi(make: Make) -> Iterator[Served]:
    yield from served(make("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification"))


@pytest.fixture(scope="module")
def regression(make: Make) -> Iterator[Served]:
    yield from served(make("BertForSequenceClassification", num_labels=1, problem_type="regression"))


@pytest.fixture(scope="module")
def reranker(make: Make) -> Iterator[Served]:
    yield from served(make("BertForSequenceClassification", num_labels=1))


@pytest.fixture(scope="module")
def sparse(make: Make) -> Iterator[Served]:
    yield from served(make("BertForMaskedLM"), pooling="splade")


@pytest.fixture(scope="module")
def masked(make: Make) -> Iterator[Served]:
    yield from served(make("BertForMaskedLM"))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {"single": softmax, "multi": sigmoid, "regression": lambda x: x, "reranker": sigmoid}


def check_predictions(found: list[dict[str, Any]], labels: list[str], wanted: np.ndarray) -> None:
    """All labels, the highest first, each with its own score."""
    assert [one["label"] for one in found] == [labels[place] for place in np.argsort(-wanted, kind="stable")]
    np.testing.assert_allclose([one["score"] for one in found], -np.sort(-wanted), rtol=0, atol=1e-5)


# TEI -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_predict_is_transformers_for_texts_pairs_and_batches(name: str, request: pytest.FixtureRequest) -> None:
    served, activate = request.getfixturevalue(name), ACTIVATIONS[name]
    count = served.reference.model.config.num_labels
    labels = LABELS if name == "single" else [f"LABEL_{n}" for n in range(count)]
    alone = served.reference.logits(TEXTS[0])
    for inputs in (TEXTS[0], [TEXTS[0]]):
        check_predictions(served.ok("/predict", inputs=inputs), labels, activate(alone))
        check_predictions(served.ok("/predict", inputs=inputs, raw_scores=True), labels, alone)
    check_predictions(served.ok("/predict", inputs=PAIRS[0]), labels, activate(served.reference.logits(*PAIRS[0])))
    batch: list[Any] = [[text] for text in TEXTS] + PAIRS
    for found, texts in zip(served.ok("/predict", inputs=batch), batch, strict=True):
        check_predictions(found, labels, activate(served.reference.logits(*texts)))


def test_segments_tell_the_two_texts_of_a_pair_apart(single: Served) -> None:
    """The same ids as one text, all of the first segment, are something else."""
    pair = single.ok("/predict", inputs=PAIRS[0])
    ids = single.reference.tokenizer(*PAIRS[0])["input_ids"]
    (text,) = single.ok("/classify", input=ids)["data"]
    assert {one["label"]: one["score"] for one in pair} != pytest.approx(dict(zip(LABELS, text["probs"], strict=True)), abs=1e-3)


@pytest.mark.parametrize("pair", [["abc", LONG], [LONG, "abc"], [LONG, LONG[5:]]])
@pytest.mark.parametrize("side", ["right", "left"])
def test_long_pairs_are_cut_longest_first_as_by_transformers(single: Served, pair: list[str], side: str) -> None:
    single.reference.tokenizer.truncation_side = side
    wanted = single.reference.logits(*pair)
    single.reference.tokenizer.truncation_side = "right"
    response = single.server.post("/predict", inputs=pair, raw_scores=True, truncation_direction=side)
    check_predictions(response.json(), LABELS, wanted)
    assert response.headers["x-truncated"] == "1"
    assert response.headers["x-compute-tokens"] == "512"
    refused = single.server.post("/predict", inputs=pair, truncate=False)
    assert refused.status_code == 422
    assert "wanted at most 512" in refused.json()["error"]


@pytest.mark.parametrize("name", ["reranker", "regression"])
def test_rerank_is_transformers_sorted(name: str, request: pytest.FixtureRequest) -> None:
    served = request.getfixturevalue(name)
    raw = np.array([served.reference.logits(*pair)[0] for pair in PAIRS])
    order = np.argsort(-raw, kind="stable").tolist()
    for options, wanted in (
        ({}, ACTIVATIONS[name](raw)),
        ({"raw_scores": True}, raw),
        ({"return_text": None}, ACTIVATIONS[name](raw)),
    ):
        found = served.ok("/rerank", query=QUERY, texts=TEXTS, **options)
        assert [one["index"] for one in found] == order
        np.testing.assert_allclose([one["score"] for one in found], wanted[order], rtol=0, atol=1e-5)
        assert all(one.keys() == {"index", "score"} for one in found)
    named = served.ok("/rerank", query=QUERY, texts=TEXTS, return_text=True)
    assert [one["text"] for one in named] == [TEXTS[place] for place in order]


def test_sparse_vectors_are_the_formula_on_transformers_logits(sparse: Served) -> None:
    texts = [*TEXTS, LONG]
    rows = sparse.ok("/embed_sparse", inputs=texts)
    for row, text in zip(rows, texts, strict=True):
        wanted = np.log1p(np.maximum(sparse.reference.logits(text), 0)).max(axis=0)
        assert [one["index"] for one in row] == np.flatnonzero(wanted > 0).tolist()
        np.testing.assert_allclose([one["value"] for one in row], wanted[wanted > 0], rtol=0, atol=1e-5)
    ids = sparse.reference.tokenizer(TEXTS[0])["input_ids"]
    assert sparse.ok("/embed_sparse", inputs=ids) == sparse.ok("/embed_sparse", inputs=TEXTS[0])


def test_root_and_invocations_answer_by_the_kind(single: Served, reranker: Served, sparse: Served, masked: Served) -> None:
    for path in ("/", "/invocations"):
        nested = single.ok(path, inputs=TEXTS[0], parameters={})
        flat = single.ok("/predict", inputs=TEXTS[0])
        assert nested == ([flat] if path == "/" else flat)
        assert single.ok(path, inputs=PAIRS) == single.ok("/predict", inputs=PAIRS)
        ranked = reranker.ok("/rerank", query=QUERY, texts=TEXTS)
        assert reranker.ok(path, query=QUERY, texts=TEXTS) == ranked
        assert (
            reranker.ok(path, query=QUERY, documents=TEXTS)["results"]
            == reranker.ok("/rerank", query=QUERY, documents=TEXTS)["results"]
        )
        assert reranker.ok(path, inputs=PAIRS) == reranker.ok("/predict", inputs=PAIRS)
        assert sparse.ok(path, inputs=TEXTS) == sparse.ok("/embed_sparse", inputs=TEXTS)
        assert masked.ok(path, inputs=TEXTS, normalize=False) == masked.ok("/embed", inputs=TEXTS, normalize=False)
        one_to_many = {"source_sentence": TEXTS[0], "sentences": TEXTS}
        assert masked.ok(path, inputs=one_to_many, parameters={}) == masked.ok("/similarity", inputs=one_to_many)


def test_info_says_what_is_served(single: Served, multi: Served, reranker: Served, sparse: Served, masked: Served) -> None:
    def kind_of(served: Served) -> dict[str, Any]:
        return served.server.client.get("/info").json()

    assert kind_of(single)["model_type"] == {
        "classifier": {
            "id2label": {str(place): label for place, label in enumerate(LABELS)},
            "label2id": {label: place for place, label in enumerate(LABELS)},
        }
    }
    assert [kind_of(single)[key] for key in ("kind", "dimension", "poolings")] == ["classifier", 4, []]
    assert kind_of(reranker)["model_type"] == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    assert kind_of(sparse)["model_type"] == {"embedding": {"pooling": "splade"}}
    assert kind_of(sparse)["dimension"] == sparse.reference.model.config.vocab_size
    assert kind_of(masked)["model_type"] == {"embedding": {"pooling": "cls"}}
    assert "kind     reranker" in reranker.server.banner
    assert "/rerank" in reranker.server.banner


# Clients -------------------------------------------------------------------------------------------------------------


def test_hugging_faces_client_classifies(single: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the client goes to this machine only
    found: Any = InferenceClient(model=single.url).text_classification(TEXTS[0])
    check_predictions(found, LABELS, softmax(single.reference.logits(TEXTS[0])))


@pytest.mark.parametrize("version", [1, 2])
def test_coheres_client_reranks(reranker: Served, version: int) -> None:
    import cohere

    wanted = sigmoid(np.array([reranker.reference.logits(*pair)[0] for pair in PAIRS]))
    order = np.argsort(-wanted, kind="stable")
    make = cohere.Client if version == 1 else cohere.ClientV2
    with make(api_key="none", base_url=reranker.url) as client:
        for top_n, count in ((None, 4), (2, 2), (100, 4)):
            options: dict[str, Any] = {} if top_n is None else {"top_n": top_n}
            answer = client.rerank(model="any", query=QUERY, documents=TEXTS, **options)
            assert [one.index for one in answer.results] == order[:count].tolist()
            np.testing.assert_allclose([one.relevance_score for one in answer.results], wanted[order][:count], rtol=0, atol=1e-5)
        assert answer.meta.api_version.version == str(version)
        if version == 1:
            documents = [{"text": text} for text in TEXTS]
            answer = client.rerank(query=QUERY, documents=documents, return_documents=True, rank_fields=["text"])
            assert [one.document.text for one in answer.results] == [TEXTS[place] for place in order]
        with pytest.raises(cohere.BadRequestError) as refused:
            client.rerank(model="any", query=QUERY, documents=[])
        assert refused.value.body["message"].startswith("an input is empty")
        with pytest.raises(cohere.UnprocessableEntityError) as refused:
            client.rerank(model="any", query=QUERY, documents=TEXTS, top_n=0)
        assert refused.value.body["message"].startswith("top_n")


def test_rerank_takes_documents_in_place_of_texts(reranker: Served) -> None:
    body = {"query": QUERY, "documents": [TEXTS[0], {"text": TEXTS[1]}], "return_documents": True, "top_n": None}
    jina, cohere = reranker.ok("/rerank", **body), reranker.ok("/v1/rerank", **body)
    assert jina["results"] == cohere["results"]
    assert {one["document"]["text"] for one in jina["results"]} == set(TEXTS[:2])
    assert jina["usage"]["total_tokens"] == sum(len(reranker.reference.tokenizer(*pair)["input_ids"]) for pair in PAIRS[:2])


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_documents_come_back_as_they_were_sent(reranker: Served, path: str) -> None:
    documents = [{"text": TEXTS[0], "id": 7, "tags": ["x"]}, TEXTS[1], {"id": None, "text": TEXTS[2]}]
    answer = reranker.ok(path, query=QUERY, documents=documents, return_documents=True, rank_fields=["text"], texts=None)
    found = {one["index"]: one["document"] for one in answer["results"]}
    assert [found[place] for place in range(3)] == [documents[0], {"text": TEXTS[1]}, documents[2]]


def test_null_tells_no_body_from_another(single: Served, reranker: Served) -> None:
    assert reranker.ok("/rerank", query=QUERY, texts=TEXTS, documents=None) == reranker.ok("/rerank", query=QUERY, texts=TEXTS)
    answer = single.ok("/classify", input=TEXTS, classifier=None, labels=None, template=None)
    assert answer["data"] == single.ok("/classify", input=TEXTS)["data"]


RAW = {
    "/rerank": (
        {"query": QUERY, "documents": TEXTS},
        lambda answer: [one["relevance_score"] for one in by_index(answer["results"])],
    ),
    "/v2/rerank": (
        {"query": QUERY, "documents": TEXTS},
        lambda answer: [one["relevance_score"] for one in by_index(answer["results"])],
    ),
    "/score": ({"text_1": QUERY, "text_2": TEXTS}, lambda answer: [one["score"] for one in answer["data"]]),
    "/predict": ({"inputs": PAIRS}, lambda answer: [one[0]["score"] for one in answer]),
}


def by_index(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(results, key=lambda one: one["index"])


@pytest.mark.parametrize("path", RAW)
@pytest.mark.parametrize(
    "said", [{"raw_scores": True}, {"use_activation": False}, {"raw_scores": False}, {"use_activation": True}]
)
def test_scores_are_raw_on_request_in_every_dialect(reranker: Served, path: str, said: dict[str, bool]) -> None:
    body, scores_of = RAW[path]
    logits = np.array([reranker.reference.logits(*pair)[0] for pair in PAIRS])
    raw = said in ({"raw_scores": True}, {"use_activation": False})
    found = scores_of(reranker.ok(path, **body, **said))
    np.testing.assert_allclose(found, logits if raw else sigmoid(logits), rtol=0, atol=1e-5)


def test_classes_are_raw_on_request(single: Served) -> None:
    (one,) = single.ok("/classify", input=TEXTS[0], use_activation=False)["data"]
    np.testing.assert_allclose(one["probs"], single.reference.logits(TEXTS[0]), rtol=0, atol=1e-5)


STRICT = {
    "/predict": {"inputs": LONG},
    "/rerank": {"query": QUERY, "texts": ["a", LONG]},
    "/v1/rerank": {"query": QUERY, "documents": ["a", LONG]},
    "/score": {"text_1": QUERY, "text_2": ["a", LONG]},
}


@pytest.mark.parametrize("path", STRICT)
def test_a_text_that_is_too_long_is_refused_where_asked_and_the_advice_helps(reranker: Served, path: str) -> None:
    body = STRICT[path]
    for said in ({"truncate": False}, {"on_overflow": "error"}):
        message = message_of(reranker.server.post(path, **body, **said))
        place = 0 if path == "/predict" else 1
        assert f"text {place} has" in message
        assert message.endswith("shorten it or send on_overflow: truncate")
    assert reranker.server.post(path, **body, on_overflow="truncate").headers["x-truncated"] == "1"


@pytest.mark.parametrize("limit", [1, 7, 300, 4096])
def test_documents_are_cut_to_their_own_limit(reranker: Served, limit: int) -> None:
    tokenizer = reranker.reference.tokenizer
    short = tokenizer(LONG, add_special_tokens=False)["input_ids"][:limit]
    with_text = tokenizer.decode(short) if limit < 500 else LONG
    response = reranker.server.post("/v2/rerank", query=QUERY, documents=["a", LONG], max_tokens_per_doc=limit)
    scores = {one["index"]: one["relevance_score"] for one in response.json()["results"]}
    wanted = [sigmoid(reranker.reference.logits(QUERY, text)[0]) for text in ("a", with_text)]
    np.testing.assert_allclose([scores[0], scores[1]], wanted, rtol=0, atol=1e-5)
    assert response.headers["x-truncated"] == "1"


# vLLM ----------------------------------------------------------------------------------------------------------------


def test_classify_as_vllm(single: Served) -> None:
    answer = single.ok("/classify", input=TEXTS, model="any")
    assert answer["object"] == "list"
    assert answer["usage"]["prompt_tokens"] == sum(len(single.reference.tokenizer(text)["input_ids"]) for text in TEXTS)
    for place, (one, text) in enumerate(zip(answer["data"], TEXTS, strict=True)):
        wanted = softmax(single.reference.logits(text))
        assert (one["index"], one["label"], one["num_classes"]) == (place, LABELS[wanted.argmax()], 4)
        np.testing.assert_allclose(one["probs"], wanted, rtol=0, atol=1e-5)
    (alone,) = single.ok("/classify", input=TEXTS[0])["data"]
    np.testing.assert_allclose(alone["probs"], answer["data"][0]["probs"], rtol=0, atol=1e-5)


SCORED = {
    "one with one": (TEXTS[0], TEXTS[1]),
    "one with many": (TEXTS[0], TEXTS[1:]),
    "pair by pair": (TEXTS[:2], TEXTS[2:]),
}


@pytest.mark.parametrize("case", SCORED)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score_as_vllm(reranker: Served, masked: Served, path: str, case: str) -> None:
    text_1, text_2 = SCORED[case]
    b = [text_2] if isinstance(text_2, str) else text_2
    a = [text_1] * len(b) if isinstance(text_1, str) else text_1
    answer = reranker.ok(path, text_1=text_1, text_2=text_2)
    assert [(one["index"], one["object"]) for one in answer["data"]] == [(place, "score") for place in range(len(b))]
    wanted = [sigmoid(reranker.reference.logits(*pair)[0]) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose([one["score"] for one in answer["data"]], wanted, rtol=0, atol=1e-5)
    cosines = [masked.ok("/similarity", inputs={"source_sentence": x, "sentences": [y]})[0] for x, y in zip(a, b, strict=True)]
    for names in (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")):
        assert reranker.ok(path, **dict(zip(names, SCORED[case], strict=True)))["data"] == answer["data"]
    answer = masked.ok(path, text_1=text_1, text_2=text_2)
    np.testing.assert_allclose([one["score"] for one in answer["data"]], cosines, rtol=0, atol=1e-5)


# Per text ------------------------------------------------------------------------------------------------------------


def asked(served: Served, path: str, query: str, /, **body: Any) -> Any:
    response = served.server.client.post(f"{path}?{query}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


BOTH = "details=true&partial=true"
NOTHING = {"tokens": 0, "truncated": False, "pieces": 0}


def whole(count: int) -> dict[str, Any]:
    return {"tokens": count, "truncated": False, "pieces": 1}


@pytest.mark.parametrize("path", ["/predict", "/", "/invocations"])
def test_a_bad_text_or_pair_is_an_error_among_predictions(single: Served, path: str) -> None:
    inputs = [["a"], [""], ["a", ""], ["a", LONG], ["b"]]
    answer = asked(single, path, BOTH, inputs=inputs, truncate=False)
    first, *bad, last = answer["predictions"]
    assert [first, last] == single.ok("/predict", inputs=[["a"], ["b"]])
    assert [error["error_type"] for error in bad] == ["Empty", "Empty", "Validation"]
    assert answer["details"] == [whole(3), NOTHING, NOTHING, NOTHING, whole(3)]
    alone = single.ok("/predict", inputs=inputs[:1])
    assert asked(single, path, "details=true", inputs=inputs[:1]) == {"predictions": alone, "details": [whole(3)]}


def test_a_lone_text_has_details_but_no_place_for_an_error(single: Served) -> None:
    answer = asked(single, "/predict", BOTH, inputs=TEXTS[0])
    assert (answer["predictions"], len(answer["details"])) == (single.ok("/predict", inputs=TEXTS[0]), 1)
    assert single.server.client.post("/predict?partial=true", json={"inputs": ""}).status_code == 400


def test_a_bad_text_is_an_error_among_sparse_vectors(sparse: Served) -> None:
    inputs = [TEXTS[0], "", [99999], LONG]
    answer = asked(sparse, "/embed_sparse", BOTH, inputs=inputs, on_overflow="error")
    assert answer["embeddings"][0] == sparse.ok("/embed_sparse", inputs=TEXTS[0])[0]
    assert [error["error_type"] for error in answer["embeddings"][1:]] == ["Empty", "Validation", "Validation"]
    assert answer["details"][1:] == [NOTHING] * 3
    (long,) = asked(sparse, "/", "details=true", inputs=LONG)["details"]
    assert long == {"tokens": 512, "truncated": True, "pieces": 1}


@pytest.mark.parametrize("path", ["/rerank", "/"])
def test_texts_that_fail_come_after_those_that_are_ranked(reranker: Served, path: str) -> None:
    answer = asked(reranker, path, BOTH, query="q", texts=["", "b", LONG, "a"], truncate=False, return_text=True)
    good = reranker.ok("/rerank", query="q", texts=["b", "a"])
    assert [one["index"] for one in answer["ranks"]] == [*(1 + 2 * one["index"] for one in good), 0, 2]
    assert [one["score"] for one in answer["ranks"][:2]] == [one["score"] for one in good]
    assert [one.get("error_type") for one in answer["ranks"]] == [None, None, "Empty", "Validation"]
    assert answer["details"] == [NOTHING, whole(5), NOTHING, whole(5)]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_that_fail_come_after_the_best(reranker: Served, path: str) -> None:
    answer = asked(reranker, path, BOTH, query="q", documents=["", "b", {"text": ""}, "a"], top_n=1)
    (good,) = reranker.ok(path, query="q", documents=["b", "a"], top_n=1)["results"]
    best, *failed = answer["results"]
    assert best == {**good, "index": 1 + 2 * good["index"]}
    assert failed == [{"index": place, "message": "an input is empty; wanted a text", "error_type": "Empty"} for place in (0, 2)]
    assert answer["details"] == [NOTHING, whole(5), NOTHING, whole(5)]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("name", ["reranker", "masked"])
def test_a_bad_text_fails_its_pair(name: str, path: str, request: pytest.FixtureRequest) -> None:
    served = request.getfixturevalue(name)
    answer = asked(served, path, BOTH, text_1=["a", "", "c"], text_2=["x", "y", ""])
    first, *bad = answer["data"]
    assert first == served.ok(path, text_1="a", text_2="x")["data"][0]
    problem = {"message": "an input is empty; wanted a text", "type": "BadRequestError", "param": None, "code": 400}
    assert bad == [{"index": place, "object": "error", "error": problem} for place in (1, 2)]
    assert sum(detail["tokens"] for detail in answer["details"]) == answer["usage"]["prompt_tokens"]
    assert len(answer["details"]) == (3 if name == "reranker" else 6)


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("reranker", "/rerank", {"query": "", "texts": ["a", "b"]}),
        ("reranker", "/v1/rerank", {"query": "", "documents": ["a", "b"]}),
        ("reranker", "/score", {"text_1": "", "text_2": ["a", "b"]}),
        ("masked", "/score", {"text_1": "", "text_2": ["a", "b"]}),
    ],
)
def test_what_all_results_need_has_no_place_for_an_error(name: str, path: str, body: Any, request: pytest.FixtureRequest) -> None:
    response = request.getfixturevalue(name).server.client.post(f"{path}?partial=true", json=body)
    assert response.status_code == 400
    assert "empty" in message_of(response)


def test_a_bad_text_is_an_error_among_classes(single: Served) -> None:
    answer = asked(single, "/classify", BOTH, input=["a", "", [99999]])
    assert answer["labels"] == LABELS
    assert answer["data"][0] == single.ok("/classify", input="a")["data"][0]
    assert [(one["index"], one["error_type"]) for one in answer["data"][1:]] == [(1, "Empty"), (2, "Validation")]
    assert answer["details"] == [whole(3), NOTHING, NOTHING]


# Refusals ------------------------------------------------------------------------------------------------------------

GOOD: dict[str, dict[str, Any]] = {
    "/embed": {"inputs": "a"},
    "/embed_all": {"inputs": "a"},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "/embed_sparse": {"inputs": "a"},
    "/predict": {"inputs": "a"},
    "/classify": {"input": "a"},
    "/rerank": {"query": "a", "texts": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/score": {"text_1": "a", "text_2": "b"},
}


def message_of(response: Any) -> str:
    """The message of a refusal, in the shape of the dialect that the path belongs to."""
    path, body = response.url.path, response.json()
    if path in ("/score", "/v1/score"):
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["code"] == response.status_code
        return body["error"]["message"]
    message = "message" if path in ("/v1/rerank", "/v2/rerank") else "error"
    assert body.keys() == {message, "error_type"}
    return body[message]


@pytest.mark.parametrize("name", ["single", "reranker", "sparse", "masked"])
def test_routes_of_other_kinds_say_which_kind_is_served(name: str, request: pytest.FixtureRequest) -> None:
    served = request.getfixturevalue(name)
    kind = served.server.client.get("/info").json()["kind"]
    known = ROUTES[kind].split(", ")
    for path, body in GOOD.items():
        choice = {"labels": ["b", "c"]} if path == "/classify" and kind == "embedder" else {}
        response = served.server.post(path, **body, **choice)
        assert response.status_code == (200 if path in known else 424), (path, response.text)
        if path not in known:
            assert f"the model is a{'n' if kind == 'embedder' else ''} {kind}" in message_of(response)
            assert all(route in message_of(response) for route in known)


REFUSED = [
    ("single", "/predict", {"inputs": ["a", "b", "c"]}, 422, "3 texts"),
    ("single", "/predict", {"inputs": [["a", "b", "c"]]}, 422, "3 texts"),
    ("single", "/predict", {"inputs": [["a"], ["a", "b", "c"]]}, 422, "3 texts"),
    ("single", "/predict", {"inputs": ["a", ["b"]]}, 422, "inputs"),
    ("single", "/predict", {"inputs": {"a": "b"}}, 422, "inputs"),
    ("single", "/predict", {"inputs": 5}, 422, "inputs"),
    ("single", "/predict", {"inputs": None}, 422, "inputs"),
    ("single", "/predict", {"inputs": "a", "raw_scores": "yes"}, 422, "raw_scores"),
    ("single", "/predict", {"inputs": ""}, 400, "empty"),
    ("single", "/predict", {"inputs": []}, 400, "empty"),
    ("single", "/predict", {"inputs": [[]]}, 400, "empty"),
    ("single", "/predict", {"inputs": ["a", ""]}, 400, "empty"),
    ("single", "/predict", {"inputs": [["a"], ["", "b"]]}, 400, "empty"),
    ("single", "/predict", {"inputs": [["a"]] * 2049}, 422, "at most 2048"),
    ("single", "/classify", {"input": ""}, 400, "empty"),
    ("single", "/classify", {"input": []}, 400, "empty"),
    ("single", "/classify", {"input": [["a", "b"]]}, 422, "input"),
    ("single", "/classify", {"input": [99999]}, 422, "vocabulary"),
    ("single", "/classify", {}, 422, "input: Field required"),
    ("single", "/", {"inputs": ["a", "b", "c"]}, 422, "3 texts"),
    ("single", "/", {"inputs": ""}, 400, "empty"),
    ("single", "/", {}, 422, "inputs: Field required"),
    ("single", "/invocations", [], 422, "body"),
    ("single", "/", '{"inputs": "\\ud800"}', 422, "not JSON"),
    ("reranker", "/", {"query": "a"}, 422, "texts: Field required"),
    ("reranker", "/rerank", {"query": "a", "texts": []}, 400, "empty"),
    ("reranker", "/rerank", {"query": "", "texts": ["a"]}, 400, "empty"),
    ("reranker", "/rerank", {"query": "a", "texts": ["b", ""]}, 400, "empty"),
    ("reranker", "/rerank", {"query": "a", "texts": "b"}, 422, "texts"),
    ("reranker", "/rerank", {"query": "a"}, 422, "texts: Field required"),
    ("reranker", "/rerank", {"query": ["a"], "texts": ["b"]}, 422, "query"),
    ("reranker", "/rerank", {"query": "a", "texts": [["b", "c"]]}, 422, "texts"),
    ("reranker", "/rerank", {"query": "a", "texts": ["b"] * 2049}, 422, "at most 2048"),
    ("reranker", "/rerank", {"query": "a", "texts": ["b"], "truncation_direction": "up"}, 422, "truncation_direction"),
    ("reranker", "/rerank", {"query": "a", "documents": []}, 400, "empty"),
    ("reranker", "/rerank", [1], 422, ""),
    ("reranker", "/v1/rerank", {"query": "a", "documents": []}, 400, "empty"),
    ("reranker", "/v1/rerank", {"query": "a", "documents": [{"txt": "b"}]}, 422, "documents"),
    ("reranker", "/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 422, "top_n"),
    ("reranker", "/v2/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, 422, "top_n"),
    ("reranker", "/v2/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 0}, 422, "max_tokens_per_doc"),
    ("reranker", "/v2/rerank", {"query": "a", "documents": [""]}, 400, "empty"),
    ("reranker", "/v2/rerank", "{", 422, "not JSON"),
    ("reranker", "/score", {"text_1": ["a", "b", "c"], "text_2": ["d", "e"]}, 400, "3 texts against 2"),
    ("reranker", "/score", {"text_1": ["a", "b"], "text_2": "c"}, 400, "2 texts against 1"),
    ("reranker", "/score", {"text_1": [], "text_2": "c"}, 400, "empty"),
    ("reranker", "/score", {"text_1": "a", "text_2": []}, 400, "empty"),
    ("reranker", "/score", {"text_1": "a", "text_2": [""]}, 400, "empty"),
    ("reranker", "/v1/score", {"text_1": "a"}, 400, "text_2: Field required"),
    ("sparse", "/embed_sparse", {"inputs": ""}, 400, "empty"),
    ("sparse", "/embed_sparse", {"inputs": [["a", "b"]]}, 422, "inputs"),
    ("sparse", "/embed_sparse", {"inputs": [99999]}, 422, "vocabulary"),
    ("sparse", "/embed_sparse", {"inputs": "a", "prompt_name": "query"}, 422, "Available prompts: []"),
    ("sparse", "/", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, 422, "inputs"),
    ("masked", "/", {"inputs": {"source_sentence": "a"}}, 422, "sentences"),
]


@pytest.mark.parametrize(("name", "path", "body", "status", "message"), REFUSED)
def test_bad_input_is_refused_by_name(
    name: str, path: str, body: Any, status: int, message: str, request: pytest.FixtureRequest
) -> None:
    client = request.getfixturevalue(name).server.client
    response = client.post(path, content=body) if isinstance(body, str) else client.post(path, json=body)
    assert response.status_code == status, response.text
    assert message in message_of(response)
    assert len(response.content) < 1000


def test_servers_answer_as_before_after_all_of_them(single: Served, reranker: Served) -> None:
    check_predictions(single.ok("/predict", inputs=TEXTS[0]), LABELS, softmax(single.reference.logits(TEXTS[0])))
    (found,) = reranker.ok("/rerank", query=QUERY, texts=TEXTS[:1])
    assert found["score"] == pytest.approx(sigmoid(reranker.reference.logits(*PAIRS[0])[0]), abs=1e-5)


def test_a_pooling_for_a_classifier_is_one_clear_line(make: Make) -> None:
    done = run_bertd("info", "--model", make("BertForSequenceClassification"), "--pooling", "mean")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "pooling mean was asked for and the checkpoint is a classifier (BertForSequenceClassification)" in line
