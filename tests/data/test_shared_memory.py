"""Test that arrays pass through shared memory unchanged, and that its regions are used again at the right time."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from fcvit.data import shared_memory
from fcvit.data.shared_memory import SharedMemory, WorkerMemory

pytestmark = pytest.mark.skipif(not shared_memory.SUPPORTED, reason="only Linux has anonymous files in memory")


class Pair:
    """The memory, and the view that a worker process has of it."""

    def __init__(self):
        self.memory = SharedMemory()
        self.worker = WorkerMemory(SimpleNamespace(detach=lambda: os.dup(self.memory._file)))

    def send(self, value):
        region, lent = self.memory.lend()
        packed = self.worker.pack(value, region)
        return self.memory.unpack(packed, lent), packed.copies is None


def value_of(seed, size=300):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (3, size, size), np.uint8)
    return [("name", pixels, {"mask": pixels[0] > 99, "boxes": generator.random((7, 4), np.float32)}), b"digest"]


def equal(first, second):
    (name, pixels, more), digest = first
    (name_2, pixels_2, more_2), digest_2 = second
    arrays = zip((pixels, more["mask"], more["boxes"]), (pixels_2, more_2["mask"], more_2["boxes"]), strict=True)
    return (name, digest) == (name_2, digest_2) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)


def test_arrays_are_written_once_and_can_be_changed():
    pair = Pair()
    first, shared = pair.send(value_of(0))
    assert equal(first, value_of(0)) and not shared, "the size is not known before the first object"
    second, shared = pair.send(value_of(1))
    assert equal(second, value_of(1)) and shared
    assert all(array.ctypes.data % 64 == 0 for array in (second[0][1], second[0][2]["mask"], second[0][2]["boxes"]))
    second[0][1][:] = 0


def test_a_region_is_used_again_only_when_none_of_its_arrays_exists():
    pair = Pair()
    pair.send(value_of(0))
    kept = [pair.send(value_of(seed))[0] for seed in range(4)]
    assert all(equal(value, value_of(seed)) for seed, value in enumerate(kept))
    assert pair.memory._end == 4 * pair.memory._size
    boxes = kept[1][0][2]["boxes"][2:]
    del kept[0:2]  # one of their arrays is still in use
    kept += [pair.send(value_of(seed))[0] for seed in (4, 5)]
    assert pair.memory._end == 5 * pair.memory._size
    assert np.array_equal(boxes, value_of(1)[0][2]["boxes"][2:])
    assert all(equal(value, value_of(seed)) for seed, value in zip((2, 3, 4, 5), kept, strict=True))
    del kept, boxes
    for seed in range(9):
        pair.send(value_of(seed))
    assert pair.memory._end == 5 * pair.memory._size


def test_larger_objects_get_larger_regions_and_small_ones_need_none():
    pair = Pair()
    pair.send(value_of(0))
    before = pair.memory._end
    larger, shared = pair.send(value_of(1, 500))
    assert equal(larger, value_of(1, 500)) and not shared
    larger, shared = pair.send(value_of(2, 500))
    assert equal(larger, value_of(2, 500)) and shared and pair.memory._end > before
    small, shared = pair.send(value_of(3, 8))
    assert equal(small, value_of(3, 8)) and not shared
