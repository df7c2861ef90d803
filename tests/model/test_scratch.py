"""Memory that is kept: who asks again overwrites it, and nobody else's."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from model.scratch import Scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_matrix_is_of_the_shape_and_dtype_that_was_asked_for(dtype: torch.dtype) -> None:
    scratch = Scratch()
    for rows, columns in [(3, 16), (3, 48), (1, 16), (0, 16), (200, 48), (3, 16)]:
        matrix = scratch(rows, columns, dtype)
        assert (matrix.shape, matrix.dtype, matrix.is_contiguous()) == ((rows, columns), dtype, True)
        matrix.fill_(1)
        assert matrix.sum() == rows * columns


def test_memory_is_taken_once() -> None:
    scratch = Scratch()
    shapes = [(7, 3, torch.uint8), (100, 64, torch.bfloat16), (1, 64, torch.float32)]
    for shape in shapes:
        scratch(*shape)
    largest = scratch(100, 64, torch.float32).data_ptr()
    for rows, columns, dtype in shapes * 2:
        matrix = scratch(rows, columns, dtype)
        assert (matrix.shape, matrix.dtype, matrix.data_ptr()) == ((rows, columns), dtype, largest)


def test_each_thread_has_its_own() -> None:
    scratch, barrier = Scratch(), Barrier(3)

    def write(number: int) -> bool:
        matrix = scratch(50, 32, torch.float32)
        matrix.fill_(number)
        barrier.wait()
        return bool((matrix == number).all())

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(write, range(3)))
