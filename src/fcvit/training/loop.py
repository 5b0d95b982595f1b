"""The loop of a training, for any task: epochs of steps, validation, files. The state on the disk comes last."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.errors import BadImages, NumbersDisagree, TrainingStopped, counted
from fcvit.evaluation.results import Evaluation
from fcvit.evaluation.runner import evaluate_split
from fcvit.evaluation.settings import Settings
from fcvit.interrupts import check
from fcvit.report.progress import duration, progress
from fcvit.training.batches import epoch_batches
from fcvit.training.files import BEST, LAST, LAST_EMA, replace_weights
from fcvit.training.log import Log
from fcvit.training.schedule import learning_rate
from fcvit.weights.reading import Weights

if TYPE_CHECKING:
    from fcvit.training.run import Run

logger = logging.getLogger("fcvit")


@dataclasses.dataclass(frozen=True)
class Training:
    """The result of a training.

    Attributes:
        folder: of the run: `last.safetensors`, `best.safetensors`, log, curves, state.
        rows: the log, one row an epoch.
        best: the best row by the task's score, with `best_weights` "raw" or "ema"; empty without validation.
        stopped_early: by `patience`.
        unreadable: training images that were left out, with the reason.
        first: whether this process speaks for all (see `fcvit.processes`).
        seconds: since this process began.
        shown: columns of the log that people want to see, with label and format.
    """

    folder: Path
    rows: tuple[Mapping[str, Any], ...]
    best: Mapping[str, Any]
    stopped_early: bool
    unreadable: tuple[str, ...]
    first: bool
    seconds: float
    shown: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"<Training of {counted(len(self.rows), 'epoch')} in {self.folder}>"

    @property
    def weights(self) -> Path:
        """The best weights, or the last where there was no validation."""
        return self.folder / (BEST if self.best else LAST)

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable and self.first else 0

    def to_json(self) -> dict[str, Any] | None:
        """Return the result; None where another process speaks."""
        fields = dataclasses.asdict(self) | {"weights": str(self.weights)}
        return {name: value for name, value in fields.items() if name != "shown"} if self.first else None

    def tables(self) -> Iterator[Any]:
        """Show the first, best and last epochs; nothing where another process speaks."""
        from fcvit.report.tables import table

        if not self.first:
            return
        best = self.best.get("epoch")
        keys = [key for key in self.shown if any(key in row for row in self.rows)]
        ended = "; stopped early, it no longer got better" if self.stopped_early else ""
        title = f"{counted(len(self.rows), 'epoch')} in {self.folder}{ended}"
        grid = table("epoch", *(self.shown[key][0] for key in keys), "", title=title, right=("epoch",))
        for row in self.rows:
            if row["epoch"] in (1, best) or row["epoch"] > len(self.rows) - 3:
                cells = [self.shown[key][1].format(row[key]) if key in row else "" for key in keys]
                which = ", of the EMA weights" if self.best.get("best_weights") == "ema" else ""
                grid.add_row(str(row["epoch"]), *cells, f"best{which}" if row["epoch"] == best else "")
        yield grid
        yield f"weights: {self.weights}"


def train_epochs(run: "Run") -> Training:
    """Train the epochs that are missing of a run in its folder."""
    loop = Loop(run)
    log = None
    if run.processes.first:
        log = Log(run.folder, run.recipe.tensorboard, run.progress.epoch - run.began_after)
    try:
        if log:
            log.write(run.progress.rows)
        run.processes.broadcast(b"")  # the others wait here, not in gloo, which gives up after 30 seconds
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
        run.task.shown,
    )


class Loop:
    """The epochs of a run."""

    def __init__(self, run: "Run"):
        self.run, self.recipe, self.task, self.trainer = run, run.recipe, run.task, run.trainer
        self.progress, self.first = run.progress, run.processes.first
        self.unreadable: dict[str, None] = {}
        self.seconds: list[float] = []  # of each epoch that this process trained
        self.best_key = f"best_{self.task.score}"

    def epoch(self, epoch: int, log: Log | None) -> None:
        """Train one epoch, to the state that says it is done, and log it."""
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
                rate = learning_rate(recipe, epoch + step / run.steps)
                losses.append(trainer.run(batches, rate))
                check()
                advance(recipe.batch_size)
        trainer.end_epoch()
        self._gather_unreadable()
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {"epoch": epoch + 1, "step": trainer.step, "lr": rate}
        row |= {name: float(np.mean([one[name] for one in losses])) for name in losses[0]}
        row |= self._validate()
        row |= {"images_per_second": images / seconds, "seconds": seconds} | trainer.seconds
        self.progress.epoch, self.progress.step = epoch + 1, trainer.step
        self.progress.rows.append(row)
        self.progress.scaler = trainer.scaler_state()
        better = self._note_best(row)
        if self.first:
            self._save(row, better)
        if log:
            log.write(self.progress.rows)
        self.seconds.append(time.perf_counter() - began)
        left = (recipe.total_epochs - self.progress.epoch) * float(np.median(self.seconds))
        logger.info(f"{self._in_words(row)}, {duration(left)} left at most")

    def out_of_patience(self) -> bool:
        best, patience = self.progress.best, self.recipe.patience
        since = max(best["epoch"], self.run.began_after) if best else 0
        return bool(best and patience and self.progress.epoch - since >= patience)

    def seconds_after(self, rate: float) -> float:
        """Return the time that follows the training images of an epoch: its validation, and the epochs to come.

        A step is about three forward passes; once an epoch was measured, its time stands for the rest.
        """
        validated = len(self.task.val) * (2 if self.trainer.ema else 1) if self.task.val else 0
        validation = validated / (3 * rate)
        whole = self.run.steps * self.recipe.batch_size / rate + validation
        to_come = self.recipe.total_epochs - self.progress.epoch - 1
        return validation + to_come * (float(np.median(self.seconds)) if self.seconds else whole)

    def _batches(self, epoch: int) -> Generator[tuple[np.ndarray, Any]]:
        """Yield inputs and targets of this process's micro-batches."""
        train, division = self.task.train, self.run.division
        transform, workers = self.task.transform(epoch), self.run.workers
        with contextlib.closing(epoch_batches(train, self.recipe.seed, epoch, transform, division, workers)) as loaded:
            for batch in loaded:
                self._leave_out(reason for _, reason in batch.bad)
                if len(batch.indices) < max(2, division.images / 2):
                    raise TrainingStopped(
                        f"{len(batch.bad)} of {division.images} images that go through the network together "
                        f"cannot be read ({batch.bad[0][1]}); is {train.root} as it was?"
                    )
                yield self.task.inputs(batch, epoch)

    def _leave_out(self, reasons: Iterable[str]) -> None:
        """Name each image once."""
        for reason in reasons:
            if reason not in self.unreadable:
                logger.info(f"left out: {reason}")
                self.unreadable[reason] = None

    def _gather_unreadable(self) -> None:
        """Let the first process, which speaks for all, know what the others could not read."""
        for reasons in self.run.processes.gather(json.dumps(list(self.unreadable)).encode()):
            self._leave_out(json.loads(reasons))

    def _weights(self, ema: bool) -> Weights:
        trainer = self.trainer
        return self.task.weights(
            trainer.model,
            name="ema" if ema else "raw",
            tensors=trainer.ema.tensors if ema and trainer.ema else None,
            updates=self.progress.first_updates + (0 if self.recipe.freeze else trainer.step),
        )

    def _validate(self) -> dict[str, float]:
        """Return the task's figures on the validation images, of the EMA weights too."""
        if self.task.val is None:
            return {}
        kinds = [False] + [True] * (self.trainer.ema is not None)
        from fcvit.training.step import REMEDY

        try:
            evaluation = self._evaluate(kinds)
        except NumbersDisagree as error:
            raise TrainingStopped(
                f"the network computes no finite numbers any more ({error}); {REMEDY}", False
            ) from error
        self._leave_out(evaluation.unreadable)
        row = {}
        for ema, result in zip(kinds, evaluation.report.results, strict=True):
            row |= {f"{'ema_' if ema else ''}{name}": value for name, value in self.task.row(result).items()}
        return row

    def _evaluate(self, kinds: Sequence[bool]) -> Evaluation:
        loaded = [self._weights(ema) for ema in kinds]
        engine = "native" if self.run.operators == "native" else "paddle"
        size = min(64, max(1, self.run.division.images))
        settings = Settings(engines=engine, batch_size=size, device=self.run.device)
        return evaluate_split(loaded, self.task.evaluator(loaded), settings, self.run.workers)

    def _note_best(self, row: Mapping[str, Any]) -> str | None:
        """Return which weights of this epoch are the best so far: "raw", "ema" or none."""
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
        """Write the weights, then the state: an epoch whose state is not there is done again, to the same weights."""
        folder = self.run.folder
        replace_weights(folder / LAST, self._weights(False))
        if self.trainer.ema is not None:
            replace_weights(folder / LAST_EMA, self._weights(True))
        if better:
            replace_weights(folder / BEST, self._weights(better == "ema"))
        if self.recipe.save_every and row["epoch"] % self.recipe.save_every == 0:
            replace_weights(folder / f"epoch-{row['epoch']:04d}.safetensors", self._weights(False))
        self.run.write_state()

    def _in_words(self, row: Mapping[str, Any]) -> str:
        parts = [f"epoch {row['epoch']} of {self.recipe.total_epochs}: loss {row['loss']:.4f}"]
        score = self.task.score
        for key in (score, f"ema_{score}"):
            if key in row and key in self.task.shown:
                label, spec = self.task.shown[key]
                parts.append(f"{label} {spec.format(row[key])}")
        return ", ".join([*parts, f"{row['images_per_second']:.1f} images/s"])
