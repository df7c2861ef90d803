"""What of the GPU's runner can be judged without one, and the rest where there is one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import random_rows

from model.attention import attend_sdpa
from model.batch import pack
from model.cuda import BUCKETS, Bucket, CudaRunner, GraphPool, find_bucket, pad_to
from model.encoder import Encoder
from model.runner import make_runner


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ((3,), 16),
        ((16,), 16),
        ((17,), 32),
        ((4, 4, 4, 4), 16),
        ((3, 3, 3, 3), 32),  # the dummy would be a fifth text
        ((2,) * 8, 64),
        ((512, 512), 1024),
        ((512, 500, 100), None),
        ((1,) * 400, None),
    ],
)
def test_the_smallest_bucket_is_taken_that_holds_rows_and_dummies(lengths, bucket) -> None:
    assert find_bucket(random_rows(lengths), 512) == (bucket and Bucket(bucket))


@pytest.mark.parametrize("lengths", [(1,), (3, 5), (9, 9, 9), (64,), (20, 30, 40, 1, 1, 1), (60, 60, 8)])
@pytest.mark.parametrize("max_tokens", [64, 40, 512])
def test_padding_to_a_bucket_changes_no_row(make_checkpoint, lengths, max_tokens) -> None:
    bert = Encoder.from_folder(make_checkpoint()).bert
    for layer in bert.layers:
        layer.attention.attend = attend_sdpa
    rows = random_rows([min(length, max_tokens) for length in lengths])
    bucket = find_bucket(rows, max_tokens)
    batch = pad_to(bucket, rows, max_tokens)
    assert len(batch.input_ids) == len(batch.positions) == bucket.tokens
    assert len(batch.cu_seqlens) == len(batch.cu_texts) == bucket.texts + 1
    assert batch.cu_seqlens.diff().max() <= max_tokens
    with torch.inference_mode():
        torch.testing.assert_close(bert(batch)[: sum(map(len, rows))], bert(pack(rows)), rtol=0, atol=1e-6)


def test_a_graph_is_captured_once_for_each_bucket() -> None:
    captured = []

    def capture(forward, batch):
        captured.append(len(batch.input_ids))
        return forward

    pool = GraphPool(lambda batch: batch.input_ids, capture)
    for lengths in [(3,), (5,), (40,), (16,), (33, 2)]:
        rows = random_rows(lengths)
        bucket = find_bucket(rows, 512)
        hidden = pool(bucket, pad_to(bucket, rows, 512))
        assert hidden[: sum(lengths)].tolist() == [int(token) for row in rows for token in row.ids]
    assert captured == [16, 64]


def test_buckets_rise() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert replace(Bucket(16)).texts == 4


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda", 0)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last", "pooler"])
def test_vectors_on_a_gpu_equal_those_of_the_cpu(gpu, minilm, dtype, bound, pooling) -> None:
    reference, _ = make_runner(minilm, device="cpu")
    runner = CudaRunner(Encoder.from_folder(minilm), gpu, dtype)
    for lengths in [(5,), (7, 200, 33, 1), tuple(range(1, 120))]:
        rows = random_rows(lengths, vocab_size=30522)
        np.testing.assert_allclose(runner(rows, pooling), reference(rows, pooling), rtol=0, atol=bound)


@pytest.mark.cuda
def test_a_text_alone_on_a_gpu_equals_the_same_text_in_a_batch(gpu, minilm) -> None:
    runner = CudaRunner(Encoder.from_folder(minilm), gpu, torch.bfloat16)
    rows = random_rows((7, 200, 33, 1, 250, 16), vocab_size=30522)
    together = runner(rows * 20, "mean")[: len(rows)]
    alone = np.concatenate([runner([row], "mean") for row in rows])
    np.testing.assert_allclose(alone, together, rtol=0, atol=0.02)
