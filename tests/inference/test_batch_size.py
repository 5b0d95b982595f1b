"""The batch size that fits: doubled until something stops it."""

import pytest

from fcvit.inference import batch_size
from fcvit.inference.batch_size import fitting_batch_size
from fcvit.machine import available_memory


class Clock:
    """Time passes only while an engine computes."""

    now = 0.0

    @classmethod
    def perf_counter(cls):
        return cls.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(batch_size, "time", Clock)
    monkeypatch.setattr(Clock, "now", 0.0)


class Engine:
    """Takes a fixed time for a batch and a little for each image, and breaks above a size."""

    def __init__(self, limit=10_000, error=MemoryError, each=0.0):
        self.limit, self.error, self.each, self.seen = limit, error, each, []

    def __call__(self, images):
        self.seen.append(len(images))
        if len(images) > self.limit:
            raise self.error
        Clock.now += 0.02 + self.each * len(images)


def test_it_doubles_to_the_largest_that_is_tried():
    engine = Engine()
    size, reason = fitting_batch_size([(engine, 4)])
    assert size == 512 and sorted(set(engine.seen)) == [8, 16, 32, 64, 128, 256, 512] and "the largest" in reason


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("CUDA out of memory")])
def test_it_stays_below_what_does_not_fit(error):
    size, reason = fitting_batch_size([(Engine(100, error), 4)])
    assert size == 64 and "128 does not fit" in reason and reason.startswith("64 images at a time")


def test_other_errors_are_not_taken_for_a_full_memory():
    with pytest.raises(RuntimeError, match="broken"):
        fitting_batch_size([(Engine(100, RuntimeError("broken")), 4)])
    with pytest.raises(MemoryError):  # not even the smallest fits
        fitting_batch_size([(Engine(4), 4)])


def test_it_stops_where_more_is_no_faster():
    size, reason = fitting_batch_size([(Engine(each=0.02), 4)])
    assert size < 64 and "no faster" in reason


def test_it_leaves_half_of_the_memory(monkeypatch):
    peaks = iter(range(0, 10_000, 100))
    monkeypatch.setattr(batch_size, "peak_memory", lambda: next(peaks))
    monkeypatch.setattr(batch_size, "available_memory", lambda: 300)
    size, reason = fitting_batch_size([(Engine(), 4)])
    assert size == 8 and "16 would take more than half" in reason


def test_the_memory_of_this_machine():
    assert 1 << 20 < available_memory() <= 1 << 62
