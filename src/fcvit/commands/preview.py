"""What a network is shown in training, as a picture."""

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcvit.data.loader import Batch, Dataset
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import UsageError
from fcvit.report.sample_sheet import sample_sheet
from fcvit.tasks.base import TrainingTask, get_task
from fcvit.weights.reading import read_weights
from fcvit.weights.writing import staged


@dataclasses.dataclass(frozen=True)
class Preview:
    """A picture of training images.

    Attributes:
        path: the file.
    """

    path: Path

    def tables(self) -> Iterator[str]:
        yield f"written to {self.path}"


def draw_preview(recipe: Any, path: str | os.PathLike[str], *, images: int = 6, versions: int = 6) -> Preview:
    """Draw training images, each beside what the network sees of it in as many epochs: crops, operations,
    mixing and erasing of the recipe. The images of the picture form one batch, to be mixed among themselves.

    Args:
        recipe: of a training.
        path: a new file; its ending says what kind (.png).
        images: rows, from 1, spread over the training images.
        versions: of each, from 1.

    Raises:
        UsageError: numbers out of range, or the file is there already.
        As `find_splits`, and BadImages where one cannot be read.
    """
    if images < 1 or versions < 1:
        raise UsageError(f"a preview of {images} images in {versions} versions: expected at least 1 of each")
    weights = read_weights(recipe.weights, recipe.ema) if recipe.weights else None
    task = get_task(recipe.task).training(recipe, weights)
    places = np.linspace(0, len(task.train) - 1, min(images, len(task.train))).round().astype(int)
    chosen = task.train.take(places.tolist())
    originals = [
        decode(io.BytesIO(place.read()), name) for name, place in zip(chosen.names, chosen.locations, strict=True)
    ]
    shown = [_seen(task, epoch, chosen, originals) for epoch in range(versions)]
    rows = [
        (name, original, [epoch[place] for epoch in shown])
        for place, (name, original) in enumerate(zip(chosen.names, originals, strict=True))
    ]
    size = task.preprocessing.input_size
    sheet = sample_sheet(rows, f"what the network sees of {len(rows)} training images, at {size} x {size} pixels")
    target = Path(path)
    with staged(target) as temporary:
        try:
            sheet.save(temporary)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{target}: the ending tells the kind of picture; expected .png") from error
    return Preview(target)


def _seen(task: TrainingTask, epoch: int, chosen: Dataset, originals: list[Image.Image]) -> list[Image.Image]:
    """Return the network's input in one epoch as images again; erasing and normalizing may leave the visible range."""
    transform = task.transform(epoch)
    samples = [transform(*one, index) for index, one in enumerate(zip(originals, chosen.targets, strict=True))]
    pixels = np.stack([pixels for pixels, _ in samples])
    batch = Batch(0, np.arange(len(originals)), (), (pixels,), ([target for _, target in samples],), ())
    inputs, _ = task.inputs(batch, epoch)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (task.preprocessing.mean, task.preprocessing.std))
    visible = (255 * (inputs * std + mean)).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in visible]
