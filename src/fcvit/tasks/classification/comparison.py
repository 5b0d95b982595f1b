"""Compare two evaluations on the same images: statistical significance, classes and images that differ."""

import collections
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcvit import run_folder as runs
from fcvit.errors import DoesNotFit, UsageError, counted
from fcvit.evaluation.results import differing_settings
from fcvit.metrics import classification as metrics
from fcvit.tasks.classification.results import SavedResult, read_result
from fcvit.text import csv_text

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


@dataclasses.dataclass(frozen=True)
class ResultComparison:
    """The comparison of two results on the same images.

    Attributes:
        first, second: Names of the two results.
        folders: Folders of the two results.
        settings: Settings that differ: name -> (first, second).
        images: Number of images.
        top1: Both top-1 accuracies in percent.
        difference, interval: Second minus first top-1 accuracy and its 95% confidence interval, in percentage points
            (see `fcvit.metrics.classification.paired_difference`).
        only_first, only_second: Number of images that only the first or only the second result classifies correctly.
        p_value: p-value of the exact McNemar test.
        classes: Change of each class, from the largest gain to the largest loss.
        differing: Images with different top-1 predictions.
        folder: Folder of the written comparison, or None.
    """

    first: str
    second: str
    folders: tuple[Path, Path]
    settings: dict[str, tuple[str, str]]
    images: int
    top1: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float
    classes: tuple[ClassChange, ...]
    differing: tuple[Difference, ...]
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"<ResultComparison: {self.difference:+.2f} percentage points on {counted(self.images, 'image')}>"

    def tables(self) -> "Iterator[Table | str]":
        """Yield tables of the difference, classes with gains and losses, and images with different predictions."""
        from fcvit.report.tables import interval, table

        if self.settings:
            settings = table("setting", "first", "second", title="settings that differ")
            for name, values in self.settings.items():
                settings.add_row(name.replace("_", " "), *values)
            yield settings
        title = f"{self.first} (first) and {self.second} (second) on the same {counted(self.images, 'image')}"
        figures = table(title=title)
        figures.add_row("top-1 accuracy, first", f"{self.top1[0]:.2f}%")
        figures.add_row("top-1 accuracy, second", f"{self.top1[1]:.2f}%")
        difference = f"{self.difference:+.2f} percentage points (95% confidence interval {interval(self.interval)})"
        figures.add_row("second minus first", difference)
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
) -> ResultComparison:
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
    if one.folder.resolve() == other.folder.resolve():
        raise UsageError(f"{one.folder}: both arguments are this result; pass two different results")
    _check_same_images(one, other)
    comparison = _compare(one, other)
    if folder is not None:
        with runs.run_folder(Path(folder), "compare") as target:
            runs.write_json(target / "comparison.json", dataclasses.asdict(comparison))
            header = [field.name for field in dataclasses.fields(Difference)]
            rows = [header, *map(dataclasses.astuple, comparison.differing)]
            runs.write_text(target / "differing.csv", csv_text(rows), "surrogateescape")
    return dataclasses.replace(comparison, folder=None if folder is None else Path(folder))


def _check_same_images(one: SavedResult, other: SavedResult) -> None:
    """Raise an error if the images, their true classes or the number of candidate classes are different."""
    candidates = [saved.metrics.get("classes") for saved in (one, other)]
    if candidates[0] != candidates[1]:
        raise DoesNotFit(
            f"{one.folder} predicts among {candidates[0]} classes and {other.folder} among {candidates[1]}; compare "
            "results with the same classes"
        )
    counts = [collections.Counter(image for image, _ in saved.images) for saved in (one, other)]
    only = [counts[0] - counts[1], counts[1] - counts[0]]
    if any(only):
        side = 0 if only[0] else 1
        example = next(path for image, path in (one, other)[side].images if image in only[side])
        raise DoesNotFit(
            f"{one.folder} and {other.folder} have different images: {only[0].total()} are only in the first and "
            f"{only[1].total()} only in the second, for example {example}; evaluate both on the same images"
        )
    for (_, path), truth, theirs in zip(one.images, one.truth, other.truth, strict=True):
        if truth != theirs:
            raise DoesNotFit(
                f"{path}: the true class is {truth} in {one.folder} and {theirs} in {other.folder}; compare results "
                "with the same labels"
            )


def _compare(one: SavedResult, other: SavedResult) -> ResultComparison:
    truth, first, second = (np.array(names) for names in (one.truth, one.predicted, other.predicted))
    right = first == truth, second == truth
    paired = metrics.paired(*right)
    changes = []
    for name in sorted(set(one.truth)):
        members = truth == name
        hits = [int(side[members].sum()) for side in right]
        shares = [metrics.share(hit, int(members.sum())) for hit in hits]
        changes.append(
            ClassChange(name, one.names.get(name, name), int(members.sum()), *shares, gained=hits[1] - hits[0])
        )
    names = {**other.names, **one.names}
    differing = [
        Difference(path, *three, *(names.get(name, name) for name in three))
        for (_, path), *three in zip(one.images, one.truth, one.predicted, other.predicted, strict=True)
        if three[1] != three[2]
    ]
    labels = [str(saved.metrics["name"]) for saved in (one, other)]
    if labels[0] == labels[1]:
        labels = [str(saved.folder) for saved in (one, other)]
    return ResultComparison(
        first=labels[0],
        second=labels[1],
        folders=(one.folder, other.folder),
        settings=differing_settings(one.metrics, other.metrics),
        images=len(truth),
        top1=(metrics.share(int(right[0].sum()), len(truth)), metrics.share(int(right[1].sum()), len(truth))),
        difference=paired.difference,
        interval=paired.interval,
        only_first=paired.only_first,
        only_second=paired.only_second,
        p_value=paired.p_value,
        classes=tuple(sorted(changes, key=lambda change: (-change.gained, change.id))),
        differing=tuple(sorted(differing, key=lambda row: row.path)),
    )
