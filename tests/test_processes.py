"""Test the exchange between processes with a fake store. The tests of evaluation and training use Paddle's launcher."""

import threading

import pytest

from fcvit import processes
from fcvit.errors import UsageError
from fcvit.processes import Processes, join


class Store:
    """A replacement of Paddle's store with the methods set, get and add, and a size limit for values."""

    def __init__(self):
        self.values, self.counts, self.lock = {}, {}, threading.Lock()

    def set(self, key, value):
        assert len(value) <= 1 << 20
        self.values[key] = bytes(value)

    def get(self, key):
        return self.values[key]

    def add(self, key, number):
        with self.lock:
            self.counts[key] = self.counts.get(key, 0) + number
            return self.counts[key]


def together(count, work):
    """Run `work(processes)` in `count` threads, and return the results by rank, and the store."""
    store, results = Store(), {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: work(Processes(rank, count, store))}))
        for rank in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[rank] for rank in range(count)], store


LARGE = bytes(range(256)) * 10_000  # is sent in three pieces


@pytest.mark.parametrize("count", [2, 3])
def test_values_are_broadcast_and_gathered(monkeypatch, count):
    monkeypatch.setattr(processes, "_POLL", 0.001)

    def work(job):
        values = [LARGE, b"", b"x" * (1 << 20)]
        received = [job.broadcast(value if job.first else b"ignored") for value in values]
        return received == values, job.gather(bytes([job.rank]) * (1 + job.rank * 700_000)), job.gather(b"")

    results, store = together(count, work)
    assert all(equal for equal, _, _ in results)
    assert results[0][1] == [bytes([rank]) * (1 + rank * 700_000) for rank in range(count)]
    assert sum(map(len, store.values.values())) == 0, "the store keeps values that all processes have read"
    assert results[0][2] == [b""] * count and all(rest[1:] == ([], []) for rest in results[1:])


def test_a_single_process():
    alone = Processes()
    assert alone.first and alone.broadcast(b"x") == b"x" and alone.gather(b"x") == [b"x"]
    assert join() == alone and alone.device("gpu:1") == "gpu:1"


def test_a_gpu_number_is_rejected_for_several_processes():
    with pytest.raises(UsageError, match="gpu:1 in 2 processes: expected auto, cpu or gpu"):
        Processes(1, 2, Store()).device("gpu:1")
