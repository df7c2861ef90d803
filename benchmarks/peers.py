"""One encoder in a process of its own: python -m benchmarks.peers NAME FOLDER DEVICE THREADS

Answers each line on standard input, the path of a JSON list of texts, with the seconds of one pass over them, tokenization
included, and the peak of the process's own memory in MiB since it was given another list: what it has kept from the list before
counts, what helpers of its have does not.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice, starmap
from multiprocessing import get_context
from pathlib import Path
from threading import Condition, Event

import numpy as np

Encode = Callable[[Sequence[str]], np.ndarray]
_BATCH = 32  # texts in a padded batch, as sentence-transformers has it; sorted by length
_MAX_TOKENS = 512
_CHARACTERS_AT_ONCE = 100_000  # that are tokenized while a device computes those before


def bertd(dtype: str, folder: Path, device: str, threads: int) -> Encode:
    """Ours: the library as it is, texts in the order in which they come, packed batches on as many lanes as there are.

    A device that takes batches ahead computes while other processes tokenize, as the API process does in the server.
    """
    from app.memory import pass_over_what_stays
    from app.waiting import Job, Queue
    from model.config import ModelConfig
    from model.runner import make_runner, use_threads
    from model.tokens import split_rows
    from model.vectors import normalize

    config = ModelConfig.from_folder(folder)
    _load_tokenizer(folder)
    runner, choice = make_runner(folder, device=device, dtype=dtype, threads=threads)
    runner.warm_up(choice.max_batch_tokens)
    callers = choice.lanes + runner.ahead
    pool = ThreadPoolExecutor(callers, initializer=use_threads, initargs=(max(1, threads // choice.lanes),))
    readers = ProcessPoolExecutor(2, get_context("spawn"), _load_tokenizer, (folder,)) if runner.ahead else None
    for started in [readers.submit(_tokenize, ["ready"]) for _ in range(2)] if readers else ():
        started.result()
    width = runner(split_rows(*_tokenize(["ready"])), config.pooling).shape[1]
    pass_over_what_stays()
    turn = Condition()
    free = callers

    def run_lane(queue: Queue, share: int, read: Event) -> None:
        """Run batches as the scheduler forms them, until all texts are read and none is left."""
        nonlocal free
        while True:
            with turn:
                while not (batch := queue.next_batch(share)) and not read.is_set():
                    turn.wait()
                free -= bool(batch)
            if not batch:
                return
            vectors = normalize(runner([row.tokens for row in batch], config.pooling))
            for row, vector in zip(batch, vectors, strict=True):
                row.job.outcomes[row.place] = vector
            with turn:
                free += 1
                share = queue.share(free, choice.lanes)

    def encode(texts: Sequence[str]) -> np.ndarray:
        if len(texts) == 1:
            return normalize(runner(split_rows(*_tokenize(texts)), config.pooling))
        queue, read = Queue(choice.max_batch_tokens), Event()
        answer, start = np.empty((len(texts), width), np.float32), 0
        step = max(1, len(texts) * _CHARACTERS_AT_ONCE // sum(map(len, texts))) if readers else len(texts)
        slices = [texts[start : start + step] for start in range(0, len(texts), step)]
        running = []
        try:
            for rows in starmap(split_rows, readers.map(_tokenize, slices) if readers else map(_tokenize, slices)):
                job = Job(config.pooling, Future(), 0.0, answer[start : start + len(rows)])
                start += len(rows)
                with turn:
                    queue.add(job, rows)
                    turn.notify_all()
                if not running:
                    running = [pool.submit(run_lane, queue, queue.share(free, choice.lanes), read) for _ in range(callers)]
        finally:
            with turn:
                read.set()
                turn.notify_all()
        for lane in running:
            lane.result()
        return answer

    return encode


def _load_tokenizer(folder: Path) -> None:
    global _tokenizer
    from model.config import ModelConfig
    from model.tokenizer import Tokenizer

    _tokenizer = Tokenizer.from_folder(folder, ModelConfig.from_folder(folder))


def _tokenize(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many tokens each text has, and those of all end to end: what goes from one process to another in no time."""
    rows = _tokenizer.encode(texts, max_tokens=_MAX_TOKENS)
    ids = np.concatenate([row.ids for row in rows])
    return np.array([len(row) for row in rows]), ids, np.zeros_like(ids)


def sentence_transformers(dtype: str, folder: Path, device: str, threads: int) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": getattr(torch, dtype)})
    model.max_seq_length = _MAX_TOKENS
    return lambda texts: model.encode(texts, batch_size=_BATCH, show_progress_bar=False, normalize_embeddings=True)


