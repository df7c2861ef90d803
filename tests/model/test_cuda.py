"""What of the GPU's runner can be judged without one, and the rest where there is one."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import lively_bert, random_rows
from transformers import BertForMaskedLM, BertForSequenceClassification

from model.attention import attend_reference
from model.batch import pack
from model.compiled_cuda import tiles_of
from model.cuda import CudaRunner, FastestAttention, Pipeline
from model.encoder import Encoder
from model.errors import UnsupportedModel
from model.graphs import BUCKETS, Bucket, GraphPool, Width
from model.runner import make_runner
from model.tokens import Tokens
from model.vectors import normalize


class FakeDevice:
    """Computes what is queued on it, one batch after the other, each when it is told to."""

    def __init__(self) -> None:
        self.log = []
        self.ends = {name: Event() for name in ("first", "second")}

    def launch(self, name):
        self.log.append(f"launch {name}")
        return name, self.Done(self, name)

    class Done:
        def __init__(self, device, name) -> None:
            self.device, self.name = device, name

        def synchronize(self) -> None:
            assert self.device.ends[self.name].wait(30)
            self.device.log.append(f"end of {self.name} seen")


def test_a_batch_is_launched_behind_the_one_that_is_computed_and_told_of_when_its_turn_comes() -> None:
    device, pipeline, launched = FakeDevice(), Pipeline(), {name: Event() for name in ("first", "second")}
    pipeline.on_device = lambda: device.log.append("on device")

    def launch(name):
        assert pipeline.turn.locked()
        answer = device.launch(name)
        launched[name].set()
        return answer

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(pipeline.run, lambda: launch("first"))
        assert launched["first"].wait(30)
        second = threads.submit(pipeline.run, lambda: launch("second"))
        assert launched["second"].wait(30)
        assert not first.done()
        assert device.log.count("on device") <= 1
        device.ends["first"].set()
        assert first.result(30) == "first"
        device.ends["second"].set()
        assert second.result(30) == "second"
    assert not pipeline.turn.locked()
    assert device.log.count("on device") == 2
    assert device.log.index("end of first seen") < len(device.log) - 1 - device.log[::-1].index("on device")


def test_a_launch_that_fails_leaves_the_turn_to_the_next() -> None:
    device, pipeline = FakeDevice(), Pipeline()
    with pytest.raises(ZeroDivisionError):
        pipeline.run(lambda: 1 // 0)
    device.ends["first"].set()
    assert pipeline.run(lambda: device.launch("first")) == "first"


WIDTHS = [Width(256), Width(512, 32)]


class Recorded(CudaRunner):
    """Notes the rows that it is called with, on no device; so many tokens fit into the memory of that."""

    def __init__(self, encoder, fits=10**6) -> None:
        self.fits = fits
        self.encoder = encoder
        self.ran, self.buckets = [], []
        self._graphs, self._attention, self._widths = GraphPool(None), FastestAttention(None), WIDTHS

    def __call__(self, rows, task):
        assert task == self.encoder.config.task
        self.ran.append(rows)
        self.buckets.append(self._find_bucket(rows, task))

    def hidden(self, rows):
        tokens = sum(map(len, rows))
        if tokens > self.fits:
            raise torch.cuda.OutOfMemoryError


@pytest.mark.parametrize(("tokens", "full"), [(32768, (64, 512)), (33000, (64, 512)), (8192, None), (100, None)])
def test_all_graphs_and_a_full_batch_of_the_longest_texts_are_made_at_start(make_checkpoint, tokens, full) -> None:
    runner = Recorded(Encoder.from_folder(make_checkpoint()))
    assert runner.prepare(tokens) == tokens
    buckets = runner.buckets
    shapes = [(size, WIDTHS[0]) for size in BUCKETS] + [(size, WIDTHS[1]) for size in BUCKETS if size > WIDTHS[0].longest]
    wanted = {Bucket(size, width.longest, width.texts(size)) for size, width in shapes}
    assert {bucket for bucket in wanted if bucket.tokens <= tokens} <= set(buckets)
    assert buckets[:-1] == sorted(buckets[:-1], key=lambda bucket: -bucket.tokens)
    assert runner._attention.full == full
    if full:
        assert buckets[-1] == Bucket(full[0] * full[1], full[1], full[0])
    assert runner.warm_up(tokens) > 0
    assert sum(map(len, runner.ran[-1])) == tokens


def test_large_graphs_are_for_the_task_of_the_encoder_only(make_checkpoint) -> None:
    runner = Recorded(Encoder.from_folder(make_checkpoint()))
    runner.prepare(32768)
    small, large = random_rows((100,)), random_rows((300,) * 40)
    task = runner.encoder.config.task
    assert runner._find_bucket(small, task) == runner._find_bucket(small, "hidden") == Bucket(128, 256, 32)
    assert runner._find_bucket(large, task) == Bucket(12288, 512, 192)
    assert runner._find_bucket(large, "hidden") is None


def test_a_batch_is_halved_until_it_fits_and_has_no_larger_graphs(make_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    runner = Recorded(Encoder.from_folder(make_checkpoint()), fits=20_000)
    runner._graphs._graphs["too large"] = None
    assert runner.prepare(65536) == 16384
    assert runner._find_bucket(random_rows((512,) * 33), runner.encoder.config.task) is None
    assert not runner._graphs._graphs


def test_a_gpu_without_room_for_one_text_is_refused(make_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**30))
    runner = Recorded(Encoder.from_folder(make_checkpoint()), fits=100)
    runner.device = "cuda:0"
    with pytest.raises(UnsupportedModel, match="cuda:0 has 1024 MiB of memory, and too little"):
        runner.prepare(32768)


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda", 0)


MIXES = [(5,), (7, 200, 33, 1), (512, 300, 2), tuple(range(1, 120)), (512,) * 20, (14,) * 900]
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of vectors of length 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last", "pooler"])
def test_vectors_on_a_gpu_equal_those_of_the_cpu(gpu, minilm, dtype, pooling) -> None:
    reference, _ = make_runner(minilm, device="cpu")
    runner = CudaRunner(Encoder.from_folder(minilm), gpu, dtype)
    for lengths in MIXES:
        rows = random_rows(lengths, vocab_size=30522)
        found, wanted = runner(rows, pooling), reference(rows, pooling)
        np.testing.assert_allclose(normalize(found), normalize(wanted), rtol=0, atol=BOUNDS[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", BOUNDS)
def test_matrices_on_a_gpu_equal_those_of_the_cpu(gpu, minilm, dtype) -> None:
    reference, _ = make_runner(minilm, device="cpu")
    runner = CudaRunner(Encoder.from_folder(minilm), gpu, dtype)
    for lengths in MIXES:
        rows = random_rows(lengths, vocab_size=30522)
        for found, wanted in zip(runner.hidden(rows), reference.hidden(rows), strict=True):
            np.testing.assert_allclose(normalize(found), normalize(wanted), rtol=0, atol=4 * BOUNDS[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize(("architecture", "pooling"), [(BertForSequenceClassification, None), (BertForMaskedLM, "splade")])
def test_heads_on_a_gpu_equal_those_of_the_cpu(gpu, tmp_path, architecture, pooling) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    lively_bert(architecture=architecture, **sizes).save_pretrained(tmp_path)
    reference, _ = make_runner(tmp_path, device="cpu", pooling=pooling)
    runner = CudaRunner(Encoder.from_folder(tmp_path, pooling), gpu, torch.float16)
    task = runner.encoder.config.task
    for lengths in [(5,), (7, 200, 33, 1)]:
        rows = random_rows(lengths)
        np.testing.assert_allclose(normalize(runner(rows, task)), normalize(reference(rows, task)), rtol=0, atol=0.01)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_text_alone_on_a_gpu_equals_the_same_text_in_a_batch(gpu, minilm, dtype) -> None:
    runner = CudaRunner(Encoder.from_folder(minilm), gpu, dtype)
    rows = random_rows((7, 200, 33, 1, 250, 16), vocab_size=30522)
    together = runner(rows * 20, "mean")[: len(rows)]
    alone = np.concatenate([runner([row], "mean") for row in rows])
    np.testing.assert_allclose(normalize(alone), normalize(together), rtol=0, atol=BOUNDS[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "heads"), [(384, 12), (768, 12)])
def test_attention_by_tiles_is_that_of_the_formula_on_a_gpu(gpu, dtype, hidden, heads) -> None:
    from model.compiled_cuda import Kernels, TileAttention
    from model.config import BertConfig

    torch.manual_seed(0)
    lengths = (1, 2, 7, 33, 256, 512)
    q, k, v = (torch.randn(sum(lengths), 3 * hidden) * 2).to(dtype).chunk(3, dim=-1)
    batch = pack(random_rows(lengths))
    there = replace(batch, tiles=tiles_of(batch.lengths).to(gpu))
    attend = TileAttention(Kernels(BertConfig(hidden_size=hidden, num_attention_heads=heads), gpu, dtype), hidden // heads)
    found = attend(q.to(gpu), k.to(gpu), v.to(gpu), there, heads)
    wanted = attend_reference(q, k, v, batch, heads)
    torch.testing.assert_close(found.cpu().float(), wanted.float(), rtol=0.01, atol=0.02)


@pytest.mark.cuda
def test_two_threads_at_once_get_what_each_gets_alone(gpu, minilm) -> None:
    runner = CudaRunner(Encoder.from_folder(minilm), gpu, torch.bfloat16)
    batches = [random_rows(lengths, vocab_size=30522, seed=seed) for seed, lengths in enumerate(MIXES * 4)]
    other = CudaRunner(Encoder.from_folder(minilm), gpu, torch.bfloat16)  # so that graphs are captured while batches run
    wanted = [other(rows, "mean") for rows in batches]
    found = [None] * len(batches)
    start = Barrier(2)

    def run(places) -> None:
        start.wait()
        for place in places:
            found[place] = runner(batches[place], "mean")

    threads = [Thread(target=run, args=(range(first, len(batches), 2),)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.cuda
def test_a_batch_that_does_not_fit_is_refused_and_the_next_one_runs(gpu, minilm) -> None:
    runner = CudaRunner(Encoder.from_folder(minilm), gpu, torch.bfloat16)
    rows = random_rows((5, 9), vocab_size=30522)
    wanted = runner(rows, "mean")
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            runner([Tokens.of([1] * 512)] * 4096, "mean")
        assert 512 <= runner.prepare(2**21) < 2**21
        torch.cuda.set_per_process_memory_fraction(0.004)
        assert 512 <= runner.prepare(2**15) < 2**15  # where the largest graph finds no room
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_array_equal(runner(rows, "mean"), wanted)


_LOSE = """
import os
import sys
from pathlib import Path
import torch
from model.cuda import CudaRunner
from model.encoder import Encoder
from model.errors import DeviceLost
from model.tokens import Tokens
runner = CudaRunner(Encoder.from_folder(Path(sys.argv[1])), torch.device("cuda", 0), torch.bfloat16)
runner([Tokens.of([7])], "mean")
for row in ([30522], [7]):
    try:
        runner([Tokens.of(row)], "mean")
    except DeviceLost as error:
        print("lost", flush=True)
os._exit(0)  # as the engine does: torch would abort as it takes its memory back from the device
"""


@pytest.mark.cuda
def test_a_device_that_has_failed_is_lost_for_the_process(gpu, minilm) -> None:
    done = subprocess.run([sys.executable, "-c", _LOSE, str(minilm)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lost", "lost"]
