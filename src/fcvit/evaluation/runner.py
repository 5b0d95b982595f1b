"""Evaluate weights on labeled samples: several weights, protocols and engines in one pass, for any task.

The flow of the data: samples -> batches of crops -> outputs of each configuration -> a record of every sample in the
journal -> figures from all records at once -> files. Since figures come from the records alone, a run that
is continued, or shared by several processes, ends as an uninterrupted one does.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import interrupts
from fcvit import run_folder as runs
from fcvit.data.loader import DIGEST, Batch, Workers, batches, read_file
from fcvit.data.transforms.preprocess import decoders
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UnreadableFile, UsageError
from fcvit.evaluation.journal import Frame, Journal
from fcvit.evaluation.logits import LogitFiles
from fcvit.evaluation.request import Request, sha256
from fcvit.evaluation.results import Evaluation, NotWritten, RunRecords
from fcvit.evaluation.settings import Configuration, Plan, Settings, absolute
from fcvit.inference.batch_size import fitting_batch_size
from fcvit.inference.engines import Engine
from fcvit.processes import Processes, join
from fcvit.report.progress import progress
from fcvit.tasks.base import Evaluator, get_task, task_of
from fcvit.weights.reading import Weights, read_weights

JOURNALS = "journals"
_SAMPLE = 64  # images whose files are compared where they are elsewhere now
logger = logging.getLogger("fcvit")


def evaluate(
    weights: "Sequence[Weights | str | os.PathLike[str]]",
    data: str | os.PathLike[str],
    settings: Settings,
    options: Mapping[str, Any],
    folder: Path | None,
    record: bool,
    workers: int = 0,
    strict: bool = False,
) -> Evaluation:
    """Evaluate weights on the data at a path; see `fcvit.commands.evaluate.evaluate`."""
    if not weights:
        raise UsageError("--weights: expected at least one file")
    _check_workers(workers)
    if settings.save_logits and not record:
        raise UsageError("save_logits needs a folder")
    began = time.perf_counter()
    processes = join()
    paths = tuple(absolute(one.source.path if isinstance(one, Weights) else one) for one in weights)
    pairs = zip(weights, paths, strict=True)
    loaded = [one if isinstance(one, Weights) else read_weights(path, settings.ema) for one, path in pairs]
    for note in dict.fromkeys(note for one in loaded for note in one.notes):
        logger.info(note)
    task = task_of(loaded)
    known = {field.name for field in dataclasses.fields(task.options)}
    if foreign := sorted(set(options) - known):
        raise UsageError(f"eval: {', '.join(foreign)}: no options of {task.name}; known: {', '.join(sorted(known))}")
    asked = task.options(**options)
    request = Request(paths, absolute(data), task.name, settings, asked)
    evaluator = task.evaluator(loaded, Path(request.data), asked)
    plan = Plan(settings, loaded, processes.device(settings.device), evaluator)
    for note in evaluator.notes:
        logger.info(note)
    engines = plan.engines()  # what they miss is said before a folder is made
    _fit_batch_size(plan, processes)
    request = dataclasses.replace(request, settings=plan.settings)
    identity = _agreed(plan, processes)
    with contextlib.ExitStack() as stack:
        target = None
        if record:
            if processes.first:
                if not getattr(asked, "list_file", None):
                    runs.refuse_inside(Path("runs") if folder is None else folder, Path(request.data), f"--data {data}")
                details = request.to_json() | {"identity": identity}
                target = stack.enter_context(runs.run_folder(folder, "eval", details))
            target = _shared_folder(target, processes)
        run = _Run(plan, engines, identity, processes, target, request)
        return run.finish(workers, strict, began)


def evaluate_split(
    loaded: Sequence[Weights], evaluator: Evaluator, settings: Settings, workers: "int | Workers"
) -> Evaluation:
    """Evaluate weights in memory during a training; nothing is written."""
    processes = join()
    plan = Plan(settings, loaded, processes.device(settings.device), evaluator)
    identity = _agreed(plan, processes)
    return _Run(plan, plan.engines(), identity, processes, None, None).finish(workers, False, time.perf_counter())


def resume(
    folder: str | os.PathLike[str],
    *,
    moved: Mapping[str, Any] | None = None,
    workers: int = 0,
    strict: bool = False,
) -> Evaluation:
    """Go on with a run that was interrupted; its numbers are those of an uninterrupted one.

    A finished run is only written again, from its records: with charts, if the extra `report` came later.

    Args:
        folder: of the run.
        moved: where what the run reads is now, by the names of the arguments of `evaluate` (weights: of all files, in
            their order), if it is no longer where it was. The content must be the same: images by their names and
            the content of a sample of those that were evaluated, files by what is read from them.
        workers, strict: as in `evaluate`.

    Raises:
        UnreadableFile, UsageError: no such run.
        DoesNotFit: weights, images or packages are no longer those that the run began with.
        And what `evaluate` raises.
    """
    began = time.perf_counter()
    _check_workers(workers)
    folder = Path(folder)
    processes = join()
    text = processes.broadcast(json.dumps(runs.read_run(folder, "eval")).encode() if processes.first else b"")
    record = json.loads(text)
    request = Request.from_json(record, folder / "run.json")
    if moved:
        request = request.moved(moved)
        record |= request.to_json()
    loaded = [read_weights(path, request.settings.ema) for path in request.weights]
    evaluator = get_task(request.task).evaluator(loaded, Path(request.data), request.options)
    plan = Plan(request.settings, loaded, processes.device(request.settings.device), evaluator)
    now, before = _agreed(plan, processes), record.get("identity", {})
    for what in now:
        if before.get(what) != now[what]:
            raise DoesNotFit(
                f"{folder}: {_change(what, before.get(what), now[what])} since the run began: it cannot end with "
                "the numbers that it would have had; start a new one"
            )
    if moved:
        _check_files(plan, now, folder)
    with contextlib.ExitStack() as stack:
        if processes.first:
            stack.enter_context(runs.continued_run(folder, record))
        run = _Run(plan, None, now, processes, _shared_folder(folder, processes), request)
        return run.finish(workers, strict, began)


class _Run:
    """An evaluation from its first batch to its files."""

    def __init__(
        self,
        plan: Plan,
        engines: list[Engine] | None,
        identity: Mapping[str, object],
        processes: Processes,
        folder: Path | None,
        request: Request | None,
    ):
        self.plan, self.engines, self.processes = plan, engines, processes
        self.folder, self.request = folder, request
        self.key = sha256(identity)
        self.logits: LogitFiles | None = None
        self.again = f"fcvit eval --resume {shlex.quote(str(folder))}"

    def finish(self, workers: "int | Workers", strict: bool, began: float) -> Evaluation:
        """Do what is missing, then write all figures.

        Raises:
            NotWritten: the disk is full; the error has the figures.
        """
        try:
            folder = self.folder and self.folder / JOURNALS
            self.journal = Journal(self.plan.dtype, self.key, folder, self.processes.rank)
            with interrupts.kept(), contextlib.closing(self.journal):
                self._compute(workers, strict)
                self._exchange()
                evaluation = self._evaluation(began)
                if self.processes.first and self.folder is not None:
                    self._write(evaluation)
                interrupts.check()
        except KeyboardInterrupt:
            if self.folder is not None and self.processes.first:
                logger.info(f"go on with: {self.again}")
            raise
        except OSError as error:
            if self.folder is None or isinstance(error, BrokenPipeError):  # the reader of our output is gone
                raise
            raise UnreadableFile(f"{_failed(error, self.folder)}; go on with: {self.again}") from error
        self.processes.gather(b"")  # the first one keeps the store for the others
        return dataclasses.replace(evaluation, seconds=time.perf_counter() - began)

    def _compute(self, workers: "int | Workers", strict: bool) -> None:
        """Do the batches that are missing, into the journal."""
        plan, processes, frames = self.plan, self.processes, self.journal.frames
        if self.folder is not None and plan.settings.save_logits:
            folders = [self.folder / one.name for one in plan.configurations]
            self.logits = LogitFiles(folders, (len(plan.dataset), plan.evaluator.outputs), len(plan.batches))
        # By number, not by what is left: what another process has already done must not shift the shares.
        mine = [number for number in plan.batches if number % processes.count == processes.rank]
        missing = [number for number in mine if number not in frames]
        if not missing:
            return
        if frames:
            logger.info(f"{sum(map(plan.batch_images, frames))} of {len(plan.dataset)} images are done already")
        engines = self.engines or plan.engines()
        title = "evaluating" if processes.count == 1 else f"evaluating (process 1 of {processes.count})"
        total = sum(map(plan.batch_images, missing))
        transforms = [plan.evaluator.transform(crop) for crop in plan.crops]
        with contextlib.ExitStack() as stack:
            advance = stack.enter_context(progress(title, total)) if processes.first else lambda _: None
            loaded = batches(plan.dataset, missing, int(plan.settings.batch_size), transforms, workers)
            stack.enter_context(contextlib.closing(loaded))
            for batch in loaded:
                if batch.bad and strict:
                    raise BadImages(f"{batch.bad[0][1]} (--strict stops at the first image that cannot be read)")
                self.journal.append(self._frame(engines, batch))
                interrupts.check()
                advance(len(batch.indices) + len(batch.bad))

    def _frame(self, engines: Sequence[Engine], batch: Batch) -> Frame:
        """Send a batch through all configurations."""
        plan = self.plan
        records = np.zeros(len(batch.indices), plan.dtype)
        records["index"] = batch.indices
        seconds = [0.0] * len(engines)
        outputs: list[np.ndarray] = []
        chunks: list[bytes] = []
        if len(records):
            records["digest"] = np.frombuffer(b"".join(batch.digests), np.uint8).reshape(-1, DIGEST)
            for position, (one, engine) in enumerate(zip(plan.configurations, engines, strict=True)):
                began = time.perf_counter()
                output = engine(batch.pixels[one.crop])
                seconds[position] = time.perf_counter() - began
                self._check_finite(one, engine, output, batch.indices)
                if self.logits is not None:
                    self.logits.write(position, batch.indices, output)
                outputs.append(output)
                reference = None if one.reference is None else outputs[one.reference]
                record, parts = plan.evaluator.record(output, batch.targets[one.crop], reference)
                records["configurations"][:, position] = record
                chunks += parts
        if self.logits is not None:
            self.logits.mark(batch.number)
        extra = {"bad": batch.bad, "seconds": seconds, "devices": [engine.device for engine in engines]}
        return Frame(batch.number, records, extra, tuple(chunks))

    def _check_finite(self, one: Configuration, engine: Engine, output: np.ndarray, indices: np.ndarray) -> None:
        """Refuse NaN, which compares as if the true class were first."""
        finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
        if not finite.all():
            name = self.plan.dataset.names[indices[np.flatnonzero(~finite)[0]]]
            raise NumbersDisagree(
                f"{one.name}: logits of {name} are not finite; the weights are damaged, or {engine.precision} is too "
                "narrow for them"
            )

    def _exchange(self) -> None:
        """Give every process the records of all."""
        journal, processes = self.journal, self.processes
        for rank, content in enumerate(processes.gather(journal.encoded())):
            journal.merge(content, f"process {rank}")
        journal.merge(processes.broadcast(journal.encoded()), "process 0")
        lost = [number for number in self.plan.batches if number not in journal.frames]
        assert not lost, f"no process did batches {lost[:5]}"

    def _evaluation(self, began: float) -> Evaluation:
        """Compute all figures.

        Raises:
            BadImages: not a single image could be read.
        """
        plan = self.plan
        records = RunRecords(plan, [self.journal.frames[number] for number in plan.batches], self._about())
        report = plan.evaluator.report(records)
        for hint in dict.fromkeys(report.hints):
            logger.info(hint)
        return Evaluation(
            report,
            tuple(f"{name}: {reason}" for name, reason in records.left_out),
            plan.evaluator.rule,
            self.folder,
            self.processes.first,
            time.perf_counter() - began,
        )

    def _about(self) -> dict[str, Any]:
        """Return what the files of the results say beside the figures."""
        if self.request is None:
            return {}
        return {"data": self.request.data, "task": self.request.task, "versions": runs.versions() | decoders()}

    def _write(self, evaluation: Evaluation) -> None:
        assert self.folder is not None
        try:
            if self.logits is not None:
                self.logits.finish(self.journal)
            evaluation.report.write(self.folder)
        except (UnreadableFile, OSError) as error:
            reason = error if isinstance(error, UnreadableFile) else _failed(error, self.folder)
            text = f"{reason}; the figures are complete; to write them: {self.again}"
            raise NotWritten(text, dataclasses.replace(evaluation, folder=None)) from error


def _fit_batch_size(plan: Plan, processes: Processes) -> None:
    """Replace "auto" by a batch size that fits."""
    if plan.settings.batch_size != "auto":
        return
    fitting = fitting_batch_size(plan.jobs()) if processes.first else (0, "")
    size, reason = json.loads(processes.broadcast(json.dumps(fitting).encode()))
    plan.settings = dataclasses.replace(plan.settings, batch_size=size)
    logger.info(f"batch size: {reason}")


def _check_workers(workers: object) -> None:
    if isinstance(workers, int) and workers < 0:
        raise UsageError(f"--workers {workers}: expected at least 0")


def _check_files(plan: Plan, identity: Mapping[str, object], folder: Path) -> None:
    """Compare images that the run has evaluated with the files of today, a sample of them.

    Raises:
        DoesNotFit: one is not what it was.
    """
    frames = Journal(plan.dtype, sha256(identity), folder / JOURNALS).frames.values()
    records = [record for frame in frames for record in frame.records]
    for record in records[:: -(-len(records) // _SAMPLE) or 1]:
        name = plan.dataset.names[record["index"]]
        content = read_file(name, plan.dataset.locations[record["index"]])
        if hashlib.sha256(content).digest()[:DIGEST] != record["digest"].tobytes():
            raise DoesNotFit(f"{plan.dataset.root}: {name} is not the image that the run in {folder} evaluated")


def _change(what: str, before: object, now: object) -> str:
    """Say what is no longer as it was; of packages, which."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        listed = ", ".join(f"{name} {before.get(name, 'absent')} to {now.get(name, 'absent')}" for name in names)
        return f"{what} changed ({listed})"
    return f"{what.replace('_', ' ')} changed"


def _agreed(plan: Plan, processes: Processes) -> dict[str, Any]:
    """Return what decides the records, after every process has seen the same.

    Raises:
        DoesNotFit: this process sees something else than the first one.
    """
    identity = plan.identity()
    first = json.loads(processes.broadcast(json.dumps(identity).encode()))
    for what in identity:
        if first.get(what) != identity[what]:
            change = _change(what, first.get(what), identity[what])
            raise DoesNotFit(f"process {processes.rank} does not see what process 0 sees: {change}")
    return identity


def _shared_folder(folder: Path | None, processes: Processes) -> Path:
    """Return the run's folder in every process; made where another machine does not share it."""
    path = Path(os.fsdecode(processes.broadcast(os.fsencode(folder.absolute()) if folder else b"")))
    path.mkdir(parents=True, exist_ok=True)
    return folder if folder is not None else path


def _failed(error: OSError, folder: Path) -> str:
    return f"{error.filename or folder}: {error.strerror or error}"
