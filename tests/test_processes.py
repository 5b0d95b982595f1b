"""Test the exchange between processes and their heartbeats with a fake store, in threads of one process.

The tests of evaluation, training and several machines use Paddle's store.
"""

import contextlib
import threading
import time

import pytest

from fcvit import heartbeats, interrupts, processes
from fcvit.errors import PeerLost, UsageError
from fcvit.heartbeats import Heartbeats, at_loss, route
from fcvit.processes import Processes, join


class Store:
    """A replacement of Paddle's store with the methods set, get and add, and a size limit for values."""

    def __init__(self):
        self.values, self.counts, self.lock = {}, {}, threading.Lock()

    def set(self, key, value):
        assert len(value) <= 1 << 20
        self.values[key] = bytes(value)

    def get(self, key):
        while key not in self.values:
            time.sleep(0.001)
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


LIMIT = 1.0  # seconds


class Connection(Store):
    """A connection of one process to a store. It can be cut, and it can stop answering."""

    def __init__(self, store):
        self.store, self.cut, self.silent = store, False, threading.Event()
        self.silent.set()

    def __getattribute__(self, name):
        if name in ("set", "get", "add"):
            if self.cut:
                raise ValueError("TCP send error")
            self.silent.wait()
            return getattr(self.store, name)
        return super().__getattribute__(name)


@pytest.fixture
def job(monkeypatch):
    """Start three processes with heartbeats, and return them with their connections."""
    raised = []
    monkeypatch.setattr(interrupts, "_raised", raised)
    monkeypatch.setattr(heartbeats, "_SLOW_START", 0)
    monkeypatch.setattr(heartbeats.os, "_exit", lambda code: ended.append(code) or threading.Event().wait(5))
    ended = []
    store = Store()
    connections = [Connection(store) for _ in range(3)]
    started = [
        Heartbeats(lambda c=connection: c, rank, 3, LIMIT, "10.77.0.1", f"node-{rank}")
        for rank, connection in enumerate(connections)
    ]
    for peer in started:
        peer.start()
    yield started, connections, ended
    for peer, connection in zip(started[::-1], connections[::-1], strict=True):
        connection.silent.set()
        peer.loss = peer.loss or PeerLost("the test has ended")  # a thread that ends later must not report a loss
        peer.leave("end of the test")


def losses(peers):
    return [str(peer.wait_for_loss()) for peer in peers]


@pytest.mark.slow
def test_a_process_that_stops_is_reported_by_all_others(job):
    peers, connections, _ = job
    peers[0].remedy = "resume with: fcvit resume run"
    time.sleep(LIMIT)
    assert [peer.loss for peer in peers] == [None] * 3
    connections[2].silent.clear()
    message, other = losses(peers[:2])
    assert message.startswith("process 2 on node-2: no heartbeat for 1 s; it was killed")
    assert message.endswith("; resume with: fcvit resume run") and other.partition(";")[0] == message.partition(";")[0]
    with pytest.raises(PeerLost, match=r"process [02] on node-"):  # process 2 sees no store
        interrupts.check()


def test_a_process_that_fails_leaves_its_message(job):
    peers, _, _ = job
    peers[1].leave("data: No such file (exit code 3)")
    expected = "process 1 on node-1 failed: data: No such file (exit code 3); start the command again in all processes"
    assert losses([peers[0], peers[2]]) == [expected] * 2


def test_the_first_process_leaves_its_message_before_the_store_ends(job):
    peers, _, _ = job
    peers[0].leave("the disk is full (exit code 3)")
    assert all(text.startswith("process 0 on node-0 failed: the disk is full") for text in losses(peers[1:]))


@pytest.mark.slow
def test_a_process_that_ends_early_is_not_lost(job):
    peers, _, _ = job
    peers[2].leave()
    time.sleep(LIMIT)
    assert peers[0].loss is peers[1].loss is None
    waiting = threading.Thread(target=peers[0].leave)
    waiting.start()
    time.sleep(LIMIT)
    assert waiting.is_alive(), "the first process hosts the store, so it waits for the others"
    assert peers[1].loss is None
    peers[1].leave()
    waiting.join(5)
    assert not waiting.is_alive()


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_is_a_loss(job):
    peers, connections, _ = job
    time.sleep(LIMIT)
    connections[1].cut = True
    connections[2].silent.clear()
    cut, silent = losses(peers[1:])
    assert cut.startswith("process 0 on node-0 cannot be reached;")
    assert silent.startswith("process 0 on node-0 cannot be reached for 1 s;")


@pytest.mark.slow
def test_a_process_in_a_native_call_ends_after_its_run_was_recorded(job, capfd):
    peers, _, ended = job
    reasons = []
    at_loss.extend([lambda _: 1 / 0, reasons.append])
    try:
        peers[1].leave("a reason")
        deadline = time.monotonic() + 5
        while len(ended) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        del at_loss[-2:]
    assert ended == [PeerLost.exit_code] * 2
    assert len(reasons) == 2 and reasons[0].startswith("process 1 on node-1 failed: a reason")
    assert f"fcvit: {reasons[0]}\n" in capfd.readouterr().err


def test_an_error_of_the_store_is_reported_as_the_loss_that_caused_it(job):
    peers, _, _ = job
    peers[2].leave("a reason")
    broken = Connection(Store())
    broken.cut = True
    with pytest.raises(PeerLost, match="process 2 on node-2 failed: a reason"):
        Processes(1, 3, broken, peers[1]).gather(b"")
    with pytest.raises(PeerLost, match="the connection to the other processes failed: TCP send error"):
        Processes(1, 3, broken).gather(b"")


def test_processes_meet_before_a_collective():
    late = []

    def work(job):
        for number in range(3):
            if job.rank == number:
                time.sleep(0.02)
                late.append(number)
            job.meet()
            assert late == list(range(number + 1)), "the others waited"
        return True

    results, _ = together(3, work)
    assert results == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_a_run_folder_on_one_machine_only_is_noticed(monkeypatch, tmp_path, shared):
    monkeypatch.setattr(processes, "_APPEARS", 0.3)

    def work(job):
        job.machines = 2
        folder = tmp_path / ("shared" if shared else str(job.rank))
        folder.mkdir(exist_ok=True)
        return job.share(folder)

    results, _ = together(2, work)
    assert results == [shared] * 2
    assert not [*tmp_path.glob("*/*"), *tmp_path.glob("*/.*")]


def test_the_network_interface_is_the_one_on_the_route():
    with contextlib.suppress(OSError):  # a machine without a loopback interface
        assert route("127.0.0.1") == ("127.0.0.1", "lo")


@pytest.mark.parametrize("seconds", [4.9, 1e9, float("nan")])
def test_a_time_limit_out_of_range_is_rejected(seconds):
    with pytest.raises(UsageError, match="expected 5 to 86400 seconds"):
        join(seconds)


def test_a_process_that_has_ended_is_not_waited_for(job, monkeypatch):
    monkeypatch.setattr(processes, "_LOOK", 0)
    peers, connections, _ = job
    for rank, waiting in ((1, 0), (0, 1)):
        threading.Thread(target=peers[rank].leave).start()
        exchange = Processes(waiting, 2, connections[waiting], peers[waiting])
        with pytest.raises(PeerLost, match=f"process {rank} has already ended; start the command again"):
            exchange._take("fcvit/1/missing", rank)
