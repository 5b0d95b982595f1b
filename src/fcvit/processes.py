"""Several processes, perhaps on several machines, that Paddle's launcher started for one job.

They exchange bytes through the key-value store that Paddle opens among them, not through its
collectives: gloo gives up on a process that comes 30 seconds later than the others (Paddle 3.3.1), and
the evaluation needs no more than a word at the beginning and the records at the end.
"""

import dataclasses
import functools
import logging
import os
import time
from typing import Any

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework, paddle_place

# A value of 60 MB broke the connection; small ones cost 40 ms each whatever their size.
_PIECE = 1 << 20
_POLL = 0.1  # seconds


@dataclasses.dataclass
class Processes:
    """Which process this is, 0 to `count` - 1, and how to reach the others.

    All of them must make the same calls in the same order.
    """

    rank: int = 0
    count: int = 1
    _store: Any = None
    _calls: int = 0
    _said: list[str] = dataclasses.field(default_factory=list)  # pieces that others may not have read yet

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def broadcast(self, value: bytes) -> bytes:
        """What the first process passed, in every process; the others wait for it."""
        if self.count == 1:
            return value
        key = self._key()
        if self.first:
            self._said += self._put(key, value)
            return value
        return self._take(key)[0]

    def gather(self, value: bytes) -> list[bytes]:
        """In the first process, what each one passed, in their order; in the others, nothing."""
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
            self._said += pieces
        # Whoever calls this has read everything before: a long training would fill the store.
        for piece in self._said:
            self._store.set(piece, b"")
        self._said.clear()
        return values

    def _key(self) -> str:
        self._calls += 1
        return f"fcvit/{self._calls}"

    def _put(self, key: str, value: bytes) -> list[str]:
        """Under which keys it was put."""
        pieces = [f"{key}/{number}" for number in range(-(-len(value) // _PIECE))]
        for number, piece in enumerate(pieces):
            self._store.set(piece, value[number * _PIECE : (number + 1) * _PIECE])
        self._store.add(f"{key}/pieces", len(pieces) + 1)
        return pieces

    def _take(self, key: str) -> tuple[bytes, list[str]]:
        """What was put, and under which keys."""
        while not (count := self._store.add(f"{key}/pieces", 0)):
            time.sleep(_POLL)  # the store's own waiting has a time limit; others may take hours
        pieces = [f"{key}/{number}" for number in range(count - 1)]
        return b"".join(self._store.get(piece) for piece in pieces), pieces

    def device(self, name: str) -> str:
        """The device of this process: under the launcher `auto` and `gpu` are the GPU that it gave to it.

        Raises:
            UsageError: the same GPU is asked for in all processes.
        """
        if self.count == 1:
            return name
        if name.startswith("gpu:"):
            raise UsageError(f"--device {name} in {self.count} processes: expected auto, cpu or gpu (its own for each)")
        if paddle_place(name) == "cpu":
            return name
        return f"gpu:{import_framework('paddle').distributed.ParallelEnv().device_id}"


@functools.cache
def join() -> Processes:
    """Meet the other processes of `python -m paddle.distributed.launch`; alone without it.

    Once and for all: a training that evaluates goes on counting its calls where it was.
    """
    count = int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)
    if count == 1:
        return Processes()
    store = import_framework("paddle").base.core.create_or_get_global_tcp_store()
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    if rank:  # the first process speaks for all
        logging.getLogger("fcvit").setLevel(logging.WARNING)
    return Processes(rank, count, store)
