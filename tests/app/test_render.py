"""Arrays as bytes, without a server."""

import base64
import json
import threading

import numpy as np
import pytest
from safetensors.numpy import load

from app import compression
from app.compression import Compress
from app.render import base64_text, in_blocks, json_bytes, json_list, raw_rows, safetensors

ARRAYS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 4), np.float32), np.zeros((0, 2), np.float32)]


def test_a_json_list_is_that_of_its_items():
    for items in ([], [1], [1, "two", None], ARRAYS):
        plain = [item.tolist() if isinstance(item, np.ndarray) else item for item in items]
        assert json.loads(b"".join(json_list(items))) == plain


def test_a_large_array_is_rendered_a_few_rows_at_a_time_and_as_ever():
    large = np.random.default_rng(0).standard_normal((5_000, 40)).astype(np.float32)
    for item in (large, large.reshape(50, 100, 40), {"tokens": ["a"], "embeddings": large}, large.astype(np.int8), large.ravel()):
        pieces = list(json_list([item, 1, item]))
        assert b"".join(pieces) == json_bytes([item, 1, item])
        assert max(map(len, pieces)) < 2**18
    pieces = list(raw_rows([large, large[:2], large[:, ::2]]))
    assert b"".join(pieces) == large.tobytes() + large[:2].tobytes() + large[:, ::2].tobytes()
    assert max(map(len, pieces)) < 2**18


def test_floats_come_back_as_they_were():
    array = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(1e-20)
    (found,) = json.loads(b"".join(json_list([array])))
    np.testing.assert_array_equal(np.array(found, dtype=np.float32), array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
def test_a_safetensors_file_is_what_its_library_reads(dtype):
    arrays = [array.astype(dtype) for array in ARRAYS]
    content = b"".join(safetensors(arrays))
    tensors = load(content)
    assert sorted(tensors) == ["0", "1", "2"]
    for place, array in enumerate(arrays):
        assert tensors[str(place)].dtype == array.dtype
        np.testing.assert_array_equal(tensors[str(place)], array)
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_numbers_are_little_endian_wherever_they_come_from():
    wanted = np.array([1.5, -2], dtype="<f4")
    for array in (wanted, wanted.astype(">f4"), np.array([[1.5, 0], [-2, 0]], dtype=np.float32)[:, 0]):
        assert base64.b64decode(base64_text(array)) == wanted.tobytes()
        assert b"".join(raw_rows([array])) == wanted.tobytes()


def test_blocks_are_made_one_at_a_time_and_lose_nothing():
    made = []

    def chunks():
        for n in range(10):
            made.append(n)
            yield bytes([n]) * 100_000

    blocks = in_blocks(chunks())
    first = next(blocks)
    assert (len(first), made) == (300_000, [0, 1, 2])
    assert first + b"".join(blocks) == b"".join(bytes([n]) * 100_000 for n in range(10))
    assert list(in_blocks([])) == []


@pytest.mark.parametrize(("size", "in_loop"), [(2_000, True), (1_000_000, False)])
async def test_a_large_body_is_compressed_off_the_event_loop(monkeypatch, size, in_loop):
    threads = []

    class Watched:
        def compress(self, data):
            threads.append(threading.get_ident())
            return data

        def flush(self):
            return b""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size})

    async def send(message):
        sent.append(message)

    sent = []
    monkeypatch.setitem(compression._COMPRESSORS, "gzip", Watched)
    await Compress(app)({"type": "http", "headers": [(b"accept-encoding", b"gzip")]}, None, send)
    assert (threads == [threading.get_ident()]) is in_loop
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert len(sent[1]["body"]) == size
