"""The images that a run trains on and those that validate it: two splits with the same classes."""

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np

from fcvit.data.class_folders import LabeledImages, known_classes, read_dataset
from fcvit.data.classes import Classes, ClassName, imagenet, order_note, read_classes
from fcvit.data.folders import legible
from fcvit.data.sources import Source, open_source
from fcvit.data.splits import find_layout
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.models.variants import IMAGENET_CLASSES
from fcvit.text import some
from fcvit.weights.reading import Weights


class DataFields(Protocol):
    """The fields of a recipe that choose images and classes; its documentation explains them."""

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
    """The images of a run.

    Attributes:
        train, val: with the same class indices; val None: no validation.
        classes: in the order of the indices, one for each output.
        notes: how they were found, for people.
    """

    train: LabeledImages
    val: LabeledImages | None
    classes: Classes
    notes: tuple[str, ...]

    def counts(self) -> np.ndarray:
        """Return the number of training images of each class."""
        return np.bincount(self.train.labels, minlength=len(self.classes))


def find_splits(recipe: DataFields, weights: Weights | None) -> Splits:
    """Find the images of a recipe, and their classes: those of the recipe's list, else of the weights whose
    head is kept, else the sorted folders.

    Raises:
        UsageError: the recipe names no data.
        UnreadableFile: nothing there.
        DoesNotFit: the classes of the splits, the list and the weights do not go together.
    """
    if not recipe.data:
        raise UsageError("no data: expected the folder or tar of the training images in the recipe, or --data FOLDER")
    given = read_classes(Path(recipe.classes)) if recipe.classes else None
    train_root, val_root, notes = _roots(recipe, given or (weights.classes if weights is not None else None))
    folders = sorted(map(legible, train_root.folders()))
    if weights is not None and not recipe.new_head:
        known, count = given or weights.classes, weights.spec.num_classes
        if known is None and count == IMAGENET_CLASSES and set(folders) <= {c.id for c in imagenet()}:
            known = imagenet()
        if given is not None and len(given) != count:
            raise DoesNotFit(
                f"{recipe.classes} lists {len(given)} classes, the weights have {count}; or new_head = true"
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
        raise DoesNotFit(f"{error}; fcvit finetune (or new_head = true) gives the weights a new head") from error
    if count < 2:
        raise DoesNotFit(f"{train_root.path}: one class, {known[0].id if known else '?'}; nothing is told apart by one")
    classes = known or tuple(ClassName(label, label) for label in train.mapping)
    val = None
    if val_root is not None:
        try:
            val = read_dataset(val_root, None, classes, count)
        except (DoesNotFit, UnreadableFile) as error:
            remedy = "name another with --val FOLDER" if recipe.val else f"train without it: --data {train_root.path}"
            raise type(error)(f"validation images: {error}; or {remedy}") from error
    elif recipe.held_out:
        train, val = _hold_out(train, recipe)
        notes.append(f"held out for validation: {len(val)} of {len(train) + len(val)} images (seed {recipe.seed})")
    else:
        notes.append("no validation images: neither val nor held_out is given")
    notes += dict.fromkeys((*train.notes, *(val.notes if val is not None else ())))
    if missing := [classes[index].id for index in sorted(set(range(count)) - set(train.labels))]:
        notes.append(f"{len(missing)} of {count} classes have no training images: {some(missing)}")
    validation = f", {counted(len(val), 'validation image')}" if val is not None else ""
    notes.append(f"{counted(len(train), 'training image')}{validation}, {counted(count, 'class')}")
    return Splits(train, val, classes, tuple(notes))


def _roots(recipe: DataFields, classes: Classes | None) -> tuple[Source, Source | Path | None, list[str]]:
    """Find where training and validation images are, and what to say of it; refuse what may be read in two ways."""
    val = Path(recipe.val) if recipe.val else None
    layout = find_layout(open_source(Path(recipe.data)), known_classes(classes, 0))
    root, path, notes = layout.source, layout.source.path, list(layout.notes)
    if layout.doubt:
        raise UnreadableFile(
            f"{path} has folders of images beside {layout.doubt}: if that is a split, name its folder "
            f"{path / layout.doubt}; if it is a class, rename it"
        )
    if not layout.splits:
        return root, val, notes
    train, valid = layout.named("train"), layout.named("val")
    if not train:
        raise UnreadableFile(
            f"{path} has a folder {', '.join(layout.splits)} of class folders, but none train; where are the others?"
        )
    if len(train) > 1:
        raise UsageError(f"{path} has the folders {', '.join(train)}: name the one that trains with --data FOLDER")
    if val is None and len(valid) > 1:
        raise UsageError(f"{path} has the folders {', '.join(valid)}: say which one validates with --val FOLDER")
    used = train + (valid if val is None else [])
    kind = "these are the splits" if len(used) > 1 else "a split"
    notes.append(f"{path} has the folders {', '.join(train + valid)}: {kind}")
    if others := sorted({*layout.splits, *layout.others} - set(used)):
        notes.append(f"not used: {some(others)} in {path}")
    return layout.splits[train[0]], layout.splits[valid[0]] if val is None and valid else val, notes


def _hold_out(images: LabeledImages, recipe: DataFields) -> tuple[LabeledImages, LabeledImages]:
    """Divide into training and validation images; a class keeps at least one to train on."""
    count = round(recipe.held_out * len(images))
    if not 1 <= count < len(images):
        raise UsageError(f"held_out = {recipe.held_out} of {len(images)} images: too few for both splits")
    drawn = set(images.subset(count, recipe.seed).names)
    trained = {label for name, label in zip(images.names, images.labels, strict=True) if name not in drawn}
    validating = [name in drawn and label in trained for name, label in zip(images.names, images.labels, strict=True)]
    if not any(validating):
        raise UsageError(
            f"held_out = {recipe.held_out} of {len(images)} images: every class has too few for both splits"
        )
    train, val = ([index for index, held in enumerate(validating) if held == wanted] for wanted in (False, True))
    return images.take(train), images.take(val)


def _classes_of(folders: list[str]) -> Classes:
    """Return class folders as classes, numbers in the order of their values. WordNet ids get ImageNet's names."""
    if all(folder.isascii() and folder.isdecimal() for folder in folders):
        folders = sorted(folders, key=lambda folder: (int(folder), folder))
    names = {c.id: c.name for c in imagenet()}
    if len(folders) == IMAGENET_CLASSES and set(folders) == set(names):
        return imagenet()
    return tuple(ClassName(folder, names.get(folder, folder)) for folder in folders)
