"""Train a network by a recipe, in one folder that a run can always be continued from.

The flow of the data: recipe -> task (splits, network, loss) -> trainer -> the loop of `fcvit.training.loop`. This file
builds the run and opens its folder; it knows no task.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fcvit import run_folder as runs
from fcvit.data.loader import Workers
from fcvit.data.transforms.preprocess import decoders
from fcvit.errors import DoesNotFit, MissingExtra, TrainingStopped, UnreadableFile, UsageError, counted
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place
from fcvit.interrupts import check, held_back, kept
from fcvit.processes import Processes, join
from fcvit.tasks.base import get_task
from fcvit.tasks.recipe import Recipe
from fcvit.training import files
from fcvit.training.batches import MicroBatches, steps_per_epoch
from fcvit.training.files import BEST, LAST, LAST_EMA
from fcvit.training.loop import Training, train_epochs
from fcvit.training.state import STATE, Progress, read_state, write_state
from fcvit.weights.reading import Weights, read_weights

PLACES = ("data", "val", "classes", "weights")  # fields that are made absolute, for whoever continues the run
logger = logging.getLogger("fcvit")


def train(
    recipe: Recipe, *, folder: str | os.PathLike[str] | None = None, device: str = "auto", workers: int = 0
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
        TrainingStopped: the loss is not finite, or images vanished; the last checkpoint stays.
        UnreadableFile: nothing more can be written; the last checkpoint stays.
    """
    recipe = _placed(recipe, {name: value for name in PLACES if (value := getattr(recipe, name))})
    with Run.prepared(recipe, device, workers) as run, run.opened(folder, {}):
        return train_epochs(run)


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
    record, recipe = _read(folder, moved)
    start = files.start_weights(folder)
    if start is None and record.get("extends"):  # it would begin from nothing
        raise UnreadableFile(
            f"{folder}: ended before it took over the state of {record['extends']}; extend that run again"
        )
    with _naming_option(recipe), Run.prepared(recipe, record["device"], workers, start) as run:
        run.check_same(folder, record, moved)
        with run.continued(folder, record):
            return train_epochs(run)


