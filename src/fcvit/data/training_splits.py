"""Find the training and validation images of a run, and their common classes."""

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np

from fcvit.data.class_folders import LabeledImages, known_classes, read_dataset
from fcvit.data.classes import Classes, ClassName, imagenet, order_note, read_classes
from fcvit.data.sources import Source, open_source
from fcvit.data.splits import find_layout
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.models.variants import IMAGENET_CLASSES
from fcvit.text import some
from fcvit.weights.reading import Weights


class DataFields(Protocol):
    """The recipe fields that select images and classes. The recipe documents them."""

    @property
    def data(self) -> str: ...
    @property
    def val(self) -> str | None: ...
    @property
    def classes(self) -> str | None: ...
    @property
    def held_out(self) -> float: ...
    @property
    def new_head(self) -> bool: ...
    @property
    def seed(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Splits:
    """The training and validation images of a run.

    Attributes:
        train: Training images.
        val: Validation images with the same class indices, or None without validation.
        classes: One class for each output, in the order of the indices.
        notes: Readable notes on how the images and classes were found.
    """

    train: LabeledImages
    val: LabeledImages | None
    classes: Classes
    notes: tuple[str, ...]

    def counts(self) -> np.ndarray:
        """Return the number of training images per class, an integer array of shape (classes,)."""
        return np.bincount(np.asarray(self.train.labels), minlength=len(self.classes))


def find_splits(recipe: DataFields, weights: Weights | None) -> Splits:
    """Find the images of a recipe and their classes.

    The classes are those of the recipe's class list. Without a list they are those of the weights if the head is kept,
    and otherwise the sorted class folders.

    Args:
        recipe: Fields that select images and classes.
        weights: Weights to start from, or None.

    Raises:
        UsageError: The recipe contains no data, or the choice of the splits is ambiguous or impossible.
        UnreadableFile: The images or the class list cannot be read.
        DoesNotFit: The classes of the splits, the list and the weights do not match.
    """
    if not recipe.data:
        raise UsageError("no data; set data in the recipe or pass --data with the folder or tar of the training images")
    given = read_classes(Path(recipe.classes)) if recipe.classes else None
    train_root, val_root, notes = _roots(recipe, given or (weights.classes if weights is not None else None))
    folders = train_root.classes()
    if weights is not None and not recipe.new_head:
        known, count = given or weights.classes, weights.spec.num_classes
        if known is None and count == IMAGENET_CLASSES and set(folders) <= {c.id for c in imagenet()}:
            known = imagenet()
        if given is not None and len(given) != count:
            raise DoesNotFit(
                f"{recipe.classes}: contains {len(given)} classes, but the weights have {count}; pass another list or "
                "set new_head = true"
            )
        if given is not None and (note := order_note(given, weights.classes)):
            notes.append(note)
    else:
        known = given or _classes_of(folders)
        count = len(known)
    try:
        train = read_dataset(train_root, None, known, count)
    except DoesNotFit as error:
        if weights is None or recipe.new_head:
            raise
        raise DoesNotFit(f"{error} (or train a new head with fcvit finetune or new_head = true)") from error
    if count < 2:
        raise DoesNotFit(
            f"{train_root.path}: the only class is {known[0].id if known else '?'}; training needs at least two classes"
        )
    classes = known or tuple(ClassName(label, label) for label in train.mapping)
    val = None
    if val_root is not None:
        try:
            val = read_dataset(val_root, None, classes, count)
        except (DoesNotFit, UnreadableFile) as error:
            remedy = (
                "pass another folder with --val"
                if recipe.val
                else f"train without validation images with --data {train_root.path}"
            )
            raise type(error)(f"validation images: {error} (or {remedy})") from error
    elif recipe.held_out:
        train, val = _hold_out(train, recipe)
        notes.append(f"held out for validation: {len(val)} of {len(train) + len(val)} images (seed {recipe.seed})")
    else:
        notes.append("no validation images, because neither val nor held_out is set")
    notes += dict.fromkeys((*train.notes, *(val.notes if val is not None else ())))
    if missing := [classes[index].id for index in sorted(set(range(count)) - set(train.labels))]:
        notes.append(f"{len(missing)} of {count} classes have no training images: {some(missing)}")
    validation = f", {counted(len(val), 'validation image')}" if val is not None else ""
    notes.append(f"{counted(len(train), 'training image')}{validation}, {counted(count, 'class')}")
    return Splits(train, val, classes, tuple(notes))


def _roots(recipe: DataFields, classes: Classes | None) -> tuple[Source, Source | Path | None, list[str]]:
    """Return the sources of the training and validation images, and notes on them. Refuse ambiguous folders."""
    val = Path(recipe.val) if recipe.val else None
    layout = find_layout(open_source(Path(recipe.data)), known_classes(classes, 0))
    root, path, notes = layout.source, layout.source.path, list(layout.notes)
    if layout.doubt:
        raise UnreadableFile(
            f"{path} contains {layout.doubt} and other folders of images; if {layout.doubt} is a split, pass "
            f"{path / layout.doubt}, and if it is a class, rename it"
        )
    if not layout.splits:
        return root, val, notes
    train, valid = layout.named("train"), layout.named("val")
    if not train:
        raise UnreadableFile(
            f"{path} contains the splits {', '.join(layout.splits)} but no training split; pass the folder of the "
            "training images with --data"
        )
    if len(train) > 1:
        raise UsageError(f"{path}: several training splits ({', '.join(train)}); pass the folder of one with --data")
    if val is None and len(valid) > 1:
        raise UsageError(f"{path}: several validation splits ({', '.join(valid)}); pass the folder of one with --val")
    used = train + (valid if val is None else [])
    kind = "splits" if len(used) > 1 else "split"
    notes.append(f"{path}: contains the {kind} {', '.join(train + valid)}")
    if others := sorted({*layout.splits, *layout.others} - set(used)):
        notes.append(f"{path}: {some(others)} not used")
    return layout.splits[train[0]], layout.splits[valid[0]] if val is None and valid else val, notes


def _hold_out(images: LabeledImages, recipe: DataFields) -> tuple[LabeledImages, LabeledImages]:
    """Divide the images into training and validation images. Every class keeps at least one training image."""
    count = round(recipe.held_out * len(images))
    if not 1 <= count < len(images):
        raise UsageError(f"held_out = {recipe.held_out} of {len(images)} images: too few images for both splits")
    drawn = set(images.subset(count, recipe.seed).names)
    trained = {label for name, label in zip(images.names, images.labels, strict=True) if name not in drawn}
    validating = [name in drawn and label in trained for name, label in zip(images.names, images.labels, strict=True)]
    if not any(validating):
        raise UsageError(
            f"held_out = {recipe.held_out} of {len(images)} images: no class has enough images for both splits"
        )
    train, val = ([index for index, held in enumerate(validating) if held == wanted] for wanted in (False, True))
    return images.take(train), images.take(val)


def _classes_of(folders: list[str]) -> Classes:
    """Return the class folders as classes, with ImageNet's names for WordNet ids.

    If all folders are numbers, they are sorted by value.
    """
    if all(folder.isascii() and folder.isdecimal() for folder in folders):
        folders = sorted(folders, key=lambda folder: (int(folder), folder))
    names = {c.id: c.name for c in imagenet()}
    if len(folders) == IMAGENET_CLASSES and set(folders) == set(names):
        return imagenet()
    return tuple(ClassName(folder, names.get(folder, folder)) for folder in folders)
