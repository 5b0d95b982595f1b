"""End a process of a job when another one has failed, has stopped or cannot be reached.

Every process counts up a number in the launcher's key-value store. A thread does this, so a long step is no failure.
Process 0 hosts the store, watches the numbers of all others, and publishes the first failure there. The others check
this publication, and that the store answers. A process that fails leaves its own error message in the store.

Time counts only while this process runs. A process that was stopped and continues does not report the others.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fcvit import interrupts
from fcvit.errors import PeerLost

_LEFT, _FAILED = 1 << 40, 1 << 41  # added to the number of a process that ends
_LOST = "fcvit/lost"
_SLOW_START = 60  # seconds that processes may start one after the other, also with a shorter time limit
# What Paddle's store raises when the connection is closed.
STORE_ERRORS = (ValueError, RuntimeError, SystemError)

# Functions that record the reason before the process ends in the middle of a native call.
at_loss: list[Callable[[str], object]] = []


class Heartbeats:
    """The threads of one process that send its heartbeats and watch the other processes.

    Args:
        connect: Function that opens a connection to the store. Calls of another connection may block.
        rank: Rank of this process.
        count: Number of processes.
        timeout: Seconds within which this process ends after another one was lost.
        master: Address of the machine with process 0.
        host: Name of this machine in messages.

    Attributes:
        loss: The error about the first lost process.
        remedy: What to do after a loss, at the end of the message.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, count: int, timeout: float, master: str, host: str):
        self.loss: PeerLost | None = None
        self.remedy = "start the command again in all processes"
        self._connect, self._rank, self._count, self._host = connect, rank, count, host
        self._interval = min(1.0, timeout / 20)
        self._limit, self._grace = 0.6 * timeout, 0.2 * timeout  # the rest is for the exchange of messages
        self._hosts = {0: master}
        self._started: dict[int, int] = {}  # number of each other process
        self._silent = dict.fromkeys(range(1, count), 0.0)  # seconds since the last heartbeat of each other process
        self._rounds = 0
        self._leaving = threading.Event()
        self._error = ""
        self._beating = threading.Thread(target=self._beat, name="fcvit-heartbeats", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="fcvit-watch", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        self._beating.start()
        self._watching.start()

    def wait_for_loss(self) -> PeerLost | None:
        """Return the error about a lost process, and wait for it if necessary."""
        for _ in range(int((self._limit + self._grace) / self._interval)):
            if self.loss is not None:
                break
            time.sleep(self._interval)
        return self.loss

    def leave(self, error: str = "") -> None:
        """Tell the other processes that this one ends. Process 0 waits for the others, because it hosts the store.

        Args:
            error: Error message of this process if it failed.
        """
        if self._leaving.is_set():
            return
        self._error = error
        self._leaving.set()
        waits_for_all = self._rank == 0 and not error
        self._beating.join(None if waits_for_all else self._grace)

    def _beat(self) -> None:
        with interrupts.blocked():  # the main thread receives the signals
            self._connect_and_exchange()

    def _connect_and_exchange(self) -> None:
        try:
            store = self._connect()
            store.set(f"fcvit/host/{self._rank}", self._host.encode())
            if self._rank:
                self._hosts[0] = store.get("fcvit/host/0").decode()
            self._exchange(store)
        except STORE_ERRORS:  # the end of process 0, which is normal after this process has left
            if not self._leaving.is_set():
                self._lose(f"process 0 on {self._hosts[0]} cannot be reached")

    def _exchange(self, store: Any) -> None:
        """Send heartbeats and read those of the others until this process ends."""
        key, told = f"fcvit/beat/{self._rank}", False
        clock = _Clock(self._interval)
        while True:
            leaving = self._leaving.is_set()
            if self._rank:
                if leaving:
                    store.set(f"fcvit/error/{self._rank}", self._error.encode())
                    store.add(key, _FAILED if self._error else _LEFT)
                    while not self._error:
                        # Until process 0 ends: the store's server rarely aborts when a connection is closed.
                        time.sleep(self._interval)
                        store.add(key, 0)
                    return
                store.add(key, 1)
                if self.loss is None and store.add(_LOST, 0):
                    self._lose(store.get(f"{_LOST}/reason").decode())
            else:
                if leaving and not told:
                    told = True
                    if self._error:
                        self._publish(store, f"process 0 on {self._host} failed: {self._error}")
                    store.add(key, _FAILED if self._error else _LEFT)
                if not self._others_running(store, clock.passed()) and leaving:
                    return
            self._rounds += 1
            if leaving:
                time.sleep(self._interval)
            else:
                self._leaving.wait(self._interval)

    def _others_running(self, store: Any, passed: float) -> bool:
        """Read the numbers of all other processes, and publish the first failure. Return whether any still runs.

        Args:
            store: The connection.
            passed: Seconds since the last call.
        """
        for rank in tuple(self._silent):
            number = store.add(f"fcvit/beat/{rank}", 0)
            if number >= _LEFT:
                del self._silent[rank]
                if number >= _FAILED:
                    host, error = (store.get(f"fcvit/{key}/{rank}").decode() for key in ("host", "error"))
                    self._publish(store, f"process {rank} on {host} failed: {error}")
            elif number != self._started.get(rank, 0):
                self._started[rank], self._silent[rank] = number, 0.0
            else:
                self._silent[rank] += passed
                if self._silent[rank] > (self._limit if number else max(self._limit, _SLOW_START)):
                    del self._silent[rank]
                    host = f" on {store.get(f'fcvit/host/{rank}').decode()}" if number else ""
                    reason = f"no heartbeat for {self._limit:.0f} s; it was killed, is stopped or cannot be reached"
                    self._publish(store, f"process {rank}{host}: {reason if number else 'it has not started'}")
        return bool(self._silent)

    def _publish(self, store: Any, reason: str) -> None:
        if self.loss is None:
            store.set(f"{_LOST}/reason", reason.encode())
            store.add(_LOST, 1)
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        self.loss = PeerLost(f"{reason}; {self.remedy}")
        interrupts.raise_later(self.loss)

    def _watch(self) -> None:
        """Notice that the store does not answer. End the process if its main thread does not, after a loss."""
        stalled = waited = 0.0
        rounds = 0
        clock = _Clock(self._interval)
        while not self._leaving.wait(self._interval):
            passed = clock.passed()
            if self.loss is not None:
                waited += passed
                if waited > self._grace:
                    self._end_process()
            elif self._rounds != rounds:
                stalled, rounds = 0.0, self._rounds
            else:
                stalled += passed
                if stalled > (self._limit if rounds else max(self._limit, _SLOW_START)):
                    self._lose(f"process 0 on {self._hosts[0]} cannot be reached for {self._limit:.0f} s")

    def _end_process(self) -> None:
        """End the process while its main thread is in a native call that does not return, such as a collective."""
        for record in at_loss:
            try:
                record(str(self.loss))
            except Exception:  # the process must end, also with a full disk
                continue
        os.write(2, f"fcvit: {self.loss}\n".encode(errors="backslashreplace"))
        os._exit(PeerLost.exit_code)


class _Clock:
    """Measure the time between calls, without the time in which this process was stopped."""

    def __init__(self, interval: float):
        self._longest, self._last = 3 * interval, time.monotonic()

    def passed(self) -> float:
        """Return the seconds since the last call, at most three intervals."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, self._longest), now
        return passed


def has_left(store: Any, rank: int) -> bool:
    """Return whether a process has ended without an error."""
    return _LEFT <= store.add(f"fcvit/beat/{rank}", 0) < _FAILED


def route(address: str) -> tuple[str, str | None]:
    """Return this machine's address on the route to another one, and the name of its network interface if known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _interface_address(probe, name) == own:
                return own, name
    return own, None


def _interface_address(any_socket: socket.socket, name: str) -> str | None:
    """Return the IPv4 address of a network interface, on Linux."""
    import fcntl

    request = name.encode()[:15].ljust(256, b"\0")
    try:
        return socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), 0x8915, request)[20:24])  # SIOCGIFADDR
    except OSError:  # an interface without an address
        return None


def send_at_once(address: tuple[str, int]) -> None:
    """Turn off Nagle's algorithm for the connections of this process to an address.

    Paddle's store writes a request in small pieces. Each call then waits 44 ms for the acknowledgement of the first
    piece, instead of 0.1 ms.
    """
    try:
        numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
    except OSError:  # not on Linux
        return
    for number in numbers:
        try:
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.type == socket.SOCK_STREAM and connection.getpeername() == address:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:  # not a connected socket
            continue
