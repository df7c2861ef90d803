"""Batches of fixed shapes, and what a graph is captured for; a capture that needs no GPU stands in."""

from dataclasses import replace

import pytest
import torch
from reference import random_rows

from model.attention import attend_sdpa
from model.batch import pack
from model.compiled_cuda import tiles_of
from model.encoder import Encoder
from model.graphs import BUCKETS, Bucket, GraphPool, Transfer, Width, find_bucket, pad_to

WIDTHS = (Width(256), Width(512, 32))


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ((3,), (16, 256, 4)),
        ((16,), (16, 256, 4)),
        ((17,), (32, 256, 8)),
        ((4, 4, 4, 4), (16, 256, 4)),
        ((3, 3, 3, 3), (32, 256, 8)),  # the dummy would be a fifth text
        ((2,) * 8, (64, 256, 16)),
        ((256, 256), (512, 256, 128)),
        ((257, 200), (512, 512, 16)),
        ((257, *(10,) * 20), (768, 512, 24)),
        ((512, 512), (1024, 512, 32)),
        ((512, 500, 100), (1536, 512, 48)),
        ((512,) * 17, (9216, 512, 144)),
        ((14,) * 1200, (18432, 256, 2304)),
        ((512,) * 64, (32768, 512, 512)),
        ((512,) * 65, None),
        ((1,) * 2049, None),
        ((3,) * 5000, None),
    ],
)
def test_the_smallest_bucket_is_taken_that_holds_rows_and_dummies(lengths, bucket) -> None:
    assert find_bucket(random_rows(lengths), WIDTHS) == (bucket and Bucket(*bucket))


def test_only_buckets_of_the_sizes_that_are_there_are_taken() -> None:
    rows = random_rows((256, 256, 100))
    assert find_bucket(rows, WIDTHS, (512, 2048)) == Bucket(2048, 256, 512)
    assert find_bucket(rows, WIDTHS, (512,)) is None


def test_a_bucket_promises_no_longer_texts_than_the_model_reads() -> None:
    assert find_bucket(random_rows((3,)), [Width(40)]) == Bucket(16, 40, 4)


@pytest.mark.parametrize("lengths", [(1,), (3, 5), (9, 9, 9), (64,), (20, 30, 40, 1, 1, 1), (60, 60, 8), (300, 20)])
@pytest.mark.parametrize("max_tokens", [64, 40, 512])
def test_padding_to_a_bucket_changes_no_row(make_checkpoint, lengths, max_tokens) -> None:
    bert = Encoder.from_folder(make_checkpoint()).bert
    for layer in bert.layers:
        layer.attention.attend = attend_sdpa
    rows = random_rows([min(length, max_tokens) for length in lengths])
    bucket = find_bucket(rows, [Width(max_tokens)])
    batch = pad_to(bucket, rows)
    assert len(batch.input_ids) == len(batch.positions) == bucket.tokens
    assert len(batch.cu_seqlens) == len(batch.cu_texts) == bucket.texts + 1
    assert len(batch.tiles) == bucket.tiles
    assert batch.cu_seqlens.diff().max() <= batch.max_seqlen == bucket.longest
    assert 0 <= batch.first.min() <= batch.first.max() < bucket.tokens
    with torch.inference_mode():
        torch.testing.assert_close(bert(batch)[-sum(map(len, rows)) :], bert(pack(rows)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tiled", [True, False])
def test_a_transfer_holds_a_batch_in_one_piece(tiled) -> None:
    batch = pack(random_rows((3, 7, 1), segments=2))
    batch = replace(batch, tiles=tiles_of(batch.lengths) if tiled else None)
    transfer = Transfer(batch, pinned=False)
    there = transfer.batch_in(transfer.data.clone())
    for name in ("input_ids", "type_ids", "positions", "cu_seqlens", "cu_texts"):
        assert torch.equal(getattr(there, name), getattr(batch, name))
    assert torch.equal(there.tiles, batch.tiles) if tiled else there.tiles is None
    assert there.max_seqlen == batch.max_seqlen


def test_a_graph_is_captured_once_for_each_bucket_and_task() -> None:
    captured = []

    def capture(forward, batch):
        captured.append(len(batch.batch_in(batch.data).input_ids))
        return lambda batch: forward(batch.batch_in(batch.data))

    forwards = {"mean": lambda batch: batch.input_ids, "cls": lambda batch: -batch.input_ids}
    pool = GraphPool(capture)
    for length, task in [(3, "mean"), (5, "mean"), (40, "mean"), (16, "cls"), (16, "mean")]:
        rows = random_rows((length,))
        bucket = find_bucket(rows, WIDTHS)
        ids = pool(bucket, task, forwards[task], Transfer(pad_to(bucket, rows), pinned=False))
        assert (-ids if task == "cls" else ids)[-length:].tolist() == rows[0].ids.tolist()
    assert captured == [16, 64, 16]
    pool.clear()
    pool(find_bucket(rows, WIDTHS), "mean", forwards["mean"], Transfer(pad_to(bucket, rows), pinned=False))
    assert captured == [16, 64, 16, 16]


def test_buckets_rise() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
