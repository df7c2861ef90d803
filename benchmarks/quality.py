"""What each output_dtype costs: STSBenchmark dev, all-MiniLM-L6-v2.

    python -m benchmarks.quality FILE.csv [--write]

FILE.csv holds sentence, sentence, gold score. Spearman × 100 of the likeness of the two vectors with the gold score; and how
many of the ten sentences nearest to each by float32 are still among its ten nearest.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from benchmarks.machine import describe_machine
from benchmarks.peers import bertd
from benchmarks.tables import write_section
from model.cgroup import available_cores
from model.hub import find_model
from model.vectors import Array, OutputDtype, normalize, quantize

Compare = Callable[[Array, Array], np.ndarray]
_NEAREST = 10


def cosine(a: Array, b: Array) -> np.ndarray:
    """Of every row of a and every row of b, [M, N]."""
    return normalize(a.astype(np.float32)) @ normalize(b.astype(np.float32)).T


def centred_cosine(a: Array, b: Array) -> np.ndarray:
    return cosine(a - np.float32(127.5), b - np.float32(127.5))


def same_bits(a: Array, b: Array) -> np.ndarray:
    """Minus the Hamming distance."""
    bits = [np.unpackbits(rows.view(np.uint8), axis=1).astype(np.float32) for rows in (a, b)]
    return -((bits[0] @ (1 - bits[1]).T) + (1 - bits[0]) @ bits[1].T)


COMPARED: dict[OutputDtype, tuple[str, Compare]] = {
    "float32": ("cosine", cosine),
    "float16": ("cosine", cosine),
    "int8": ("cosine of the integers", cosine),
    "uint8": ("cosine of the integers less 127.5", centred_cosine),
    "binary": ("Hamming distance", same_bits),
    "ubinary": ("Hamming distance", same_bits),
}


def spearman(left: Array, right: Array, gold: np.ndarray, compare: Compare) -> float:
    """× 100."""
    likeness = [compare(left[n : n + 1], right[n : n + 1])[0, 0] for n in range(len(gold))]
    return float(spearmanr(likeness, gold).statistic * 100)


def nearest(rows: Array, compare: Compare) -> np.ndarray:
    """The places of the rows that are most like each, itself left out: [N, 10]."""
    likeness = compare(rows, rows)
    np.fill_diagonal(likeness, -np.inf)
    return np.argsort(-likeness, axis=1, kind="stable")[:, :_NEAREST]


def table(vectors: Array, gold: np.ndarray) -> list[str]:
    """Rows of the table; the left sentences come first in `vectors`."""
    single = np.unique(vectors, axis=0)
    wanted = nearest(single, cosine)
    rows = []
    for dtype, (name, compare) in COMPARED.items():
        numbers = quantize(vectors, dtype)
        score = spearman(numbers[: len(gold)], numbers[len(gold) :], gold, compare)
        found = nearest(quantize(single, dtype), compare)
        kept = np.mean([len(set(a) & set(b)) / _NEAREST for a, b in zip(wanted, found, strict=True)])
        rows.append(f"| {dtype} | {numbers[0].nbytes} | {name} | {score:.3f} | {kept:.1%} |")
    return rows


HEADER = "| output_dtype | bytes a vector | compared by | Spearman × 100 | nearest ten kept |\n|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    with options.file.open(encoding="utf-8", newline="") as file:
        pairs = list(csv.reader(file))
    encode = bertd("float32", find_model("sentence-transformers/all-MiniLM-L6-v2"), "cpu", available_cores())
    vectors = encode([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
    rows = table(vectors, np.array([float(pair[2]) for pair in pairs]))
    print("\n".join([HEADER, *rows]))
    if options.write:
        command = f"`python -m benchmarks.quality {options.file.name}`, {describe_machine()}."
        write_section("quality", "\n".join([command, "", HEADER, *rows]))


if __name__ == "__main__":
    main()
