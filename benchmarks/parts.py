"""Where a forward spends its time, and what the size of a batch does: python -m benchmarks.parts [--dtype float32]

With `--device cuda` only the latter: a device works on while its launches return. Texts are tokenized beforehand.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from benchmarks.encode import COUNTS, model_folder
from benchmarks.machine import matrix_rate
from benchmarks.workloads import Workload, make_workload
from model.cgroup import available_cores
from model.config import ModelConfig, PoolingMode
from model.runner import Runner, make_runner
from model.tokenizer import Tokenizer
from model.tokens import Tokens

Map = Callable[..., Iterable]
SIZES = {"cpu": (512, 1024, 2048, 4096, 8192), "cuda": (4096, 8192, 16384, 32768, 65536)}


def batches(rows: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Rows in their order, in batches of at most `size` tokens."""
    batch: list[Tokens] = []
    tokens = 0
    for row in rows:
        if batch and tokens + len(row) > size:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += len(row)
    yield batch


def seconds_of(runner: Runner, rows: Sequence[Tokens], size: int, pooling: PoolingMode = "mean", run: Map = map) -> float:
    """Of all batches; `run` may hand one over while another runs."""
    start = time.perf_counter()
    for _ in run(lambda batch: runner(batch, pooling), batches(rows, size)):
        pass
    return time.perf_counter() - start


def watch(owner: object, name: str, part: str, spent: dict[str, float]) -> None:
    """Add the time of a method to a part's account."""
    method: Callable = getattr(owner, name)

    def timed(*arguments):
        start = time.perf_counter()
        answer = method(*arguments)
        spent[part] += time.perf_counter() - start
        return answer

    setattr(owner, name, timed)


def watch_parts(runner: Runner) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    watch(runner.encoder.bert.embeddings, "forward", "embeddings", spent)
    watch(runner.encoder, "pool", "pooling", spent)
    for layer in runner.encoder.bert.layers:
        watch(layer.attention.qkv, "forward", "queries, keys, values", spent)
        watch(layer.attention, "attend", "attention", spent)
        watch(layer.attention.output, "forward", "attention's output", spent)
        watch(layer.feed_forward.up, "forward", "feed-forward, first", spent)
        watch(layer.feed_forward.down, "forward", "feed-forward, second", spent)
        watch(layer.attention_norm, "forward", "residual and LayerNorm", spent)
        watch(layer.feed_forward_norm, "forward", "residual and LayerNorm", spent)
    return spent


def flops_of(workload: Workload, config: ModelConfig) -> dict[str, float]:
    hidden, inner, layers = config.bert.hidden_size, config.bert.intermediate_size, config.bert.num_hidden_layers
    tokens = float(workload.lengths.sum()) * layers
    return {
        "queries, keys, values": 6 * hidden**2 * tokens,
        "attention": 4 * hidden * float((workload.lengths**2).sum()) * layers,
        "attention's output": 2 * hidden**2 * tokens,
        "feed-forward, first": 2 * hidden * inner * tokens,
        "feed-forward, second": 2 * hidden * inner * tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm", choices=COUNTS["cpu"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workloads", nargs="+", default=["short", "mixed", "long"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tell(options, model_folder(options.model, Path(scratch)))


def tell(options: argparse.Namespace, folder: Path) -> None:
    cuda = options.device == "cuda"
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder, config)
    plain, choice = make_runner(folder, options.device, options.dtype, available_cores())
    plain.warm_up(choice.max_batch_tokens)
    run = ThreadPoolExecutor(plain.lanes + plain.ahead).map if plain.ahead else map
    if not cuda:
        watched, _ = make_runner(folder, options.device, options.dtype, available_cores())
        spent = watch_parts(watched)
    for name in options.workloads:
        workload = make_workload(name, COUNTS[options.device][options.model][name], folder)
        rows, flops = tokenizer.encode(workload.texts, max_tokens=512), workload.flops(config)
        times: dict[int, list[float]] = defaultdict(list)
        gains = []
        seconds_of(plain, rows, choice.max_batch_tokens, run=run)
        for _ in range(options.rounds):
            full, first = (seconds_of(plain, rows, choice.max_batch_tokens, pooling, run) for pooling in ("mean", "cls"))
            gains.append(full / first)
            for size in SIZES[options.device]:
                times[size].append(seconds_of(plain, rows, size, run=run))
        rates = ", ".join(f"{size}: {flops / median(found) / 1e9:.0f}" for size, found in times.items())
        peak = matrix_rate(options.dtype, options.device, choice.threads) / 1e9
        print(f"{options.model}, {name}, {options.dtype}, GFLOP/s by tokens in a batch: {rates}; large products: {peak:.0f}")
        print(f"  pooled by [CLS]: {median(gains):.2f} times as fast as by the mean")
        if cuda:
            continue
        seconds_of(watched, rows, choice.max_batch_tokens)
        spent.clear()
        total = seconds_of(watched, rows, choice.max_batch_tokens)
        for part, seconds in sorted(spent.items(), key=lambda pair: -pair[1]):
            product = flops_of(workload, config).get(part)
            print(f"  {part}: {seconds / total:.1%}" + (f", {product / seconds / 1e9:.0f} GFLOP/s" if product else ""))


if __name__ == "__main__":
    main()
