"""Numbers in every format, against numpy on the vectors as pooled."""

import base64
import gzip
import itertools
import json

import numpy as np
import pytest
import zstandard
from raw_http import connect, request
from safetensors.numpy import load

from app.negotiation import content_coding, media_type

TEXTS = ["abc", "a longer text of letters", "我在吃苹果"]
DTYPES = ["float32", "float16", "int8", "uint8", "binary", "ubinary"]
OCTETS, SAFETENSORS = "application/octet-stream", "application/safetensors"


def in_dtype(rows, dtype):
    """Rows as `sentence_transformers.quantize_embeddings` gives them, with the ranges of docs/outputs.md."""
    if dtype.startswith("float"):
        return rows.astype(dtype)
    if dtype.endswith("binary"):
        bits = np.packbits(rows > 0, axis=-1)
        return bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    largest = min(1, 5 / np.sqrt(rows.shape[-1]))
    steps = np.clip(np.floor((rows + largest) / (2 * largest / 255)), 0, 255)
    return steps.astype(np.uint8) if dtype == "uint8" else (steps - 128).astype(np.int8)


def assert_same_numbers(got, wanted):
    """Equal to the digit that float32 has; where a number stands on a border, the step beside it counts too."""
    assert got.shape == wanted.shape
    if wanted.dtype.kind == "f":
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 if wanted.dtype == np.float32 else 1e-3)
    else:
        assert (got.astype(int) != wanted.astype(int)).mean() < 0.02


def decoded(response, dtype, texts):
    """The numbers of an answer in any format, [N, out]."""
    assert response.status_code == 200, response.text
    media = response.headers["content-type"]
    if media == SAFETENSORS:
        return np.stack([load(response.content)[str(n)] for n in range(len(texts))])
    if media == OCTETS:
        assert response.headers["x-dtype"] == dtype.name
        places = [int(n) for n in response.headers["x-shape"].split(",")]
        return np.frombuffer(response.content, dtype.newbyteorder("<")).reshape(places)
    rows = response.json()
    if isinstance(rows, dict):
        rows = [item["embedding"] for item in rows["data"]]
    if isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), dtype.newbyteorder("<")) for row in rows])
    kinds = {type(number) for row in rows for number in row}
    assert kinds == ({float} if dtype.kind == "f" else {int})
    return np.array(rows).astype(dtype)


