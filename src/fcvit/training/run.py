"""Train a network by a recipe, in one folder that a run can always be continued from.

The way of the data: recipe -> splits -> parts of a step -> trainer -> after each epoch: running statistics
agreed on, validation by `fcvit.evaluation.runner`, weights, and last the state, whose replacement is the
moment from which the epoch counts.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.loader import Workers
from fcvit.data.transforms.preprocess import decoders
from fcvit.errors import (
    DoesNotFit,
    MissingExtra,
    NumbersDisagree,
    TrainingStopped,
    UnreadableFile,
    UsageError,
    counted,
)
from fcvit.evaluation.runner import Evaluation, evaluate
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place
from fcvit.interrupts import check, held_back, kept
from fcvit.models.build import build_classifier, create_model, weights_of
from fcvit.processes import Processes, join
from fcvit.report.progress import duration, progress
from fcvit.training.data import (
    Division,
    Splits,
    epoch_parts,
    find_splits,
    input_preprocessing,
    network_input,
    steps_per_epoch,
)
from fcvit.training.log import JSONL, Log
from fcvit.training.recipe import Recipe, build_recipe
from fcvit.training.schedule import learning_rate
from fcvit.training.state import STATE, Progress, read_state, write_state
from fcvit.weights.reading import Weights, read_weights
from fcvit.weights.writing import staged, write_weights

logger = logging.getLogger("fcvit")

LAST, BEST, LAST_EMA = "last.safetensors", "best.safetensors", "last-ema.safetensors"
_RECIPE = "recipe.toml"
PLACES = ("data", "val", "classes", "weights")  # fields that are made absolute, for whoever continues the run
_SAMPLE = 64  # image files of a split whose content tells whether images that are elsewhere now are the same

Announce = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training left.

    Attributes:
        folder: of the run: `last.safetensors`, `best.safetensors`, log, curves, state.
        rows: the log, one row an epoch.
        best: the best row by validation top-1, with `best_weights` "raw" or "ema"; empty without validation.
        stopped_early: by `patience`.
        unreadable: training images that were left out, with the reason.
        first: whether this process speaks for all (see `fcvit.processes`).
        seconds: since this process began.
    """

    folder: Path
    rows: tuple[Mapping[str, Any], ...]
    best: Mapping[str, Any]
    stopped_early: bool
    unreadable: tuple[str, ...]
    first: bool
    seconds: float

    @property
    def weights(self) -> Path:
        """The best weights, or the last where there was no validation."""
        return self.folder / (BEST if self.best else LAST)


def train(
    recipe: Recipe,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    workers: int = 0,
) -> Training:
    """Train by a recipe, from its weights or from scratch.

    Args:
        recipe: see `fcvit.training.recipe`.
        folder: a new folder; None: `runs/train`, or the first free one after it.
        device: auto, cpu, gpu or gpu:N.
        workers: processes that decode and augment; 0: this one does. They do not change what is computed.
            A script that starts some must begin its work under `if __name__ == "__main__":`.

    Raises:
        UsageError, UnreadableFile, DoesNotFit, MissingExtra: before the first step.
        TrainingStopped: the loss is no finite number, or images vanished; the last checkpoint stands.
        UnreadableFile: nothing more can be written; the last checkpoint stands.
    """
    recipe = _placed(recipe, {name: value for name in PLACES if (value := getattr(recipe, name))})
    with _Run.prepared(recipe, device, workers) as run, run.opened(folder, {}):
        return run.finish()


def resume(
    folder: str | os.PathLike[str],
    *,
    moved: Mapping[str, str | os.PathLike[str]] | None = None,
    workers: int = 0,
) -> Training:
    """Go on with a run after its last finished epoch; on a CPU it ends with the bits of an uninterrupted one.

    Args:
        folder: of the run.
        moved: where data, val, classes or weights are now, by these names, if they are no longer where they were.
            Names and classes of the images must be the same, and the content of a sample of the files.
        workers: as in `train`.

    Raises:
        DoesNotFit: data, weights, packages or number of processes are not what the run began with.
        And what `train` raises.
    """
    folder = Path(folder)
    known, recipe = _read(folder, moved)
    start = _start(folder)
    if start is None and known.get("extends"):  # it would begin from nothing
        raise UnreadableFile(
            f"{folder}: ended before it took over the state of {known['extends']}; extend that run again"
        )
    with _found(recipe), _Run.prepared(recipe, known["device"], workers, start) as run:
        run.check_same(folder, known, moved)
        with run.continued(folder, known):
            return run.finish()


