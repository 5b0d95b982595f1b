"""Compare two detection results on the same images: AP, and the classes that differ."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fcvit.errors import DoesNotFit
from fcvit.evaluation.comparison import ResultComparison, check_different, check_same_images, common
from fcvit.tasks.detection.results import read_result

if TYPE_CHECKING:
    from rich.table import Table

_CLASSES = 10  # maximum number of rows in a table


@dataclasses.dataclass(frozen=True)
class ClassChange:
    """The change of one class: annotated objects, both AP in percent, and their difference in percentage points. NaN if
    there are no objects.
    """

    id: str
    name: str
    objects: int
    first: float
    second: float
    difference: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionComparison(ResultComparison):
    """The comparison of two results on the same images and annotations, with the attributes of
    `fcvit.evaluation.comparison.ResultComparison`. The difference is that of the mask AP, or of the box AP if one of
    the results has no masks, without an interval.

    Attributes:
        metric: "mask AP" or "box AP".
        box_ap, mask_ap: Both values in percent. NaN without masks.
        classes: Change of each class in the same metric, from the largest gain to the largest loss.
    """

    metric: str
    box_ap: tuple[float, float]
    mask_ap: tuple[float, float]
    classes: tuple[ClassChange, ...]

    def tables(self) -> "Iterator[Table | str]":
        """Yield tables of the difference, and of the classes with gains and losses."""
        from fcvit.report.tables import table

        yield from self.settings_tables()
        figures = table(title=self.title)
        for name, values in (("box AP", self.box_ap), ("mask AP", self.mask_ap)):
            for which, value in zip(("first", "second"), values, strict=True):
                if not math.isnan(value):
                    figures.add_row(f"{name}, {which}", f"{value:.1f}%")
        figures.add_row(f"{self.metric}, second minus first", self.difference_text)
        yield figures
        gains = [change for change in self.classes if change.difference > 0][:_CLASSES]
        losses = [change for change in reversed(self.classes) if change.difference < 0][:_CLASSES]
        for which, chosen in (("gains", gains), ("losses", losses)):
            if chosen:
                columns = ("objects", "first (%)", "second (%)", "change")
                rows = [
                    (c.name, f"{c.objects:,}", f"{c.first:.1f}", f"{c.second:.1f}", f"{c.difference:+.1f}")
                    for c in chosen
                ]
                title = f"classes with the largest {which} in {self.metric}"
                yield table("class", *columns, rows=rows, title=title, right=columns)
        if self.folder is not None:
            yield f"written to {self.folder}"


def compare(
    first: str | os.PathLike[str], second: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None
) -> DetectionComparison:
    """Compare two results of `fcvit eval`.

    Images are matched by the content of image and annotations.

    Args:
        first, second: Folder of a result, or of a run with a single result.
        folder: New folder for `comparison.json` and `classes.csv`. If None, nothing is written.

    Raises:
        UnreadableFile: A folder does not contain a finished result.
        UsageError: A run contains several results, or both arguments are the same result.
        DoesNotFit: The images, their annotations or the classes are different.
    """
    one, other = read_result(Path(first)), read_result(Path(second))
    check_different(one, other)
    sides = [saved.metrics["per_class"] for saved in (one, other)]
    pairs = itertools.zip_longest(*([row["id"] for row in rows] for rows in sides), fillvalue="no class")
    if differing := next((pair for pair in pairs if pair[0] != pair[1]), None):
        raise DoesNotFit(
            f"{one.folder} and {other.folder} have different classes, for example {differing[0]} and {differing[1]}; "
            "compare results with the same classes"
        )
    check_same_images(one, other, "SHA-256 of the annotations")
    masks = all(saved.metrics["mask"] for saved in (one, other))
    kind = "mask" if masks else "box"

    def both(name: str) -> tuple[float, float]:
        values = [_number((saved.metrics[name] or {}).get("ap")) for saved in (one, other)]
        return values[0], values[1]

    changes = []
    for rows in zip(*sides, strict=True):
        before, after = (_number(row[f"{kind}_ap"]) for row in rows)
        changes.append(ClassChange(rows[0]["id"], rows[0]["name"], rows[0]["objects"], before, after, after - before))
    before, after = both(kind)
    comparison = DetectionComparison(
        **common(one, other),
        difference=after - before,
        interval=(math.nan, math.nan),
        metric=f"{kind} AP",
        box_ap=both("box"),
        mask_ap=both("mask"),
        classes=tuple(sorted(changes, key=lambda c: (-c.difference if c.difference == c.difference else 0, c.id))),
    )
    return comparison.write(folder, "classes.csv", comparison.classes, ClassChange)


def _number(value: float | None) -> float:
    """Return a number of `metrics.json`, where null is NaN."""
    return math.nan if value is None else float(value)