FORMATS = {
    "float": ({"encoding_format": "float"}, {}),
    "base64": ({"encoding_format": "base64"}, {}),
    "octets": ({}, {"accept": OCTETS}),
    "safetensors": ({}, {"accept": SAFETENSORS}),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_combines_with_every_other(prompted, form, dtype):
    fields, headers = FORMATS[form]
    for pooling, prompt in itertools.product(["cls", "mean"], [None, "query"]):
        raw = np.array(prompted.post("/embed", inputs=TEXTS, pooling=pooling, prompt_name=prompt, normalize=False).json())
        for normalize, dimensions in itertools.product([True, False], [None, 16, 13]):
            body = {"inputs": TEXTS, "pooling": pooling, "prompt_name": prompt, "normalize": normalize}
            body |= {"dimensions": dimensions, "output_dtype": dtype, **fields}
            response = prompted.client.post("/embed", json=body, headers=headers)
            if dtype in ("int8", "uint8") and not normalize:
                assert response.status_code == 422
                assert "length 1" in response.json()["error"]
                continue
            rows = raw.astype(np.float32)[:, :dimensions]
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows
            wanted = in_dtype(rows, dtype)
            assert_same_numbers(decoded(response, wanted.dtype, TEXTS), wanted)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_openai_route_gives_the_same_numbers(prompted, form, dtype):
    fields, headers = FORMATS[form]
    for prompt, dimensions in itertools.product([None, "query"], [None, 13]):
        body = {"dimensions": dimensions, "output_dtype": dtype, "prompt_name": prompt, **fields}
        ours = prompted.client.post("/embed", json={"inputs": TEXTS, **body}, headers=headers)
        theirs = prompted.client.post("/v1/embeddings", json={"input": TEXTS, **body}, headers=headers)
        wanted = decoded(ours, kind_of(dtype), TEXTS)
        np.testing.assert_array_equal(decoded(theirs, kind_of(dtype), TEXTS), wanted)
        assert theirs.headers["x-compute-tokens"] == ours.headers["x-compute-tokens"]


def kind_of(dtype):
    return np.dtype({"binary": "int8", "ubinary": "uint8"}.get(dtype, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "binary", "ubinary"])
def test_a_token_matrix_keeps_its_shape_in_every_format(prompted, dtype):
    matrices = [np.array(m, dtype=np.float32) for m in prompted.post("/embed_all", inputs=TEXTS).json()]
    wanted = [in_dtype(matrix, dtype) for matrix in matrices]
    plain = prompted.post("/embed_all", inputs=TEXTS, output_dtype=dtype).json()
    coded = prompted.post("/embed_all", inputs=TEXTS, output_dtype=dtype, encoding_format="base64").json()
    body = {"inputs": TEXTS, "output_dtype": dtype}
    tensors = load(prompted.client.post("/embed_all", json=body, headers={"accept": SAFETENSORS}).content)
    assert len(tensors) == len(TEXTS)
    for n, matrix in enumerate(wanted):
        assert_same_numbers(np.array(plain[n]).astype(matrix.dtype), matrix)
        assert list(coded[n]) == ["embeddings", "shape"]
        assert_same_numbers(
            np.frombuffer(base64.b64decode(coded[n]["embeddings"]), matrix.dtype).reshape(coded[n]["shape"]), matrix
        )
        assert_same_numbers(tensors[str(n)], matrix)
        assert tensors[str(n)].dtype == matrix.dtype


def test_a_token_matrix_in_base64_names_its_tokens_too(prompted):
    (item,) = prompted.post("/embed_all", inputs="abc", return_tokens=True, encoding_format="base64").json()
    assert [token["text"] for token in item["tokens"]] == ["[CLS]", "a", "b", "c", "[SEP]"]
    assert item["shape"] == [5, 40]


def test_octets_of_matrices_of_one_shape(prompted):
    body, headers = {"inputs": ["abc", "xyz"]}, {"accept": OCTETS}
    response = prompted.client.post("/embed_all", json=body, headers=headers)
    matrices = np.array(prompted.post("/embed_all", **body).json(), dtype=np.float32)
    assert response.headers["x-shape"] == ",".join(map(str, matrices.shape))
    np.testing.assert_array_equal(np.frombuffer(response.content, "<f4").reshape(matrices.shape), matrices)


def test_octets_of_matrices_of_several_shapes_are_refused(prompted):
    response = prompted.client.post("/embed_all", json={"inputs": TEXTS}, headers={"accept": OCTETS})
    assert response.status_code == 406
    assert response.json()["error_type"] == "Validation"
    assert "application/safetensors" in response.json()["error"]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_token_matrix_has_no_range_to_divide(prompted, dtype):
    response = prompted.post("/embed_all", inputs=TEXTS, output_dtype=dtype)
    assert response.status_code == 422
    assert "wanted float32, float16, binary or ubinary" in response.json()["error"]


@pytest.mark.parametrize("field", ["output_dtype", "encoding_format"])
@pytest.mark.parametrize("path", ["/embed", "/embed_all"])
def test_an_unknown_format_is_refused_and_null_is_none(prompted, path, field):
    refused = prompted.post(path, inputs=TEXTS, **{field: "int4"})
    assert refused.status_code == 422
    assert field in refused.json()["error"]
    assert prompted.post(path, inputs=TEXTS, **{field: None}).json() == prompted.post(path, inputs=TEXTS).json()


def test_a_large_answer_is_the_same_in_pieces(prompted):
    texts = [f"{letter} " * count for letter in "abcdefgh" for count in range(1, 60)]
    whole = prompted.client.post("/embed_all", json={"inputs": texts})
    assert whole.headers["transfer-encoding"] == "chunked"
    tensors = load(prompted.client.post("/embed_all", json={"inputs": texts}, headers={"accept": SAFETENSORS}).content)
    for n, matrix in enumerate(whole.json()):
        np.testing.assert_array_equal(np.array(matrix, dtype=np.float32), tensors[str(n)])


def test_one_large_matrix_is_sent_block_by_block(prompted):
    """A chunk of the answer is what was rendered at once."""
    body = json.dumps({"inputs": "a b c " * 2000, "on_overflow": "split"}).encode()
    with connect(prompted) as connection, connection.makefile("rb") as answer:
        connection.sendall(request("/embed_all", body))
        while answer.readline() != b"\r\n":
            pass
        sizes, content = [], b""
        while size := int(answer.readline(), 16):
            content += answer.read(size)
            sizes.append(size)
            answer.readline()
    assert len(sizes) > 3
    assert max(sizes) < 2**19
    assert np.array(json.loads(content)).shape[::2] == (1, 40)


def rendered(server):
    (count,) = (line for line in server.client.get("/metrics").text.splitlines() if 'seconds_count{stage="render"' in line)
    (total,) = (line for line in server.client.get("/metrics").text.splitlines() if 'seconds_sum{stage="render"' in line)
    return float(count.split()[-1]), float(total.split()[-1])


def test_rendering_is_counted_for_large_answers_too(prompted):
    count, seconds = rendered(prompted)
    for headers in ({}, {"accept": SAFETENSORS}):
        prompted.client.post("/embed_all", json={"inputs": ["a b c d e f g " * 9] * 300}, headers=headers)
    assert rendered(prompted)[0] == count + 2
    assert rendered(prompted)[1] > seconds


UNPACK = {"gzip": gzip.decompress, "zstd": lambda content: zstandard.ZstdDecompressor().decompressobj().decompress(content)}


@pytest.mark.parametrize("asked", ["gzip", "zstd", "zstd, gzip;q=0.5", "gzip;q=1, identity;q=0.1"])
@pytest.mark.parametrize(("path", "texts"), [("/embed", TEXTS), ("/embed_all", ["a b c d e f g " * 9] * 100)])
def test_an_answer_is_compressed_where_the_request_asks(prompted, path, texts, asked):
    body = {"inputs": texts}
    plain = prompted.post(path, **body)
    with prompted.client.stream("POST", path, json=body, headers={"accept-encoding": asked}) as response:
        content = b"".join(response.iter_raw())
    assert response.headers["content-encoding"] in asked
    assert response.headers["vary"] == "accept-encoding"
    assert response.headers["x-truncated"] == "0"
    assert len(content) < len(plain.content)
    assert UNPACK[response.headers["content-encoding"]](content) == plain.content


@pytest.mark.parametrize("asked", ["gzip, deflate", "gzip, deflate, br, zstd", "deflate", "br", "identity", "", "gzip;q=0"])
def test_what_http_libraries_send_of_themselves_asks_for_nothing(prompted, asked):
    response = prompted.client.post("/embed", json={"inputs": TEXTS}, headers={"accept-encoding": asked})
    assert "content-encoding" not in response.headers


def test_a_small_answer_is_left_as_it_is(prompted):
    response = prompted.client.post("/embed", json={"inputs": "a", "dimensions": 2}, headers={"accept-encoding": "zstd"})
    assert "content-encoding" not in response.headers
    assert int(response.headers["content-length"]) == len(response.content)
    refused = prompted.client.post("/embed", json={"inputs": ""}, headers={"accept-encoding": "gzip"})
    assert (refused.status_code, refused.json()["error_type"]) == (400, "Empty")


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("zstd;q=0.8, gzip;q=0.9", "gzip"),
        ("zstd ; q=1.0 , gzip ; q=0.9", "zstd"),
        ("br, zstd;q=0.9", None),
        ("identity, gzip;q=0.5", None),
        ("*", None),
        ("gzip;q=x, zstd;q=0.1", "zstd"),
        ("gzip;q=", None),
        (";,;q=1,,", None),
    ],
)
def test_which_coding_is_asked_for(header, wanted):
    assert content_coding(header) == wanted


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html,application/xhtml+xml;q=0.9,*/*;q=0.8", "application/json"),
        ("application/octet-stream", OCTETS),
        ("Application/Safetensors; charset=x", SAFETENSORS),
        ("application/octet-stream;q=0.5, application/json", "application/json"),
        ("application/json;q=0.5, application/octet-stream", OCTETS),
        ("application/octet-stream;q=0", "application/json"),
    ],
)
def test_which_media_type_is_asked_for(header, wanted):
    assert media_type(header) == wanted
