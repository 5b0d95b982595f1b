"""The command `fcvit predict`; in Python, `fcvit.load(...).predict` does the same."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.commands.options import Classes, Device, Ema, File, Flag, Output, Threads
from fcvit.data.folders import find_images
from fcvit.errors import BadImages, UsageError
from fcvit.inference.engines import AUTO, CHOICES, Engine, create_engine
from fcvit.inference.images import check_counts
from fcvit.models.variants import Preprocessing, resolve_preprocessing
from fcvit.report.progress import progress
from fcvit.tasks.base import task_of
from fcvit.text import csv_text, printable
from fcvit.weights.reading import Weights, read_weights

_TABLES = (".csv", ".jsonl")
logger = logging.getLogger("fcvit")


@dataclasses.dataclass(frozen=True, repr=False)
class Predictions:
    """The predictions of images.

    Attributes:
        predictor: what `load` gave: it knows how predictions are shown.
        good: path and prediction of each image, in their order.
        unreadable: reasons of the images that could not be read.
        as_csv: show them as CSV.
        written: the file or folder that was written; None: nothing.
    """

    predictor: Any
    good: tuple[tuple[Path, Any], ...]
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
            raise UsageError("predict: --json and --csv are two answers; choose one")
        ranked = {str(path): self.predictor.rows(one) for path, one in self.good}
        return {"predictions": ranked, "unreadable": self.unreadable}

    def csv(self) -> str:
        """Return a line for each row of each prediction."""
        rows = [(path, *one) for path, prediction in self.good for one in enumerate(self.predictor.rows(prediction), 1)]
        lines = [("path", "place", *rows[0][2])] if rows else []
        lines += [tuple(map(_cell, (str(path), place, *row.values()))) for path, place, row in rows]
        return csv_text(lines, "\n")

    def tables(self) -> Iterator[Any]:
        """Show the prediction of each image."""
        if self.as_csv:
            yield self.csv().rstrip("\n")
        elif self.good:
            yield self.predictor.table(self.good)
        if self.written:
            yield f"written to {self.written}"


def load(
    path: "Weights | str | os.PathLike[str]",
    *,
    ema: bool | None = None,
    classes: Any = None,
    device: str = "auto",
    engine: str = AUTO,
    threads: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Any:
    """Load network, preprocessing and class names of a weights file, ready for `predict`.

    Args:
        path: a checkpoint of any format, or weights in memory.
        ema: choose the EMA or raw weights of a file that has both.
        classes: other names than the file's: a list, or the path of one.
        device: auto, cpu, gpu or gpu:N.
        engine: what computes; "auto" is the fastest installed one that passes the numerical check.
        threads: that compute on a CPU; None: one for each core.
        preprocessing: another one than the weights'.

    Returns:
        The predictor of the weights' task: for classification a `fcvit.Classifier`.

    Raises:
        UnreadableFile, DoesNotFit, UsageError: the file; see `fcvit.weights.reading.read_weights`.
        MissingExtra, NumbersDisagree: the engine; see `fcvit.inference.engines.create_engine`.
    """
    weights = path if isinstance(path, Weights) else read_weights(path, ema)
    for note in weights.notes:
        logger.info(note)
    chosen = resolve_preprocessing(preprocessing, weights.preprocessing, weights.spec.variant)

    def create() -> Engine:
        return create_engine(engine, weights, chosen, device, threads=threads)

    return task_of([weights]).predictor(weights, chosen, classes, create)


def predict(
    *images: str,
    weights: File,
    top_k: int = 5,
    engine: Annotated[str, Parameter(help=f"{CHOICES}.")] = AUTO,
    classes: Classes = None,
    device: Device = "auto",
    batch_size: int = 32,
    threads: Threads = None,
    ema: Ema = None,
    csv: Flag = False,
    output: Annotated[Path | None, Output] = None,
) -> Predictions:
    """Predict images: files, folders or glob patterns; for classification their best classes.

    Args:
        images: Files, folders (searched through) or quoted patterns.
        weights: A checkpoint of any format.
        top_k: How many classes to give.
        batch_size: Images at a time.
        csv: Print CSV.
        output: A new table (.csv or .jsonl), or a new folder for pictures of the images with their best classes.

    Raises:
        FcvitError: see `fcvit.load`.
    """
    if not images:
        raise UsageError("predict: name at least one image, folder or pattern")
    check_counts(top_k, batch_size)
    if output is not None and output.suffix not in ("", *_TABLES):
        raise UsageError(f"{output}: expected a table ({' or '.join(_TABLES)}), or a folder for pictures")
    if output is not None and output.exists():
        raise UsageError(f"{output} already exists; choose another -o")
    paths = find_images(images)
    predictor = load(weights, ema=ema, classes=classes, device=device, engine=engine, threads=threads)
    good, bad = [], []
    with progress("predicting", len(paths)) as advance:
        for path, result in zip(paths, predictor.stream(paths, top_k, batch_size=batch_size), strict=True):
            if isinstance(result, BadImages):
                bad.append(str(result))
            else:
                good.append((path, result))
            advance(1)
    predictions = Predictions(predictor, tuple(good), tuple(bad), csv, output)
    if output is not None:
        _write(predictions, output)
    return predictions


def _write(predictions: Predictions, output: Path) -> None:
    if output.suffix == ".csv":
        runs.write_text(output, predictions.csv())
    elif output.suffix == ".jsonl":
        rows = ({"path": str(path), "predictions": predictions.predictor.rows(one)} for path, one in predictions.good)
        runs.write_text(output, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        with runs.run_folder(output, "predict") as folder:
            predictions.predictor.draw(predictions.good, folder)


def _cell(value: Any) -> Any:
    """Return a number with six decimals; a negative one not as text, which would be taken for a formula."""
    if isinstance(value, float):
        return f"{value:.6f}" if value >= 0 else round(value, 6)
    return printable(value) if isinstance(value, str) else value
