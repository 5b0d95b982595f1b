"""The command `fcvit predict`; in Python, `fcvit.load(...).predict` does the same."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit.commands.options import Classes, Device, Ema, File, Threads
from fcvit.data.folders import find_images
from fcvit.errors import BadImages, UsageError
from fcvit.inference.predict import check_counts, load
from fcvit.report.progress import progress
from fcvit.text import csv_text, printable


@dataclasses.dataclass(frozen=True, repr=False)
class Predictions:
    """The predictions of images.

    Attributes:
        good: path and prediction of each image, in their order.
        unreadable: reasons of the images that could not be read.
        as_csv: show them as CSV.
    """

    good: tuple[tuple[Path, Any], ...]
    unreadable: tuple[str, ...]
    as_csv: bool = False

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def to_json(self) -> dict[str, Any]:
        ranked = {str(path): [dataclasses.asdict(row) for row in rows] for path, rows in self.good}
        return {"predictions": ranked, "unreadable": self.unreadable}

    def csv(self) -> str:
        """Return a line for each class of each image."""
        lines: list[tuple[Any, ...]] = [("path", "place", "index", "id", "name", "probability")]
        for path, rows in self.good:
            for place, row in enumerate(rows, 1):
                names = printable(str(path)), place, row.index, printable(row.id), printable(row.name)
                lines.append((*names, f"{row.probability:.6f}"))
        return csv_text(lines, "\n")

    def tables(self) -> Iterator[Any]:
        """Show the best classes of each image."""
        from fcvit.report.tables import predictions

        if self.as_csv:
            yield self.csv().rstrip("\n")
        elif self.good:
            yield predictions(self.good)


def predict(
    *images: str,
    weights: File,
    top_k: int = 5,
    engine: str = "auto",
    classes: Classes = None,
    device: Device = "auto",
    batch_size: int = 32,
    threads: Threads = None,
    ema: Ema = None,
    csv: Annotated[bool, Parameter(negative=())] = False,
) -> Predictions:
    """Classify images: files, folders or glob patterns.

    Args:
        images: Files, folders (searched through) or quoted patterns.
        weights: A checkpoint of any format.
        top_k: How many classes to give.
        engine: auto (the fastest installed one that passes the numerical check), onnxruntime, openvino, paddle,
            paddle-inference, native, torch.
        batch_size: Images at a time.
        csv: Print CSV.

    Raises:
        What `fcvit.load` raises.
    """
    if not images:
        raise UsageError("predict: name at least one image, folder or pattern")
    check_counts(top_k, batch_size)
    paths = find_images(images)
    classifier = load(weights, ema=ema, classes=classes, device=device, engine=engine, threads=threads)
    good, bad = [], []
    with progress("predicting", len(paths)) as advance:
        for path, found in zip(paths, classifier.stream(paths, top_k, batch_size=batch_size), strict=True):
            if isinstance(found, BadImages):
                bad.append(str(found))
            else:
                good.append((path, found))
            advance(1)
    return Predictions(tuple(good), tuple(bad), csv)
