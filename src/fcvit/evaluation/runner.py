"""Evaluate weights on labeled samples: several weights, protocols and engines in one pass, for any task.

Data flow: samples -> batches of preprocessed images -> outputs of each configuration -> one record per sample in the
journal -> metrics from all records -> files. Metrics depend only on the records. A resumed run, or a run of several
processes, therefore gives the same results as an uninterrupted run in one process.
"""

import contextlib
import dataclasses
import hashlib
import itertools
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
from fcvit.evaluation.protocols import AUTHORS
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
_SAMPLE = 64  # number of images whose content is checked when a run is resumed with moved data
_READ_TOGETHER = 16  # images of a batch whose sizes differ
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
    """Evaluate weights on the data at a path. See `fcvit.commands.evaluate.evaluate`."""
    if not weights:
        raise UsageError("--weights: expected at least one file")
    _check_workers(workers)
    if settings.save_logits and not record:
        raise UsageError("save_logits: logits are written to the run folder; pass a folder")
    began = time.perf_counter()
    processes = join()
    paths = tuple(absolute(item.source.path if isinstance(item, Weights) else item) for item in weights)
    pairs = zip(weights, paths, strict=True)
    loaded = [item if isinstance(item, Weights) else read_weights(path, settings.ema) for item, path in pairs]
    for note in dict.fromkeys(note for item in loaded for note in item.notes):
        logger.info(note)
    task = task_of(loaded)
    known = {field.name for field in dataclasses.fields(task.options)}
    if unknown := sorted(set(options) - known):
        raise UsageError(f"eval: unknown options of {task.name}: {', '.join(unknown)}; use {', '.join(sorted(known))}")
    task_options = task.options(**options)
    request = Request(paths, absolute(data), task.name, settings, task_options)
    evaluator = task.evaluator(loaded, Path(request.data), task_options)
    if evaluator.fixed_preprocessing and (settings.protocol != AUTHORS or settings.preprocessing):
        raise UsageError(
            f"eval: the preprocessing of {task.name} is fixed by the weights; omit --protocol and the options of the "
            "preprocessing"
        )
    if settings.save_logits and not evaluator.outputs:
        raise UsageError(f"--save-logits: the size of the logits differs between images; omit it for {task.name}")
    plan = Plan(settings, loaded, processes.device(settings.device), evaluator)
    for note in evaluator.notes:
        logger.info(note)
    engines = plan.engines()  # before the folder is created, so that a missing framework leaves no folder
    _fit_batch_size(plan, processes)
    request = dataclasses.replace(request, settings=plan.settings)
    identity = _agreed_identity(plan, processes)
    with contextlib.ExitStack() as stack:
        target = None
        if record:
            if processes.first:
                if not getattr(task_options, "list_file", None):
                    runs.reject_inside(Path("runs") if folder is None else folder, Path(request.data), f"--data {data}")
                details = request.to_json() | {"identity": identity}
                target = stack.enter_context(runs.run_folder(folder, "eval", details))
            target = _shared_folder(target, processes, settings)
        run = _Run(plan, engines, identity, processes, target, request)
        return run.finish(workers, strict, began)


def evaluate_split(
    loaded: Sequence[Weights], evaluator: Evaluator, settings: Settings, workers: "int | Workers"
) -> Evaluation:
    """Evaluate weights during training, without writing any file."""
    processes = join()
    plan = Plan(settings, loaded, processes.device(settings.device), evaluator)
    identity = _agreed_identity(plan, processes)
    return _Run(plan, plan.engines(), identity, processes, None, None).finish(workers, False, time.perf_counter())


