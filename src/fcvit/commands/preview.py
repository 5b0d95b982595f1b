"""Draw a picture of augmented training images (`fcvit train --preview`)."""

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcvit.data.loader import Batch, Dataset, stack
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import UsageError
from fcvit.report.sample_grid import sample_grid
from fcvit.tasks.base import TrainingTask, get_task
from fcvit.tasks.recipe import Recipe
from fcvit.weights.reading import read_weights
from fcvit.weights.writing import staged


@dataclasses.dataclass(frozen=True)
class Preview:
    """The written picture of training images."""

    path: Path

    def tables(self) -> Iterator[str]:
        yield f"written to {self.path}"


def draw_preview(recipe: Recipe, path: str | os.PathLike[str], *, images: int = 6, versions: int = 6) -> Preview:
    """Draw training images next to their augmented versions, with the labels of pixels, in several epochs.

    The images of the picture form one batch. Crops, operations, mixing and erasing are those of the recipe.

    Args:
        recipe: A training recipe.
        path: New picture file. The extension selects the format, for example .png.
        images: Number of images (rows), at least 1, evenly sampled from the training images.
        versions: Number of epochs (columns), at least 1.

    Raises:
        UsageError: A number is out of range, or the file already exists.
        FcvitError: The data, classes and weights do not match, or an image cannot be read.
    """
    if images < 1 or versions < 1:
        raise UsageError(f"a preview of {images} images in {versions} versions: expected at least 1 of each")
    weights = read_weights(recipe.weights, recipe.ema) if recipe.weights else None
    task = get_task(recipe.task).training(recipe, weights)
    positions = np.linspace(0, len(task.train) - 1, min(images, len(task.train))).round().astype(int)
    chosen = task.train.take(positions.tolist())
    read = getattr(task.transform(0), "decode", decode)
    originals = [
        read(io.BytesIO(location.read()), name) for name, location in zip(chosen.names, chosen.locations, strict=True)
    ]
    inputs = [_inputs(task, chosen, originals, epoch) for epoch in range(versions)]
    height, width = inputs[0][0].shape[1:3]
    epochs = [map(Image.fromarray, task.draw(*one)) for one in inputs]
    rows = [*zip(chosen.names, originals, map(list, zip(*epochs, strict=True)), strict=True)]
    grid = sample_grid(rows, f"{len(rows)} training images and the network inputs at {width} x {height} pixels")
    target = Path(path)
    with staged(target) as temporary:
        try:
            grid.save(temporary)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{target}: the extension is not a picture format; use for example .png") from error
    return Preview(target)


def _inputs(
    task: TrainingTask, chosen: Dataset, originals: Sequence[Image.Image], epoch: int
) -> tuple[np.ndarray, Any]:
    """Return the network's inputs of an epoch as visible pixels, uint8 (B, H, W, 3), and their targets."""
    transform = task.transform(epoch)
    samples = [transform(*one, index) for index, one in enumerate(zip(originals, chosen.targets, strict=True))]
    pixels, targets = zip(*samples, strict=True)
    batch = Batch(0, np.arange(len(originals)), (), (stack(pixels),), ([*targets],), ())
    images, targets = task.inputs(batch, epoch)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (task.preprocessing.mean, task.preprocessing.std))
    visible = (255 * (images.normalized() * std + mean)).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(visible.transpose(0, 2, 3, 1)), targets
