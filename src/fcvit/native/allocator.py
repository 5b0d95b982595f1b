"""Keep memory that was freed instead of giving it back to the system."""

import ctypes

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)
LARGEST_INT = 2**31 - 1


def keep_memory() -> bool:
    """Let blocks below 32 MB come from, and stay in, the heap, for this whole process from now on.

    As it is, every large block is mapped anew, page by page, and unmapped again, which takes longer than
    an elementwise operation on it. Returns whether it was done: not where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
