"""Exchange data between the processes of one job, started by Paddle's launcher on one or more machines.

The processes exchange bytes through Paddle's key-value store instead of its collectives. Gloo times out when a
process arrives 30 seconds after the others (Paddle 3.3.1), and an evaluation exchanges only a short message at the
beginning and the records at the end.
"""

import dataclasses
import functools
import logging
import os
import time
from typing import Any

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework, paddle_place

# A value of 60 MB broke the connection. Small values take 40 ms each, independent of their size.
_PIECE = 1 << 20
_POLL = 0.1  # seconds


@dataclasses.dataclass
class Processes:
    """The processes of a job, seen from one process. All processes must make the same calls in the same order.

    Attributes:
        rank: Rank of this process, 0 to `count` - 1.
        count: Number of processes.
    """

    rank: int = 0
    count: int = 1
    _store: Any = None
    _calls: int = 0
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
        if self.first:
            self._sent += self._put(key, value)
            return value
        return self._take(key)[0]

    def gather(self, value: bytes) -> list[bytes]:
        """Return the values of all processes by rank in the first process, and an empty list in all others."""
        if self.count == 1:
            return [value]
        key = self._key()
        if not self.first:
            self._put(f"{key}/{self.rank}", value)
            return []
        values = [value]
        for rank in range(1, self.count):
            taken, pieces = self._take(f"{key}/{rank}")
            values.append(taken)
            self._sent += pieces
        # All processes have now read everything sent before. Without this, a long training would fill the store.
        for piece in self._sent:
            self._store.set(piece, b"")
        self._sent.clear()
        return values

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

    def _take(self, key: str) -> tuple[bytes, list[str]]:
        """Wait for a stored value, and return it with the keys of its pieces."""
        while not (count := self._store.add(f"{key}/pieces", 0)):
            time.sleep(_POLL)  # the store's own wait has a time limit, but other processes may need hours
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


@functools.cache
def join() -> Processes:
    """Join the processes of `python -m paddle.distributed.launch`, or return a single process without the launcher.

    The result is cached, so that training and the evaluations in it share one counter of calls.
    """
    count = int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)
    if count == 1:
        return Processes()
    store = import_framework("paddle").base.core.create_or_get_global_tcp_store()
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    if rank:  # only the first process shows notes
        logging.getLogger("fcvit").setLevel(logging.WARNING)
    return Processes(rank, count, store)
