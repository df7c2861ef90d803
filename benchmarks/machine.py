"""What the machine is, and the rate of its matrix unit."""

import datetime
import platform
import time
from functools import cache
from pathlib import Path

import torch

_ROWS, _COLUMNS, _INNER = 2048, 3072, 768


def describe_machine() -> str:
    """Processor, cores, torch, date."""
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    name = names[0] if names else platform.processor()
    return f"{name} ({len(names)} cores), torch {torch.__version__}, {datetime.date.today():%Y-%m-%d}"


def matrix_rate(dtype: str, threads: int) -> float:
    """FLOP/s of the best of several large products with weights packed beforehand."""
    torch.set_num_threads(threads)
    product = _product(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2 * _ROWS * _COLUMNS * _INNER / best


@cache
def _product(dtype: str):
    with torch.inference_mode():
        x, weight, bias = torch.randn(_ROWS, _INNER), torch.randn(_COLUMNS, _INNER), torch.randn(_COLUMNS)
        if dtype == "int8":
            return _int8_product(x, weight, bias)
        kind = getattr(torch, dtype)
        x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def run() -> None:
        with torch.inference_mode():
            torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return run


def _int8_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    scale = torch.full((_COLUMNS,), 0.01)
    points = torch.zeros(_COLUMNS, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack((weight / 0.01).clamp(-127, 127).to(torch.int8), [_ROWS, _INNER])
    quantized = (x / 0.03 + 128).clamp(0, 255).to(torch.uint8)

    def run() -> None:
        with torch.inference_mode():
            torch.ops.onednn.qlinear_pointwise(
                quantized, 0.03, 128, packed, scale, points, bias, 1.0, 0, torch.float32, "none", [], ""
            )

    return run