def extend(
    source: str | os.PathLike[str],
    epochs: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    moved: Mapping[str, str | os.PathLike[str]] | None = None,
    workers: int = 0,
) -> Training:
    """Train longer than a run was meant to: a new run that begins with the state of another.

    Weights, optimizer, averages and log go on; the schedule is that of a run of `epochs`, from the epoch
    that is reached. It is not what a run of `epochs` from the beginning gives: its learning rate was
    another on the way here.

    Args:
        source: folder of the run to go on from.
        epochs: of the new schedule, more than are done.
        folder, workers: as in `train`.
        moved: as in `resume`.

    Raises:
        As `resume`.
    """
    source = Path(source)
    known, recipe = _read(source, moved)
    recipe = dataclasses.replace(recipe, epochs=epochs)
    done, _ = read_state(source)
    if recipe.total_epochs <= done.epoch:
        raise UsageError(
            f"--epochs {epochs}: with {recipe.cooldown_epochs} of cool-down no more than the {done.epoch} that are done"
        )
    prepared = _Run.prepared(recipe, known["device"], workers, _start(source))
    with _found(recipe), prepared as run:
        run.check_same(source, known, moved)
        run.restore(source)
        run.began_after, run.kept = run.progress.epoch, 0
        with run.opened(folder, {"extends": str(source.absolute()), "began_after": run.began_after}):
            run.take_over(source)
            return run.finish()


def _placed(recipe: Recipe, places: Mapping[str, str | os.PathLike[str]]) -> Recipe:
    """The recipe with other places of what it reads, made absolute."""
    if wrong := [name for name in places if name not in PLACES]:
        raise UsageError(f"{', '.join(wrong)}: only {', '.join(PLACES)} may be elsewhere; the run goes on as it began")
    absolute: dict[str, Any] = {name: str(Path(place).absolute()) for name, place in places.items()}
    return dataclasses.replace(recipe, **absolute)


@contextlib.contextmanager
def _found(recipe: Recipe) -> Iterator[None]:
    """Where something that the run reads is gone, name the option that tells where it is now."""
    try:
        yield
    except UnreadableFile as error:
        gone = [name for name in PLACES if (place := getattr(recipe, name)) and str(error).startswith(f"{place}:")]
        if not gone:
            raise
        raise UnreadableFile(f"{error}; if it is elsewhere now, say where with --{gone[0]}") from error


def _read(folder: Path, moved: Mapping[str, str | os.PathLike[str]] | None = None) -> tuple[dict[str, Any], Recipe]:
    """The record and recipe of a run, with what it reads at the places of `moved`."""
    known = runs.read_run(folder, "train")
    path = folder / "run.json"
    try:
        # "auto" was decided when the run began, and goes on as it was decided.
        operators = {"operators": known["identity"]["operators"]}
        recipe = build_recipe(known["recipe"], operators, str(path))
        if not (isinstance(known["identity"], dict) and isinstance(known["device"], str)):
            raise TypeError("no identity")
    except (KeyError, TypeError, UsageError) as error:
        raise UnreadableFile(f"{path}: without the recipe of the run ({error}); begin a new one") from error
    if moved:
        recipe = _placed(recipe, moved)
        known["recipe"] |= {name: getattr(recipe, name) for name in moved}
    return known, recipe


def _start(folder: Path) -> Path | None:
    """The weights that tell a run's network where its state has their numbers; None: it has no state yet."""
    if (folder / STATE).exists():
        return folder / LAST
    if (folder / JSONL).exists():
        raise UnreadableFile(
            f"{folder / STATE} is gone, which the run went on from; begin a new one from {folder / LAST}"
        )
    return None


