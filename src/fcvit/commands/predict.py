"""Predict images: the command `fcvit predict`, and in Python `fcvit.load(...).predict`."""

import collections
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.commands.options import Classes, Device, Ema, File, Flag, Output, Threads, all_tasks, given_options
from fcvit.data.folders import find_images
from fcvit.errors import BadImages, UsageError
from fcvit.inference.engines import AUTO, CHOICES
from fcvit.inference.exported import read_network
from fcvit.report.progress import progress
from fcvit.tasks.base import Task, task_of
from fcvit.tasks.predictor import load
from fcvit.text import csv_text, printable

_TABLES = (".csv", ".jsonl")
PredictionOptions: Any = all_tasks("prediction")


@dataclasses.dataclass(frozen=True, repr=False)
class Predictions:
    """The predictions for a list of images.

    Attributes:
        predictor: The predictor from `load`, which formats the predictions.
        good: Path and rows of each readable image, in the order of the images.
        unreadable: Error messages of the images that could not be read.
        as_csv: Whether to print the predictions as CSV.
        written: The written file or folder, or None.
    """

    predictor: Any
    good: tuple[tuple[Path, list[dict[str, Any]]], ...]
    unreadable: tuple[str, ...]
    as_csv: bool = False
    written: Path | None = None

    def __repr__(self) -> str:
        return f"<Predictions of {len(self.good)} images>"

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def to_json(self) -> dict[str, Any]:
        if self.as_csv:
            raise UsageError("predict: --json and --csv exclude each other; choose one")
        return {"predictions": {str(path): rows for path, rows in self.good}, "unreadable": self.unreadable}

    def csv(self) -> str:
        """Return a CSV table with a line for each predicted class of each image."""
        rows = [(path, *row) for path, of_image in self.good for row in enumerate(of_image, 1)]
        lines = [("path", "place", *rows[0][2])] if rows else []
        lines += [tuple(map(_cell, (str(path), rank, *row.values()))) for path, rank, row in rows]
        return csv_text(lines, "\n")

    def tables(self) -> Iterator[Any]:
        """Yield the predictions as a table or as CSV."""
        if self.as_csv:
            yield self.csv().rstrip("\n")
        elif self.good:
            yield self.predictor.table(self.good)
        if self.written:
            yield f"written to {self.written}"


def predict(
    *images: str,
    weights: File,
    options: Annotated[PredictionOptions | None, Parameter(name="*")] = None,
    engine: Annotated[str, Parameter(help=f"{CHOICES}.")] = AUTO,
    classes: Classes = None,
    device: Device = "auto",
    threads: Threads = None,
    ema: Ema = None,
    csv: Flag = False,
    output: Annotated[Path | None, Output] = None,
) -> Predictions:
    """Predict images: the most probable classes of each image, the areas of the classes in it, or its objects.

    Args:
        images: Files, folders (searched recursively) or quoted patterns.
        weights: A checkpoint of any format, or an exported file.
        options: Options of the task of the weights.
        csv: Print the predictions as CSV.
        output: New file for the predictions (.csv or .jsonl), or new folder for pictures with the predictions. For
            segmentation, the folder contains a label map and an overlay of each image, and for detection a picture
            with the objects of each image, and a JSON file in COCO's format.

    Raises:
        FcvitError: See `fcvit.load`.
    """
    if not images:
        raise UsageError("predict: expected at least one image, folder or pattern")
    if output is not None and output.suffix not in ("", *_TABLES):
        raise UsageError(f"{output}: expected a file ({' or '.join(_TABLES)}), or a folder for pictures")
    if output is not None and output.exists():
        raise UsageError(f"{output} already exists; choose another -o")
    paths = find_images(images)
    read = read_network(weights, ema)
    chosen = vars(_options_of(task_of([read]), given_options(options)))
    predictor = load(read, classes=classes, device=device, engine=engine, threads=threads)
    good: list[tuple[Path, list[dict[str, Any]]]] = []
    bad: list[str] = []

    def results() -> Iterator[tuple[Path, Any]]:
        for path, result in zip(paths, predictor.stream(paths, **chosen), strict=True):
            if isinstance(result, BadImages):
                bad.append(str(result))
            else:
                good.append((path, predictor.rows(result)))
                yield path, result
            advance(1)

    with progress("predicting", len(paths)) as advance:
        if output is not None and not output.suffix:
            with runs.run_folder(output, "predict") as folder:
                predictor.draw(results(), folder)
        else:
            collections.deque(results(), maxlen=0)
    predictions = Predictions(predictor, tuple(good), tuple(bad), csv, output)
    if output is not None and output.suffix == ".csv":
        runs.write_text(output, predictions.csv())
    elif output is not None and output.suffix == ".jsonl":
        lines = ({"path": str(path), "predictions": rows} for path, rows in good)
        runs.write_text(output, "".join(json.dumps(line) + "\n" for line in lines))
    return predictions


def _options_of(task: Task, given: dict[str, Any]) -> Any:
    """Return the prediction options of a task.

    Raises:
        UsageError: An option is not one of this task, or its value is invalid.
    """
    known = [field.name for field in dataclasses.fields(task.prediction)]
    if unknown := [name for name in given if name not in known]:
        listed, others = (", ".join(f"--{name.replace('_', '-')}" for name in names) for names in (unknown, known))
        raise UsageError(f"predict: {listed}: not an option for {task.name}; use {others}")
    return task.prediction(**given)


def _cell(value: Any) -> Any:
    """Format a CSV cell: numbers get six decimals. Negative numbers stay numbers, because text would be escaped."""
    if isinstance(value, float):
        return f"{value:.6f}" if value >= 0 else round(value, 6)
    return printable(value) if isinstance(value, str) else value
