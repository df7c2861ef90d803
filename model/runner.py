"""Every choice that depends on the machine, made once, at start."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from model.cgroup import available_cores
from model.compiled_cuda import is_ampere_or_newer
from model.config import PoolingChoice, Task
from model.cpu import CpuRunner
from model.cuda import CudaRunner
from model.encoder import Encoder
from model.errors import UnsupportedModel
from model.linear import multiplies
from model.tokens import Tokens
from model.vectors import FloatArray

DTYPES: Mapping[str, Mapping[str, torch.dtype]] = {
    "cpu": {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8},
    "cuda": {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
}


@dataclass(frozen=True)
class Choice:
    """What was decided for this machine, to be told to the user."""

    device: str
    devices: int  # of this kind that are there; a runner is on one
    dtype: str
    kernel: str
    threads: int
    lanes: int  # batches that run at once, each on its share of the threads
    max_batch_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Runner(Protocol):
    """An encoder on a device. Rows come in any order and mix; answers come in theirs."""

    encoder: Encoder
    kernel: str
    lanes: int  # batches that threads may run at once, at most
    ahead: int  # batches that more threads may hand over meanwhile, to wait on the device

    def __call__(self, rows: Sequence[Tokens], task: Task) -> FloatArray:
        """What the task makes of each row: [N, out] float32."""

    def hidden(self, rows: Sequence[Tokens]) -> list[FloatArray]:
        """One token matrix per row: N times [L, H] float32."""

    def on_layer(self, callback: Callable[[bool], None]) -> None:
        """Call back as a batch comes to a layer, with whether that is its last: time to form the next one.

        A device that takes all layers in one order tells only that it has come to the batch.
        """

    def warm_up(self, tokens: int) -> float:
        """Run once in small, for what is made at first use, then a batch of about `tokens`; tokens per second."""


def make_runner(
    folder: Path,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    max_batch_tokens: int = 0,
    pooling: PoolingChoice | None = None,
) -> tuple[Runner, Choice]:
    """Load a checkpoint for this machine; 0 and "auto" leave the choice to what is found here.

    Raises ModelError where the checkpoint, the device or the dtype cannot be served.
    """
    place = _find_device(device)
    kind = _find_dtype(place, dtype)
    encoder = Encoder.from_folder(folder, pooling)
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    runner: Runner
    if place.type == "cuda":
        runner = cuda = CudaRunner(encoder, place, kind)
        max_batch_tokens = cuda.prepare(max_batch_tokens or CudaRunner.BATCH_TOKENS)
    else:
        runner = CpuRunner(encoder, kind)
        max_batch_tokens = max_batch_tokens or CpuRunner.BATCH_TOKENS
    devices = torch.cuda.device_count() if place.type == "cuda" else 1
    lanes = min(threads, runner.lanes)
    name = str(kind).removeprefix("torch.")
    kernel = runner.kernel if dtype in ("auto", name) else f"{runner.kernel}; {name}, as there is no arithmetic in {dtype}"
    return runner, Choice(str(place), devices, name, kernel, threads, lanes, max_batch_tokens)


def use_threads(count: int) -> None:
    """How many threads the caller's thread computes on, from now on."""
    torch.get_num_threads()  # a thread's first call of it sets torch's own number
    _set_threads()(count)


@cache
def _set_threads() -> Callable[[int], object]:
    """OpenMP's own function where torch has loaded it: torch.set_num_threads changes the number of other threads, too."""
    return getattr(ctypes.CDLL(None), "omp_set_num_threads", torch.set_num_threads)


def _find_device(name: str) -> torch.device:
    """The device of that name, or for "auto" a GPU where torch sees one."""
    count = torch.cuda.device_count()
    try:
        device = torch.device(name if name != "auto" else "cuda" if count else "cpu")
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DTYPES:
        raise UnsupportedModel(f"device {name!r} is not supported; supported are auto, {', '.join(DTYPES)}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UnsupportedModel(f"device {name} is not there: torch sees {count} GPUs; set BERTD_DEVICE to auto or cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _find_dtype(device: torch.device, name: str) -> torch.dtype:
    known = DTYPES[device.type]
    if name not in known:
        raise UnsupportedModel(f"dtype {name} is not supported on {device.type}; supported are {', '.join(known)}")
    if device.type == "cuda" and name == "auto" and not is_ampere_or_newer(device):  # without arithmetic in bfloat16
        return torch.float16
    if device.type == "cpu" and known[name] == torch.bfloat16 and not multiplies(torch.bfloat16):
        return torch.float32  # many times as fast, and nearer to the truth
    return known[name]
