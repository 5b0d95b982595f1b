"""The order and view of every training image, and what the network gets of it."""

import dataclasses
from collections.abc import Generator

import numpy as np
from PIL import Image

from fcvit.data.class_folders import LabeledImages
from fcvit.data.loader import Batch, Workers, batches
from fcvit.data.transforms.augment import Augmentation, augment, erase, pixel_generator
from fcvit.data.transforms.mixing import mix
from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import UsageError
from fcvit.models.variants import Preprocessing, resolve_preprocessing
from fcvit.training.recipe import Recipe
from fcvit.weights.reading import Weights


def input_preprocessing(recipe: Recipe, weights: Weights | None) -> Preprocessing:
    """What the network is trained for: the recipe's wish, else the weights' own, else the variant's."""
    known = weights.preprocessing if weights is not None else None
    return resolve_preprocessing(recipe.preprocessing(), known, recipe.network())


@dataclasses.dataclass(frozen=True)
class Augmented:
    """The view of a training image (see `fcvit.data.loader.View`): decided by seed, epoch and place in it."""

    augmentation: Augmentation
    seed: int
    epoch: int

    @property
    def size(self) -> int:
        return self.augmentation.size

    def __call__(self, image: Image.Image, index: int, /) -> np.ndarray:
        return augment(image, self.augmentation, pixel_generator(self.seed, self.epoch, index, "augment"))


@dataclasses.dataclass(frozen=True)
class Division:
    """How a step is divided: each of `processes` takes `parts` of its images, one after the other.

    What is computed depends on the number of parts of a step alone, not on who does them.
    """

    batch_size: int
    processes: int = 1
    rank: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.slots:
            raise UsageError(
                f"batch_size {self.batch_size} is not divisible by {self.slots}, the parts of a step "
                f"({self.processes} processes times accumulate {self.parts})"
            )
        if self.images < 2:
            raise UsageError(
                f"batch_size {self.batch_size} in {self.slots} parts leaves {self.images} image a part; "
                "BatchNorm needs at least two"
            )

    @property
    def slots(self) -> int:
        """Parts of a step, over all processes."""
        return self.processes * self.parts

    @property
    def images(self) -> int:
        """Images of a part."""
        return self.batch_size // self.slots

    def numbers(self, steps: int) -> list[int]:
        """The parts of this process, in order; part `step * slots + slot` of the epoch."""
        mine = range(self.rank * self.parts, (self.rank + 1) * self.parts)
        return [step * self.slots + slot for step in range(steps) for slot in mine]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of an epoch; images that fill no batch are left out of it (others in each, as the authors do).

    Raises:
        UsageError: there are fewer images than a batch.
    """
    if images < batch_size:
        raise UsageError(f"batch_size {batch_size}: there are only {images} training images; choose a smaller one")
    return images // batch_size


def epoch_parts(
    images: LabeledImages, recipe: Recipe, size: int, epoch: int, division: Division, workers: int | Workers
) -> Generator[tuple[Batch, np.ndarray]]:
    """The parts of this process in an epoch, with their labels.

    The order is a permutation drawn from seed and epoch; the view of an image is drawn from its place in it.
    """
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(images))
    steps = steps_per_epoch(len(images), division.batch_size)
    shuffled = images.take(order[: steps * division.batch_size].tolist())
    labels = np.array(shuffled.labels, np.int64)
    view = Augmented(recipe.augmentation(size), recipe.seed, epoch)
    for batch in batches(shuffled, division.numbers(steps), division.images, [view], workers):
        yield batch, labels[batch.indices]


def network_input(
    batch: Batch, labels: np.ndarray, recipe: Recipe, preprocessing: Preprocessing, epoch: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mix, normalize, erase: float32 (B, 3, S, S) and targets (B, classes), as in the authors' pipeline."""
    generator = pixel_generator(recipe.seed, epoch, batch.number, "mix")
    pixels, targets = mix(
        batch.pixels[0],
        labels,
        num_classes,
        generator,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        switch=recipe.mix_switch,
        smoothing=recipe.label_smoothing,
    )
    images = normalize(pixels, preprocessing)
    if recipe.erasing:
        generators = [pixel_generator(recipe.seed, epoch, int(index), "erase") for index in batch.indices]
        erase(images, recipe.erasing, generators)
    return images, targets
