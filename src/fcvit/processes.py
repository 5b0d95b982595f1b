"""Several processes, perhaps on several machines, that Paddle's launcher started for one job.

They exchange bytes through the key-value store that Paddle opens among them, not through its
collectives: gloo gives up on a process that comes 30 seconds later than the others (Paddle 3.3.1), and
the evaluation needs no more than a word at the beginning and the records at the end.
"""

import dataclasses
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
            self._put(key, value)
            return value
        return self._take(key)

    def gather(self, value: bytes) -> list[bytes]:
        """In the first process, what each one passed, in their order; in the others, nothing."""
        if self.count == 1:
            return [value]
        key = self._key()
        if not self.first:
            self._put(f"{key}/{self.rank}", value)
            return []
        return [value, *(self._take(f"{key}/{rank}") for rank in range(1, self.count))]

    def _key(self) -> str:
        self._calls += 1
        return f"fcvit/{self._calls}"

    def _put(self, key: str, value: bytes) -> None:
        pieces = [value[start : start + _PIECE] for start in range(0, len(value), _PIECE)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{key}/{number}", piece)
        self._store.add(f"{key}/pieces", len(pieces) + 1)

    def _take(self, key: str) -> bytes:
        while not (pieces := self._store.add(f"{key}/pieces", 0)):
            time.sleep(_POLL)  # the store's own waiting has a time limit; others may take hours
        return b"".join(self._store.get(f"{key}/{number}") for number in range(pieces - 1))

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


def join() -> Processes:
    """Meet the other processes of `python -m paddle.distributed.launch`; alone without it."""
    count = int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)
    if count == 1:
        return Processes()
    store = import_framework("paddle").base.core.create_or_get_global_tcp_store()
    return Processes(int(os.environ["PADDLE_TRAINER_ID"]), count, store)
