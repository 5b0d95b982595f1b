"""Find the training and validation images with annotated instances of a run, and their classes."""

import os
from pathlib import Path
from typing import NamedTuple

from fcvit.data.class_colors import read_class_list
from fcvit.data.coco import CocoImages, CocoLayout, find_coco, read_coco, training_images
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.tasks.dense import find_splits
from fcvit.tasks.detection.recipe import DetectionRecipe
from fcvit.weights.reading import Weights


class CocoSplits(NamedTuple):
    """The images of a run.

    Attributes:
        train: Training images, with the instances that are trained.
        val: Validation images with all instances, or None without validation.
        notes: Readable notes on how images, annotations and classes were found.
    """

    train: CocoImages
    val: CocoImages | None
    notes: tuple[str, ...]


def find_coco_splits(recipe: DetectionRecipe, weights: Weights | None) -> CocoSplits:
    """Find the images of a recipe, and compare their categories with the classes.

    The classes are those of the recipe's class list, or of the weights if their head is kept, or else the categories of
    the training images. Categories that are not among the classes are left out.

    Args:
        recipe: Fields that select images and classes.
        weights: Weights to start from, or None.

    Raises:
        UsageError: The recipe contains no data, or the choice of the splits is ambiguous.
        UnreadableFile: The annotations or the class list cannot be read.
        DoesNotFit: The annotations, the class list and the weights do not match, or no image can be used.
    """
    if not recipe.data:
        raise UsageError(
            "no data; set data in the recipe or pass --data with the folder or tar of images and JSON files"
        )
    train, val, notes = find_splits(recipe, _layout(recipe.data), _layout, read_coco)
    kept = weights if weights is not None and weights.spec.task == "detection" and not recipe.new_head else None
    classes = train.classes
    if recipe.classes:
        classes = read_class_list(Path(recipe.classes)).classes
    elif kept is not None and kept.classes is not None:
        classes = kept.classes
    if kept is not None and kept.spec.num_classes != len(classes):
        raise DoesNotFit(
            f"{train.file}: {counted(len(classes), 'class')}, but the weights have {kept.spec.num_classes}; set "
            "new_head = true to train new last layers"
        )
    train = train.with_classes(classes)
    val = val.with_classes(classes) if val is not None else None
    train, more = training_images(train, recipe.masks)
    validation = f", {counted(len(val), 'validation image')}" if val is not None else ""
    counts = f"{counted(len(train), 'training image')}{validation}, {counted(len(classes), 'class')}"
    return CocoSplits(train, val, (*notes, *more, counts))


def _layout(path: str | os.PathLike[str]) -> CocoLayout:
    layout = find_coco(Path(path))
    if layout is None:
        raise UnreadableFile(
            f"{path}: no annotations in COCO's format; expected a folder annotations with instances_*.json beside the "
            "images, or a JSON file"
        )
    return layout