def resume(
    folder: str | os.PathLike[str],
    *,
    moved: Mapping[str, Any] | None = None,
    workers: int = 0,
    strict: bool = False,
) -> Evaluation:
    """Resume an interrupted run. The results are the same as without the interruption.

    For a finished run, only the result files are written again, for example to add charts after installing the extra
    `report`.

    Args:
        folder: Folder of the run.
        moved: New paths of input files that were moved, by the names of the arguments of `evaluate`. For weights, pass
            the paths of all files in their original order. The content must be unchanged: image names, the content of
            a sample of the evaluated images, and the content of the other files are checked.
        workers, strict: See `evaluate`.

    Raises:
        UnreadableFile, UsageError: The folder does not contain a run, or its record is damaged.
        DoesNotFit: Weights, images or packages have changed since the run started.
        FcvitError: See `evaluate`.
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
    now, before = _agreed_identity(plan, processes), record.get("identity", {})
    for key in now:
        if before.get(key) != now[key]:
            raise DoesNotFit(
                f"{folder}: {_describe_change(key, before.get(key), now[key])} since the run started, so the "
                "results would differ from those of an uninterrupted run; start a new run"
            )
    if moved:
        _check_files(plan, now, folder)
    with contextlib.ExitStack() as stack:
        if processes.first:
            stack.enter_context(runs.continued_run(folder, record))
        run = _Run(plan, None, now, processes, _shared_folder(folder, processes, request.settings), request)
        return run.finish(workers, strict, began)


class _Run:
    """The execution of an evaluation, from the first batch to the result files."""

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
        self.resume_command = f"fcvit resume {shlex.quote(str(folder))}"
        if folder is not None:
            processes.resume_with(self.resume_command)

    def finish(self, workers: "int | Workers", strict: bool, began: float) -> Evaluation:
        """Compute the missing batches, then write all results.

        Raises:
            NotWritten: The results are complete but cannot be written. The error contains them.
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
                logger.info(f"resume with: {self.resume_command}")
            raise
        except OSError as error:
            if self.folder is None or isinstance(error, BrokenPipeError):  # the process that reads our output has ended
                raise
            raise UnreadableFile(f"{_os_error(error, self.folder)}; resume with: {self.resume_command}") from error
        self.processes.gather(b"")  # wait for all processes: the first one hosts the key-value store
        return dataclasses.replace(evaluation, seconds=time.perf_counter() - began)

    def _compute(self, workers: "int | Workers", strict: bool) -> None:
        """Compute the batches of this process that are not in the journal, and append them."""
        plan, processes, frames = self.plan, self.processes, self.journal.frames
        if self.folder is not None and plan.settings.save_logits:
            folders = [self.folder / configuration.name for configuration in plan.configurations]
            self.logits = LogitFiles(folders, (len(plan.dataset), plan.evaluator.outputs), len(plan.batches))
        # Batches are assigned by their number: an assignment of the missing ones would differ between processes.
        mine = [number for number in plan.batches if number % processes.count == processes.rank]
        missing = [number for number in mine if number not in frames]
        if not missing:
            return
        if frames:
            logger.info(f"{sum(map(plan.batch_images, frames))} of {len(plan.dataset)} images were already evaluated")
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
        """Evaluate a batch with all configurations."""
        plan = self.plan
        records = np.zeros(len(batch.indices), plan.dtype)
        records["index"] = batch.indices
        seconds = [0.0] * len(engines)
        chunks: list[list[bytes]] = [[] for _ in engines]
        if len(records):
            records["digest"] = np.frombuffer(b"".join(batch.digests), np.uint8).reshape(-1, DIGEST)
        step = plan.evaluator.at_once or max(len(records), 1)
        for start in range(0, len(records), step):
            some = slice(start, start + step)
            outputs: list[Any] = []
            for position, (configuration, engine) in enumerate(zip(plan.configurations, engines, strict=True)):
                pixels = batch.pixels[configuration.crop][some]
                began = time.perf_counter()
                output = plan.evaluator.compute(engine, pixels, batch.targets[configuration.crop][some])
                seconds[position] += time.perf_counter() - began
                if isinstance(output, np.ndarray):
                    self._check_finite(configuration, engine, output, batch.indices[some])
                if self.logits is not None:
                    self.logits.write(position, batch.indices[some], output)
                outputs.append(output)
                reference = None if configuration.reference is None else outputs[configuration.reference]
                record, parts = plan.evaluator.record(output, batch.targets[configuration.crop][some], reference)
                records["configurations"][some, position] = record
                chunks[position] += parts
        if self.logits is not None:
            self.logits.mark(batch.number)
        extra = {"bad": batch.bad, "seconds": seconds, "devices": [engine.device for engine in engines]}
        return Frame(batch.number, records, extra, tuple(itertools.chain(*chunks)))

    def _check_finite(
        self, configuration: Configuration, engine: Engine, output: np.ndarray, indices: np.ndarray
    ) -> None:
        """Reject NaN and infinity: comparisons with NaN are false, so the true class would have the best rank."""
        finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
        if not finite.all():
            name = self.plan.dataset.names[indices[np.flatnonzero(~finite)[0]]]
            raise NumbersDisagree(
                f"{configuration.name}: the logits of {name} are not finite: the weights are damaged, or their values "
                f"exceed the range of {engine.precision}"
            )

    def _exchange(self) -> None:
        """Collect the records of all processes in every process."""
        journal, processes = self.journal, self.processes
        for rank, content in enumerate(processes.gather(journal.encoded())):
            journal.merge(content, f"process {rank}")
        journal.merge(processes.broadcast(journal.encoded()), "process 0")
        lost = [number for number in self.plan.batches if number not in journal.frames]
        assert not lost, f"no process computed batches {lost[:5]}"

    def _evaluation(self, began: float) -> Evaluation:
        """Compute all results from the records.

        Raises:
            BadImages: No image could be read.
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
        """Return the information about the run that result files contain in addition to the metrics."""
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
            reason = error if isinstance(error, UnreadableFile) else _os_error(error, self.folder)
            text = f"{reason}; the evaluation is complete, write its results with: {self.resume_command}"
            raise NotWritten(text, dataclasses.replace(evaluation, folder=None)) from error


def _fit_batch_size(plan: Plan, processes: Processes) -> None:
    """Replace "auto" by a batch size that fits in memory."""
    if plan.settings.batch_size != "auto":
        return
    if plan.evaluator.at_once == 1:
        fitting = (_READ_TOGETHER, f"{_READ_TOGETHER} images are read together, and computed one by one")
    else:
        fitting = fitting_batch_size(plan.jobs()) if processes.first else (0, "")
    size, reason = json.loads(processes.broadcast(json.dumps(fitting).encode()))
    plan.settings = dataclasses.replace(plan.settings, batch_size=size)
    logger.info(f"batch size: {reason}")


def _check_workers(workers: object) -> None:
    if isinstance(workers, int) and workers < 0:
        raise UsageError(f"--workers {workers}: expected a whole number of at least 0")


def _check_files(plan: Plan, identity: Mapping[str, object], folder: Path) -> None:
    """Check that the content of a sample of the evaluated images is unchanged.

    Raises:
        DoesNotFit: An image has changed.
    """
    frames = Journal(plan.dtype, sha256(identity), folder / JOURNALS).frames.values()
    records = [record for frame in frames for record in frame.records]
    for record in records[:: -(-len(records) // _SAMPLE) or 1]:
        name = plan.dataset.names[record["index"]]
        content = read_file(name, plan.dataset.locations[record["index"]])
        if hashlib.sha256(content).digest()[:DIGEST] != record["digest"].tobytes():
            raise DoesNotFit(
                f"{plan.dataset.root}: {name} is not the image that was evaluated in {folder}; restore it or start a "
                "new run"
            )


def _describe_change(key: str, before: object, now: object) -> str:
    """Describe a change of the identity, with the names and versions of changed packages."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        listed = ", ".join(f"{name} {before.get(name, 'absent')} to {now.get(name, 'absent')}" for name in names)
        return f"{key} changed ({listed})"
    return f"{key.replace('_', ' ')} changed"


