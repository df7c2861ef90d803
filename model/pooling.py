"""One vector per text from the packed hidden rows, by index: no padding, so no mask."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.batch import Batch
from model.config import Task


def first_rows(hidden: Tensor, batch: Batch) -> Tensor:
    """The row of [CLS] of each text: [T, H] -> [N, H]."""
    return hidden[batch.first]


def last_rows(hidden: Tensor, batch: Batch) -> Tensor:
    return hidden[batch.last]


def mean_rows(hidden: Tensor, batch: Batch) -> Tensor:
    """The mean over all tokens of each text, special tokens included (arXiv 1908.10084, section 3)."""
    return torch.segment_reduce(hidden.float(), "mean", offsets=batch.cu_seqlens.long(), axis=0)


def max_rows(hidden: Tensor, batch: Batch) -> Tensor:
    return torch.segment_reduce(hidden.float(), "max", offsets=batch.cu_seqlens.long(), axis=0)


POOL: Mapping[Task, Callable[[Tensor, Batch], Tensor]] = {
    "cls": first_rows,
    "pooler": first_rows,  # the Pooler then stands on it
    "scores": first_rows,  # the Classifier then stands on it
    "mean": mean_rows,
    "max": max_rows,
    "last": last_rows,
}
