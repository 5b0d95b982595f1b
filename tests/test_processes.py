"""Values between processes, through a store as Paddle's launcher has it; the launcher itself is in tasks/."""

import threading

import pytest

from fcvit import processes
from fcvit.errors import UsageError
from fcvit.processes import Processes, join


class Store:
    """What Paddle's store does: set, get, add; a value must not be large."""

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
    """Run `work(processes)` in as many threads; their results by rank."""
    store, found = Store(), {}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: work(Processes(rank, count, store))}))
        for rank in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in range(count)], store


LARGE = bytes(range(256)) * 10_000  # three pieces


@pytest.mark.parametrize("count", [2, 3])
def test_values_reach_the_others(monkeypatch, count):
    monkeypatch.setattr(processes, "_POLL", 0.001)

    def work(some):
        values = [LARGE, b"", b"x" * (1 << 20)]
        heard = [some.broadcast(value if some.first else b"mine") for value in values]
        return heard == values, some.gather(bytes([some.rank]) * (1 + some.rank * 700_000)), some.gather(b"")

    found, store = together(count, work)
    assert all(heard for heard, _, _ in found)
    assert found[0][1] == [bytes([rank]) * (1 + rank * 700_000) for rank in range(count)]
    assert sum(map(len, store.values.values())) == 0, "the store keeps what all have read"
    assert found[0][2] == [b""] * count and all(rest[1:] == ([], []) for rest in found[1:])


def test_alone():
    alone = Processes()
    assert alone.first and alone.broadcast(b"x") == b"x" and alone.gather(b"x") == [b"x"]
    assert join() == alone and alone.device("gpu:1") == "gpu:1"


def test_one_gpu_is_not_shared_by_all():
    with pytest.raises(UsageError, match="its own for each"):
        Processes(1, 2, Store()).device("gpu:1")