def _agreed_identity(plan: Plan, processes: Processes) -> dict[str, Any]:
    """Return the identity of the run, after checking that it is equal in all processes.

    Raises:
        DoesNotFit: The identity in this process differs from the one in process 0.
    """
    identity = plan.identity()
    first = json.loads(processes.broadcast(json.dumps(identity).encode()))
    for key in identity:
        if first.get(key) != identity[key]:
            change = _describe_change(key, first.get(key), identity[key])
            raise DoesNotFit(f"process {processes.rank} differs from process 0; {change}")
    return identity


def _shared_folder(folder: Path | None, processes: Processes, settings: Settings) -> Path:
    """Return the run folder in every process, and create it on machines that do not share it.

    Raises:
        UsageError: Logits are written, but the machines do not share the folder.
    """
    path = Path(os.fsdecode(processes.broadcast(os.fsencode(folder.absolute()) if folder else b"")))
    path.mkdir(parents=True, exist_ok=True)
    if not processes.share(path):
        if settings.save_logits:
            raise UsageError(f"--save-logits: the machines do not share {path}; use a shared folder, or omit it")
        logger.info(f"{path}: each machine keeps the records of its own images, so resume the run on the same machines")
    return folder if folder is not None else path


def _os_error(error: OSError, folder: Path) -> str:
    return f"{error.filename or folder}: {error.strerror or error}"
