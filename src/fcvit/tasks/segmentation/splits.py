"""Find the training and validation images with label maps of a run, their classes, and the meaning of the labels."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fcvit.data.class_colors import ClassList, read_class_list
from fcvit.data.class_indices import composed_ids
from fcvit.data.classes import Classes, ClassName, Palette
from fcvit.data.label_maps import LabelEncoding, check_labels, resolve_encoding, scan_labels
from fcvit.data.segmentation import LabeledMaps, MapLayout, find_maps, join, read_split
from fcvit.data.sources import open_source
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.tasks.base import OwnData
from fcvit.tasks.dense import find_splits
from fcvit.tasks.segmentation.recipe import SegmentationRecipe
from fcvit.text import some
from fcvit.weights.reading import Weights

_EXAMINED = 2000  # label maps that are examined before a training; the others are checked when they are read
_COMMAND = ("fcvit", "...")  # messages add options to it; the user ran train or finetune


@dataclasses.dataclass(frozen=True)
class MapSplits:
    """The images with label maps of a run.

    Attributes:
        train: Training images.
        val: Validation images, or None without validation.
        classes: One class for each output, in the order of the indices.
        palette: Color of each class, or None.
        encoding: Meaning of the values in label files.
        pixels: Number of pixels of each class in the examined training label maps, (classes,).
        notes: Readable notes on how images, labels and classes were found.
    """

    train: LabeledMaps
    val: LabeledMaps | None
    classes: Classes
    palette: Palette | None
    encoding: LabelEncoding
    pixels: np.ndarray
    notes: tuple[str, ...]


class ListedMaps(NamedTuple):
    """The images with label maps of a run, before a label map is read.

    Attributes:
        layout: Folders of the data set.
        train, val: See `MapSplits`.
        listed: Class list of the recipe or of the data set, or None.
        notes: Readable notes on how images and labels were found.
    """

    layout: MapLayout
    train: LabeledMaps
    val: LabeledMaps | None
    listed: ClassList | None
    notes: list[str]


def list_maps(recipe: SegmentationRecipe) -> ListedMaps:
    """Find the images, label maps and class list of a recipe. No label map is read.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: As in `find_map_splits`.
    """
    if not recipe.data:
        raise UsageError("no data; set data in the recipe or pass --data with the folder or tar of images and labels")
    layout = _layout(recipe.data)
    read = functools.partial(read_split, label_suffix=recipe.label_suffix)
    train, val, notes = find_splits(recipe, layout, _layout, read)
    listed = read_class_list(Path(recipe.classes)) if recipe.classes else layout.class_list()
    return ListedMaps(layout, train, val, listed, notes)


def find_map_splits(recipe: SegmentationRecipe, weights: Weights | None) -> MapSplits:
    """Find the images of a recipe, and compare their label maps with the classes.

    The classes are those of the recipe's class list, of the data set (ADE20K or classes.csv), or of the weights if
    their head is kept. Otherwise they are the values in the label maps. At most 2,000 label maps are examined, evenly
    sampled, or all of them if no classes are given. Label maps that cannot be used are left out of the training and
    listed.

    Args:
        recipe: Fields that select images, label maps and classes.
        weights: Weights to start from, or None.

    Raises:
        UsageError: The recipe contains no data, the choice of the splits is ambiguous, or label maps contain only 0 and
            255.
        UnreadableFile: The images or the class list cannot be read, or no label map can be used.
        DoesNotFit: The label maps, the class list and the weights do not match.
    """
    layout, train, val, listed, notes = list_maps(recipe)
    kept = weights if weights is not None and weights.spec.task == "segmentation" and not recipe.new_head else None
    if listed is None and kept is not None and kept.classes is not None:
        listed = ClassList(kept.classes, kept.palette)
    if recipe.reduce_zero_label is None and layout.is_ade20k:
        notes.append(
            f"{layout.source.path}: 0 is ignored, as in ADE20K (--reduce-zero-label false reads it as a class)"
        )
    count = len(listed.classes) if listed else kept.spec.num_classes if kept else None
    described = recipe.label_options().encoding(count, listed, layout.is_ade20k)
    examined = [_sample(split, described) for split in (train, val) if split is not None]
    stats = [list(scan_labels(split, 0)) for split in examined]
    everything = join(examined), [one for part in stats for one in part]
    encoding = resolve_encoding(*everything, described, _COMMAND)
    number = encoding.num_classes or 0
    if number < 2:
        raise DoesNotFit(
            f"{layout.source.path}: the label maps contain only one class, but training needs at least two; the other "
            "pixels, such as the background, must be a class too"
        )
    if kept is not None and kept.spec.num_classes != number:
        raise DoesNotFit(
            f"{layout.source.path}: {counted(number, 'class')}, but the weights have {kept.spec.num_classes}; set "
            "new_head = true to train a new last layer"
        )
    classes = listed.classes if listed else tuple(ClassName(str(i), f"class {i}") for i in range(number))
    checks = [check_labels(split, part, encoding) for split, part in zip(examined, stats, strict=True)]
    for split, check in zip(examined, checks, strict=True):
        if len(check.bad) == len(split):
            raise UnreadableFile(f"{split.root}: no label map can be used, for example {check.bad[0][1]}")
        if check.bad:
            reasons = some([reason for _, reason in check.bad], 3)
            notes.append(f"{counted(len(check.bad), 'label map')} cannot be used, and are left out: {reasons}")
    notes += check_labels(*everything, encoding).hints
    whole = len(examined[0]) == len(train)
    if not whole:
        notes.append(f"examined {len(examined[0]):,} of {len(train):,} label maps")
    elif absent := [classes[index].name for index in checks[0].absent]:
        notes.append(f"{len(absent)} of {counted(number, 'class')} have no training pixels: {some(absent)}")
    validation = f", {counted(len(val), 'validation image')}" if val is not None else ""
    notes.append(f"{counted(len(train), 'training image')}{validation}, {counted(number, 'class')}")
    palette = listed.palette if listed else None
    return MapSplits(train, val, classes, palette, encoding, np.array(checks[0].pixels, np.int64), tuple(notes))


def _layout(path: str | os.PathLike[str]) -> MapLayout:
    layout = find_maps(open_source(Path(path)))
    if layout is None:
        raise UnreadableFile(
            f"{path}: no segmentation data set; expected the folders images and annotations in it, or in a folder for "
            "each split"
        )
    return layout


def _sample(images: LabeledMaps, described: LabelEncoding) -> LabeledMaps:
    """Return the images whose label maps are examined: all, if the classes are counted, otherwise an even sample."""
    if described.num_classes is None or len(images) <= _EXAMINED:
        return images
    return images.take(np.linspace(0, len(images) - 1, _EXAMINED).round().astype(int).tolist())


def own_maps(recipe: SegmentationRecipe, weights: Weights) -> OwnData:
    """Return what fine-tuning needs to know about images with label maps. No label map is read.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: As in `find_map_splits`.
    """
    maps, same = list_maps(recipe), False
    fields: dict[str, Any] = {}
    notes: dict[str, str] = {}
    if weights.spec.task == "segmentation" and maps.listed:
        # The order matters, because it gives the values in the label maps.
        same = composed_ids(maps.listed.classes) == composed_ids(weights.classes)
    elif weights.spec.task == "segmentation":
        notes["new_head"] = (
            "no class list, so the last layer is new (--new-head false keeps the classes of the weights)"
        )
    if max(recipe.crop_size) > min(recipe.scale):
        fields["crop_size"] = (min(recipe.scale),) * 2
        notes["crop_size"] = f"crop_size {min(recipe.scale)}: the shorter side of scale"
    return OwnData(len(maps.train), same, "class list matches", fields, notes)


def recognize_maps(data: Path, weights: Weights, label_suffix: str | None) -> str | None:
    """Return the names of the folders of images and label maps in data, "" if they can also be classes, or None.

    Folders with these names are label maps if most of them have the names of images. Class folders could also be named
    like this. Whether the files are label maps is checked before the first step.
    """
    try:
        layout = find_maps(open_source(data))
        if layout is None:
            return None
        splits = [read_split(layout, name, label_suffix) for name in layout.splits]
        paired = all(len(split.unused) < len(split) for split in splits)
        folders = next(iter(layout.splits.values()))
        if paired and not {*composed_ids(weights.classes)} & {part for name in folders for part in Path(name).parts}:
            return f"images with label maps ({folders[0]} and {folders[1]})"
    except (UsageError, DoesNotFit, UnreadableFile):
        pass  # such folders are not clearly label maps; the command for label maps reports the reason
    return ""
