"""What a network is shown in training, as a picture."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fcvit.data.class_folders import LabeledImages
from fcvit.data.loader import Batch
from fcvit.data.training_splits import find_splits
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import UsageError
from fcvit.models.variants import Preprocessing
from fcvit.report.sample_sheet import sample_sheet
from fcvit.training.data import Augmented, input_preprocessing, network_input
from fcvit.training.recipe import Recipe
from fcvit.weights.reading import read_weights
from fcvit.weights.writing import staged


def preview(recipe: Recipe, path: str | os.PathLike[str], *, images: int = 6, versions: int = 6) -> Path:
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
    splits = find_splits(recipe, weights)
    preprocessing = input_preprocessing(recipe, weights)
    places = np.linspace(0, len(splits.train) - 1, min(images, len(splits.train))).round().astype(int)
    chosen = splits.train.take(places.tolist())
    originals = [
        decode(io.BytesIO(place.read()), name) for name, place in zip(chosen.names, chosen.locations, strict=True)
    ]
    shown = [_seen(recipe, preprocessing, epoch, chosen, originals, len(splits.classes)) for epoch in range(versions)]
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
            raise UsageError(f"{target}: the ending tells the kind of picture; expected .png") from error
    return target


def _seen(
    recipe: Recipe,
    preprocessing: Preprocessing,
    epoch: int,
    chosen: LabeledImages,
    originals: list[Image.Image],
    num_classes: int,
) -> list[Image.Image]:
    """The network's input in one epoch, as images again; what erasing and normalizing make invisible is cut off."""
    view = Augmented(recipe.augmentation(preprocessing.input_size), recipe.seed, epoch)
    pixels = np.stack([view(image, index) for index, image in enumerate(originals)])
    batch = Batch(0, np.arange(len(originals)), (), (pixels,), ())
    inputs, _ = network_input(batch, np.array(chosen.labels), recipe, preprocessing, epoch, num_classes)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    visible = (255 * (inputs * std + mean)).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in visible]