def extend(
    source: str | os.PathLike[str],
    epochs: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    moved: Mapping[str, str | os.PathLike[str]] | None = None,
    workers: int = 0,
) -> Training:
    """Train longer than a run was meant to: a new run that begins with the state of another.

    Weights, optimizer, EMA weights and log go on; the schedule is that of a run of `epochs`, from the epoch
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
    record, recipe = _read(source, moved)
    recipe = dataclasses.replace(recipe, epochs=epochs)
    done, _ = read_state(source)
    if recipe.total_epochs <= done.epoch:
        raise UsageError(
            f"--epochs {epochs}: with {recipe.cooldown_epochs} of cool-down no more than the {done.epoch} that are done"
        )
    prepared = Run.prepared(recipe, record["device"], workers, files.start_weights(source))
    with _naming_option(recipe), prepared as run:
        run.check_same(source, record, moved)
        run.restore(source)
        run.began_after, run.saved = run.progress.epoch, 0
        with run.opened(folder, {"extends": str(source.absolute()), "began_after": run.began_after}):
            run.take_over(source)
            return train_epochs(run)


def _placed(recipe: Recipe, places: Mapping[str, str | os.PathLike[str]]) -> Recipe:
    """Return the recipe with other places of what it reads, made absolute."""
    if wrong := [name for name in places if name not in PLACES]:
        raise UsageError(f"{', '.join(wrong)}: only {', '.join(PLACES)} may be elsewhere; the run goes on as it began")
    absolute: dict[str, Any] = {name: str(Path(place).absolute()) for name, place in places.items()}
    return dataclasses.replace(recipe, **absolute)


@contextlib.contextmanager
def _naming_option(recipe: Recipe) -> Iterator[None]:
    """Where something that the run reads is gone, name the option that tells where it is now."""
    try:
        yield
    except UnreadableFile as error:
        gone = [name for name in PLACES if (place := getattr(recipe, name)) and str(error).startswith(f"{place}:")]
        if not gone:
            raise
        raise UnreadableFile(f"{error}; if it is elsewhere now, say where with --{gone[0]}") from error


def _read(folder: Path, moved: Mapping[str, str | os.PathLike[str]] | None) -> tuple[dict[str, Any], Recipe]:
    """Return the record and recipe of a run, with what it reads at the places of `moved`."""
    record, recipe = files.read_record(folder)
    if moved:
        recipe = _placed(recipe, moved)
        record["recipe"] |= {name: getattr(recipe, name) for name in moved}
    return record, recipe


class Run:
    """A training with everything it needs: task, trainer, progress, folder.

    Attributes:
        folder: set when the run is in it.
        progress: how far it is.
        saved: epochs in the state that is on the disk.
        began_after: epochs of a run that this one extends.
    """

    folder: Path

    def __init__(
        self,
        recipe: Any,
        place: str,
        device: str,
        workers: "int | Workers",
        processes: Processes,
        start: Path | None,
    ):
        from fcvit.training.optimizer import freeze_backbone
        from fcvit.training.step import Trainer, use_synchronized_batchnorm

        self.recipe, self.device, self.workers, self.processes = recipe, device, workers, processes
        self.began = time.perf_counter()
        self.division = MicroBatches(recipe.batch_size, processes.count, processes.rank, recipe.accumulate)
        weights = _weights(recipe, start)
        # A run that goes on has its head already, and needs the weights that it began with no more.
        given = dataclasses.replace(recipe, weights=str(start), new_head=False, ema=None) if start else recipe
        self.task = get_task(recipe.task).training(given, weights)
        model = self.task.network()
        if recipe.freeze:
            freeze_backbone(model)
        for note in (*(weights.notes if weights is not None and start is None else ()), *self.task.notes):
            logger.info(note)
        if recipe.warmup_epochs >= recipe.epochs:
            logger.info(
                f"the warm-up takes all of the {counted(recipe.epochs, 'epoch')}: the learning rate does not reach "
                f"{recipe.peak_lr:g}; a lower --warmup-epochs lets it"
            )
        self.steps = steps_per_epoch(len(self.task.train), recipe.batch_size)
        if recipe.patience and self.task.val is None:
            raise UsageError(f"patience = {recipe.patience}: without validation images nothing tells when to stop")
        if recipe.batchnorm == "sync":
            use_synchronized_batchnorm(model)
        self.operators = _accelerate(model, recipe, place)
        self.trainer = Trainer(model, recipe, self.division, self.task.loss)
        self.progress = Progress(first_updates=_updates(weights))
        self.saved = self.began_after = 0
        self.moved = False  # whether something that a run goes on with is elsewhere now
        self.identity = self._identity(weights, place)
        if start is not None:
            del self.identity["weights"]
        if processes.count > 1:
            self._check_processes()

    @classmethod
    @contextlib.contextmanager
    def prepared(cls, recipe: Recipe, device: str, workers: int, start: Path | None = None) -> Iterator["Run"]:
        """Check everything that can be told before a folder is made; `start`: see `start_weights`."""
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
        """Return what decides the numbers of the run."""
        names = ("fcvit", "paddlepaddle", "paddlepaddle-gpu", "numpy", "pillow")
        listed = {
            "training_images": self.task.train.listing(),
            "validation_images": self.task.val and self.task.val.listing(),
            **self.task.identity,
            "weights": weights and weights.source.sha256,
            "parts_of_a_step": self.division.total,
            "kind_of_device": place.partition(":")[0],
            "operators": self.operators,
            "packages": {name: v for name, v in runs.versions().items() if name in names} | decoders(),
        }
        return files.as_json(listed)

    def check_same(self, folder: Path, record: Mapping[str, Any], moved: Collection[str] | None) -> None:
        """Check that the run in `folder` began with the same; `moved`: what is elsewhere now.

        Raises:
            DoesNotFit: something else is there now.
        """
        before = record["identity"]
        if changed := [what for what in self.identity if before.get(what) != self.identity[what]]:
            raise DoesNotFit(
                f"{folder}: {', '.join(changed).replace('_', ' ')} changed since the run began; it cannot go on as it "
                "would have. Put it back, or begin a new run from its weights"
            )
        self.identity, self.moved = before, bool(moved)
        for name in moved or ():
            place = getattr(self.recipe, name)
            if name == "weights":
                same = read_weights(place, self.recipe.ema).source.sha256 == self.identity.get("weights")
            else:  # a class list is in the identity; a run of an earlier version has no sample
                same = record.get("sample") in (None, files.sample_content((self.task.train, self.task.val)))
            if not same:
                raise DoesNotFit(f"--{name} {place}: other content than the run in {folder} began with")

    def _check_processes(self) -> None:
        """Check that all processes train the same network on the same images.

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
        """Open a new folder for the run."""
        record = {
            "recipe": {name: value for name, value in dataclasses.asdict(self.recipe).items() if value is not None},
            "identity": self.identity,
            "sample": files.sample_content((self.task.train, self.task.val)),
            "device": self.device,
            **details,
        }
        with contextlib.ExitStack() as stack:
            if self.processes.first:
                path = Path(folder) if folder is not None else None
                for split in (self.task.train, self.task.val):
                    if split is not None:
                        runs.refuse_inside(path or Path("runs"), split.root, f"the images {split.root}")
                stack.enter_context(self._ending_explained())
                self.folder = stack.enter_context(runs.run_folder(path, "train", record))
                runs.write_text(self.folder / files.RECIPE, self.recipe.to_toml())
            self._share_folder()
            yield

    @contextlib.contextmanager
    def continued(self, folder: Path, record: Mapping[str, Any]) -> Iterator[None]:
        """Open the folder of a run that was interrupted."""
        with contextlib.ExitStack() as stack:
            if self.processes.first:
                stack.enter_context(self._ending_explained())
                stack.enter_context(runs.continued_run(folder, record))
            self.began_after = int(record.get("began_after", 0))
            with held_back():
                if (folder / STATE).exists():
                    self.restore(folder)
                self.folder = folder  # from now on an end is explained by what was restored
            if self.processes.first:
                files.remove_temporary(folder)
                if self.moved:
                    runs.write_text(folder / files.RECIPE, self.recipe.to_toml())
            self._share_folder(folder)
            if self.saved:
                logger.info(f"done already: {self.progress.epoch} of {counted(self.recipe.total_epochs, 'epoch')}")
            yield

    @contextlib.contextmanager
    def _ending_explained(self) -> Iterator[None]:
        """Tell how to go on, however the run ends, once there is something to go on with."""
        try:
            with kept():
                yield
                check()
        except TrainingStopped as error:
            raise TrainingStopped(f"{error}; {self._how_to_go_on(error.again)}") from error
        except UnreadableFile as error:
            if not hasattr(self, "folder"):
                raise
            raise UnreadableFile(f"{error}; {self._how_to_go_on()}") from error
        except KeyboardInterrupt:
            if hasattr(self, "folder"):
                with held_back():
                    logger.info(self._how_to_go_on())
            raise

    def _how_to_go_on(self, again: bool = True) -> str:
        if self.began_after and not self.saved:
            return f"{self.folder} has not taken over the state of the run that it extends; extend that one again"
        done = f"epoch {self.saved} stands in {self.folder}" if self.saved else "no epoch was finished"
        return f"{done}; go on with: fcvit train --resume {shlex.quote(str(self.folder))}" if again else done

    def _share_folder(self, folder: Path | None = None) -> None:
        path = self.processes.broadcast(os.fsencode(self.folder.absolute()) if self.processes.first else b"")
        if not self.processes.first:
            self.folder = folder or Path(os.fsdecode(path))

    def take_over(self, source: Path) -> None:
        """Copy the weights of the run that this one extends, so that a run always has its best and last."""
        if self.processes.first:
            for name in (LAST, LAST_EMA, BEST):
                if (source / name).exists():
                    files.replace_weights(self.folder / name, read_weights(source / name))
            self.write_state()  # last: from now on the run can be resumed

    def restore(self, folder: Path) -> None:
        """Take up the state that a run left.

        Raises:
            UnreadableFile: it is damaged, or of another network.
        """
        self.progress, tensors = read_state(folder)
        self.saved = self.progress.epoch
        try:
            self.trainer.restore(tensors, self.progress.step, self.progress.scaler)
        except UnreadableFile as error:
            raise UnreadableFile(f"{folder}: {error}") from error

    def write_state(self) -> None:
        """Replace the state; from now on its epochs count."""
        write_state(self.folder, self.progress, self.trainer.tensors())
        self.saved = self.progress.epoch


def _weights(recipe: Recipe, start: Path | None) -> Weights | None:
    if start is not None:
        return read_weights(start, None, recipe.network())
    return read_weights(recipe.weights, recipe.ema, recipe.network()) if recipe.weights else None


def _accelerate(model: Any, recipe: Recipe, place: str) -> str:
    """Let our own operators compute the model where they can; return which operators do."""
    if place != "cpu":
        if recipe.operators == "native":
            raise UsageError('operators = "native": they are for the CPU; use auto or plain')
        return "plain"
    if recipe.operators == "plain":
        return "plain"
    from fcvit.inference.engines import accelerate

    try:
        accelerate(model)
    except MissingExtra as error:
        if recipe.operators == "native":
            raise
        logger.info(f"Paddle's own operators compute, which are several times slower: {error}")
        return "plain"
    return "native"


def _updates(weights: Weights | None) -> int:
    """Return how often the BatchNorm statistics that a run starts with were updated."""
    tensors = weights.tensors if weights else {}
    return max((int(t) for name, t in tensors.items() if name.endswith("num_batches_tracked")), default=0)
