"""Predict any number of images: the frames of a `BatchRun` hold predictions, which are written in the order of images.

Data flow: images -> batches of preprocessed images -> predictions in the journal -> file or folder. One process writes
the predictions of a batch as soon as they are computed. With several processes, the first one writes all at the end.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fcvit.data.folders import FORMATS
from fcvit.data.loader import DIGEST, Batch
from fcvit.data.named_images import NamedImages
from fcvit.data.sources import Location
from fcvit.errors import BadImages, UnreadableFile, UsageError
from fcvit.evaluation.batch_run import BatchRun, agreed_identity, chosen_batch_size, new_records
from fcvit.evaluation.journal import Frame
from fcvit.evaluation.prediction_files import WRITERS, Predicted
from fcvit.evaluation.request import Request
from fcvit.evaluation.settings import MOVABLE, used_packages
from fcvit.inference.engines import AUTO
from fcvit.processes import Processes

if TYPE_CHECKING:
    from fcvit.tasks.predictor import Predictor

_DTYPE = np.dtype([("index", "<i8"), ("digest", "u1", (DIGEST,))])
_KEPT = 100  # predictions that are kept for the terminal if there is a file or folder


@dataclasses.dataclass(frozen=True)
class PredictionSettings:
    """The settings of a prediction of any task. `run.json` stores them.

    Attributes:
        images: Arguments that name the images. Relative paths refer to `Request.data`.
        output: Name of the file or folder for the predictions, or None.
        engine, device, threads, ema, classes: See `fcvit.load`.
        batch_size: Number of images per batch, or "auto".
    """

    images: Sequence[str]
    output: str | None
    engine: str = AUTO
    device: str = "auto"
    threads: int | None = None
    ema: bool | None = None
    classes: Any = field(default=None, metadata=MOVABLE)
    batch_size: Any = 32

    def __post_init__(self) -> None:
        size = self.batch_size
        if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UsageError(f"--batch-size {size!r:.40}: expected auto or an integer of at least 1")


@dataclasses.dataclass
class PredictionRun:
    """The prediction of images by all processes of a job.

    Args:
        request: Request with `PredictionSettings`. Values that were chosen automatically are replaced.
        images: The images.
        predictor: Predictor of the task.
        output: File or folder for the predictions, or None.
        processes: Processes that share the work.

    Attributes:
        packed: Whether the output is a folder, for which the journal has more than the rows.
        kept: The first predictions, or all of them if there is no output.
        count: Number of images with a prediction.
        unreadable: Error messages of the images that could not be read.

    Raises:
        DoesNotFit: The processes differ.
    """

    request: Request
    images: NamedImages
    predictor: "Predictor"
    output: Path | None
    processes: Processes
    kept: list[Predicted] = field(default_factory=list)
    count: int = 0
    unreadable: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings, predictor = self.request.settings, self.predictor
        self.transform = predictor.transform(self.request.options)  # checks the options
        jobs = [(predictor.engine, predictor.preprocessing.input_size)]
        size = chosen_batch_size(settings.batch_size, predictor.at_once, lambda: jobs, self.processes)
        engine = predictor.engine.name if settings.engine == AUTO else settings.engine
        settings = dataclasses.replace(settings, batch_size=size, engine=engine)
        self.request = dataclasses.replace(self.request, settings=settings)
        self.packed = self.output is not None and self.output.suffix not in WRITERS
        self.identity = agreed_identity(self._identity(), self.processes)

    def _identity(self) -> Mapping[str, Any]:
        """Return everything that determines the predictions, as JSON (see `Plan.identity`)."""
        settings, predictor = self.request.settings, self.predictor
        listed = {
            "weights": predictor.weights.source.sha256,
            "preprocessing": dataclasses.asdict(predictor.preprocessing),
            "engine": settings.engine,
            "threads": settings.threads,
            "classes": [[c.id, c.name] for c in predictor.classes],
            "options": dataclasses.asdict(self.request.options),
            "pictures": self.packed,
            "batch_size": settings.batch_size,
            "list_of_images": self.images.listing(),
            "packages": used_packages([settings.engine]),
        }
        return json.loads(json.dumps(listed))

    def check_files(self, folder: Path) -> None:
        """Check that a sample of the images for which a run has predictions is unchanged.

        Raises:
            DoesNotFit: An image has changed.
        """
        self._run(folder).check_files(Path(self.request.data))

    def _run(self, folder: Path | None) -> BatchRun:
        size = self.request.settings.batch_size
        return BatchRun(self.images, size, _DTYPE, self.identity, self.processes, folder)

    def finish(self, folder: Path | None, workers: int) -> None:
        """Compute the missing predictions and write all.

        Args:
            folder: Folder of the run, or None to keep all predictions.
            workers: Number of processes that decode images.
        """
        run = self._run(folder)
        with run.opened():
            computed = run.compute("predicting", lambda: self._frame, [self.transform], workers)
            batches = self._batches(run.in_order(computed))
            if self.output is None or not self.processes.first:
                for _ in batches:
                    pass
            elif self.packed:
                try:
                    self.predictor.draw(self._pictures(batches), self.output)
                except (BadImages, UnreadableFile) as error:  # an image cannot be read again, or a full disk
                    raise UnreadableFile(f"{error}; resume with: {run.resume_command}") from error
            else:
                WRITERS[self.output.suffix](batches, self.output, self.predictor)

    def _frame(self, batch: Batch) -> Frame:
        """Predict a batch. The frame has one chunk for each readable image."""
        predictor, options = self.predictor, self.request.options
        names = [self.images.names[index] for index in batch.indices.tolist()]
        step = predictor.at_once or max(len(names), 1)
        chunks: list[bytes] = []
        for start in range(0, len(names), step):
            some = slice(start, start + step)
            predictions = predictor.compute(names[some], batch.pixels[0][some], batch.targets[0][some], options)
            chunks += map(predictor.pack if self.packed else self._rows, predictions)
        return Frame(batch.number, new_records(batch, _DTYPE), {"bad": batch.bad}, tuple(chunks))

    def _rows(self, prediction: Any) -> bytes:
        return json.dumps(self.predictor.rows(prediction)).encode()

    def _batches(self, frames: Iterator[Frame]) -> Iterator[list[Predicted]]:
        """Yield the predictions of each frame, and count them."""
        limit = len(self.images) if self.output is None else _KEPT
        for frame in frames:
            self.unreadable += [reason for _, reason in frame.extra["bad"]]
            indices = frame.records["index"].tolist()
            self.count += len(indices)
            names = [self.images.names[index] for index in indices]
            batch = list(map(Predicted, names, frame.chunks, indices))
            if not self.packed:
                self.kept += batch[: limit - len(self.kept)]
            yield batch

    def _pictures(self, batches: Iterator[list[Predicted]]) -> Iterator[tuple[Path, Any, Any]]:
        """Yield the path of each image, the image and its prediction."""
        for one in itertools.chain.from_iterable(batches):
            location = self.images.locations[one.index]
            if isinstance(location, Location) and location == Location(location.path):
                image: Any = Path(location.path)
            else:  # a part of a file
                image = Image.open(io.BytesIO(location.read()), formats=list(FORMATS))
            prediction = self.predictor.unpack(one.content, image, self.request.options)
            if len(self.kept) < _KEPT:
                self.kept.append(one._replace(content=self._rows(prediction)))
            yield Path(one.name), image, prediction