def _padded(folder: Path, run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Encode:
    """A peer that takes padded batches: texts sorted by length, mean pooling, normalised."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_MAX_TOKENS)
    tokenizer.enable_padding()

    def encode(texts: Sequence[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
        answer, places = None, iter(order)
        while batch := list(islice(places, _BATCH)):
            encoded = tokenizer.encode_batch_fast([texts[n] for n in batch])
            mask = np.array([e.attention_mask for e in encoded], dtype=np.int64)
            hidden = run(np.array([e.ids for e in encoded], dtype=np.int64), mask)
            pooled = (hidden * mask[..., None]).sum(axis=1, dtype=np.float32) / mask.sum(axis=1, keepdims=True)
            pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
            answer = np.empty((len(texts), pooled.shape[1]), dtype=np.float32) if answer is None else answer
            answer[batch] = pooled
        return answer

    return encode


def _transformers_model(folder: Path):
    import torch
    from transformers import BertModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    return Hidden().eval(), example


def onnx_runtime(dtype: str, folder: Path, device: str, threads: int) -> Encode:
    import onnxruntime
    import torch

    model, example = _transformers_model(folder)
    axes = {0: "batch", 1: "length"}
    with tempfile.TemporaryDirectory() as scratch:
        path = f"{scratch}/model.onnx"
        names = {"input_names": list(example), "output_names": ["hidden"]}
        dynamic = dict.fromkeys([*example, "hidden"], axes)
        torch.onnx.export(model, tuple(example.values()), path, **names, dynamic_axes=dynamic, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return _padded(folder, lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0])


def openvino(dtype: str, folder: Path, device: str, threads: int) -> Encode:
    import openvino as ov

    model, example = _transformers_model(folder)
    converted = ov.convert_model(model, example_input=example)
    hints = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype], "INFERENCE_NUM_THREADS": threads}
    compiled = ov.compile_model(converted, "CPU", hints)
    return _padded(folder, lambda ids, mask: compiled({"input_ids": ids, "attention_mask": mask})[0])


def ctranslate2(dtype: str, folder: Path, device: str, threads: int) -> Encode:
    import ctranslate2 as ct

    with tempfile.TemporaryDirectory() as scratch:
        ct.converters.TransformersConverter(str(folder)).convert(f"{scratch}/model", quantization=dtype, force=True)
        encoder = ct.Encoder(f"{scratch}/model", device="cpu", compute_type=dtype, intra_threads=threads, inter_threads=1)

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        rows = [row[:length].tolist() for row, length in zip(ids, mask.sum(axis=1), strict=True)]
        return np.array(encoder.forward_batch(rows).last_hidden_state)

    return _padded(folder, run)


PEERS: Mapping[str, tuple[Callable[[str, Path, str, int], Encode], str]] = {
    "bertd float32": (bertd, "float32"),
    "bertd bfloat16": (bertd, "bfloat16"),
    "bertd float16": (bertd, "float16"),
    "bertd int8": (bertd, "int8"),
    "sentence-transformers float32": (sentence_transformers, "float32"),
    "sentence-transformers bfloat16": (sentence_transformers, "bfloat16"),
    "sentence-transformers float16": (sentence_transformers, "float16"),
    "ONNX Runtime float32": (onnx_runtime, "float32"),
    "OpenVINO float32": (openvino, "float32"),
    "OpenVINO bfloat16": (openvino, "bfloat16"),
    "CTranslate2 float32": (ctranslate2, "float32"),
    "CTranslate2 int8": (ctranslate2, "int8"),
}
ON_CUDA = tuple(name for name, (make, dtype) in PEERS.items() if make in (bertd, sentence_transformers) and dtype != "int8")
ON_CPU = tuple(name for name, (_, dtype) in PEERS.items() if dtype != "float16")


def main() -> None:
    name, folder, device, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    make, dtype = PEERS[name]
    encode = make(dtype, Path(folder), device, int(threads))
    encode(["ready"])
    print("ready", file=answers, flush=True)
    file, texts = "", []
    for line in sys.stdin:
        if line != file:
            file, texts = line, json.loads(Path(line.strip()).read_text())
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak
            encode(texts[:64])
        start = time.perf_counter()
        vectors = encode(texts)
        seconds = time.perf_counter() - start
        first = np.asarray(vectors[0][:3], dtype=float).tolist()
        rss = int(re.search(r"^VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) // 1024
        print(json.dumps({"seconds": seconds, "rss": rss, "first": first}), file=answers, flush=True)


if __name__ == "__main__":
    main()
