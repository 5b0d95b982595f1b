"""Evaluate weights on labeled samples: several weights, protocols and engines in one pass, for any task.

Data flow: samples -> batches of preprocessed images -> outputs of each configuration -> one record per sample in the
journal -> metrics from all records -> files. Metrics depend only on the records. A resumed run, or a run of several
processes, therefore gives the same results as an uninterrupted run in one process.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.loader import Batch, Workers
from fcvit.data.transforms.preprocess import decoders
from fcvit.errors import NumbersDisagree, UnreadableFile, UsageError
from fcvit.evaluation.batch_run import (
    BatchRun,
    agreed_identity,
    check_identity,
    check_workers,
    chosen_batch_size,
    describe,
    new_records,
    shared_folder,
)
from fcvit.evaluation.journal import Frame
from fcvit.evaluation.logits import LogitFiles
from fcvit.evaluation.protocols import AUTHORS
from fcvit.evaluation.request import Request
from fcvit.evaluation.results import Evaluation, NotWritten, RunRecords
from fcvit.evaluation.settings import Configuration, Plan, Settings, absolute
from fcvit.inference.engines import Engine
from fcvit.inference.exported import read_network
from fcvit.processes import Processes, join
from fcvit.tasks.base import Evaluator, get_task, task_of
from fcvit.weights.reading import Weights

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
    check_workers(workers)
    if settings.save_logits and not record:
        raise UsageError("save_logits: logits are written to the run folder; pass a folder")
    began = time.perf_counter()
    processes = join()
    paths = tuple(absolute(item.source.path if isinstance(item, Weights) else item) for item in weights)
    pairs = zip(weights, paths, strict=True)
    loaded = [item if isinstance(item, Weights) else read_network(path, settings.ema) for item, path in pairs]
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
    identity = agreed_identity(plan.identity(), processes)
    with contextlib.ExitStack() as stack:
        target = None
        if record:
            if processes.first:
                if not getattr(task_options, "list_file", None):
                    runs.reject_inside(Path("runs") if folder is None else folder, Path(request.data), f"--data {data}")
                details = request.to_json() | {"identity": identity}
                target = stack.enter_context(runs.run_folder(folder, "eval", details))
            target = shared_folder(target, processes, "--save-logits" if settings.save_logits else "")
        run = _Run(plan, engines, identity, processes, target, request)
        return run.finish(workers, strict, began)


def evaluate_split(
    loaded: Sequence[Weights], evaluator: Evaluator, settings: Settings, workers: "int | Workers"
) -> Evaluation:
    """Evaluate weights during training, without writing any file and without the numerical check of the engine."""
    processes = join()
    plan = Plan(settings, loaded, processes.device(settings.device), evaluator, check=False)
    identity = agreed_identity(plan.identity(), processes)
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
    check_workers(workers)
    folder = Path(folder)
    processes = join()
    text = processes.broadcast(json.dumps(runs.read_run(folder, "eval")).encode() if processes.first else b"")
    record = json.loads(text)
    request = Request.from_json(record, folder / "run.json")
    if moved:
        request = request.moved(moved)
        record |= request.to_json()
    loaded = [read_network(path, request.settings.ema) for path in request.weights]
    evaluator = get_task(request.task).evaluator(loaded, Path(request.data), request.options)
    plan = Plan(request.settings, loaded, processes.device(request.settings.device), evaluator)
    now, before = agreed_identity(plan.identity(), processes), record.get("identity", {})
    check_identity(now, before, folder)
    if moved:
        run = BatchRun(plan.dataset, int(plan.settings.batch_size), plan.dtype, now, processes, folder)
        run.check_files(plan.dataset.root)
    with contextlib.ExitStack() as stack:
        if processes.first:
            stack.enter_context(runs.continued_run(folder, record))
        run = _Run(plan, None, now, processes, shared_folder(folder, processes), request)
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
        self.run = BatchRun(plan.dataset, int(plan.settings.batch_size), plan.dtype, identity, processes, folder)
        self.logits: LogitFiles | None = None

    def finish(self, workers: "int | Workers", strict: bool, began: float) -> Evaluation:
        """Compute the missing batches, then write all results.

        Raises:
            NotWritten: The results are complete but cannot be written. The error contains them.
        """
        plan, run, processes = self.plan, self.run, self.processes
        with run.opened() as journal:
            if self.folder is not None and plan.settings.save_logits:
                folders = [self.folder / configuration.name for configuration in plan.configurations]
                self.logits = LogitFiles(folders, (len(plan.dataset), plan.evaluator.outputs), len(run.batches))
            transforms = [plan.evaluator.transform(crop) for crop in plan.crops]
            for _ in run.compute("evaluating", self._prepare, transforms, workers, strict):
                pass
            run.gather()
            if processes.count > 1:  # every process computes the results
                journal.merge(processes.broadcast(journal.encoded() if processes.first else b""), keep=False)
            frames = [journal[number] for number in run.batches]
            evaluation = self._evaluation(frames, began)
            if processes.first and self.folder is not None:
                self._write(evaluation, frames)
        return dataclasses.replace(evaluation, seconds=time.perf_counter() - began)

    def _prepare(self) -> Callable[[Batch], Frame]:
        return functools.partial(self._frame, self.engines or self.plan.engines())

    def _frame(self, engines: Sequence[Engine], batch: Batch) -> Frame:
        """Evaluate a batch with all configurations."""
        plan = self.plan
        records = new_records(batch, plan.dtype)
        seconds = [0.0] * len(engines)
        chunks: list[list[bytes]] = [[] for _ in engines]
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

    def _evaluation(self, frames: Sequence[Frame], began: float) -> Evaluation:
        """Compute all results from the records.

        Raises:
            BadImages: No image could be read.
        """
        plan = self.plan
        records = RunRecords(plan, frames, self._about())
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

    def _write(self, evaluation: Evaluation, frames: Sequence[Frame]) -> None:
        assert self.folder is not None
        try:
            if self.logits is not None:
                self.logits.finish(frames)
            evaluation.report.write(self.folder)
        except (UnreadableFile, OSError) as error:
            reason = error if isinstance(error, UnreadableFile) else describe(error, self.folder)
            text = f"{reason}; the evaluation is complete, write its results with: {self.run.resume_command}"
            raise NotWritten(text, dataclasses.replace(evaluation, folder=None)) from error


def _fit_batch_size(plan: Plan, processes: Processes) -> None:
    """Replace "auto" by a batch size that fits in memory."""
    size = chosen_batch_size(plan.settings.batch_size, plan.evaluator.at_once, plan.jobs, processes)
    plan.settings = dataclasses.replace(plan.settings, batch_size=size)
