"""Compare two segmentation results on the same images: mIoU with its interval, classes and images that differ."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcvit.errors import DoesNotFit
from fcvit.evaluation.comparison import ResultComparison, check_different, check_same_images, common
from fcvit.metrics import segmentation as metrics
from fcvit.tasks.segmentation.results import SavedCounts, bounds, read_result

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationComparison(ResultComparison):
    """The comparison of two results on the same images and labels, with the attributes of
    `fcvit.evaluation.comparison.ResultComparison`. The difference is that of the mIoU, with an interval by bootstrap
    over images, with the same draws for both.

    Attributes:
        miou, aacc: Both values in percent.
        classes: Change of each class, from the largest gain to the largest loss.
        changed: Images with different counts, from the largest gain to the largest loss.
    """

    miou: tuple[float, float]
    aacc: tuple[float, float]
    classes: tuple[ClassChange, ...]
    changed: tuple[ImageChange, ...]

    def tables(self) -> "Iterator[Table | str]":
        """Yield tables of the difference, classes with gains and losses, and images with gains and losses."""
        from fcvit.report.tables import table

        yield from self.settings_tables()
        figures = table(title=self.title)
        for name, values in (("mIoU", self.miou), ("pixel accuracy", self.aacc)):
            for which, value in zip(("first", "second"), values, strict=True):
                figures.add_row(f"{name}, {which}", f"{metrics.printed(value)}%")
        figures.add_row("mIoU, second minus first", self.difference_text)
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
) -> SegmentationComparison:
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
    check_different(one, other)
    ids = [[row["id"] for row in saved.metrics["per_class"]] for saved in (one, other)]
    if ids[0] != ids[1]:
        pairs = itertools.zip_longest(*ids, fillvalue="no class")
        differing = next(pair for pair in pairs if pair[0] != pair[1])
        raise DoesNotFit(
            f"{one.folder} and {other.folder} have different classes, for example {differing[0]} and {differing[1]}; "
            "compare results with the same classes"
        )
    check_same_images(one, other, "SHA-256 of the label map")
    comparison = _compare(one, other)
    return comparison.write(folder, "images.csv", comparison.changed, ImageChange)


def _compare(one: SavedCounts, other: SavedCounts) -> SegmentationComparison:
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
    return SegmentationComparison(
        **common(one, other),
        miou=(float(first.miou), float(second.miou)),
        aacc=(float(first.aacc), float(second.aacc)),
        difference=float(second.miou - first.miou),
        interval=bounds(resampled[1].miou - resampled[0].miou),
        classes=tuple(sorted(changes, key=lambda change: (-np.nan_to_num(change.difference), change.id))),
        changed=tuple(sorted(changed, key=lambda change: (-np.nan_to_num(change.difference), change.path))),
    )
