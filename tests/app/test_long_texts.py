"""Texts that are too long, over HTTP, from the real checkpoint: windows against those windows sent by hand."""

import json
from itertools import pairwise

import httpx
import numpy as np
import pytest
from checkpoints import save_checkpoint
from servers import RunningServer, run_bertd, running_server

from model.tokens import Tokens
from model.windows import split

LIMIT = 256  # tokens that the checkpoint takes
WORDS = "the river bank was flooded and a savings bank closed , 苹果 is an apple . unaffable cafe\u0301 👍🏽".split()  # noqa: SIM905
VARIED = " ".join(WORDS[n * n % len(WORDS)] for n in range(900))


def ask(server: RunningServer, path: str, query: str = "", **body: object) -> httpx.Response:
    response = server.client.post(f"{path}?{query}", json=body)
    assert response.status_code == 200, response.text
    return response


def array(answer: object) -> np.ndarray:
    return np.array(answer, dtype=np.float32)


def ids_of(server: RunningServer, text: str) -> list[int]:
    return [token["id"] for token in ask(server, "/tokenize", inputs=text).json()[0]]


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean", "max", "last"])
def test_a_text_that_fits_is_not_touched_by_split(server, pooling):
    texts = ["hello", "word " * (LIMIT - 2)]
    plain = ask(server, "/embed", inputs=texts, pooling=pooling)
    halves = ask(server, "/embed", inputs=texts, pooling=pooling, on_overflow="split")
    np.testing.assert_allclose(array(halves.json()), array(plain.json()), atol=1e-6)
    assert halves.headers["x-compute-tokens"] == plain.headers["x-compute-tokens"] == str(3 + LIMIT)


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean", "max", "last"])
def test_the_vector_of_a_long_text_is_that_of_its_windows(server, pooling):
    pieces = split(Tokens.of(ids_of(server, VARIED)), LIMIT)
    windows = [row.ids.tolist() for row in pieces.rows]
    assert len(windows) > 3
    each = array(ask(server, "/embed", inputs=windows, pooling=pooling, normalize=False).json())
    wanted = each.max(axis=0) if pooling == "max" else np.average(each, axis=0, weights=[len(row) for row in windows])
    for dimensions in (None, 16):
        options = {"pooling": pooling, "on_overflow": "split", "dimensions": dimensions}
        raw = array(ask(server, "/embed", inputs=["short", VARIED], normalize=False, **options).json()[1])
        np.testing.assert_allclose(raw, wanted[:dimensions], atol=1e-5)
        (scaled,) = array(ask(server, "/embed", inputs=VARIED, **options).json())
        np.testing.assert_allclose(scaled, raw / np.linalg.norm(raw), atol=1e-6)


