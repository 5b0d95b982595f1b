"""What a network is shown in training, as a picture."""

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcvit.data.labeled import LabeledImages
from fcvit.data.loader import Batch
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import UsageError
from fcvit.models.variants import Preprocessing
from fcvit.report.sample_sheet import sample_sheet
from fcvit.training.data import Augmented, find_splits, input_preprocessing, network_input
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
    """Draw training images, each beside what the network sees of it in as many epochs.

    The images of the picture form one batch: crops, operations, mixing and erasing are the recipe's.

    Args:
        recipe: of a training.
        path: a new .png file, or of another type of picture.
        images: number of rows, from 1, evenly spread over the training images.
        versions: number of epochs, from 1.

    Raises:
        UsageError: a number is out of range, or the file already exists.
        And what `find_splits` raises, and BadImages where an image cannot be read.
    """
    if images < 1 or versions < 1:
        raise UsageError(f"a preview of {images} images in {versions} versions: expected at least 1 of each")
    weights = read_weights(recipe.weights, recipe.ema) if recipe.weights else None
    splits = find_splits(recipe, weights)
    preprocessing = input_preprocessing(recipe, weights)
    places = np.linspace(0, len(splits.train) - 1, min(images, len(splits.train))).round().astype(int)
    chosen = splits.train.take(places.tolist())
    originals = [
        decode(io.BytesIO(place.read()), name) for name, place in zip(chosen.names, chosen.locations, strict=True)
    ]
    shown = [
        _network_view(recipe, preprocessing, epoch, chosen, originals, len(splits.classes)) for epoch in range(versions)
    ]
    rows = [
        (f"{splits.classes[label].name}: {name}", original, [epoch[place] for epoch in shown])
        for place, (name, label, original) in enumerate(zip(chosen.names, chosen.labels, originals, strict=True))
    ]
    size = preprocessing.input_size
    sheet = sample_sheet(rows, f"what the network sees of {len(rows)} training images, at {size} x {size} pixels")
    target = Path(path)
    with staged(target) as temporary:
        try:
            sheet.save(temporary)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{target}: the extension selects the type of picture; expected .png") from error
    return Preview(target)


def _network_view(
    recipe: Any,
    preprocessing: Preprocessing,
    epoch: int,
    chosen: LabeledImages,
    originals: list[Image.Image],
    num_classes: int,
) -> list[Image.Image]:
    """Return the network's input in one epoch as images; what erasing and normalizing make invisible is cut off."""
    view = Augmented(recipe.augmentation(preprocessing.input_size), recipe.seed, epoch)
    pixels = np.stack([view(image, index) for index, image in enumerate(originals)])
    batch = Batch(0, np.arange(len(originals)), (), (pixels,), ())
    inputs, _ = network_input(batch, np.array(chosen.labels), recipe, preprocessing, epoch, num_classes)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    visible = (255 * (inputs * std + mean)).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in visible]