class _Run:
    """A training from its preparation to its end."""

    folder: Path  # set when the run is in it

    def __init__(
        self,
        recipe: Any,
        place: str,
        device: str,
        workers: int | Workers,
        processes: Processes,
        start: Path | None,
    ):
        from fcvit.training.step import Trainer, balanced, synchronize

        self.recipe, self.device, self.workers, self.processes = recipe, device, workers, processes
        self.began = time.perf_counter()
        self.division = Division(recipe.batch_size, processes.count, processes.rank, recipe.accumulate)
        weights = _weights(recipe, start)
        # A run that goes on has its head already, and needs the weights that it began with no more.
        given = dataclasses.replace(recipe, weights=str(start), new_head=False, ema=None) if start else recipe
        self.splits = find_splits(given, weights)
        for note in (*(weights.notes if weights is not None and start is None else ()), *self.splits.notes):
            logger.info(note)
        if recipe.warmup_epochs >= recipe.epochs:
            logger.info(
                f"the warm-up takes all of the {counted(recipe.epochs, 'epoch')}: the learning rate does not reach "
                f"{recipe.peak_lr:g}; a lower --warmup-epochs lets it"
            )
        self.steps = steps_per_epoch(len(self.splits.train), recipe.batch_size)
        if recipe.patience and self.splits.val is None:
            raise UsageError(f"patience = {recipe.patience}: without validation images nothing tells when to stop")
        self.preprocessing = input_preprocessing(recipe, weights)
        model = _network(given, weights, self.splits)
        if recipe.batchnorm == "sync":
            synchronize(model)
        self.operators = _accelerate(model, recipe, place)
        class_weights = balanced(self.splits.counts()) if recipe.class_weights == "balanced" else None
        self.trainer = Trainer(model, recipe, self.division, class_weights)
        self.progress = Progress()
        self.kept = 0  # epochs in the state that is on the disk
        self.progress.first_updates = _updates(weights)
        self.moved = False  # whether something that a run goes on with is elsewhere now
        self.began_after = 0  # epochs of a run that this one extends
        self.unreadable: dict[str, None] = {}
        self.seconds: list[float] = []  # of each epoch that this process trained
        self.identity = self._identity(weights, place)
        if start is not None:
            del self.identity["weights"]
        if processes.count > 1:
            self._agree()

    @classmethod
    @contextlib.contextmanager
    def prepared(cls, recipe: Recipe, device: str, workers: int, start: Path | None = None) -> Iterator["_Run"]:
        """Everything that can be told before a folder is made; `start`: see `_start`."""
        if workers < 0:
            raise UsageError(f"--workers {workers}: expected at least 0")
        processes = join()
        paddle = import_framework("paddle")
        place = paddle_place(processes.device(device))
        amp = paddle.amp
        has = {"float16": amp.is_float16_supported, "bfloat16": amp.is_bfloat16_supported}
        if recipe.precision in has and (place == "cpu" or not has[recipe.precision](place)):
            # Paddle would compute in float32, and say so in a warning at most.
            asked = f"precision = {recipe.precision!r}"
            raise UsageError(f"{asked}: Paddle does not have it on the {place}; take float32 (--precision float32)")
        if place == "cpu" and recipe.batchnorm == "sync":
            raise UsageError('batchnorm = "sync": Paddle does not have it on the CPU; use average')
        with contextlib.ExitStack() as stack:
            stack.enter_context(on_paddle_device(place))
            if processes.count > 1:
                paddle.distributed.init_parallel_env()
            paddle.seed(recipe.seed)
            run = cls(recipe, place, device, workers, processes, start)
            if workers:
                run.workers = stack.enter_context(contextlib.closing(Workers(workers)))
            yield run

    def _identity(self, weights: Weights | None, place: str) -> dict[str, Any]:
        """What decides the numbers of the run."""
        kept = ("fcvit", "paddlepaddle", "paddlepaddle-gpu", "numpy", "pillow")
        listed = {
            "training_images": self.splits.train.listing(),
            "validation_images": self.splits.val and self.splits.val.listing(),
            "classes": [c.id for c in self.splits.classes],
            "weights": weights and weights.source.sha256,
            "parts_of_a_step": self.division.slots,
            "kind_of_device": place.partition(":")[0],
            "operators": self.operators,
            "packages": {name: v for name, v in runs.versions().items() if name in kept} | decoders(),
        }
        return json.loads(json.dumps(listed))

    def check_same(self, folder: Path, known: Mapping[str, Any], moved: Collection[str] | None) -> None:
        """Go on only with what the run in `folder` began with; `moved`: what is elsewhere now.

        Raises:
            DoesNotFit: something else is there now.
        """
        if changed := [what for what in self.identity if known["identity"].get(what) != self.identity[what]]:
            raise DoesNotFit(
                f"{folder}: {', '.join(changed).replace('_', ' ')} changed since the run began; it cannot go on as it "
                "would have. Put it back, or begin a new run from its weights"
            )
        self.identity, self.moved = known["identity"], bool(moved)
        for name in moved or ():
            place = getattr(self.recipe, name)
            if name == "weights":
                same = read_weights(place, self.recipe.ema).source.sha256 == self.identity.get("weights")
            else:  # a class list is in the identity; a run of an earlier version has no sample
                same = known.get("sample") in (None, self.sample())
            if not same:
                raise DoesNotFit(f"--{name} {place}: other content than the run in {folder} began with")

    def sample(self) -> str:
        """SHA-256 of some image files of both splits, evenly sampled, so that a large data set costs no time."""
        content = hashlib.sha256()
        for images in (self.splits.train, self.splits.val):
            places = images.locations if images else ()
            for index in np.linspace(0, len(places) - 1, min(len(places), _SAMPLE)).round().astype(int):
                try:
                    read = places[index].read()
                except OSError:
                    read = b""
                content.update(hashlib.sha256(read).digest())
        return content.hexdigest()

    def _agree(self) -> None:
        """All processes train the same network on the same images.

        Raises:
            DoesNotFit: they do not.
        """
        state = b"".join(tensor.numpy().tobytes() for tensor in self.trainer.model.state_dict().values())
        mine = json.dumps([hashlib.sha256(state).hexdigest(), self.identity, dataclasses.asdict(self.recipe)])
        first = self.processes.broadcast(mine.encode())
        if first != mine.encode():
            raise DoesNotFit(f"process {self.processes.rank} does not see the recipe, images or weights of process 0")

    @contextlib.contextmanager
    def opened(self, folder: str | os.PathLike[str] | None, details: Mapping[str, object]) -> Iterator[None]:
        """In a new folder."""
        record = {
            "recipe": {name: value for name, value in dataclasses.asdict(self.recipe).items() if value is not None},
            "identity": self.identity,
            "sample": self.sample(),
            "device": self.device,
            **details,
        }
        with contextlib.ExitStack() as stack:
            if self.processes.first:
                path = Path(folder) if folder is not None else None
                self._refuse_inside(Path("runs") if path is None else path)
                stack.enter_context(self._ending_explained())
                self.folder = stack.enter_context(runs.run_folder(path, "train", record))
                runs.write_text(self.folder / _RECIPE, self.recipe.to_toml())
            self._share_folder()
            yield

    @contextlib.contextmanager
    def continued(self, folder: Path, known: Mapping[str, Any]) -> Iterator[None]:
        """In the folder of a run that was interrupted."""
        with contextlib.ExitStack() as stack:
            if self.processes.first:
                stack.enter_context(self._ending_explained())
                stack.enter_context(runs.continued_run(folder, known))
            self.began_after = int(known.get("began_after", 0))
            with held_back():
                if (folder / STATE).exists():
                    self.restore(folder)
                self.folder = folder  # from now on an end is explained by what was restored
            if self.processes.first:
                _clean(folder)
                if self.moved:
                    runs.write_text(folder / _RECIPE, self.recipe.to_toml())
            self._share_folder(folder)
            if self.kept:
                done = f"{self.progress.epoch} of {counted(self.recipe.total_epochs, 'epoch')}"
                logger.info(f"done already: {done}")
            yield

    @contextlib.contextmanager
    def _ending_explained(self) -> Iterator[None]:
        """Tell how to go on, however the run ends, once there is something to go on with."""
        try:
            with kept():
                yield
                check()
        except TrainingStopped as error:
            raise TrainingStopped(f"{error}; {self._what_stands(error.again)}") from error
        except UnreadableFile as error:
            if not hasattr(self, "folder"):
                raise
            raise UnreadableFile(f"{error}; {self._what_stands()}") from error
        except KeyboardInterrupt:
            if hasattr(self, "folder"):
                with held_back():
                    logger.info(self._what_stands())
            raise

    def take_over(self, source: Path) -> None:
        """The weights of the run that this one extends, so that a run always has its best and last."""
        if self.processes.first:
            for name in (LAST, LAST_EMA, BEST):
                if (source / name).exists():
                    _replace(self.folder / name, read_weights(source / name))
            self._write_state()  # last: from now on the run can be resumed

    def _share_folder(self, folder: Path | None = None) -> None:
        path = self.processes.broadcast(os.fsencode(self.folder.absolute()) if self.processes.first else b"")
        if not self.processes.first:
            self.folder = folder or Path(os.fsdecode(path))

    def _refuse_inside(self, folder: Path) -> None:
        for split in (self.splits.train, self.splits.val):
            if split is not None:
                runs.refuse_inside(folder, split.root, f"the images {split.root}")

    def restore(self, folder: Path) -> None:
        """Take up the state that a run left.

        Raises:
            UnreadableFile: it is damaged, or of another network.
        """
        self.progress, tensors = read_state(folder)
        self.kept = self.progress.epoch
        try:
            self.trainer.restore(tensors, self.progress.step, self.progress.scaler)
        except UnreadableFile as error:
            raise UnreadableFile(f"{folder}: {error}") from error

    def finish(self) -> Training:
        """The epochs that are missing."""
        log = (
            Log(self.folder, self.recipe.tensorboard, self.progress.epoch - self.began_after)
            if self.processes.first
            else None
        )
        rows = self.progress.rows
        try:
            if log:
                log.write(rows)
            self.processes.broadcast(b"")  # the others wait here, not in gloo, which gives up after 30 seconds
            while self.progress.epoch < self.recipe.total_epochs and not self._out_of_patience():
                began = time.perf_counter()
                row = self._epoch(self.progress.epoch)
                if log:
                    log.write(rows)
                self.seconds.append(time.perf_counter() - began)
                left = (self.recipe.total_epochs - self.progress.epoch) * float(np.median(self.seconds))
                logger.info(f"{_in_words(row, self.recipe.total_epochs)}, {duration(left)} left at most")
                self.processes.broadcast(b"")
        finally:
            if log:
                log.close()
        best = self.progress.best
        return Training(
            self.folder,
            tuple(rows),
            best,
            self.progress.epoch < self.recipe.total_epochs,
            tuple(self.unreadable),
            self.processes.first,
            time.perf_counter() - self.began,
        )

    def _out_of_patience(self) -> bool:
        best, patience = self.progress.best, self.recipe.patience
        since = max(best["epoch"], self.began_after) if best else 0
        return bool(best and patience and self.progress.epoch - since >= patience)

    def _what_stands(self, again: bool = True) -> str:
        if self.began_after and not self.kept:
            return f"{self.folder} has not taken over the state of the run that it extends; extend that one again"
        stands = f"epoch {self.kept} stands in {self.folder}" if self.kept else "no epoch was finished"
        return f"{stands}; go on with: fcvit train --resume {shlex.quote(str(self.folder))}" if again else stands

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """One epoch, to the state that says it is done; its row of the log."""
        trainer, recipe = self.trainer, self.recipe
        trainer.train_mode()
        trainer.reset_clock()
        began = time.perf_counter()
        losses = []
        what = f"epoch {epoch + 1} of {recipe.total_epochs}"
        rate = 0.0
        with contextlib.ExitStack() as stack:
            images = self.steps * recipe.batch_size
            shown = progress(what, images, after=self._seconds_after) if self.processes.first else None
            advance = stack.enter_context(shown) if shown else lambda _: None
            parts = stack.enter_context(contextlib.closing(self._parts(epoch)))
            for step in range(self.steps):
                rate = learning_rate(recipe, epoch + step / self.steps)
                losses.append(trainer.run(parts, rate))
                check()
                advance(recipe.batch_size)
        trainer.end_epoch()
        self._gather_unreadable()
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {"epoch": epoch + 1, "step": trainer.step, "lr": rate, "loss": float(np.mean(losses))}
        row |= self._validate()
        row |= {"images_per_second": images / seconds, "seconds": seconds} | trainer.seconds
        self.progress.epoch, self.progress.step = epoch + 1, trainer.step
        self.progress.rows.append(row)
        self.progress.scaler = trainer.scaler_state()
        if self.processes.first:
            self._save(row)
        else:
            self._note_best(row)
        return row

    def _seconds_after(self, rate: float) -> float:
        """The time that follows the training images of an epoch: its validation, and the epochs to come.

        A step is about three forward passes; once an epoch was measured, its time stands for the rest.
        """
        validated = len(self.splits.val) * (2 if self.trainer.average else 1) if self.splits.val else 0
        validation = validated / (3 * rate)
        whole = self.steps * self.recipe.batch_size / rate + validation
        to_come = self.recipe.total_epochs - self.progress.epoch - 1
        return validation + to_come * (float(np.median(self.seconds)) if self.seconds else whole)

    def _parts(self, epoch: int) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets of this process's parts."""
        size, count = self.preprocessing.input_size, len(self.splits.classes)
        loaded = epoch_parts(self.splits.train, self.recipe, size, epoch, self.division, self.workers)
        with contextlib.closing(loaded):
            for batch, labels in loaded:
                self._leave_out(reason for _, reason in batch.bad)
                if len(labels) < max(2, self.division.images / 2):
                    raise TrainingStopped(
                        f"{len(batch.bad)} of {self.division.images} images that go through the network together "
                        f"cannot be read ({batch.bad[0][1]}); is {self.splits.train.root} as it was?"
                    )
                yield network_input(batch, labels, self.recipe, self.preprocessing, epoch, count)

    def _leave_out(self, reasons: Iterable[str]) -> None:
        """Name each image once."""
        for reason in reasons:
            if reason not in self.unreadable:
                logger.info(f"left out: {reason}")
                self.unreadable[reason] = None

    def _gather_unreadable(self) -> None:
        """Let the first process, which speaks for all, know what the others could not read."""
        for found in self.processes.gather(json.dumps(list(self.unreadable)).encode()):
            self._leave_out(json.loads(found))

    def _weights(self, averaged: bool) -> Weights:
        trainer = self.trainer
        return weights_of(
            trainer.model,
            name="ema" if averaged else "raw",
            preprocessing=self.preprocessing,
            classes=self.splits.classes,
            tensors=trainer.average.tensors if averaged and trainer.average else None,
            updates=self.progress.first_updates + (0 if self.recipe.freeze else trainer.step),
        )

    def _validate(self) -> dict[str, float]:
        """Loss, top-1 and top-5 on the validation images, of the averaged weights too."""
        if self.splits.val is None:
            return {}
        kinds = [False] + [True] * (self.trainer.average is not None)
        from fcvit.training.step import REMEDY

        try:
            found = self._evaluated(kinds)
        except NumbersDisagree as error:
            raise TrainingStopped(
                f"the network computes no finite numbers any more ({error}); {REMEDY}", False
            ) from error
        self._leave_out(found.unreadable)
        row = {}
        for averaged, result in zip(kinds, found.results, strict=True):
            prefix = "ema_" if averaged else ""
            row |= {f"{prefix}val_loss": result.loss, f"{prefix}top1": result.top1}
            if result.k < result.classes:  # else it is 100 %
                row[f"{prefix}top{result.k}"] = result.top_k
        return row

    def _evaluated(self, kinds: Sequence[bool]) -> Evaluation:
        assert self.splits.val is not None
        return evaluate(
            [self._weights(averaged) for averaged in kinds],
            self.splits.val,
            engines="native" if self.operators == "native" else "paddle",
            batch_size=min(64, max(1, self.division.images)),
            device=self.device,
            workers=self.workers,
        )

    def _note_best(self, row: Mapping[str, Any]) -> str | None:
        """Which weights of this epoch are the best so far: "raw", "ema" or none."""
        scores = {kind: row[key] for kind, key in (("raw", "top1"), ("ema", "ema_top1")) if key in row}
        if not scores:
            return None
        kind = max(scores, key=scores.__getitem__)
        best = self.progress.best
        if best and scores[kind] <= best["best_top1"]:
            return None
        self.progress.best = dict(row) | {"best_weights": kind, "best_top1": scores[kind]}
        return kind

    def _save(self, row: Mapping[str, Any]) -> None:
        """The weights, then the state: an epoch whose state is not there is done again, to the same weights."""
        _replace(self.folder / LAST, self._weights(False))
        if self.trainer.average is not None:
            _replace(self.folder / LAST_EMA, self._weights(True))
        if kind := self._note_best(row):
            _replace(self.folder / BEST, self._weights(kind == "ema"))
        if self.recipe.save_every and row["epoch"] % self.recipe.save_every == 0:
            _replace(self.folder / f"epoch-{row['epoch']:04d}.safetensors", self._weights(False))
        self._write_state()

    def _write_state(self) -> None:
        write_state(self.folder, self.progress, self.trainer.tensors())
        self.kept = self.progress.epoch


