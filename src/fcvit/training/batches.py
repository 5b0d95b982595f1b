"""Split an optimizer step into micro-batches over processes, and order the samples of an epoch."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import numpy as np

from fcvit.data.loader import Batch, Dataset, Transform, Workers, batches
from fcvit.errors import UsageError
from fcvit.machine import own_threads

_AHEAD = 2  # prepared batches that wait for the network
_OBSERVED = 30.0  # seconds of training after which a note may say that the network waits for images
_WAITING = 0.1  # share of the time, from which on there is a note
Inputs = TypeVar("Inputs")
logger = logging.getLogger("fcvit")


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of an optimizer step: each process computes `accumulate` of them in sequence.

    The result depends only on the number of micro-batches per step, not on which process computes them.

    Raises:
        UsageError: The batch size is not divisible, or a micro-batch would have fewer than two images.
    """

    batch_size: int
    processes: int = 1
    rank: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.total:
            raise UsageError(
                f"batch_size {self.batch_size} is not divisible by {self.total}, the number of micro-batches per step "
                f"({self.processes} processes x accumulate {self.accumulate}); choose a multiple of it"
            )
        if self.images < 2:
            raise UsageError(
                f"batch_size {self.batch_size} leaves {self.images} image in each of {self.total} micro-batches, but "
                "BatchNorm needs at least two; choose a larger batch_size"
            )

    @property
    def total(self) -> int:
        """Return the number of micro-batches per step over all processes."""
        return self.processes * self.accumulate

    @property
    def images(self) -> int:
        """Return the number of images in a micro-batch."""
        return self.batch_size // self.total

    def numbers(self, steps: int, first: int = 0) -> list[int]:
        """Return the numbers of this process's micro-batches, from the step `first` on.

        Micro-batch i of a step has number `step * total + i`.
        """
        mine = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        return [step * self.total + number for step in range(first, steps) for number in mine]


def steps_in_pass(images: int, batch_size: int) -> int:
    """Return the number of steps in one pass over the images, which is an epoch unless the recipe sets its steps.

    The last, incomplete batch is dropped, as in the authors' training. Each epoch drops other images.

    Raises:
        UsageError: There are fewer images than a batch needs.
    """
    if images < batch_size:
        raise UsageError(
            f"batch_size {batch_size}: there are only {images} training images; choose a smaller batch_size"
        )
    return images // batch_size


def epoch_order(images: int, seed: int, epoch: int, batch_size: int, steps: int | None = None) -> np.ndarray:
    """Return the positions of an epoch's samples in the data set, in order.

    By default an epoch is one pass: a permutation that follows from the seed and the epoch. With a number of steps,
    passes follow each other without a gap, and the epoch is its part of this sequence. An epoch can then be shorter or
    longer than a pass, and all samples are used equally often.

    Args:
        images: Number of samples.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        batch_size: Samples per step.
        steps: Steps per epoch, or None for one pass.
    """
    used = (steps or steps_in_pass(images, batch_size)) * batch_size
    first = epoch * used if steps else epoch * images
    passes = range(first // images, -(-(first + used) // images))
    order = np.concatenate([np.random.default_rng([seed, number]).permutation(images) for number in passes])
    return order[first % images :][:used]


def grouped(order: Sequence[int], groups: Sequence[int], size: int) -> list[int]:
    """Reorder the samples of an epoch so that each micro-batch has samples of one group, such as one orientation.

    Samples of a group stay in their order, and so do the micro-batches by their last sample. Samples that do not fill a
    micro-batch of their group are at the end. mmdetection's GroupSampler repeats samples instead.

    Args:
        order: Positions of the samples in the data set (see `epoch_order`).
        groups: Group of each sample of the data set.
        size: Number of samples in a micro-batch.
    """
    waiting: dict[int, list[int]] = {}
    complete: list[int] = []
    for position in order:
        members = waiting.setdefault(groups[position], [])
        members.append(position)
        if len(members) == size:
            complete += members
            members.clear()
    return complete + [position for members in waiting.values() for position in members]


def epoch_batches(
    dataset: Dataset,
    seed: int,
    epoch: int,
    transform: Transform,
    micro_batches: MicroBatches,
    workers: "int | Workers",
    steps: int | None = None,
    groups: Sequence[int] | None = None,
    first: int = 0,
) -> Generator[Batch]:
    """Yield this process's micro-batches of an epoch from the step `first` on, in the order of `epoch_order`.

    With `groups`, the group of each sample of the data set, the order is changed by `grouped`. A transform seeds its
    random draws with the position of a sample in this order.
    """
    order: Any = epoch_order(len(dataset), seed, epoch, micro_batches.batch_size, steps)
    if groups is not None:
        order = grouped(order.tolist(), groups, micro_batches.images)
    shuffled = dataset.take(order)
    numbers = micro_batches.numbers(len(shuffled) // micro_batches.batch_size, first)
    yield from batches(shuffled, numbers, micro_batches.images, [transform], workers)


def prepared(
    loaded: Generator[Batch], prepare: Callable[[Batch], Inputs], in_thread: bool
) -> Generator[tuple[Batch, Inputs]]:
    """Yield each batch with the result of a function. The batches are closed with this generator.

    Args:
        loaded: The batches.
        prepare: The function. Its result must depend only on the batch.
        in_thread: Load and prepare two batches ahead in a thread, while the caller uses the batches before them.
            Otherwise, batches are loaded and prepared when the caller asks for them.
    """

    def following() -> tuple[Batch, Inputs] | None:
        batch = next(loaded, None)
        return None if batch is None else (batch, prepare(batch))

    with contextlib.ExitStack() as stack:
        stack.callback(loaded.close)
        if not in_thread:
            yield from iter(following, None)
            return
        thread = concurrent.futures.ThreadPoolExecutor(1, "fcvit-batches")
        stack.callback(thread.shutdown, cancel_futures=True)
        waiting = collections.deque(thread.submit(following) for _ in range(_AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(following))
            yield item


@dataclasses.dataclass
class WaitingTime:
    """The time that the network waits for images. A note reports once after 30 s that it is a tenth or more.

    Attributes:
        workers: Number of processes that decode images.
        waited, elapsed: Seconds that the network waited, and seconds of all steps except the first of each epoch, which
            also waits for the start of the processes.
    """

    workers: int
    waited: float = 0.0
    elapsed: float = 0.0
    _last: tuple[float, float] = (0.0, 0.0)

    def after_step(self, first: bool, waited: float) -> None:
        """Count a step.

        Args:
            first: Whether this is the first step of an epoch.
            waited: Seconds that the network waited since the beginning of the epoch.
        """
        now, observed = time.perf_counter(), self.elapsed
        if not first:
            self.elapsed += now - self._last[0]
            self.waited += waited - self._last[1]
        self._last = (now, waited)
        # Without workers, decoding is a part of each step, and processes for it would take cores from the network.
        limit = _WAITING if self.workers else 3 * _WAITING
        if observed < _OBSERVED <= self.elapsed and self.waited >= limit * self.elapsed:
            cores = own_threads()
            remedy = "store smaller images, or use a machine with more cores"
            if self.workers < cores:
                remedy = f"pass --workers {cores}, which is the number of cores, instead of {self.workers}"
            share = self.waited / self.elapsed
            logger.info(f"decoding limits the training: the network waits for images {share:.0%} of the time; {remedy}")
