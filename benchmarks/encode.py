"""Library level: texts per second of one process, tokenization included, peers beside us in the same run.

    python -m benchmarks.encode [--device cpu] [--models minilm base] [--workloads short mixed long] [--rounds 5] [--write]

Each encoder lives in a process of its own with the same number of threads; rounds are interleaved and medians shown, so that a
drift of the machine hits all alike. `share` is model FLOPs ÷ time ÷ the machine's rate of large matrix products in the
same arithmetic, measured in the same rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from benchmarks.machine import describe_machine, matrix_rate
from benchmarks.peers import ON_CPU, ON_CUDA, PEERS
from benchmarks.tables import this_command, write_section
from benchmarks.workloads import Workload, make_workload
from model.cgroup import available_cores
from model.config import ModelConfig
from model.hub import find_model

COUNTS = {  # texts: a pass over them takes a second or so, sentence-transformers' some more
    "cpu": {"minilm": {"short": 600, "mixed": 120, "long": 24}, "base": {"short": 150, "mixed": 64, "long": 6}},
    "cuda": {"minilm": {"short": 30000, "mixed": 20000, "long": 8000}, "base": {"short": 20000, "mixed": 16000, "long": 6000}},
}


@dataclass
class Measured:
    """The seconds of each round of one encoder, and its peak resident memory in MiB."""

    seconds: list[float]
    rss: int = 0


class Peer:
    """A process that runs benchmarks.peers."""

    def __init__(self, name: str, folder: Path, device: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.peers", name, str(folder), device, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    @cached_property
    def works(self) -> bool:
        """Whether it runs here; waits until it does."""
        return self._process.stdout.readline().strip() == "ready"

    def run(self, texts: Path, measured: Measured) -> None:
        self._process.stdin.write(f"{texts}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        measured.seconds.append(answer["seconds"])
        measured.rss = answer["rss"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def model_folder(model: str, scratch: Path) -> Path:
    """all-MiniLM-L6-v2, or a BERT-base shape with random weights and the same tokenizer."""
    minilm = find_model("sentence-transformers/all-MiniLM-L6-v2")
    if model == "minilm":
        return minilm
    import torch
    from transformers import BertConfig, BertModel

    folder = scratch / model
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=30522)).save_pretrained(folder)
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "modules.json"):
        (folder / name).write_bytes((minilm / name).read_bytes())
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512}))
    pooling = folder / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text(json.dumps({"word_embedding_dimension": 768, "pooling_mode_mean_tokens": True}))
    return folder


def measure(peers: Mapping[str, Peer], folder: Path, workload: Workload, options: argparse.Namespace) -> list[str]:
    """Rows of the table for one workload."""
    found = {name: Measured([]) for name in peers}
    rates: dict[str, list[float]] = {PEERS[name][1]: [] for name in peers}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as texts:
        json.dump(workload.texts, texts)
        texts.flush()
        for _ in range(options.rounds):
            for dtype, rate in rates.items():
                rate.append(matrix_rate(dtype, options.device, options.threads))
            for name, peer in peers.items():
                peer.run(Path(texts.name), found[name])
    flops = workload.flops(ModelConfig.from_folder(folder))
    baseline = next((measured.seconds for name, measured in found.items() if name.startswith("sentence-transformers")), None)
    rows = []
    for name, measured in found.items():
        seconds = median(measured.seconds)
        rate = median(rates[PEERS[name][1]])
        ratio = median(theirs / ours for theirs, ours in zip(baseline, measured.seconds, strict=True)) if baseline else 0
        rows.append(
            f"| {name} | {len(workload.texts) / seconds:.0f} | {workload.lengths.sum() / seconds:.0f} | {ratio:.2f} | "
            f"{flops / seconds / 1e9:.0f} of {rate / 1e9:.0f} ({flops / seconds / rate:.0%}) | {measured.rss} |"
        )
    return rows


HEADER = (
    "| encoder | texts/s | tokens/s | × sentence-transformers | GFLOP/s of the matrix rate (share) | peak RSS, MiB |\n"
    "|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "base"], choices=COUNTS["cpu"])
    parser.add_argument("--workloads", nargs="+", default=["short", "mixed", "long"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all that the device has")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.peers = options.peers or (ON_CUDA if cuda else ON_CPU)
    for model in options.models:
        lines = [f"{this_command('benchmarks.encode')}, {options.threads} threads, {describe_machine(options.device)}."]
        with tempfile.TemporaryDirectory() as scratch:
            folder = model_folder(model, Path(scratch))
            peers = {name: Peer(name, folder, options.device, options.threads) for name in options.peers}
            peers = {name: peer for name, peer in peers.items() if peer.works}
            for name in options.workloads:
                workload = make_workload(name, COUNTS[options.device][model][name], folder)
                rows = measure(peers, folder, workload, options)
                title = f"**{model}, {name}** ({len(workload.texts)} texts, {workload.lengths.mean():.0f} tokens on average)"
                lines += ["", title, "", HEADER, *rows]
                print("\n".join([title, *rows]), flush=True)
            for peer in peers.values():
                peer.close()
        if options.write:
            write_section(f"encode-{model}{'-cuda' if cuda else ''}", "\n".join(lines))


if __name__ == "__main__":
    main()
