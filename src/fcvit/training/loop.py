"""The training loop for any task: train and validate epochs, then write weights, state and logs."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.data.loader import Batch
from fcvit.errors import BadImages, NumbersDisagree, TrainingStopped, counted
from fcvit.evaluation.results import Evaluation
from fcvit.evaluation.runner import evaluate_split
from fcvit.evaluation.settings import Settings
from fcvit.interrupts import check
from fcvit.report.progress import duration, progress
from fcvit.training.batches import WaitingTime, epoch_batches, prepared
from fcvit.training.files import BEST, LAST, LAST_EMA, replace_weights
from fcvit.training.log import Log
from fcvit.training.schedule import learning_rate
from fcvit.weights.reading import Weights

if TYPE_CHECKING:
    from fcvit.training.run import Run

logger = logging.getLogger("fcvit")


@dataclasses.dataclass(frozen=True)
class Training:
    """The result of a training run.

    Attributes:
        folder: Folder of the run with `last.safetensors`, `best.safetensors`, log, curves and state.
        rows: The log, one row per epoch.
        best: Row with the best score of the task, with `best_weights` "raw" or "ema". Empty without validation.
        stopped_early: True if `patience` ended the run.
        unreadable: Images that could not be read, with the reason.
        first: True in the process with rank 0, which reports the result (see `fcvit.processes`).
        seconds: Seconds since this process began.
        report: Whether the "best" or the "last" weights are the result.
        shown: Columns of the log to show, with label and format.
    """

    folder: Path
    rows: tuple[Mapping[str, Any], ...]
    best: Mapping[str, Any]
    stopped_early: bool
    unreadable: tuple[str, ...]
    first: bool
    seconds: float
    report: str = "best"
    shown: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"<Training of {counted(len(self.rows), 'epoch')} in {self.folder}>"

    @property
    def weights(self) -> Path:
        """Return the path of the weights that are the result. Without validation, these are always the last."""
        return self.folder / (BEST if self.best and self.report == "best" else LAST)

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable and self.first else 0

    def to_json(self) -> dict[str, Any] | None:
        """Return the result as JSON, or None in all processes except the first."""
        fields = dataclasses.asdict(self) | {"weights": str(self.weights)}
        return {name: value for name, value in fields.items() if name != "shown"} if self.first else None

    def tables(self) -> Iterator[Any]:
        """Show the first, best and last epochs. Only the first process shows them."""
        from fcvit.report.tables import table

        if not self.first:
            return
        best = self.best.get("epoch")
        keys = [key for key in self.shown if any(key in row for row in self.rows)]
        ended = ", stopped early because the score did not improve (patience)" if self.stopped_early else ""
        title = f"{counted(len(self.rows), 'epoch')} in {self.folder}{ended}"
        title += "; the first, best and last epochs" if len(self.rows) > 4 else ""
        grid = table("epoch", *(self.shown[key][0] for key in keys), "", title=title, right=("epoch",))
        for row in self.rows:
            if row["epoch"] in (1, best) or row["epoch"] > len(self.rows) - 3:
                cells = [self.shown[key][1].format(row[key]) if key in row else "" for key in keys]
                which = " (EMA weights)" if self.best.get("best_weights") == "ema" else ""
                grid.add_row(str(row["epoch"]), *cells, f"best{which}" if row["epoch"] == best else "")
        yield grid
        yield f"weights: {self.weights}"


def train_epochs(run: "Run") -> Training:
    """Train the remaining epochs of a run."""
    loop = Loop(run)
    log = None
    if run.processes.first:
        log = Log(run.folder, run.recipe.tensorboard, run.progress.epoch - run.began_after)
    try:
        if log:
            log.write(run.progress.rows)
        run.processes.broadcast(b"")  # wait here, because a collective of gloo times out after 30 seconds
        while run.progress.epoch < run.recipe.total_epochs and not loop.out_of_patience():
            loop.epoch(run.progress.epoch, log)
            run.processes.broadcast(b"")
    finally:
        if log:
            log.close()
    return Training(
        run.folder,
        tuple(run.progress.rows),
        run.progress.best,
        run.progress.epoch < run.recipe.total_epochs,
        tuple(loop.unreadable),
        run.processes.first,
        time.perf_counter() - run.began,
        run.recipe.report,
        run.task.shown,
    )


class Loop:
    """The training loop of a run."""

    def __init__(self, run: "Run"):
        self.run, self.recipe, self.task, self.trainer = run, run.recipe, run.task, run.trainer
        self.progress, self.first = run.progress, run.processes.first
        self.unreadable: dict[str, None] = {}
        self.seconds: list[float] = []  # duration of each epoch that this process trained
        self.best_key = f"best_{self.task.score}"
        self.waiting = WaitingTime(getattr(run.workers, "count", 0))

    def epoch(self, epoch: int, log: Log | None) -> None:
        """Train and validate one epoch, write its files and state, and log it."""
        trainer, recipe, run = self.trainer, self.recipe, self.run
        trainer.train_mode()
        trainer.reset_clock()
        began = time.perf_counter()
        losses: list[dict[str, float]] = []
        rate, images = 0.0, run.steps * recipe.batch_size
        title = f"epoch {epoch + 1} of {recipe.total_epochs}"
        with contextlib.ExitStack() as stack:
            shown = progress(title, images, after=self.seconds_after) if self.first else None
            advance = stack.enter_context(shown) if shown else lambda _: None
            batches = stack.enter_context(contextlib.closing(self._batches(epoch)))
            for step in range(run.steps):
                rate = learning_rate(recipe, epoch + step / run.steps, run.steps)
                losses.append(trainer.run(batches, rate))
                self.waiting.after_step(step == 0, trainer.seconds["data"])
                check()
                advance(recipe.batch_size)
        trainer.end_epoch()
        self._gather_unreadable()
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {"epoch": epoch + 1, "step": trainer.step, "lr": rate}
        row |= {name: float(np.mean([step_losses[name] for step_losses in losses])) for name in losses[0]}
        row |= self._validate()
        row |= {"images_per_second": images / seconds, "seconds": seconds} | trainer.seconds
        self.progress.epoch, self.progress.step = epoch + 1, trainer.step
        self.progress.rows.append(row)
        self.progress.scaler = trainer.scaler_state()
        better = self._update_best(row)
        if self.first:
            self._save(row, better)
        if log:
            log.write(self.progress.rows)
        self.seconds.append(time.perf_counter() - began)
        left = (recipe.total_epochs - self.progress.epoch) * float(np.median(self.seconds))
        logger.info(f"{self._describe(row)}, at most {duration(left)} left")

    def out_of_patience(self) -> bool:
        best, patience = self.progress.best, self.recipe.patience
        since = max(best["epoch"], self.run.began_after) if best else 0
        return bool(best and patience and self.progress.epoch - since >= patience)

    def seconds_after(self, rate: float) -> float:
        """Estimate the seconds for the validation of this epoch and for all later epochs.

        Until an epoch has been measured, one training image is assumed to take as long as three validation images.

        Args:
            rate: Training images per second.
        """
        validated = len(self.task.val) * (2 if self.trainer.ema else 1) if self.task.val else 0
        validation = validated / (3 * rate)
        estimate = self.run.steps * self.recipe.batch_size / rate + validation
        later_epochs = self.recipe.total_epochs - self.progress.epoch - 1
        return validation + later_epochs * (float(np.median(self.seconds)) if self.seconds else estimate)

    def _batches(self, epoch: int) -> Generator[tuple[Any, Any]]:
        """Yield the inputs and targets of this process's micro-batches."""
        train, micro_batches, seed = self.task.train, self.run.micro_batches, self.recipe.seed
        transform, workers = self.task.transform(epoch), self.run.workers
        steps = self.recipe.steps_per_epoch
        order = (steps, getattr(self.task, "groups", None))
        loaded = epoch_batches(train, seed, epoch, transform, micro_batches, workers, *order)
        needed = max(2, micro_batches.images / 2)

        def prepare(batch: Batch) -> tuple[Any, Any] | None:
            if len(batch.indices) < needed:
                return None
            images, targets = self.task.inputs(batch, epoch)
            return self.trainer.stage(images), targets

        with contextlib.closing(prepared(loaded, prepare, in_thread=bool(workers))) as ready:
            for batch, inputs in ready:
                self._record_unreadable(reason for _, reason in batch.bad)
                if inputs is None:
                    raise TrainingStopped(
                        f"{len(batch.bad)} of {micro_batches.images} images in a micro-batch cannot be read "
                        f"({batch.bad[0][1]}), so check {train.root}"
                    )
                yield inputs

    def _record_unreadable(self, reasons: Iterable[str]) -> None:
        """Add unreadable images to the result, and log each of them once."""
        for reason in reasons:
            if reason not in self.unreadable:
                logger.info(f"left out: {reason}")
                self.unreadable[reason] = None

    def _gather_unreadable(self) -> None:
        """Collect the unreadable images of all processes in the first process, which reports them."""
        for reasons in self.run.processes.gather(json.dumps(list(self.unreadable)).encode()):
            self._record_unreadable(json.loads(reasons))

    def _weights(self, ema: bool) -> Weights:
        trainer = self.trainer
        return self.task.weights(
            trainer.model,
            name="ema" if ema else "raw",
            tensors=trainer.ema.tensors if ema and trainer.ema else None,
            updates=self.progress.first_updates + (0 if self.recipe.freeze else trainer.step),
        )

    def _validate(self) -> dict[str, float]:
        """Return the metrics of the raw and EMA weights on the validation images."""
        if self.task.val is None:
            return {}
        kinds = [False] + [True] * (self.trainer.ema is not None)
        from fcvit.training.step import REMEDY

        try:
            evaluation = self._evaluate(kinds)
        except NumbersDisagree as error:
            raise TrainingStopped(
                f"the outputs of the network are no longer finite ({error}): {REMEDY}", False
            ) from error
        self._record_unreadable(evaluation.unreadable)
        row = {}
        for ema, result in zip(kinds, evaluation.report.results, strict=True):
            row |= {f"{'ema_' if ema else ''}{name}": value for name, value in self.task.row(result).items()}
        return row

    def _evaluate(self, kinds: Sequence[bool]) -> Evaluation:
        loaded = [self._weights(ema) for ema in kinds]
        engine = "native" if self.run.operators == "native" else "paddle"
        size = min(64, max(1, self.run.micro_batches.images))
        settings = Settings(engines=engine, batch_size=size, device=self.run.device)
        return evaluate_split(loaded, self.task.evaluator(loaded), settings, self.run.workers)

    def _update_best(self, row: Mapping[str, Any]) -> str | None:
        """Update the best row, and return which weights of this epoch are the new best: "raw", "ema" or None."""
        score = self.task.score
        scores = {kind: row[key] for kind, key in (("raw", score), ("ema", f"ema_{score}")) if key in row}
        if not scores:
            return None
        kind = max(scores, key=scores.__getitem__)
        best = self.progress.best
        if best and scores[kind] <= best[self.best_key]:
            return None
        self.progress.best = dict(row) | {"best_weights": kind, self.best_key: scores[kind]}
        return kind

    def _save(self, row: Mapping[str, Any], better: str | None) -> None:
        """Write the weights, then the state. If the state is missing, a resumed run trains the epoch again."""
        folder = self.run.folder
        replace_weights(folder / LAST, self._weights(False))
        if self.trainer.ema is not None:
            replace_weights(folder / LAST_EMA, self._weights(True))
        if better:
            replace_weights(folder / BEST, self._weights(better == "ema"))
        if self.recipe.save_every and row["epoch"] % self.recipe.save_every == 0:
            replace_weights(folder / f"epoch-{row['epoch']:04d}.safetensors", self._weights(False))
        self.run.write_state()

    def _describe(self, row: Mapping[str, Any]) -> str:
        """Return a one-line summary of an epoch."""
        parts = [f"epoch {row['epoch']} of {self.recipe.total_epochs}: loss {row['loss']:.4f}"]
        score = self.task.score
        for key in (score, f"ema_{score}"):
            if key in row and key in self.task.shown:
                label, spec = self.task.shown[key]
                parts.append(f"{label} {spec.format(row[key])}")
        return ", ".join([*parts, f"{row['images_per_second']:.1f} images/s"])
