"""Keep freed memory in the process instead of returning it to the system."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # constants of glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)
LARGEST_INT = 2**31 - 1


def keep_memory() -> bool:
    """Make this process allocate blocks below 32 MB from the heap and keep them after they are freed.

    By default, glibc returns large freed blocks to the system. The page faults of the next allocation then take longer
    than an elementwise operation on the block. Returns True on success, and False if the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
