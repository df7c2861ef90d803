"""How a process takes memory from the system and gives it back, and how long it looks for what can be given back."""

import ctypes
import gc

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc
_LARGE = 2**18  # bytes of a block that goes back to the system as soon as it is freed: a body, an answer, a matrix

_YOUNGEST = 20_000  # objects made, less those that ended, between two looks of the garbage collector: a millisecond's work
_YOUNG_LOOKS = 100  # at young objects, before it looks at all


def keep_memory_small(arenas: int) -> None:
    """Have glibc share so many arenas among all threads, and use the system itself for large blocks; elsewhere, do nothing.

    By default each thread has an arena of its own, and blocks of any size stay in the one that they were freed in: with the
    bodies and answers of mixed requests that grows for hours. Threads that allocate at once, as those that tokenize, are half
    as fast as one of them with a single arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, arenas)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Have glibc give the system what lies free between blocks in use, which takes it milliseconds; elsewhere, do nothing.

    By itself it only gives back what is free at the end of the heap, and one small block there holds all that a peak has left.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def pass_over_what_stays() -> None:
    """Have the garbage collector look no more at the objects that are here now, which stay, and seldom at all the others.

    Each look stops the process: for a tenth of a second with those of the libraries, and as long with those of the thousand
    requests of a full queue. Hardly anything of ours is in a cycle, and what is ends young; looking for it as often as Python
    does by itself takes a twelfth of all work on a request.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    _, young, _ = gc.get_threshold()
    gc.set_threshold(_YOUNGEST, young, _YOUNG_LOOKS)
