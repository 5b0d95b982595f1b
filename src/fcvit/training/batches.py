"""Split an optimizer step into micro-batches over processes, and order the samples of an epoch."""

import dataclasses
from collections.abc import Generator

import numpy as np

from fcvit.data.loader import Batch, Dataset, Transform, Workers, batches
from fcvit.errors import UsageError


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

    def numbers(self, steps: int) -> list[int]:
        """Return the numbers of this process's micro-batches. Micro-batch i of a step has number `step * total + i`."""
        mine = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        return [step * self.total + number for step in range(steps) for number in mine]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of steps per epoch.

    The last, incomplete batch is dropped, as in the authors' training. Each epoch drops other images.

    Raises:
        UsageError: There are fewer images than a batch needs.
    """
    if images < batch_size:
        raise UsageError(
            f"batch_size {batch_size}: there are only {images} training images; choose a smaller batch_size"
        )
    return images // batch_size


def epoch_batches(
    dataset: Dataset, seed: int, epoch: int, transform: Transform, micro_batches: MicroBatches, workers: "int | Workers"
) -> Generator[Batch]:
    """Yield this process's micro-batches of an epoch.

    The order of the samples is a permutation that follows from the seed and the epoch. A transform seeds its random
    draws with the position of a sample in this order.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
    steps = steps_per_epoch(len(dataset), micro_batches.batch_size)
    shuffled = dataset.take(order[: steps * micro_batches.batch_size].tolist())
    yield from batches(shuffled, micro_batches.numbers(steps), micro_batches.images, [transform], workers)
