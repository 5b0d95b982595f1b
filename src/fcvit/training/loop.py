"""The training loop for any task: train and validate epochs, then write weights, state and logs."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.data.loader import Batch
from fcvit.errors import DIVERGED, BadImages, NumbersDisagree, TrainingStopped, counted
from fcvit.evaluation.results import Evaluation
from fcvit.evaluation.runner import evaluate_split
from fcvit.evaluation.settings import Settings
from fcvit.inference.native_network import unsupported
from fcvit.interrupts import check, held_back, remembered
from fcvit.report.progress import duration
from fcvit.report.progress import progress as show_progress
from fcvit.training.batches import WaitingTime, epoch_batches, prepared
from fcvit.training.files import BEST, LAST, LAST_EMA, replace_weights
from fcvit.training.log import Log
from fcvit.training.schedule import learning_rate
from fcvit.training.state import BackgroundWrite, check_folder
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
        while run.progress.epoch < run.recipe.total_epochs and not loop.out_of_patience():
            loop.epoch(run.progress.epoch, log)
            run.processes.broadcast(b"")  # the launcher ends all processes soon after one has ended
    finally:
        if log:
            log.close()
        loop.write.finish()
    return Training(
        run.folder,
        tuple(run.progress.rows),
        run.progress.best,
        run.progress.epoch < run.recipe.total_epochs,
        tuple(run.progress.unreadable),
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
        self.seconds: list[float] = []  # duration of each epoch that this process trained
        self.write = BackgroundWrite()
        self.saved_at = self.read_at = time.monotonic()
        self.steps_per_read = 1
        self.stopping = False  # True if all processes have agreed to stop after a signal to one of them
        self.slow_disk = False  # True if a note has reported this
        self.best_key = f"best_{self.task.score}"
        self.waiting = WaitingTime(getattr(run.workers, "count", 0))

    def epoch(self, epoch: int, log: Log | None) -> None:
        """Train and validate the rest of an epoch, write its files and state, and log it."""
        trainer, recipe, progress, steps = self.trainer, self.recipe, self.progress, self.run.steps
        trainer.train_mode()
        trainer.reset_clock()
        trainer.seconds |= progress.phases
        self.began = time.perf_counter() - progress.epoch_seconds
        try:
            self._train(epoch)
            seconds = progress.epoch_seconds
            row: dict[str, Any] = {"epoch": epoch + 1, "step": trainer.step}
            row |= {"lr": learning_rate(recipe, epoch + (steps - 1) / steps, steps)}
            row |= {name: float(np.mean(losses)) for name, losses in progress.losses.items()}
            row |= self._validate()
            row |= {"images_per_second": steps * recipe.batch_size / seconds, "seconds": seconds} | trainer.seconds
            with held_back():
                progress.end_epoch(row)
                better = self._update_best(row)
                if self.first:
                    self._save(row, better)
        except KeyboardInterrupt:
            if self.first and progress.epoch_step == steps:  # it arrived during the validation
                with held_back():
                    self.write.start(self.run.copy_state())
                    self.write.finish()
            if self.stopping:
                with held_back():
                    self.run.processes.leave()  # all processes have agreed to stop, so this one has not failed
            raise
        if log:
            log.write(progress.rows)
        self.seconds.append(time.perf_counter() - self.began)
        left = (recipe.total_epochs - progress.epoch) * float(np.median(self.seconds))
        logger.info(f"{self._describe(row)}, at most {duration(left)} left")

    def _train(self, epoch: int) -> None:
        """Run the remaining steps of an epoch. A signal ends the run after the current step, when its state is saved.

        Raises:
            KeyboardInterrupt: A signal arrived in one of the processes.
            TrainingStopped: A loss is not finite.
        """
        trainer, recipe, progress, steps = self.trainer, self.recipe, self.progress, self.run.steps
        first, unread = progress.epoch_step, []
        if first == steps:
            return
        with contextlib.ExitStack() as stack:
            size = recipe.batch_size
            title = f"epoch {epoch + 1} of {recipe.total_epochs}"
            shown = show_progress(title, steps * size, after=self.seconds_after, start=first * size)
            advance = stack.enter_context(shown) if self.first else lambda _: None
            interrupted = stack.enter_context(remembered())
            batches = stack.enter_context(contextlib.closing(self._batches(epoch)))
            for step in range(first, steps):
                rate = learning_rate(recipe, epoch + step / steps, steps)
                unread.append(trainer.run(batches, rate, lambda: self._requests(interrupted)))
                self.waiting.after_step(step == first, trainer.seconds["data"])
                check()
                self.write.check()
                advance(size)
                last = step + 1 == steps
                if len(unread) < self.steps_per_read and not last:
                    continue
                requests = self._read(unread)
                unread.clear()
                if last:
                    trainer.end_epoch()
                    self._gather_unreadable()
                    progress.epoch_seconds = time.perf_counter() - self.began
                progress.epoch_step, self.stopping = step + 1, requests["stop"] > 0
                if self.stopping and last:
                    raise KeyboardInterrupt  # `epoch` saves the state
                if self.stopping or requests["save"]:
                    self._save_step()
                if self.stopping:
                    self.write.finish()
                    raise KeyboardInterrupt

    def _requests(self, interrupted: Callable[[], bool]) -> dict[str, float]:
        """Return the values of this process on which all processes must agree (see `_read`)."""
        now = time.monotonic()
        pause = self.recipe.checkpoint_minutes * 60
        due = self.first and 0 < pause <= now - self.saved_at
        if due and self.write.running and not self.slow_disk:
            self.slow_disk = True
            logger.info(
                f"writing the state takes longer than {self.recipe.checkpoint_minutes:g} minutes, so it is "
                f"saved less often; check the disk of {self.run.folder}"
            )
        return {
            "stop": float(interrupted()),
            "save": float(due and not self.write.running),
            "seconds": (now - self.read_at) / self.run.processes.count,
        }

    def _read(self, unread: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Read the results of steps, record their losses, and return the largest value of each request.

        Reading waits until a GPU has finished the steps, so this is done about once a second there. On a CPU it is
        done after each step.
        """
        results = [{name: float(value) for name, value in values.items()} for values in unread]
        requests = {name: max(values.pop(name) for values in results) for name in ("stop", "save", "seconds")}
        for number, losses in enumerate(results, self.trainer.step - len(results) + 1):
            if not np.isfinite(losses["loss"]):
                raise TrainingStopped(f"the loss is {losses['loss']} at step {number}: {DIVERGED}", False)
            for name, loss in losses.items():
                self.progress.losses.setdefault(name, []).append(loss)
        self.read_at = time.monotonic()
        if self.run.identity["kind_of_device"] != "cpu":
            # The same number in all processes, because they agree on the seconds.
            self.steps_per_read = int(np.clip(len(results) / max(requests["seconds"], 1e-3), 1, 100))
        return requests

    def _save_step(self) -> None:
        """Start to write the state after a step. All processes must call this together."""
        self._gather_unreadable()
        values = self.run.processes.gather(self.trainer.statistics.values().tobytes())
        self.progress.epoch_seconds = time.perf_counter() - self.began
        if self.first:
            rows = self.run.micro_batches.total
            within = self.progress.epoch_step < self.run.steps
            statistics = np.frombuffer(b"".join(values), np.float32).reshape(rows, -1) if within else None
            self.write.start(self.run.copy_state(statistics))
            self.saved_at = time.monotonic()

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
        order = (steps, getattr(self.task, "groups", None), self.progress.epoch_step)
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
            if reason not in self.progress.unreadable:
                logger.info(f"left out: {reason}")
                self.progress.unreadable.append(reason)

    def _gather_unreadable(self) -> None:
        """Collect the unreadable images of all processes in the first process, which reports them."""
        gathered = self.run.processes.gather(json.dumps(self.progress.unreadable).encode())
        for reasons in gathered:
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
        try:
            evaluation = self._evaluate(kinds)
        except NumbersDisagree as error:
            raise TrainingStopped(
                f"the outputs of the network are no longer finite ({error}): {DIVERGED}", False
            ) from error
        except BadImages as error:
            raise TrainingStopped(f"{error}, so check {self.task.val.root}") from error
        if 2 * len(evaluation.unreadable) > len(self.task.val):
            raise TrainingStopped(
                f"{len(evaluation.unreadable)} of {len(self.task.val)} validation images cannot be read "
                f"({evaluation.unreadable[0]}), so check {self.task.val.root}"
            )
        self._record_unreadable(evaluation.unreadable)
        row = {}
        for ema, result in zip(kinds, evaluation.report.results, strict=True):
            row |= {f"{'ema_' if ema else ''}{name}": value for name, value in self.task.row(result).items()}
        return row

    def _evaluate(self, kinds: Sequence[bool]) -> Evaluation:
        loaded = [self._weights(ema) for ema in kinds]
        engine = "native" if self.run.operators == "native" and not unsupported(loaded[0].spec) else "paddle"
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
        self.write.finish()
        check_folder(folder)
        replace_weights(folder / LAST, self._weights(False))
        if self.trainer.ema is not None:
            replace_weights(folder / LAST_EMA, self._weights(True))
        if better:
            replace_weights(folder / BEST, self._weights(better == "ema"))
        if self.recipe.save_every and row["epoch"] % self.recipe.save_every == 0:
            replace_weights(folder / f"epoch-{row['epoch']:04d}.safetensors", self._weights(False))
        self.run.copy_state()()
        self.saved_at = time.monotonic()

    def _describe(self, row: Mapping[str, Any]) -> str:
        """Return a one-line summary of an epoch."""
        parts = [f"epoch {row['epoch']} of {self.recipe.total_epochs}: loss {row['loss']:.4f}"]
        score = self.task.score
        for key in (score, f"ema_{score}"):
            if key in row and key in self.task.shown:
                label, spec = self.task.shown[key]
                parts.append(f"{label} {spec.format(row[key])}")
        return ", ".join([*parts, f"{row['images_per_second']:.1f} images/s"])
