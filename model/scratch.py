"""Memory for what a layer computes and drops again, kept from layer to layer and from batch to batch."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

Place = Callable[[int, int, torch.dtype], Tensor]
"""(rows, columns, dtype) -> a matrix to write into, of any content"""


def fresh(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix of its own."""
    return torch.empty(rows, columns, dtype=dtype)


class Scratch(threading.local):
    """One matrix at a time: the next one overwrites it, in the same thread.

    torch asks glibc for aligned blocks, and what one of them leaves is too small for another of its size: with batches of
    mixed sizes the heap of each thread grew to several times of what a forward needs.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._matrices: dict[int, Tensor] = {}  # the last one of each width: all layers of a batch ask for the same

    def __call__(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        matrix = self._matrices.get(columns)
        if matrix is None or len(matrix) != rows or matrix.dtype != dtype:
            size = rows * columns * dtype.itemsize
            if size > len(self._memory):
                self._matrices.clear()
                del self._memory  # before there is more: the new one may then lie where the old one was
                self._memory = torch.empty(size, dtype=torch.uint8)
            matrix = self._matrices[columns] = self._memory[:size].view(dtype).view(rows, columns)
        return matrix
