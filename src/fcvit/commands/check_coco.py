"""The part of `fcvit check-data` for images with a JSON file in COCO's format: count the annotations of each class."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.commands.image_checks import Check, Finding, Images, Unreadable, examine_images
from fcvit.data.classes import labels as class_labels
from fcvit.data.coco import UNUSABLE_IMAGES, CocoImages, CocoLayout, different_size, read_coco
from fcvit.data.listed import LISTED, Listed, ListedMapping, total
from fcvit.errors import BadImages, counted
from fcvit.text import some

logger = logging.getLogger("fcvit")


@dataclasses.dataclass(frozen=True)
class CocoSplit:
    """The counts of one JSON file.

    Attributes:
        name: Name of the split. "all" for a data set without splits.
        file: The JSON file.
        images: Number of images that were found.
        empty: Number of images without an annotation.
        annotations: Class -> number of annotations, crowds included. 0 means that the class never occurs.
        crowds: Number of annotations of groups (`iscrowd`).
        masks: Number of annotations with a usable mask.
        problems: Kind of problem -> the entries concerned, see `fcvit.data.coco`.
    """

    name: str
    file: Path
    images: int
    empty: int
    annotations: Mapping[str, int]
    crowds: int
    masks: int
    problems: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, repr=False)
class CocoCheck(Check):
    """The findings of `check_data` for images with a JSON file in COCO's format. Names are relative to the data set.

    EXIF orientations are not listed, because they are applied.

    Attributes:
        path: The data set.
        missing: Class -> splits that do not have its category.
        hints: Likely errors in the annotations.
    """

    splits: tuple[CocoSplit, ...]
    path: Path
    missing: Mapping[str, tuple[str, ...]]
    hints: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        unusable = self.unreadable or any(kind in split.problems for split in self.splits for kind in UNUSABLE_IMAGES)
        return BadImages.exit_code if unusable else 0

    def tables(self) -> Iterator[Any]:
        """Yield tables of the counts of each split, the annotations of each class, the findings and the duplicates."""
        from fcvit.report import tables

        columns = ("images", "without annotations", "annotations", "crowds", "with a mask")
        title = f"{counted(self.images, 'image')} with annotations in COCO's format"
        listing = tables.table("split", *columns, title=title, right=columns)
        for split in self.splits:
            total = sum(split.annotations.values())
            numbers = (split.images, split.empty, total, split.crowds, split.masks)
            listing.add_row(split.name, *(f"{number:,}" for number in numbers))
        yield listing
        names = [split.name for split in self.splits]
        classes = dict.fromkeys(label for split in self.splits for label in split.annotations)
        counts = {label: [split.annotations.get(label, 0) for split in self.splits] for label in classes}
        ranked = sorted(counts.items(), key=lambda item: -sum(item[1]))
        rows = [(label, *(f"{count:,}" for count in numbers)) for label, numbers in ranked]
        title = "annotations, most first"
        yield from self.finding_tables(
            tables.table("class", *names, title=title, right=names, rows=rows, limit=tables.SHOWN)
        )
        yield from (f"hint: {hint}" for hint in self.hints)

    def findings(self) -> Iterator[Finding]:
        yield "images that cannot be used", Listed([bad.image for bad in self.unreadable], total(self.unreadable))
        missing = [f"{label} not in {', '.join(names)}" for label, names in self.missing.items()]
        yield "categories not in every split", Listed(missing, total(self.missing))
        for split in self.splits:
            of = f" ({split.name})" if len(self.splits) > 1 else ""
            yield from ((f"{kind}{of}", items) for kind, items in split.problems.items())
            few = [f"{label} ({count})" for label, count in split.annotations.items() if 0 < count < self.few]
            yield f"classes with fewer than {self.few} annotations{of}", few
        yield from super().findings()


def check_coco(layout: CocoLayout, few: int, workers: int) -> CocoCheck:
    """Check images with JSON files in COCO's format.

    Args:
        layout: The data set.
        few: List classes with fewer annotations than this.
        workers: Processes that decode.

    Raises:
        UnreadableFile, DoesNotFit: As in `fcvit.data.coco.read_coco`.
    """
    path = layout.source.path
    if layout.others:
        logger.info(f"{path}: not checked, because there are files named instances_*.json: {some(layout.others)}")
    splits = {name: read_coco(layout, name) for name in layout.splits}
    examined = examine_images(
        [Images(name, split.names, split.locations) for name, split in splits.items()], workers, upright=True
    )
    listed = np.array([target.size for split in splits.values() for target in split.targets], np.int32).reshape(-1, 2)
    positions = np.flatnonzero(examined.readable & (examined.sizes != listed).any(1))
    different = [
        Unreadable(examined.locate(i)[1], different_size(tuple(examined.sizes[i].tolist()), tuple(listed[i].tolist())))
        for i in positions[:LISTED]
    ]
    counts = tuple(_count(name, split) for name, split in splits.items())
    classes = dict.fromkeys(label for split in counts for label in split.annotations)
    missing = {c: tuple(split.name for split in counts if c not in split.annotations) for c in classes}
    return CocoCheck(
        splits=counts,
        few=few,
        unreadable=Listed((*examined.unreadable, *different), total(examined.unreadable) + len(positions)),
        path=path,
        missing=ListedMapping((label, names) for label, names in missing.items() if names),
        hints=tuple(hint for split in splits.values() for hint in split.hints),
        **examined.common(),
    )


def _count(name: str, split: CocoImages) -> CocoSplit:
    labels = np.concatenate([target.labels for target in split.targets]) if len(split) else np.zeros(0, int)
    counts = np.bincount(labels, minlength=len(split.classes)).tolist()
    return CocoSplit(
        name,
        split.file,
        len(split),
        sum(not len(target.labels) for target in split.targets),
        dict(zip(class_labels(split.classes), counts, strict=True)),
        sum(int(target.crowd.sum()) for target in split.targets),
        sum(mask is not None for target in split.targets for mask in target.masks),
        {kind: Listed(items) for kind, items in split.problems.items()},
    )