def _clean(folder: Path) -> None:
    """Remove what a process that was killed was writing."""
    for path in folder.glob(f"{runs.TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _weights(recipe: Recipe, start: Path | None) -> Weights | None:
    if start is not None:
        return read_weights(start, None, recipe.network())
    return read_weights(recipe.weights, recipe.ema, recipe.network()) if recipe.weights else None


def _replace(path: Path, weights: Weights) -> None:
    with staged(path, overwrite=True) as temporary:
        write_weights(temporary, weights)


def _network(recipe: Recipe, weights: Weights | None, splits: Splits) -> Any:
    """The model as training finds it."""
    from fcvit.training.optimizer import freeze_backbone

    count = len(splits.classes)
    if weights is None:
        model = create_model(recipe.network(), None, count, recipe.drop_path_rate, recipe.drop_rate)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a head that the recipe asks for
            model = build_classifier(weights, None, recipe.drop_path_rate, recipe.drop_rate)
        if recipe.new_head or not model.num_classes:
            model.reset_classifier(count)
            logger.info(f"{weights.source.path}: a new head for {count} classes")
    if recipe.freeze:
        freeze_backbone(model)
    return model


def _accelerate(model: Any, recipe: Recipe, place: str) -> str:
    """Let our own operators compute the model where they can; which operators do."""
    if place != "cpu":
        if recipe.operators == "native":
            raise UsageError('operators = "native": they are for the CPU; use auto or plain')
        return "plain"
    if recipe.operators == "plain":
        return "plain"
    from fcvit.native.network import accelerate

    try:
        accelerate(model)
    except MissingExtra as error:
        if recipe.operators == "native":
            raise
        logger.info(f"Paddle's own operators compute, which are several times slower: {error}")
        return "plain"
    return "native"


def _updates(weights: Weights | None) -> int:
    """How often the BatchNorm statistics that a run starts with were updated."""
    counts = [
        int(t) for name, t in (weights.tensors if weights else {}).items() if name.endswith("num_batches_tracked")
    ]
    return max(counts, default=0)


def _in_words(row: Mapping[str, Any], total: int) -> str:
    parts = [f"epoch {row['epoch']} of {total}: loss {row['loss']:.4f}"]
    for key, name in (("top1", "top-1"), ("ema_top1", "top-1 of the average")):
        if key in row:
            parts.append(f"{name} {row[key]:.2f} %")
    return ", ".join([*parts, f"{row['images_per_second']:.1f} images/s"])
