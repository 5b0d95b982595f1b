"""Two evaluations over the same images: is the difference real, and where does it lie?"""

import collections
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcvit import run_folder as runs
from fcvit.errors import DoesNotFit, UsageError, counted
from fcvit.metrics import classification as metrics
from fcvit.tasks.classification.results import SavedResult, read_result
from fcvit.text import csv_text

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN, _CLASSES = 20, 10  # rows of listings that may be long
_SETTINGS = ("weights_sha256", "network", "protocol", "engine", "device", "precision", "batch_size")


@dataclasses.dataclass(frozen=True)
class ClassChange:
    """One class: images, per cent right in the first and the second, and images gained (or lost, below 0)."""

    id: str
    name: str
    images: int
    first: float
    second: float
    gained: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """An image that the two take for different classes: ids, and names where they are known."""

    path: str
    truth: str
    first: str
    second: str
    truth_name: str
    first_name: str
    second_name: str


@dataclasses.dataclass(frozen=True)
class ResultComparison:
    """The differences of two results over the same images.

    Attributes:
        first, second: their names.
        folders: where they are.
        settings: what they were computed with, where it is not the same: (first's, second's).
        images: that both evaluated.
        top1: per cent, of each.
        difference, interval: second less first, in points; see `fcvit.metrics.classification.paired_difference`.
        only_first, only_second: images that only one gets right.
        p_value: of the exact McNemar test.
        classes: the most gained first, the most lost last.
        differing: images with another top-1 class.
        folder: where it was written, or None.
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
        return f"<ResultComparison: {self.difference:+.2f} points over {counted(self.images, 'image')}>"

    def tables(self) -> "Iterator[Table | str]":
        """Show the difference, classes that gained and lost, and images that differ."""
        from fcvit.report.tables import interval, table

        if self.settings:
            settings = table("", "first", "second", title="settings that differ")
            for what, both in self.settings.items():
                settings.add_row(what.replace("_", " "), *both)
            yield settings
        figures = table(title=f"{self.first} and {self.second}, the same {counted(self.images, 'image')}")
        figures.add_row("top-1 of the first", f"{self.top1[0]:.2f} %")
        figures.add_row("top-1 of the second", f"{self.top1[1]:.2f} %")
        figures.add_row("difference", f"{self.difference:+.2f} points (95 % interval {interval(self.interval)})")
        figures.add_row("only the first is right", str(self.only_first))
        figures.add_row("only the second is right", str(self.only_second))
        figures.add_row("exact McNemar test", f"p = {self.p_value:.2g}")
        figures.add_row("another top-1 class", counted(len(self.differing), "image"))
        yield figures
        moved = [change for change in self.classes if change.gained]
        for title, rows in (
            ("classes that gained most", [change for change in moved if change.gained > 0][:_CLASSES]),
            ("classes that lost most", [change for change in reversed(moved) if change.gained < 0][:_CLASSES]),
        ):
            if rows:
                columns = ("images", "first %", "second %", "images gained")
                listing = table("class", "name", *columns, title=title, right=columns)
                for row in rows:
                    shares = (f"{row.first:.1f}", f"{row.second:.1f}")
                    listing.add_row(row.id, row.name, str(row.images), *shares, f"{row.gained:+d}")
                yield listing
        if self.differing:
            listing = table("image", "truth", "first", "second", title="images on which they differ")
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

    Images are matched by their content, so that a tar and a folder of the same images can be compared.

    Args:
        first, second: the folder of a result (weights and protocol), or of a run that has only one.
        folder: a new folder for `comparison.json` and `differing.csv`; None: nothing is written.

    Raises:
        UnreadableFile: no finished results there.
        UsageError: a run with several results, or twice the same.
        DoesNotFit: they are over different images, or the images have other classes.
    """
    one, other = read_result(Path(first)), read_result(Path(second))
    if one.folder.resolve() == other.folder.resolve():
        raise UsageError(f"{one.folder} twice; expected two results")
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
    """Refuse other images, the same ones with other classes, and other sets of classes."""
    told_apart = [saved.metrics.get("classes") for saved in (one, other)]
    if told_apart[0] != told_apart[1]:
        raise DoesNotFit(
            f"{one.folder} tells {told_apart[0]} classes apart and {other.folder} {told_apart[1]}: not the same task"
        )
    counts = [collections.Counter(image for image, _ in saved.images) for saved in (one, other)]
    only = [counts[0] - counts[1], counts[1] - counts[0]]
    if any(only):
        side = 0 if only[0] else 1
        example = next(path for image, path in (one, other)[side].images if image in only[side])
        raise DoesNotFit(
            f"{one.folder} and {other.folder} are over different images: {only[0].total()} are only in the first, "
            f"{only[1].total()} only in the second, such as {example}"
        )
    for (_, path), truth, theirs in zip(one.images, one.truth, other.truth, strict=True):
        if truth != theirs:
            raise DoesNotFit(f"{path} is {truth} in {one.folder} and {theirs} in {other.folder}: other classes")


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
        settings=_settings(one, other),
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


def _settings(one: SavedResult, other: SavedResult) -> dict[str, tuple[str, str]]:
    """Return the settings in which the two differ, as texts."""
    sides = []
    for saved in (one, other):
        side = {what: saved.metrics.get(what) for what in _SETTINGS}
        if isinstance(protocol := side["protocol"], dict):
            pixels = protocol.get("preprocessing")
            side |= {"protocol": protocol.get("name")} | (pixels if isinstance(pixels, dict) else {})
        sides.append(side)
    first, second = sides
    differing = [what for what in first | second if first.get(what) != second.get(what)]
    return {what: (str(first.get(what)), str(second.get(what))) for what in differing}
