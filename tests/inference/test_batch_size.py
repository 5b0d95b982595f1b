"""Tests of the search for a batch size that fits in memory."""

import pytest

from fcvit.inference import batch_size
from fcvit.inference.batch_size import fitting_batch_size
from fcvit.machine import available_memory


class Clock:
    """A clock that advances only while an engine computes."""

    now = 0.0

    @classmethod
    def perf_counter(cls):
        return cls.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(batch_size, "time", Clock)
    monkeypatch.setattr(Clock, "now", 0.0)


class Engine:
    """An engine with a fixed time per batch and per image, which fails above a batch size."""

    def __init__(self, limit=10_000, error=MemoryError, each=0.0):
        self.limit, self.error, self.each, self.seen = limit, error, each, []

    def __call__(self, images):
        self.seen.append(len(images))
        if len(images) > self.limit:
            raise self.error
        Clock.now += 0.02 + self.each * len(images)


def test_the_batch_size_doubles_up_to_the_largest():
    engine = Engine()
    size, reason = fitting_batch_size([(engine, 4)])
    assert size == 512 and sorted(set(engine.seen)) == [8, 16, 32, 64, 128, 256, 512] and "the largest" in reason


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("CUDA out of memory")])
def test_a_batch_size_that_does_not_fit_ends_the_search(error):
    size, reason = fitting_batch_size([(Engine(100, error), 4)])
    assert size == 64 and "128 does not fit" in reason and reason.startswith("64 ")


def test_other_errors_are_not_treated_as_out_of_memory():
    with pytest.raises(RuntimeError, match="broken"):
        fitting_batch_size([(Engine(100, RuntimeError("broken")), 4)])
    with pytest.raises(MemoryError):  # the smallest batch size does not fit
        fitting_batch_size([(Engine(4), 4)])


def test_a_batch_size_that_is_not_faster_ends_the_search():
    size, reason = fitting_batch_size([(Engine(each=0.02), 4)])
    assert size < 64 and "not faster" in reason


def test_half_of_the_free_memory_is_left(monkeypatch):
    peaks = iter(range(0, 10_000, 100))
    monkeypatch.setattr(batch_size, "peak_memory", lambda: next(peaks))
    monkeypatch.setattr(batch_size, "available_memory", lambda: 300)
    size, reason = fitting_batch_size([(Engine(), 4)])
    assert size == 8 and reason.startswith("8 ") and "16 " in reason and "memory" in reason


def test_the_available_memory_is_plausible():
    assert 1 << 20 < available_memory() <= 1 << 62
