"""Compare two evaluations on the same images: statistical significance, classes and images that differ."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcvit.errors import DoesNotFit, counted
from fcvit.evaluation.comparison import ResultComparison, check_different, check_same_images, common
from fcvit.metrics import classification as metrics
from fcvit.tasks.classification.results import SavedPredictions, read_result

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN, _CLASSES = 20, 10  # maximum number of rows in a table


@dataclasses.dataclass(frozen=True)
class ClassChange:
    """The change of one class: images, both accuracies in percent, and correct images gained (negative: lost)."""

    id: str
    name: str
    images: int
    first: float
    second: float
    gained: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """An image with different predictions: class ids, and class names if known."""

    path: str
    truth: str
    first: str
    second: str
    truth_name: str
    first_name: str
    second_name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierComparison(ResultComparison):
    """The comparison of two results of classifiers, with the attributes of
    `fcvit.evaluation.comparison.ResultComparison`. The confidence interval is that of
    `fcvit.metrics.classification.paired_difference`.

    Attributes:
        top1: Both top-1 accuracies in percent.
        only_first, only_second: Number of images that only the first or only the second result classifies correctly.
        p_value: p-value of the exact McNemar test.
        classes: Change of each class, from the largest gain to the largest loss.
        differing: Images with different top-1 predictions.
    """

    top1: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float
    classes: tuple[ClassChange, ...]
    differing: tuple[Difference, ...]

    def tables(self) -> "Iterator[Table | str]":
        """Yield tables of the difference, classes with gains and losses, and images with different predictions."""
        from fcvit.report.tables import table

        yield from self.settings_tables()
        figures = table(title=self.title)
        figures.add_row("top-1 accuracy, first", f"{self.top1[0]:.2f}%")
        figures.add_row("top-1 accuracy, second", f"{self.top1[1]:.2f}%")
        figures.add_row("second minus first", self.difference_text)
        figures.add_row("correct only in the first", str(self.only_first))
        figures.add_row("correct only in the second", str(self.only_second))
        figures.add_row("exact McNemar test", f"p = {self.p_value:.2g}")
        figures.add_row("different top-1 predictions", counted(len(self.differing), "image"))
        yield figures
        moved = [change for change in self.classes if change.gained]
        for title, rows in (
            ("classes with the largest gains", [change for change in moved if change.gained > 0][:_CLASSES]),
            ("classes with the largest losses", [change for change in reversed(moved) if change.gained < 0][:_CLASSES]),
        ):
            if rows:
                columns = ("images", "first (%)", "second (%)", "change in correct images")
                listing = table("class", "name", *columns, title=title, right=columns)
                for row in rows:
                    shares = (f"{row.first:.1f}", f"{row.second:.1f}")
                    listing.add_row(row.id, row.name, str(row.images), *shares, f"{row.gained:+d}")
                yield listing
        if self.differing:
            listing = table("image", "true class", "first", "second", title="images with different top-1 predictions")
            for row in self.differing[:_SHOWN]:
                pairs = ((row.truth, row.truth_name), (row.first, row.first_name), (row.second, row.second_name))
                listing.add_row(row.path, *(id if name == id else f"{name} ({id})" for id, name in pairs))
            if len(self.differing) > _SHOWN:
                listing.add_row(f"... and {len(self.differing) - _SHOWN} more", "", "", "")
            yield listing
        if self.folder is not None:
            yield f"written to {self.folder}"


def compare(
    first: str | os.PathLike[str], second: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None
) -> ClassifierComparison:
    """Compare two results of `fcvit eval`.

    Images are matched by their content, so results on a tar and on a folder of the same images can be compared.

    Args:
        first, second: Folder of a result, or of a run with a single result.
        folder: New folder for `comparison.json` and `differing.csv`. If None, nothing is written.

    Raises:
        UnreadableFile: A folder does not contain a finished result.
        UsageError: A run contains several results, or both arguments are the same result.
        DoesNotFit: The images, their true classes or the candidate classes are different.
    """
    one, other = read_result(Path(first)), read_result(Path(second))
    check_different(one, other)
    candidates = [saved.metrics.get("classes") for saved in (one, other)]
    if candidates[0] != candidates[1]:
        raise DoesNotFit(
            f"{one.folder} predicts among {candidates[0]} classes and {other.folder} among {candidates[1]}; compare "
            "results with the same classes"
        )
    check_same_images(one, other, "true class")
    comparison = _compare(one, other)
    return comparison.write(folder, "differing.csv", comparison.differing, Difference)


def _compare(one: SavedPredictions, other: SavedPredictions) -> ClassifierComparison:
    truth, first, second = (np.array(names) for names in (one.truth, one.predicted, other.predicted))
    right = first == truth, second == truth
    paired = metrics.paired(*right)
    changes = []
    for name in sorted(set(one.truth)):
        members = truth == name
        hits = [int(side[members].sum()) for side in right]
        shares = [metrics.share(hit, int(members.sum())) for hit in hits]
        changes.append(
            ClassChange(name, one.class_names.get(name, name), int(members.sum()), *shares, gained=hits[1] - hits[0])
        )
    names = {**other.class_names, **one.class_names}
    differing = [
        Difference(path, *three, *(names.get(name, name) for name in three))
        for path, *three in zip(one.names, one.truth, one.predicted, other.predicted, strict=True)
        if three[1] != three[2]
    ]
    return ClassifierComparison(
        **common(one, other),
        top1=(metrics.share(int(right[0].sum()), len(truth)), metrics.share(int(right[1].sum()), len(truth))),
        difference=paired.difference,
        interval=paired.interval,
        only_first=paired.only_first,
        only_second=paired.only_second,
        p_value=paired.p_value,
        classes=tuple(sorted(changes, key=lambda change: (-change.gained, change.id))),
        differing=tuple(sorted(differing, key=lambda row: row.path)),
    )
