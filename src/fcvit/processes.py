"""Exchange data between the processes of one job, started by Paddle's launcher on one or more machines.

The processes exchange bytes through Paddle's key-value store instead of its collectives. Gloo times out when a
process arrives 30 seconds after the others (Paddle 3.3.1), and an evaluation exchanges only a short message at the
beginning and the records at the end.
"""

import atexit
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fcvit import interrupts
from fcvit.errors import FcvitError, PeerLost, UsageError
from fcvit.frameworks import import_framework, paddle_place
from fcvit.heartbeats import STORE_ERRORS, Heartbeats, has_left, route, send_at_once
from fcvit.run_folder import TEMPORARY

PEER_TIMEOUT = 60.0  # seconds
_SHORTEST, _LONGEST = 5, 86_400  # seconds
_PIECE = 1 << 20  # a value of 60 MB broke the connection
_POLL = 0.02  # seconds
_HOSTED = 0.3  # seconds until the store is hosted; Paddle tries to connect only every three seconds
_LOOK = 1  # seconds between two looks whether a process has ended that others wait for
_APPEARS = 5  # seconds until a network file system shows a new file on another machine


class _Store:
    """Paddle's key-value store. Signals are delivered between its calls."""

    def __init__(self, store: Any):
        self._store = store

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def uninterrupted(*arguments: Any) -> Any:
            with interrupts.blocked():
                return call(*arguments)

        return uninterrupted


