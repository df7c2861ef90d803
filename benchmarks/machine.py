"""What the machine is, and the rate of its matrix unit."""

import datetime
import platform
import time
from functools import cache
from pathlib import Path

import torch

_ROWS, _COLUMNS, _INNER = 2048, 3072, 768
_ON_CUDA = 8192  # rows, columns and depth: enough to fill a GPU


def describe_machine(device: str = "cpu") -> str:
    """Processor, cores, GPU if it is one, torch, date."""
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    name = names[0] if names else platform.processor()
    name = f"{torch.cuda.get_device_name()}, {name}" if device == "cuda" else name
    return f"{name} ({len(names)} cores), torch {torch.__version__}, {datetime.date.today():%Y-%m-%d}"


def matrix_rate(dtype: str, device: str, threads: int) -> float:
    """FLOP/s of the best of several large products, on a CPU with weights packed beforehand."""
    torch.set_num_threads(threads)
    product, flops = _cuda_product(dtype) if device == "cuda" else _product(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return flops / best


@cache
def _cuda_product(dtype: str):
    x, weight = (torch.randn(_ON_CUDA, _ON_CUDA, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))

    def run() -> None:
        torch.mm(x, weight)
        torch.cuda.synchronize()

    return run, 2 * _ON_CUDA**3


@cache
def _product(dtype: str):
    with torch.inference_mode():
        x, weight, bias = torch.randn(_ROWS, _INNER), torch.randn(_COLUMNS, _INNER), torch.randn(_COLUMNS)
        if dtype == "int8":
            return _int8_product(x, weight, bias), 2 * _ROWS * _COLUMNS * _INNER
        kind = getattr(torch, dtype)
        x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def run() -> None:
        with torch.inference_mode():
            torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return run, 2 * _ROWS * _COLUMNS * _INNER


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