def test_a_matrix_has_a_row_per_token_each_from_the_window_with_most_context(server):
    ids = ids_of(server, VARIED)
    (answer,) = ask(server, "/embed_all", inputs=VARIED, on_overflow="split", return_tokens=True).json()
    merged, tokens = array(answer["embeddings"]), answer["tokens"]
    assert len(merged) == len(tokens) == len(ids)
    assert all(VARIED[token["start"] : token["end"]] == token["text"] for token in tokens[1:-1])
    assert [tokens[0]["start"], tokens[-1]["start"]] == [None, None]
    pieces = split(Tokens.of(ids), LIMIT, overlap=(LIMIT - 2) // 4)
    alone = [array(ask(server, "/embed_all", inputs=row.ids.tolist()).json()[0]) for row in pieces.rows]
    for place in range(len(ids) - 2):
        contexts = [min(place - a, b - 1 - place) if a <= place < b else -1 for a, b in pieces.spans]
        owner = contexts.index(max(contexts))
        np.testing.assert_allclose(merged[1 + place], alone[owner][1 + place - pieces.spans[owner][0]], atol=2e-5)


def test_a_text_of_twenty_thousand_tokens(server):
    text = "a long story about a river . " * 2857
    response = ask(server, "/embed", "details=true", inputs=[text, "short"], on_overflow="split")
    detail, short = response.json()["details"]
    assert detail == {"tokens": 19999 + 2 * 79, "truncated": False, "pieces": 79}
    assert short == {"tokens": 3, "truncated": False, "pieces": 1}
    assert response.headers["x-truncated"] == "0"
    assert np.linalg.norm(response.json()["embeddings"][0]) == pytest.approx(1, abs=1e-5)
    matrix = ask(server, "/embed_all", inputs=text[: 29 * 700], on_overflow="split").json()[0]
    assert len(matrix) == 4902


@pytest.mark.parametrize(
    ("fields", "status", "truncated"),
    [
        ({}, 200, "1"),
        ({"truncate": True}, 200, "1"),
        ({"truncate": False}, 422, None),
        ({"on_overflow": "error"}, 422, None),
        ({"on_overflow": "split"}, 200, "0"),
        ({"truncate": False, "on_overflow": "truncate"}, 200, "1"),
        ({"truncate": True, "on_overflow": "error"}, 422, None),
        ({"truncate": None, "on_overflow": None}, 200, "1"),
    ],
)
def test_truncate_and_on_overflow(server, fields, status, truncated):
    for path, body in {
        "/embed": {"inputs": VARIED, **fields},
        "/embed_all": {"inputs": VARIED, **fields},
        "/similarity": {"inputs": {"source_sentence": "a", "sentences": [VARIED]}, "parameters": fields},
    }.items():
        response = server.client.post(path, json=body)
        assert (response.status_code, response.headers.get("x-truncated")) == (status, truncated)
        if status == 422:
            assert "on_overflow" in response.json()["error"]


def test_token_ids_are_split_too(server):
    ids = ids_of(server, VARIED)
    text, framed, bare = array(ask(server, "/embed", inputs=[VARIED, ids, ids[1:-1]], on_overflow="split").json())
    np.testing.assert_allclose(framed, text, atol=1e-6)
    np.testing.assert_allclose(bare, text, atol=1e-6)


def test_every_data_route_says_how_many_texts_were_cut(server):
    for path, body in {"/tokenize": {"inputs": VARIED}, "/decode": {"ids": [7592]}}.items():
        assert ask(server, path, **body).headers["x-truncated"] == "0"
    assert ask(server, "/embed_chunks", inputs=VARIED, chunk_tokens=100).headers["x-truncated"] == "0"
    cut = ask(server, "/embed_chunks", inputs=[VARIED, "a"], chunk_tokens=100, on_overflow="truncate")
    assert cut.headers["x-truncated"] == "1"
    assert cut.json()[0][-1]["end"] < len(VARIED) / 3


# Per text --------------------------------------------------------------------------------------------------------------


def test_details_stand_beside_the_same_results(server):
    texts = ["short", VARIED]
    count = len(ids_of(server, VARIED))
    for path, name in {"/embed": "embeddings", "/embed_all": "embeddings"}.items():
        answer = ask(server, path, "details=true", inputs=texts).json()
        assert answer[name] == ask(server, path, inputs=texts).json()
        assert answer["details"] == [
            {"tokens": 3, "truncated": False, "pieces": 1},
            {"tokens": LIMIT, "truncated": True, "pieces": 1},
        ]
    many = {"a": ["short"], "b": ["short", VARIED]}
    answer = ask(server, "/similarity", "details=true", inputs=many, parameters={"on_overflow": "split"}).json()
    np.testing.assert_allclose(answer["scores"][0][0], 1, atol=1e-5)
    pieces = split(Tokens.of(range(count)), LIMIT).rows
    long = {"tokens": sum(map(len, pieces)), "truncated": False, "pieces": len(pieces)}
    assert answer["details"] == [{"tokens": 3, "truncated": False, "pieces": 1}] * 2 + [long]


BAD = ["good", "", VARIED, [30522], [7592], []]
WORDS_OF_BAD = {1: "Empty", 2: "Validation", 3: "Validation", 5: "Empty"}


def test_a_bad_text_is_an_error_in_its_place(server):
    for path in ("/embed", "/embed_all"):
        answer = ask(server, path, "partial=true&details=1", inputs=BAD, on_overflow="error").json()
        good = ask(server, path, inputs=[BAD[0], BAD[4]]).json()
        for place, (result, detail) in enumerate(zip(answer["embeddings"], answer["details"], strict=True)):
            if place in WORDS_OF_BAD:
                assert result["error_type"] == WORDS_OF_BAD[place]
                assert result["error"]
                assert detail == {"tokens": 0, "truncated": False, "pieces": 0}
            else:
                np.testing.assert_allclose(result, good[place // 4], atol=1e-6)
        assert "the text has" in answer["embeddings"][2]["error"]
        assert server.client.post(path, json={"inputs": BAD, "on_overflow": "error"}).status_code == 400


def test_a_request_of_bad_texts_only_is_answered(server):
    assert [error["error_type"] for error in ask(server, "/embed", "partial=true", inputs=["", ""]).json()] == ["Empty"] * 2
    (error,) = ask(server, "/embed_all", "partial=true", inputs="", return_tokens=True).json()
    assert error["error_type"] == "Empty"


def test_partial_similarity(server):
    one = ask(server, "/similarity", "partial=true", inputs={"source_sentence": "a", "sentences": ["a", "", "b"]}).json()
    assert one[0] == pytest.approx(1, abs=1e-5)
    assert one[1]["error_type"] == "Empty"
    assert isinstance(one[2], float)
    for metric in ("cosine", "dot", "euclidean"):
        many = {"a": ["x", ""], "b": ["", "x"]}
        rows = ask(server, "/similarity", "partial=true", inputs=many, parameters={"metric": metric}).json()
        assert rows[0][0]["error_type"] == rows[1]["error_type"] == "Empty"
        assert isinstance(rows[0][1], float)
    lost = server.client.post("/similarity?partial=true", json={"inputs": {"source_sentence": "", "sentences": ["a"]}})
    assert (lost.status_code, lost.json()["error_type"]) == (400, "Empty")


def test_partial_does_not_excuse_a_bad_request(server):
    for body in ({"inputs": []}, {"inputs": "a", "dimensions": 0}, {"inputs": "a", "prompt_name": "nobody"}):
        assert server.client.post("/embed?partial=true", json=body).status_code in (400, 422)
    bad = server.client.post("/embed?partial=perhaps", json={"inputs": "a"})
    assert (bad.status_code, bad.json()["error"].split(":")[0]) == (422, "partial")
    assert server.client.post("/embed?unknown=1", json={"inputs": "a"}).status_code == 200


def test_the_query_is_documented(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    for path in ("/embed", "/embed_all", "/similarity", "/embed_chunks"):
        assert [parameter["name"] for parameter in paths[path]["post"]["parameters"]] == ["details", "partial"]


# Chunks ----------------------------------------------------------------------------------------------------------------

TEXTS = [
    "The river rose. It flooded the bank, and 3.14 houses! Then it fell.\r\nA new line.",
    "我喜欢苹果。你喜欢什么？我们去吃饭吧！好",
    "Cafe\u0301 nai\u0308ve. 👩‍👩‍👧‍👦 a family 👍🏽 ok. 🏳️‍🌈 flags 🇩🇪",
    VARIED,
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("size", "overlap"), [(4, 0), (12, 5), (254, 0)])
def test_chunks_cover_the_tokens_in_order(server, late, size, overlap):
    answer = ask(server, "/embed_chunks", inputs=TEXTS, chunk_tokens=size, overlap_tokens=overlap, late=late).json()
    for text, chunks in zip(TEXTS, answer, strict=True):
        tokens = [token for token in ask(server, "/tokenize", inputs=text).json()[0] if not token["special"]]
        assert [chunk["start"] for chunk in chunks] == sorted({chunk["start"] for chunk in chunks})
        assert (chunks[0]["start"], chunks[-1]["end"]) == (0, len(text))
        for token in tokens:
            assert any(chunk["start"] <= token["start"] < token["stop"] <= chunk["end"] for chunk in chunks)
        for left, right in pairwise(chunks):
            assert not text[left["end"] : right["start"]].strip()
        inside = [[t for t in tokens if c["start"] <= t["start"] and t["stop"] <= c["end"]] for c in chunks]
        assert all(1 <= len(its) <= size for its in inside)
    if not overlap and size == 4:
        assert TEXTS[0][: answer[0][0]["end"]] == "The river rose."


def test_a_chunk_is_embedded_as_a_text_of_its_own(server):
    options = {"normalize": False, "dimensions": 32}
    answer = ask(server, "/embed_chunks", inputs=TEXTS, chunk_tokens=20, overlap_tokens=5, **options).json()
    chunks = [(text[c["start"] : c["end"]], c["embedding"]) for text, its in zip(TEXTS, answer, strict=True) for c in its]
    wanted = ask(server, "/embed", inputs=[text for text, _ in chunks], **options).json()
    np.testing.assert_allclose(array([vector for _, vector in chunks]), array(wanted), atol=2e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_late_chunks_are_means_over_the_rows_of_the_matrix(server, text):
    (matrix,) = ask(server, "/embed_all", inputs=text, return_tokens=True, on_overflow="split").json()
    rows, tokens = array(matrix["embeddings"]), matrix["tokens"]
    (chunks,) = ask(server, "/embed_chunks", inputs=text, chunk_tokens=12, overlap_tokens=3, late=True, normalize=False).json()
    for chunk in chunks:
        inside = [
            place for place, token in enumerate(tokens)
            if token["start"] is not None and chunk["start"] <= token["start"] and token["end"] <= chunk["end"]
        ]  # fmt: skip
        np.testing.assert_allclose(chunk["embedding"], rows[inside].mean(axis=0), atol=1e-5)


def test_a_late_chunk_knows_what_stands_around_it(server):
    """The figures of the README."""
    text = "The river bank was flooded. It stood in water for days."
    (asked,) = array(ask(server, "/embed", inputs="What happened to the river bank?").json())
    cosines = {}
    for late in (False, True):
        first, second = ask(server, "/embed_chunks", inputs=text, chunk_tokens=7, late=late).json()[0]
        assert [(first["start"], first["end"]), (second["start"], second["end"])] == [(0, 27), (28, 55)]
        cosines[late] = asked @ array(second["embedding"])
    assert cosines == pytest.approx({False: 0.38, True: 0.57}, abs=0.01)


def test_chunks_have_details_and_errors_in_their_places(server):
    texts = ["One two. Three four.", "", "   ", "x"]
    for late, detail in {
        False: {"tokens": 5 + 5, "truncated": False, "pieces": 2},
        True: {"tokens": 8, "truncated": False, "pieces": 1},
    }.items():
        answer = ask(server, "/embed_chunks", "partial=true&details=true", inputs=texts, chunk_tokens=4, late=late).json()
        first, empty, blank, last = answer["chunks"]
        assert [(chunk["start"], chunk["end"]) for chunk in first] == [(0, 8), (9, 20)]
        assert empty["error_type"] == "Empty"
        assert blank == []
        assert (last[0]["start"], last[0]["end"]) == (0, 1)
        assert answer["details"][0] == detail
        assert answer["details"][1] == {"tokens": 0, "truncated": False, "pieces": 0}


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 422, "chunk_tokens: Field required"),
        ({"chunk_tokens": 0}, 422, "wanted 1 to 254"),
        ({"chunk_tokens": 255}, 422, "wanted 1 to 254"),
        ({"chunk_tokens": "9"}, 422, "chunk_tokens"),
        ({"chunk_tokens": 9, "overlap_tokens": 9}, 422, "wanted 0 to 8"),
        ({"chunk_tokens": 9, "overlap_tokens": -1}, 422, "wanted 0 to 8"),
        ({"chunk_tokens": 9, "late": True, "pooling": "cls"}, 422, "late"),
        ({"chunk_tokens": 9, "dimensions": 0}, 422, "wanted 1 to 384"),
        ({"chunk_tokens": 9, "inputs": [1, 2]}, 422, "inputs"),
        ({"chunk_tokens": 9, "inputs": ""}, 400, "empty"),
        ({"chunk_tokens": 9, "inputs": []}, 400, "empty"),
        ({"chunk_tokens": 9, "inputs": VARIED, "on_overflow": "error"}, 422, "text 0 has"),
        ({"chunk_tokens": 254, "overlap_tokens": 253, "inputs": VARIED}, 413, "wanted at most 65536"),
        ({"chunk_tokens": 254, "overlap_tokens": 253, "inputs": VARIED, "late": True}, 413, "wanted at most 65536"),
    ],
)
def test_bad_chunks_are_refused(server, fields, status, message):
    response = server.client.post("/embed_chunks", json={"inputs": "a", **fields})
    assert response.status_code == status, response.text
    assert message in response.json()["error"]


# A server of other habits ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A small checkpoint with prompts, behind a server that splits and takes few tokens."""
    folder = save_checkpoint(tmp_path_factory.mktemp("prompted"), seed=5, max_position_embeddings=32, initializer_range=0.3)
    prompts = {"prompts": {"query": "a b c ", "endless": "a " * 40}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with running_server(model=folder, on_overflow="split", max_request_tokens=400) as server:
        yield server


def test_the_servers_own_habit(prompted):
    long = "d " * 100
    assert ask(prompted, "/embed", "details=true", inputs=long).json()["details"][0]["pieces"] == 4
    assert ask(prompted, "/embed", "details=true", inputs=long, truncate=True).json()["details"][0]["truncated"]
    info = prompted.client.get("/info").json()
    assert (info["on_overflow"], info["max_request_tokens"], info["auto_truncate"]) == ("split", 400, False)


def test_a_prompt_stands_before_each_window(prompted):
    ids = ids_of(prompted, "d e f " * 30)
    body, head, tail = ids[1:-1], [ids[0], *ids_of(prompted, "a b c ")[1:-1]], ids[-1:]
    spans = split(Tokens.of(head + body + tail), 32, before=4, overlap=27 // 4).spans
    assert len(spans) > 3
    windows = [head + body[start:stop] + tail for start, stop in spans]
    (matrix,) = ask(prompted, "/embed_all", inputs="d e f " * 30, prompt_name="query").json()
    assert len(matrix) == 4 + len(body) + 1
    (first,) = ask(prompted, "/embed_all", inputs=[windows[0]]).json()
    (last,) = ask(prompted, "/embed_all", inputs=[windows[-1]]).json()
    np.testing.assert_allclose(array(matrix[:10]), array(first[:10]), atol=1e-5)
    np.testing.assert_allclose(array(matrix[-10:]), array(last[-10:]), atol=1e-5)
    plain = ask(prompted, "/embed_chunks", inputs="d e f", chunk_tokens=5, prompt_name="query", normalize=False).json()
    np.testing.assert_allclose(
        plain[0][0]["embedding"], ask(prompted, "/embed", inputs="a b c d e f", normalize=False).json()[0], atol=1e-5
    )


def test_a_prompt_that_leaves_no_room_is_refused(prompted):
    refused = prompted.client.post("/embed", json={"inputs": "d", "prompt_name": "endless"})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
    assert "no room" in refused.json()["error"]
    chunks = prompted.client.post("/embed_chunks", json={"inputs": "d", "chunk_tokens": 1, "prompt_name": "endless"})
    assert chunks.status_code == 422


def test_too_many_tokens_in_a_request_are_refused(prompted):
    for path, body in {
        "/embed": {"inputs": ["d " * 200, "d " * 200]},
        "/embed_all": {"inputs": "d " * 400},
        "/embed_chunks": {"inputs": "d " * 401, "chunk_tokens": 30},
        "/similarity": {"inputs": {"a": ["d " * 200], "b": ["d " * 200]}},
        "/tokenize": {"inputs": ["d " * 200, "d " * 200]},
    }.items():
        response = prompted.client.post(path, json=body)
        assert (response.status_code, response.json()["error_type"]) == (413, "Validation")
        assert "wanted at most 400, send fewer or shorter texts" in response.json()["error"]
    assert ask(prompted, "/embed", inputs=["d " * 200, "d " * 200], truncate=True).headers["x-truncated"] == "2"


def test_a_text_of_too_many_tokens_is_not_read_to_its_end(prompted):
    long = "d " * 3000
    for body, status, found in (
        ({"inputs": long}, 413, "text 0 has more than 400 tokens in one request"),
        ({"inputs": ["d", [7] * 500]}, 413, "text 1 has more than 400 tokens in one request"),
        ({"inputs": long, "on_overflow": "error"}, 422, "text 0 has more than 400 tokens; wanted at most 32"),
        ({"inputs": "d " * 300, "on_overflow": "error"}, 422, "text 0 has 302 tokens; wanted at most 32"),
    ):
        response = prompted.client.post("/embed", json=body)
        assert response.status_code == status
        assert found in response.json()["error"]
    good, bad = ask(prompted, "/embed", "partial=true", inputs=["d", long]).json()
    assert len(good) == 32
    assert bad["error"].startswith("the text has more than 400 tokens")


def test_the_command_line_splits_and_refuses(tmp_path, prompted):
    model = prompted.client.get("/info").json()["model_id"]
    texts = ["a b", "d e f " * 30]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    done = run_bertd("embed", tmp_path / "texts.txt", "--model", model, "--on-overflow", "split")
    assert done.returncode == 0, done.stderr
    assert "were longer" not in done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "texts.npy"), array(ask(prompted, "/embed", inputs=texts).json()), atol=1e-5)
    refused = run_bertd("embed", tmp_path / "texts.txt", "--model", model, "--on-overflow", "error")
    assert refused.returncode == 1
    assert "texts.txt, line 2: the text has 92 tokens" in refused.stderr
