"""Predict images: the command `fcvit predict`, and in Python `fcvit.load(...).predict`."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.commands.options import (
    Classes,
    Device,
    Ema,
    File,
    Flag,
    Output,
    PeerTimeout,
    Threads,
    all_tasks,
    decoding_processes,
    given_options,
    task_options,
)
from fcvit.data.named_images import NamedImages, find_named
from fcvit.errors import BadImages, UsageError
from fcvit.evaluation.batch_run import JOURNALS, check_identity, check_workers, shared_folder
from fcvit.evaluation.prediction_files import WRITERS, csv_header, csv_lines, require_parquet
from fcvit.evaluation.predictions import PredictionRun, PredictionSettings
from fcvit.evaluation.request import Request
from fcvit.evaluation.settings import absolute
from fcvit.inference.engines import AUTO, CHOICES
from fcvit.inference.exported import read_network
from fcvit.processes import PEER_TIMEOUT, Processes, join
from fcvit.tasks.base import task_of
from fcvit.tasks.predictor import Predictor, load
from fcvit.weights.reading import Weights

_FEW = 64  # images that are decoded without worker processes, which need a second to start
PredictionOptions: Any = all_tasks("prediction")


@dataclasses.dataclass(frozen=True, repr=False)
class Predictions:
    """The predictions for a list of images.

    Attributes:
        predictor: The predictor from `load`, which formats the predictions.
        count: Number of images with a prediction.
        good: Path and rows of each readable image, in the order of the images. If the predictions were written, only
            the first ones.
        unreadable: Error messages of the images that could not be read.
        as_csv: Whether to print the predictions as CSV.
        written: The written file or folder, or None.
        first: True in the process that prints the predictions (see `fcvit.processes`).
    """

    predictor: Predictor
    count: int
    good: tuple[tuple[Path, list[dict[str, Any]]], ...]
    unreadable: tuple[str, ...]
    as_csv: bool = False
    written: Path | None = None
    first: bool = True

    def __repr__(self) -> str:
        return f"<Predictions of {self.count} images>"

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable and self.first else 0

    def to_json(self) -> dict[str, Any] | None:
        """Return the predictions, or where they were written. Return None in processes other than the first."""
        if self.as_csv:
            raise UsageError("predict: --json and --csv exclude each other; choose one")
        if not self.first:
            return None
        if self.written:
            return {"images": self.count, "written": self.written, "unreadable": self.unreadable}
        return {"predictions": {str(path): rows for path, rows in self.good}, "unreadable": self.unreadable}

    def csv(self) -> str:
        """Return a CSV table with a line for each predicted class of each image."""
        return csv_header(self.predictor) + "".join(csv_lines(str(path), rows) for path, rows in self.good)

    def tables(self) -> Iterator[Any]:
        """Yield the predictions as a table or as CSV. If many were written, yield only their number."""
        if not self.first:
            return
        if self.as_csv and not self.written:
            yield self.csv().rstrip("\n")
        elif self.good and len(self.good) == self.count:
            yield self.predictor.table(self.good)
        if self.written:
            yield f"predictions for {self.count:,} images written to {self.written}"


def predict(
    *images: str,
    weights: File,
    options: Annotated[PredictionOptions | None, Parameter(name="*")] = None,
    engine: Annotated[str, Parameter(help=f"{CHOICES}.")] = AUTO,
    classes: Classes = None,
    batch_size: int | Literal["auto"] = 32,
    device: Device = "auto",
    threads: Threads = None,
    workers: int | None = None,
    ema: Ema = None,
    csv: Flag = False,
    peer_timeout: PeerTimeout = PEER_TIMEOUT,
    output: Annotated[Path | None, Output] = None,
) -> Predictions:
    """Predict images: the most probable classes of each image, the areas of the classes in it, or its objects.

    Args:
        images: Files, folders (searched recursively), quoted patterns, or tar archives.
        weights: A checkpoint of any format, or an exported file.
        options: Options of the task of the weights.
        batch_size: Images per batch. auto uses the largest that fits in memory.
        workers: Processes that decode images (default: none for up to 64 images, otherwise one per core, at most 32).
        csv: Print the predictions as CSV.
        output: New file for the predictions (.csv, .jsonl or .parquet), or new folder for pictures with the
            predictions. For segmentation, the folder contains a label map and an overlay of each image, and for
            detection a picture with the objects of each image, and a JSON file in COCO's format.

    Raises:
        FcvitError: See `fcvit.load`.
    """
    if not images:
        raise UsageError("predict: expected at least one image, folder or pattern")
    check_workers(workers)
    processes = join(peer_timeout)
    folder = None if output is None else run_folder(output)
    if output is not None and processes.first:
        _check_output(output, images)
    settings = PredictionSettings(
        images=images,
        output=None if output is None else output.name,
        engine=engine,
        device=device,
        threads=threads,
        ema=ema,
        classes=absolute(classes) if isinstance(classes, str | os.PathLike) else classes,
        batch_size=batch_size,
    )
    named = find_named(images, Path.cwd())
    read = read_network(weights, ema)
    task = task_of([read])
    chosen = task_options("predict", task, given_options(options))
    request = Request((absolute(weights),), str(Path.cwd()), task.name, settings, chosen)
    run = _prepare(request, named, read, output, processes)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            if processes.first:
                details = run.request.to_json() | {"identity": run.identity}
                stack.enter_context(runs.run_folder(folder, "predict", details))
            folder = shared_folder(folder if processes.first else None, processes)
        run.finish(folder, _workers(workers, named))
    return _finished(run, folder, csv)


def resume(folder: Path, moved: Mapping[str, Any], workers: int | None) -> Predictions:
    """Continue an interrupted prediction. See `fcvit.commands.resume.resume`."""
    check_workers(workers)
    processes = join()
    text = processes.broadcast(json.dumps(runs.read_run(folder, "predict")).encode() if processes.first else b"")
    record = json.loads(text)
    request = Request.from_json(record, folder / "run.json", PredictionSettings, "prediction")
    output = folder.with_name(request.settings.output)
    if record.get("status") == "finished":
        raise UsageError(f"{folder}: this prediction is complete; its results are in {output}")
    if moved:
        request = request.moved(moved)
        record |= request.to_json()
    named = find_named(request.settings.images, Path(request.data))
    read = read_network(request.weights[0], request.settings.ema)
    run = _prepare(request, named, read, output, processes)
    check_identity(run.identity, record.get("identity", {}), folder)
    if moved:
        run.check_files(folder)
    with contextlib.ExitStack() as stack:
        if processes.first:
            stack.enter_context(runs.continued_run(folder, record))
        run.finish(shared_folder(folder if processes.first else None, processes), _workers(workers, named))
    return _finished(run, folder, False)


def run_folder(output: Path) -> Path:
    """Return the run folder of an output: the folder for pictures, or a folder beside a file, removed at the end."""
    return output.with_name(f"{output.name}.run") if output.suffix else output


def _check_output(output: Path, images: Sequence[str]) -> None:
    """Check that an output does not exist and can be written.

    Raises:
        UsageError: The name has an unknown ending, the output exists or is incomplete, or it is among the images.
        MissingExtra: pyarrow is not installed.
    """
    if output.suffix not in ("", *WRITERS):
        raise UsageError(f"{output}: expected a file ({', '.join(WRITERS)}), or a folder for pictures")
    if output.suffix == ".parquet":
        require_parquet()
    folder = run_folder(output)
    if (folder / "run.json").exists():
        record = runs.read_run(folder)
        if record.get("command") == "predict" and record.get("status") != "finished":
            raise UsageError(
                f"{output} is not complete; continue it with: fcvit resume {shlex.quote(str(folder))}, or choose "
                "another -o"
            )
    if output.exists():
        raise UsageError(f"{output} already exists; choose another -o")
    if folder == output:
        for argument in images:
            runs.reject_inside(output, Path(argument), argument)


def _prepare(
    request: Request, images: NamedImages, read: Weights, output: Path | None, processes: Processes
) -> PredictionRun:
    settings = request.settings
    device = processes.device(settings.device)
    predictor = load(read, classes=settings.classes, device=device, engine=settings.engine, threads=settings.threads)
    return PredictionRun(request, images, predictor, output, processes)


def _workers(workers: int | None, images: NamedImages) -> int:
    return 0 if workers is None and len(images) <= _FEW else decoding_processes(workers)


def _finished(run: PredictionRun, folder: Path | None, as_csv: bool) -> Predictions:
    """Remove the files with which the run would be continued, and return its predictions."""
    first = run.processes.first
    if folder is not None and (first or not (folder / "run.json").exists()):  # or a machine that does not share it
        shutil.rmtree(folder / JOURNALS if first and folder == run.output else folder, ignore_errors=True)
    good = tuple((Path(one.name), json.loads(one.content)) for one in run.kept)
    return Predictions(run.predictor, run.count, good, tuple(run.unreadable), as_csv, run.output, first)
