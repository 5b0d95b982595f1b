"""Compare two segmentation results on the same images: mIoU with its interval, classes and images that differ."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcvit import run_folder as runs
from fcvit.errors import DoesNotFit, UsageError, counted
from fcvit.evaluation.results import differing_settings
from fcvit.metrics import segmentation as metrics
from fcvit.tasks.segmentation.results import SavedResult, bounds, read_result
from fcvit.text import csv_text

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN, _CLASSES = 20, 10  # maximum number of rows in a table


@dataclasses.dataclass(frozen=True)
class ClassChange:
    """The change of one class: labeled pixels, both IoU in percent, their difference in percentage points and its 95%
    confidence interval. Values are NaN if a result neither labels nor predicts the class.
    """

    id: str
    name: str
    labeled: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class ImageChange:
    """The mIoU of an image in both results, in percent, and their difference in percentage points."""

    path: str
    first: float
    second: float
    difference: float


@dataclasses.dataclass(frozen=True)
class ResultComparison:
    """The comparison of two results on the same images and labels.

    Attributes:
        first, second: Names of the two results.
        folders: Folders of the two results.
        settings: Settings that differ: name -> (first, second).
        images: Number of images.
        miou, aacc: Both values in percent.
        difference, interval: Second minus first mIoU and its 95% confidence interval, in percentage points (bootstrap
            over images, with the same draws for both).
        classes: Change of each class, from the largest gain to the largest loss.
        changed: Images with different counts, from the largest gain to the largest loss.
        folder: Folder of the written comparison, or None.
    """

    first: str
    second: str
    folders: tuple[Path, Path]
    settings: dict[str, tuple[str, str]]
    images: int
    miou: tuple[float, float]
    aacc: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    classes: tuple[ClassChange, ...]
    changed: tuple[ImageChange, ...]
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"<ResultComparison: {self.difference:+.2f} percentage points on {counted(self.images, 'image')}>"

    def tables(self) -> "Iterator[Table | str]":
        """Yield tables of the difference, classes with gains and losses, and images with gains and losses."""
        from fcvit.report.tables import interval, table

        if self.settings:
            rows = [(name.replace("_", " "), *values) for name, values in self.settings.items()]
            yield table("setting", "first", "second", title="settings that differ", rows=rows)
        title = f"{self.first} (first) and {self.second} (second) on the same {counted(self.images, 'image')}"
        figures = table(title=title)
        for name, values in (("mIoU", self.miou), ("pixel accuracy", self.aacc)):
            for which, value in zip(("first", "second"), values, strict=True):
                figures.add_row(f"{name}, {which}", f"{metrics.printed(value)}%")
        difference = f"{self.difference:+.2f} percentage points (95% confidence interval {interval(self.interval)})"
        figures.add_row("mIoU, second minus first", difference)
        figures.add_row("images with other counts", f"{len(self.changed):,}")
        yield figures
        for kind, changes, shown in (("classes", self.classes, _CLASSES), ("images", self.changed, _SHOWN)):
            gains = [change for change in changes if change.difference > 0][:shown]
            losses = [change for change in reversed(changes) if change.difference < 0][:shown]
            for which, chosen in (("gains", gains), ("losses", losses)):
                if chosen:
                    columns = ("first (%)", "second (%)", "change")
                    rows = [
                        (_label(row), f"{row.first:.1f}", f"{row.second:.1f}", f"{row.difference:+.1f}")
                        for row in chosen
                    ]
                    title = f"{kind} with the largest {which} in {'IoU' if kind == 'classes' else 'mIoU'}"
                    yield table(kind, *columns, rows=rows, title=title, right=columns)
        if self.folder is not None:
            yield f"written to {self.folder}"


def _label(change: ClassChange | ImageChange) -> str:
    return change.name if isinstance(change, ClassChange) else change.path


def compare(
    first: str | os.PathLike[str], second: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None
) -> ResultComparison:
    """Compare two results of `fcvit eval`.

    Images are matched by the content of image and label, so results on a tar and on a folder can be compared.

    Args:
        first, second: Folder of a result, or of a run with a single result.
        folder: New folder for `comparison.json` and `images.csv`. If None, nothing is written.

    Raises:
        UnreadableFile: A folder does not contain a finished result.
        UsageError: A run contains several results, or both arguments are the same result.
        DoesNotFit: The images, their labels or the classes are different.
    """
    one, other = read_result(Path(first)), read_result(Path(second))
    if one.folder.resolve() == other.folder.resolve():
        raise UsageError(f"{one.folder}: both arguments are this result; pass two different results")
    _check_same_images(one, other)
    comparison = _compare(one, other)
    if folder is not None:
        with runs.run_folder(Path(folder), "compare") as target:
            runs.write_json(target / "comparison.json", dataclasses.asdict(comparison))
            header = [field.name for field in dataclasses.fields(ImageChange)]
            rows = [header, *map(dataclasses.astuple, comparison.changed)]
            runs.write_text(target / "images.csv", csv_text(rows), "surrogateescape")
    return dataclasses.replace(comparison, folder=None if folder is None else Path(folder))


def _check_same_images(one: SavedResult, other: SavedResult) -> None:
    """Raise an error if the images, their labels or the classes are different."""
    ids = [[row["id"] for row in saved.metrics["per_class"]] for saved in (one, other)]
    if ids[0] != ids[1]:
        pairs = itertools.zip_longest(*ids, fillvalue="no class")
        first, second = next(pair for pair in pairs if pair[0] != pair[1])
        raise DoesNotFit(
            f"{one.folder} and {other.folder} have different classes, for example {first} and {second}; compare "
            "results with the same classes"
        )
    counts = [collections.Counter(saved.images) for saved in (one, other)]
    only = [counts[0] - counts[1], counts[1] - counts[0]]
    if any(only):
        side = 0 if only[0] else 1
        saved = (one, other)[side]
        example = next(name for name, image in zip(saved.names, saved.images, strict=True) if image in only[side])
        raise DoesNotFit(
            f"{one.folder} and {other.folder} have different images: {only[0].total()} are only in the first and "
            f"{only[1].total()} only in the second, for example {example}; evaluate both on the same images"
        )
    for name, label, theirs in zip(one.names, one.labels, other.labels, strict=True):
        if label != theirs:
            raise DoesNotFit(
                f"{name}: the label map is not the same in {one.folder} and {other.folder}; compare results with the "
                "same labels"
            )


def _compare(one: SavedResult, other: SavedResult) -> ResultComparison:
    classes, images = one.metrics["classes"], len(one.names)
    counts = [np.stack([metrics.class_counts(pairs, classes) for pairs in saved.pairs]) for saved in (one, other)]
    first, second = (metrics.figures(each.sum(axis=0)) for each in counts)
    resampled = [metrics.figures(metrics.resample(each, images)) for each in counts]
    low, high = metrics.interval(resampled[1].iou - resampled[0].iou)
    difference = second.iou - first.iou
    labeled = counts[0][:, metrics.LABELED].sum(axis=0)
    changes = [
        ClassChange(
            row["id"],
            row["name"],
            int(labeled[index]),
            *(float(values[index]) for values in (first.iou, second.iou, difference)),
            interval=(float(low[index]), float(high[index])),
        )
        for index, row in enumerate(one.metrics["per_class"])
    ]
    each = [metrics.figures(side).miou for side in counts]
    changed = [
        ImageChange(name, *(float(value) for value in (each[0][row], each[1][row], each[1][row] - each[0][row])))
        for row, name in enumerate(one.names)
        if (counts[0][row] != counts[1][row]).any()
    ]
    labels = [str(saved.metrics["name"]) for saved in (one, other)]
    if labels[0] == labels[1]:
        labels = [str(saved.folder) for saved in (one, other)]
    return ResultComparison(
        first=labels[0],
        second=labels[1],
        folders=(one.folder, other.folder),
        settings=differing_settings(one.metrics, other.metrics),
        images=images,
        miou=(float(first.miou), float(second.miou)),
        aacc=(float(first.aacc), float(second.aacc)),
        difference=float(second.miou - first.miou),
        interval=bounds(resampled[1].miou - resampled[0].miou),
        classes=tuple(sorted(changes, key=lambda change: (-np.nan_to_num(change.difference), change.id))),
        changed=tuple(sorted(changed, key=lambda change: (-np.nan_to_num(change.difference), change.path))),
    )
