"""The parts of a comparison of two results that are the same for all tasks: reading, checks, and written files."""

import collections
import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fcvit import run_folder as runs
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.evaluation.results import METRICS, differing_settings
from fcvit.text import csv_text, interval

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class SavedResult:
    """A result that was read from its folder, with the images in the order of their content.

    Attributes:
        folder: Folder of the configuration.
        metrics: Content of `metrics.json`.
        names, images, truth: Name, first digits of the SHA-256 of the file, and true label of each image.
    """

    folder: Path
    metrics: dict[str, Any]
    names: tuple[str, ...]
    images: tuple[str, ...]
    truth: tuple[str, ...]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Raise an `UnreadableFile` with the path instead of the errors of a damaged result file."""
    try:
        yield path
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error, RecursionError) as error:
        raise UnreadableFile(
            f"{path}: damaged or written by another version ({error!s:.80}); run fcvit eval again"
        ) from error


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read `metrics.json` in the folder of a configuration.

    Raises:
        UnreadableFile: The file is damaged.
    """
    with reading(folder / METRICS) as path:
        figures = json.loads(path.read_bytes())
        if not isinstance(figures["fingerprint"], str) or not isinstance(figures["name"], str):
            raise ValueError("fingerprint and name must be text")
        return figures


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV file of a result."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield from csv.DictReader(file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultComparison:
    """The part of a comparison of two results that does not depend on the task.

    Attributes:
        first, second: Names of the two results.
        folders: Folders of the two results.
        settings: Settings that differ: name -> (first, second).
        images: Number of images.
        difference, interval: Second minus first value of the main metric and its 95% confidence interval, in percentage
            points. The interval is NaN if the task has none.
        folder: Folder of the written comparison, or None.
    """

    first: str
    second: str
    folders: tuple[Path, Path]
    settings: dict[str, tuple[str, str]]
    images: int
    difference: float
    interval: tuple[float, float]
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.difference:+.2f} percentage points on {counted(self.images, 'image')}>"

    def write(self, folder: str | os.PathLike[str] | None, file: str, rows: Sequence[Any], row_type: type) -> Self:
        """Write `comparison.json` and a CSV file with dataclasses as rows. Without a folder, nothing is written."""
        if folder is None:
            return self
        with runs.run_folder(Path(folder), "compare") as target:
            runs.write_json(target / "comparison.json", dataclasses.asdict(self))
            header = [field.name for field in dataclasses.fields(row_type)]
            content = csv_text([header, *map(dataclasses.astuple, rows)])
            runs.write_text(target / file, content, "surrogateescape")
        return dataclasses.replace(self, folder=Path(folder))

    def settings_tables(self) -> "Iterator[Table]":
        """Yield the table of the settings that differ, if there are any."""
        from fcvit.report.tables import table

        if self.settings:
            rows = [(name.replace("_", " "), *values) for name, values in self.settings.items()]
            yield table("setting", "first", "second", title="settings that differ", rows=rows)

    @property
    def title(self) -> str:
        return f"{self.first} (first) and {self.second} (second) on the same {counted(self.images, 'image')}"

    @property
    def difference_text(self) -> str:
        bounds = interval(self.interval)
        return f"{self.difference:+.2f} percentage points" + (f" (95% confidence interval {bounds})" if bounds else "")


def check_different(one: SavedResult, other: SavedResult) -> None:
    """Raise a UsageError if both results are the same folder."""
    if one.folder.resolve() == other.folder.resolve():
        raise UsageError(f"{one.folder}: both arguments are this result; pass two different results")


def check_same_images(one: SavedResult, other: SavedResult, label: str) -> None:
    """Check that two results are for the same images with the same labels.

    Args:
        one, other: Results to compare.
        label: Name of the true label in messages.

    Raises:
        DoesNotFit: The images or their true labels are different.
    """
    counts = [collections.Counter(saved.images) for saved in (one, other)]
    only = [counts[0] - counts[1], counts[1] - counts[0]]
    if any(only):
        saved, differing = (one, only[0]) if only[0] else (other, only[1])
        example = next(name for name, image in zip(saved.names, saved.images, strict=True) if image in differing)
        raise DoesNotFit(
            f"{one.folder} and {other.folder} have different images: {only[0].total()} are only in the first and "
            f"{only[1].total()} only in the second, for example {example}; evaluate both on the same images"
        )
    for name, first, second in zip(one.names, one.truth, other.truth, strict=True):
        if first != second:
            raise DoesNotFit(
                f"{name}: the {label} is {first} in {one.folder} and {second} in {other.folder}; compare results with "
                "the same labels"
            )


def common(one: SavedResult, other: SavedResult) -> dict[str, Any]:
    """Return the fields of `ResultComparison` that do not depend on the metrics."""
    names = [str(saved.metrics["name"]) for saved in (one, other)]
    if names[0] == names[1]:
        names = [str(saved.folder) for saved in (one, other)]
    return {
        "first": names[0],
        "second": names[1],
        "folders": (one.folder, other.folder),
        "settings": differing_settings(one.metrics, other.metrics),
        "images": len(one.names),
    }