@dataclasses.dataclass
class Processes:
    """The processes of a job, seen from one process. All processes must make the same calls in the same order.

    Attributes:
        rank: Rank of this process, 0 to `count` - 1.
        count: Number of processes.
        machines: Number of machines.
    """

    rank: int = 0
    count: int = 1
    _store: Any = None
    _heartbeats: Heartbeats | None = None
    machines: int = 1
    _calls: int = 0
    _meetings: int = 0
    _sent: list[str] = dataclasses.field(default_factory=list)  # keys that other processes may not have read yet

    @property
    def first(self) -> bool:
        """Return whether this is the process with rank 0, which reports for all processes."""
        return self.rank == 0

    def broadcast(self, value: bytes) -> bytes:
        """Return the first process's value in every process. The other processes wait for it."""
        if self.count == 1:
            return value
        key = self._key()
        with self._translated():
            if self.first:
                self._sent += self._put(key, value)
                return value
            return self._take(key, 0)[0]

    def gather(self, value: bytes) -> list[bytes]:
        """Return the values of all processes by rank in the first process, and an empty list in all others."""
        if self.count == 1:
            return [value]
        key = self._key()
        with self._translated():
            if not self.first:
                self._put(f"{key}/{self.rank}", value)
                return []
            values = [value]
            for rank in range(1, self.count):
                taken, pieces = self._take(f"{key}/{rank}", rank)
                values.append(taken)
                self._sent += pieces
            # All processes have now read everything sent before. Without this, a long training would fill the store.
            for piece in self._sent:
                self._store.set(piece, b"")
        self._sent.clear()
        return values

    def init_collectives(self) -> None:
        """Prepare `all_reduce`. The network interface is the one on the route to the first process's machine."""
        address, _ = _master()
        _, interface = route(address)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self.meet()
        with self._translated():
            import_framework("paddle").distributed.init_parallel_env()

    def meet(self) -> None:
        """Wait until all processes call this. A signal or a lost process interrupts the wait."""
        if self.count == 1:
            return
        self._meetings += 1
        expected = self._meetings * self.count
        with self._translated():
            self._store.add("fcvit/meetings", 1)
            self._wait(lambda: self._store.add("fcvit/meetings", 0) >= expected, range(self.count), 0.001)

    def all_reduce(self, tensor: Any) -> None:
        """Replace a tensor of Paddle by its sum over all processes.

        Gloo gives up 30 seconds after the first process has called it, and Paddle 3.3.1 cannot change this limit. On a
        CPU the processes therefore wait for each other before.
        """
        if tensor.place.is_cpu_place():
            self.meet()
        with self._translated():
            import_framework("paddle").distributed.all_reduce(tensor)

    def share(self, folder: Path) -> bool:
        """Return whether all processes see the same folder. It exists in the first process."""
        if self.machines == 1:
            return True
        name = self.broadcast(f"{TEMPORARY}shared-{os.getpid()}".encode() if self.first else b"").decode()
        try:
            if self.first:
                (folder / name).touch()
            self.broadcast(b"")  # wait until the file is written
            for _ in range(int(_APPEARS / _POLL)):
                if seen := (folder / name).exists():
                    break
                time.sleep(_POLL)
            answers = self.gather(b"yes" if seen else b"no")
        finally:
            if self.first:
                (folder / name).unlink(missing_ok=True)
        return self.broadcast(b"no" if b"no" in answers else b"yes") == b"yes"

    def resume_with(self, command: str) -> None:
        """Set the command that continues the run, for the message about a lost process."""
        if self._heartbeats is not None:
            self._heartbeats.remedy = f"resume with: {command} (in all processes)"

    def leave(self, error: str = "") -> None:
        """Tell the other processes that this one ends, and with which error message if it failed."""
        if self._heartbeats is not None:
            self._heartbeats.leave(error)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise errors of the store and of collectives as a loss of the process that caused them.

        Raises:
            PeerLost: Always instead of these errors.
        """
        try:
            yield
        except FcvitError:
            raise
        except STORE_ERRORS as error:
            loss = self._heartbeats.wait_for_loss() if self._heartbeats else None
            raise loss or self._loss(f"the connection to the other processes failed: {error}") from error

    def _loss(self, reason: str) -> PeerLost:
        return PeerLost(f"{reason}; {self._heartbeats.remedy}" if self._heartbeats else reason)

    def _wait(self, ready: Callable[[], bool], sources: Iterable[int], poll: float) -> None:
        """Wait for processes. The store's own wait has a time limit, but other processes may need hours.

        Raises:
            PeerLost: A process was lost, or has ended so that it will never be ready.
        """
        looked = time.monotonic()
        while not ready():
            interrupts.check()
            time.sleep(poll)
            if time.monotonic() - looked > _LOOK:
                looked = time.monotonic()
                ended = [rank for rank in sources if has_left(self._store, rank)]
                if ended and not ready():
                    raise self._loss(f"process {ended[0]} has already ended")

    def _key(self) -> str:
        self._calls += 1
        return f"fcvit/{self._calls}"

    def _put(self, key: str, value: bytes) -> list[str]:
        """Store a value in pieces, and return the keys of the pieces."""
        pieces = [f"{key}/{number}" for number in range(-(-len(value) // _PIECE))]
        for number, piece in enumerate(pieces):
            self._store.set(piece, value[number * _PIECE : (number + 1) * _PIECE])
        self._store.add(f"{key}/pieces", len(pieces) + 1)
        return pieces

    def _take(self, key: str, source: int) -> tuple[bytes, list[str]]:
        """Wait for a value that another process stores, and return it with the keys of its pieces."""
        self._wait(lambda: self._store.add(f"{key}/pieces", 0) > 0, [source], _POLL)
        count = self._store.add(f"{key}/pieces", 0)
        pieces = [f"{key}/{number}" for number in range(count - 1)]
        return b"".join(self._store.get(piece) for piece in pieces), pieces

    def device(self, name: str) -> str:
        """Return the device of this process. Under the launcher, `auto` and `gpu` mean the GPU assigned by it.

        Raises:
            UsageError: The same GPU is requested in all processes.
        """
        if self.count == 1:
            return name
        if name.startswith("gpu:"):
            raise UsageError(f"--device {name} in {self.count} processes: expected auto, cpu or gpu (one GPU for each)")
        if paddle_place(name) == "cpu":
            return name
        return f"gpu:{import_framework('paddle').distributed.ParallelEnv().device_id}"


_joined: list[Processes] = []


def join(peer_timeout: float = PEER_TIMEOUT) -> Processes:
    """Join the processes of `python -m paddle.distributed.launch`, or return a single process without the launcher.

    The first call joins. Later calls return the same object, so that training and the evaluations in it share one
    counter of calls.

    Args:
        peer_timeout: Seconds within which this process ends after another one was lost.

    Raises:
        UsageError: The time limit is out of range.
    """
    if not _SHORTEST <= peer_timeout <= _LONGEST:
        raise UsageError(f"--peer-timeout {peer_timeout:g}: expected {_SHORTEST} to {_LONGEST} seconds")
    if not _joined:
        _joined.append(_join(peer_timeout))
    return _joined[0]


def report(error: str) -> None:
    """Tell the other processes of the launcher that this one fails, also if it has not joined them yet."""
    if _count() > 1:
        with contextlib.suppress(Exception):  # this process already reports an error
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the launcher: this process is ending already
            join().leave(error)


def _join(peer_timeout: float) -> Processes:
    count = _count()
    if count == 1:
        return Processes()
    core = import_framework("paddle").base.core
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    if rank:  # only the first process shows notes
        logging.getLogger("fcvit").setLevel(logging.WARNING)
    address, port = _master()

    def connect() -> Any:
        if rank == 0:
            time.sleep(_HOSTED)
        store = core.TCPStore(address, port, False, 0)
        send_at_once((address, port))
        return store

    host = f"{socket.gethostname()} ({route(address)[0]})"
    heartbeats = Heartbeats(connect, rank, count, peer_timeout, address, host)
    heartbeats.start()
    os.environ.setdefault("PADDLE_PG_TIMEOUT", str(int(peer_timeout * 1000)))  # of NCCL, in milliseconds
    store = core.create_or_get_global_tcp_store()
    send_at_once((address, port))
    job = Processes(rank, count, _Store(store), heartbeats, int(os.environ.get("PADDLE_NNODES") or 1))
    # An uncaught error of a Python program that calls this package is in `sys.last_value`.
    atexit.register(lambda: job.leave(repr(error) if (error := getattr(sys, "last_value", None)) else ""))
    return job


def _count() -> int:
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)


def _master() -> tuple[str, int]:
    """Return address and port of the launcher's store."""
    address, port = os.environ["PADDLE_MASTER"].split(":")
    return socket.gethostbyname(address), int(port)
