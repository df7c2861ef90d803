"""How the API process takes memory from the system, and gives it back."""

import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc
_LARGE = 2**18  # bytes of a block that goes back to the system as soon as it is freed: a body, an answer, a matrix


def keep_memory_small() -> None:
    """Have glibc use one arena for all threads, and the system itself for large blocks; elsewhere, do nothing.

    By default each thread has an arena of its own, and blocks of any size stay in the one that they were freed in: with the
    bodies and answers of mixed requests that grows for hours.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
