"""Share memory with worker processes, so that large arrays are not copied through a pipe.

The memory is an anonymous file. Unlike named blocks in /dev/shm it needs no cleaning up and no space there: the system
frees it when the last of the processes has ended, also after SIGKILL.
"""

import mmap
import os
import pickle
import weakref
from collections.abc import Sequence
from multiprocessing import reduction
from typing import Any, NamedTuple

import numpy as np

SUPPORTED = hasattr(os, "memfd_create")  # Linux
_ALIGNMENT = 64  # bytes
_MIN_BYTES = 1 << 16  # less than this is sent through the pipe


class Region(NamedTuple):
    """A region of the memory: its position and size in bytes."""

    offset: int
    size: int


class Packed(NamedTuple):
    """A pickled object. Its arrays are in a region of the shared memory, or in `copies` if that is too small.

    Attributes:
        pickled: The object without its arrays.
        spans: Start and end of each array in the region.
        copies: The arrays, or None if they are in the region.
        size: Size of all arrays in bytes.
    """

    pickled: bytes
    spans: Sequence[tuple[int, int]]
    copies: Sequence[bytearray] | None
    size: int


class SharedMemory:
    """Regions of memory that worker processes write and this process reads.

    A region is used again as soon as no array in it exists any more. All regions have the size of the largest object so
    far, so their number is that of the objects that exist at the same time.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("fcvit")
        weakref.finalize(self, os.close, self._file)
        self._size = self._end = 0
        self._free: list[tuple[Region, mmap.mmap]] = []

    def __reduce__(self) -> Any:
        """Pass the file to a process that is being spawned."""
        return WorkerMemory, (reduction.DupFd(self._file),)

    def lend(self) -> tuple[Region | None, np.ndarray | None]:
        """Return a free region and its bytes, or None before the first object. It is free again without the bytes."""
        if not self._size:
            return None, None
        while self._free:
            region, memory = self._free.pop()
            if region.size == self._size:
                break
            memory.madvise(mmap.MADV_REMOVE)  # too small: give its pages back
        else:
            region = Region(self._end, self._size)
            self._end += self._size
            os.ftruncate(self._file, self._end)
            memory = mmap.mmap(self._file, region.size, offset=region.offset)
        lent = np.frombuffer(memory, np.uint8)
        weakref.finalize(lent, self._free.append, (region, memory))
        return region, lent

    def unpack(self, packed: Packed, lent: np.ndarray | None) -> Any:
        """Return a packed object. Its arrays use the lent bytes without a copy, and keep them from being used again."""
        if packed.copies is None:
            assert lent is not None
            return pickle.loads(packed.pickled, buffers=[lent[start:end] for start, end in packed.spans])
        if packed.size >= _MIN_BYTES:
            self._size = max(self._size, 1 << (packed.size - 1).bit_length())
        return pickle.loads(packed.pickled, buffers=packed.copies)


class WorkerMemory:
    """The shared memory in a worker process."""

    def __init__(self, file: Any):
        self._file: int = file.detach()
        self._mapped: dict[Region, memoryview] = {}

    def pack(self, value: Any, region: Region | None) -> Packed:
        """Pickle an object, and write its arrays into a region if they fit."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(value, 5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        spans, size = [], 0
        for array in arrays:
            spans.append((size, size + array.nbytes))
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if region is None or not _MIN_BYTES <= size <= region.size:
            return Packed(pickled, spans, [bytearray(array) for array in arrays], size)
        if region not in self._mapped:
            self._mapped[region] = memoryview(mmap.mmap(self._file, region.size, offset=region.offset))
        for (start, end), array in zip(spans, arrays, strict=True):
            self._mapped[region][start:end] = array
        return Packed(pickled, spans, None, size)
