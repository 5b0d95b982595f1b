"""The micro-batches of an optimizer step, shared by processes, and the order of the samples in an epoch."""

import dataclasses
from collections.abc import Generator

import numpy as np

from fcvit.data.loader import Batch, Dataset, Transform, Workers, batches
from fcvit.errors import UsageError


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """The division of a step: each of `processes` takes `accumulate` micro-batches, one after the other.

    What is computed depends on the number of micro-batches of a step alone, not on who does them.

    Raises:
        UsageError: the batch size is not divisible, or leaves less than two images.
    """

    batch_size: int
    processes: int = 1
    rank: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.total:
            raise UsageError(
                f"batch_size {self.batch_size} is not divisible by {self.total}, the micro-batches of a step "
                f"({self.processes} processes times accumulate {self.accumulate})"
            )
        if self.images < 2:
            raise UsageError(
                f"batch_size {self.batch_size} in {self.total} micro-batches leaves {self.images} image for each; "
                "BatchNorm needs at least two"
            )

    @property
    def total(self) -> int:
        """Micro-batches of a step, over all processes."""
        return self.processes * self.accumulate

    @property
    def images(self) -> int:
        """Return the number of images of a micro-batch."""
        return self.batch_size // self.total

    def numbers(self, steps: int) -> list[int]:
        """Return the micro-batches of this process, in order; number `step * total + i` of the epoch."""
        mine = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        return [step * self.total + number for step in range(steps) for number in mine]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the steps of an epoch; images that fill no batch are left out (others in each epoch, as the authors do).

    Raises:
        UsageError: there are fewer images than a batch.
    """
    if images < batch_size:
        raise UsageError(f"batch_size {batch_size}: there are only {images} training images; choose a smaller one")
    return images // batch_size


def epoch_batches(
    dataset: Dataset, seed: int, epoch: int, transform: Transform, division: MicroBatches, workers: "int | Workers"
) -> Generator[Batch]:
    """Yield the micro-batches of this process in an epoch.

    The order is a permutation drawn from seed and epoch; a transform draws from a sample's position in it.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
    steps = steps_per_epoch(len(dataset), division.batch_size)
    shuffled = dataset.take(order[: steps * division.batch_size].tolist())
    yield from batches(shuffled, division.numbers(steps), division.images, [transform], workers)
