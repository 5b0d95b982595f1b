"""Train a network by a recipe, resume an interrupted run, and extend a finished one.

This module builds a run and opens its folder. The recipe determines the task (splits, network and loss), the trainer
runs the optimizer steps, and `fcvit.training.loop` runs the epochs. Nothing here depends on a particular task.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
from fcvit.training.batches import MicroBatches, steps_in_pass
from fcvit.training.files import BEST, LAST, LAST_EMA
from fcvit.training.loop import Training, train_epochs
from fcvit.training.state import PREVIOUS, STATE, Progress, encode_state, read_state, write_state
from fcvit.weights.reading import Weights, read_weights

# Recipe fields that are paths. They are stored as absolute paths, so that a run can be resumed from any directory.
PLACES = ("data", "val", "classes", "weights")
logger = logging.getLogger("fcvit")


def train(
    recipe: Recipe, *, folder: str | os.PathLike[str] | None = None, device: str = "auto", workers: int = 0
) -> Training:
    """Train a network by a recipe, from the recipe's weights or from scratch.

    Args:
        recipe: The recipe (see `fcvit.training.recipe`).
        folder: New folder for the run. The default is `runs/train`, or `runs/train-2` and so on if it exists.
        device: auto, cpu, gpu or gpu:N.
        workers: Number of processes that decode and augment images. With 0 this process does it. The number does not
            change the result. A script with workers must call this under `if __name__ == "__main__":`.

    Raises:
        UsageError, UnreadableFile, DoesNotFit, MissingExtra: The run cannot start.
        TrainingStopped: The loss is not finite, or images have disappeared. The last checkpoint is kept.
        UnreadableFile: A file cannot be written. The last checkpoint is kept.
    """
    recipe = _with_paths(recipe, {name: value for name in PLACES if (value := getattr(recipe, name))})
    with Run.prepared(recipe, device, workers) as run, run.opened(folder, {}):
        return train_epochs(run)


def resume(
    folder: str | os.PathLike[str],
    *,
    moved: Mapping[str, str | os.PathLike[str]] | None = None,
    workers: int = 0,
) -> Training:
    """Resume a run after the last step whose state was saved.

    On a CPU the result is bit-identical to the result of an uninterrupted run. The number of processes may differ if it
    divides the number of micro-batches per step.

    Args:
        folder: Folder of the run.
        moved: New paths of data, val, classes or weights, by these names, if they were moved. The names and classes of
            the images must be the same. The content of a sample of the files is checked, too.
        workers: See `train`.

    Raises:
        DoesNotFit: The data, weights or packages differ from those that the run began with, or the number of processes
            does not divide the number of micro-batches per step.
        FcvitError: See `train`.
    """
    folder = Path(folder)
    record, recipe = _read(folder, moved)
    start = files.start_weights(folder)
    # Without the copied state, the run would start from scratch.
    if record.get("extends") and not files.has_state(folder):
        raise UnreadableFile(
            f"{folder}: the run ended before it had copied the state of {record['extends']}; extend that run again"
        )
    with _suggesting_option(recipe), Run.prepared(recipe, record["device"], workers, start) as run:
        run.check_same(folder, record, moved)
        with run.continued(folder, record):
            return train_epochs(run)


def resume_or_train(
    recipe: Recipe, *, folder: str | os.PathLike[str], device: str = "auto", workers: int = 0
) -> Training:
    """Resume the run in a folder if it exists, and start it otherwise. A note reports which of the two is done.

    Args:
        recipe: Recipe of the run.
        folder: Folder of the run.
        device: Device of a new run. An existing run continues on its own device.
        workers: See `train`.

    Raises:
        UsageError: The run in the folder has another recipe.
        FcvitError: See `train` and `resume`.
    """
    path = Path(folder)
    # The first process decides, because it creates the folder while the others are still looking for it.
    exists = join().broadcast(b"1" if files.run_exists(path) else b"0") == b"1"
    if not exists:
        logger.info(f"{path} contains no run, so a new run starts")
        return train(recipe, folder=path, device=device, workers=workers)
    record, stored = files.read_record(path)
    recipe = _with_paths(recipe, {name: value for name in PLACES if (value := getattr(recipe, name))})
    if recipe.operators == "auto":  # the run keeps what "auto" selected
        recipe = dataclasses.replace(recipe, operators=stored.operators)
    own, other = dataclasses.asdict(stored), dataclasses.asdict(recipe)
    changed = [f"{name} is {own.get(name)!r}, not {other[name]!r}" for name in other if own.get(name) != other[name]]
    if device not in ("auto", record["device"]):
        changed.append(f"the device is {record['device']}, not {device}")
    if changed:
        raise UsageError(
            f"{path}: the run in this folder has another recipe ({', '.join(changed)}); choose another folder, or "
            f"continue the run with: fcvit resume {shlex.quote(str(path))}"
        )
    logger.info(f"{path} contains this run, so it is resumed")
    return resume(path, workers=workers)


def extend(
    source: str | os.PathLike[str],
    epochs: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    moved: Mapping[str, str | os.PathLike[str]] | None = None,
    workers: int = 0,
) -> Training:
    """Start a new run with the state of another run, and train it for more epochs.

    The new run continues with the weights, optimizer, EMA weights and log. From the current epoch on, its learning rate
    follows the schedule of a run of `epochs` epochs. A run that had this schedule from the beginning gives another
    result, because its first epochs have different learning rates.

    Args:
        source: Folder of the run to extend.
        epochs: Number of epochs of the new schedule. It must be larger than the number of finished epochs.
        folder: See `train`.
        moved: See `resume`.
        workers: See `train`.

    Raises:
        FcvitError: See `resume`.
    """
    source = Path(source)
    record, recipe = _read(source, moved)
    recipe = dataclasses.replace(recipe, epochs=epochs)
    if not files.has_state(source):
        raise UnreadableFile(f"{source / STATE}: does not exist, because the run saved no state; start a new run")
    prepared = Run.prepared(recipe, record["device"], workers, files.start_weights(source))
    with _suggesting_option(recipe), prepared as run:
        run.check_same(source, record, moved)
        run.restore(source)
        if recipe.total_epochs <= (done := run.progress.epoch):
            raise UsageError(
                f"--epochs {epochs}: with {recipe.cooldown_epochs} cool-down epochs this is not more than the {done} "
                "epochs that are already done; choose a larger number"
            )
        run.began_after, run.saved = done, ""
        with run.opened(folder, {"extends": str(source.absolute()), "began_after": run.began_after}):
            run.copy_weights(source)
            return train_epochs(run)


def _with_paths(recipe: Recipe, paths: Mapping[str, str | os.PathLike[str]]) -> Recipe:
    """Return the recipe with new paths in some of its fields, converted to absolute paths."""
    if wrong := [name for name in paths if name not in PLACES]:
        raise UsageError(f"{', '.join(wrong)}: only {', '.join(PLACES)} can be changed when a run is resumed")
    absolute: dict[str, Any] = {name: str(Path(path).absolute()) for name, path in paths.items()}
    return dataclasses.replace(recipe, **absolute)


@contextlib.contextmanager
def _suggesting_option(recipe: Recipe) -> Iterator[None]:
    """Add the option for the new path to an error about a file or folder of the recipe that cannot be read."""
    try:
        yield
    except UnreadableFile as error:
        missing = [name for name in PLACES if (path := getattr(recipe, name)) and str(error).startswith(f"{path}:")]
        if not missing:
            raise
        raise UnreadableFile(f"{error}; if it was moved, pass the new path with --{missing[0]}") from error


def _read(folder: Path, moved: Mapping[str, str | os.PathLike[str]] | None) -> tuple[dict[str, Any], Recipe]:
    """Return the record and recipe of a run, with the new paths of `moved`."""
    record, recipe = files.read_record(folder)
    if moved:
        recipe = _with_paths(recipe, moved)
        record["recipe"] |= {name: getattr(recipe, name) for name in moved}
    return record, _shared(folder, record, recipe)


def _shared(folder: Path, record: Mapping[str, Any], recipe: Recipe) -> Recipe:
    """Return the recipe of a run with its micro-batches shared by the current number of processes.

    Raises:
        DoesNotFit: This number of processes would change the results.
    """
    total, count = record["identity"]["parts_of_a_step"], join().count
    before = total // recipe.accumulate
    if count == before:
        return recipe
    if recipe.batchnorm != "average" and record["identity"]["kind_of_device"] != "cpu":
        raise DoesNotFit(
            f"{folder}: batchnorm = {recipe.batchnorm!r} normalizes over the {before} processes that the run began "
            f"with; resume it with {counted(before, 'process')}"
        )
    if total % count:
        possible = [str(number) for number in range(1, total + 1) if total % number == 0]
        raise DoesNotFit(
            f"{folder}: {counted(count, 'process')} cannot share {total} micro-batches per step equally; resume it "
            f"with one of these numbers of processes: {', '.join(possible)}"
        )
    logger.info(
        f"{folder}: {counted(before, 'process')} x accumulate {recipe.accumulate} -> {counted(count, 'process')} x "
        f"accumulate {total // count}"
    )
    return dataclasses.replace(recipe, accumulate=total // count)


class Run:
    """A training run with its task, trainer, progress and folder.

    Attributes:
        folder: Folder of the run. It is set when the folder is opened.
        progress: Progress of the run.
        saved: Position of the state on disk (see `Progress.describe`), or "" if there is none.
        began_after: Number of epochs inherited from the run that this run extends.
    """

    folder: Path

    def __init__(
        self,
        recipe: Any,
        resolved_device: str,
        device: str,
        workers: "int | Workers",
        processes: Processes,
        start: Path | None,
    ):
        from fcvit.training.optimizer import freeze_backbone
        from fcvit.training.step import Trainer, use_synchronized_batchnorm

        self.recipe, self.device, self.workers, self.processes = recipe, device, workers, processes
        self.began = time.perf_counter()
        self.micro_batches = MicroBatches(recipe.batch_size, processes.count, processes.rank, recipe.accumulate)
        weights = _weights(recipe, start)
        # A resumed run already has its head, and no longer needs the weights of the recipe.
        given = dataclasses.replace(recipe, weights=str(start), new_head=False, ema=None) if start else recipe
        self.task = get_task(recipe.task).training(given, weights)
        model = self.task.network()
        if recipe.freeze:
            freeze_backbone(model)
        for note in (*(weights.notes if weights is not None and start is None else ()), *self.task.notes):
            logger.info(note)
        self.steps = recipe.steps_per_epoch or steps_in_pass(len(self.task.train), recipe.batch_size)
        if recipe.warmup(self.steps) >= recipe.epochs:
            field = "steps" if recipe.warmup_steps else "epochs"
            logger.info(
                f"the warm-up is as long as the schedule ({counted(recipe.epochs, 'epoch')}), so the learning rate "
                f"does not reach {recipe.peak_lr:g}; choose a smaller --warmup-{field}"
            )
        if recipe.patience and self.task.val is None:
            raise UsageError(
                f"patience = {recipe.patience}: early stopping needs validation images; set --val or --held-out"
            )
        if recipe.batchnorm == "sync":
            use_synchronized_batchnorm(model)
        elif recipe.batchnorm == "sync_head" and processes.count > 1 and resolved_device != "cpu":
            use_synchronized_batchnorm(model, head_only=True)
        self.operators = _accelerate(model, recipe, resolved_device)
        self.trainer = Trainer(model, recipe, self.micro_batches, self.task.loss, self.operators == "native")
        self.progress = Progress(first_updates=_updates(weights))
        self.began_after, self.saved = 0, ""
        self.moved = False  # True if a resumed run reads data or weights from a new path
        self.statistics: np.ndarray | None = None  # of all micro-batches, in a restored state within an epoch
        self.damaged = False  # True if the run was restored from its previous state, because the last one is damaged
        self.identity = self._identity(weights, resolved_device)
        if start is not None:
            del self.identity["weights"]
        if processes.count > 1:
            self._check_processes()

    @classmethod
    @contextlib.contextmanager
    def prepared(cls, recipe: Recipe, device: str, workers: int, start: Path | None = None) -> Iterator["Run"]:
        """Build a run and check it before its folder is created.

        Args:
            recipe: Recipe of the run.
            device: auto, cpu, gpu or gpu:N.
            workers: Number of processes that decode and augment images.
            start: Weights file that a resumed run starts from (see `start_weights`).
        """
        if workers < 0:
            raise UsageError(f"--workers {workers}: expected at least 0")
        processes = join()
        paddle = import_framework("paddle")
        resolved_device = paddle_place(processes.device(device))
        amp = paddle.amp
        has = {"float16": amp.is_float16_supported, "bfloat16": amp.is_bfloat16_supported}
        if recipe.precision in has and (resolved_device == "cpu" or not has[recipe.precision](resolved_device)):
            # Paddle would silently compute in float32, or only print a warning.
            setting = f"precision = {recipe.precision!r}"
            raise UsageError(f"{setting}: Paddle does not support it on {resolved_device}; use --precision float32")
        if resolved_device == "cpu" and recipe.batchnorm == "sync":
            raise UsageError('batchnorm = "sync": Paddle does not support it on the CPU; use --batchnorm average')
        with contextlib.ExitStack() as stack:
            stack.enter_context(on_paddle_device(resolved_device))
            if processes.count > 1:
                processes.init_collectives()
            paddle.seed(recipe.seed)
            run = cls(recipe, resolved_device, device, workers, processes, start)
            if workers:
                run.workers = stack.enter_context(contextlib.closing(Workers(workers)))
            yield run

    def _identity(self, weights: Weights | None, resolved_device: str) -> dict[str, Any]:
        """Return everything besides the recipe that determines the result of the run."""
        names = ("fcvit", "paddlepaddle", "paddlepaddle-gpu", "numpy", "pillow")
        identity = {
            "training_images": self.task.train.listing(),
            "validation_images": self.task.val and self.task.val.listing(),
            **self.task.identity,
            "weights": weights and weights.source.sha256,
            "parts_of_a_step": self.micro_batches.total,
            "kind_of_device": resolved_device.partition(":")[0],
            "operators": self.operators,
            "packages": {name: v for name, v in runs.versions().items() if name in names} | decoders(),
        }
        return files.as_json(identity)

    def check_same(self, folder: Path, record: Mapping[str, Any], moved: Collection[str] | None) -> None:
        """Check that this run has the same images, weights and packages as the run in `folder` had at its start.

        Args:
            folder: Folder of the run that is resumed or extended.
            record: Record of that run.
            moved: Names of the recipe fields that have new paths.

        Raises:
            DoesNotFit: Something has changed.
        """
        before = record["identity"]
        if changed := [key for key in self.identity if before.get(key) != self.identity[key]]:
            raise DoesNotFit(
                f"{folder}: {', '.join(changed).replace('_', ' ')} changed since the run began, so it cannot be "
                "resumed; undo the change, or start a new run from its weights"
            )
        self.identity, self.moved = before, bool(moved)
        for name in moved or ():
            path = getattr(self.recipe, name)
            if name == "weights":
                same = read_weights(path, self.recipe.ema).source.sha256 == self.identity.get("weights")
            else:  # The identity already covers a class list. Runs of earlier versions have no sample.
                same = record.get("sample") in (None, files.sample_content((self.task.train, self.task.val)))
            if not same:
                raise DoesNotFit(f"--{name} {path}: the content differs from what the run in {folder} began with")

    def _check_processes(self) -> None:
        """Check that all processes train the same network on the same images.

        Raises:
            DoesNotFit: They differ.
        """
        state = b"".join(tensor.numpy().tobytes() for tensor in self.trainer.model.state_dict().values())
        mine = json.dumps([hashlib.sha256(state).hexdigest(), self.identity, dataclasses.asdict(self.recipe)])
        first = self.processes.broadcast(mine.encode())
        if first != mine.encode():
            raise DoesNotFit(f"process {self.processes.rank}: the recipe, images or weights differ from process 0")

    @contextlib.contextmanager
    def opened(self, folder: str | os.PathLike[str] | None, details: Mapping[str, object]) -> Iterator[None]:
        """Create the folder of a new run, and record `details` in its `run.json`."""
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
                        runs.reject_inside(path or Path("runs"), split.root, f"the image folder {split.root}")
                stack.enter_context(self._adding_resume_hint())
                self.folder = stack.enter_context(runs.run_folder(path, "train", record))
                runs.write_text(self.folder / files.RECIPE, self.recipe.to_toml())
            self._share_folder()
            yield

    @contextlib.contextmanager
    def continued(self, folder: Path, record: Mapping[str, Any]) -> Iterator[None]:
        """Open the folder of an interrupted run and restore its state."""
        with contextlib.ExitStack() as stack:
            if self.processes.first:
                stack.enter_context(self._adding_resume_hint())
                stack.enter_context(runs.continued_run(folder, record))
            self.began_after = int(record.get("began_after", 0))
            with held_back():
                if files.has_state(folder):
                    self.restore(folder)
                self.folder = folder  # set last, because the hint how to resume needs the restored state
            if self.processes.first:
                files.remove_temporary(folder)
                if self.damaged:  # otherwise it would become the previous state
                    (folder / STATE).unlink(missing_ok=True)
                if self.moved:
                    runs.write_text(folder / files.RECIPE, self.recipe.to_toml())
            self._share_folder(folder)
            if self.saved:
                epochs = counted(self.recipe.total_epochs, "epoch")
                step = f" and step {done} of {self.steps}" if (done := self.progress.epoch_step) else ""
                logger.info(f"already done: {self.progress.epoch} of {epochs}{step}")
            yield

    @contextlib.contextmanager
    def _adding_resume_hint(self) -> Iterator[None]:
        """Add the command that resumes the run to errors, or log it when the run is interrupted."""
        try:
            with kept():
                yield
                check()
        except TrainingStopped as error:
            raise TrainingStopped(f"{error}; {self._resume_hint(error.again)}") from error
        except UnreadableFile as error:
            if not hasattr(self, "folder"):
                raise
            raise UnreadableFile(f"{error}; {self._resume_hint()}") from error
        except KeyboardInterrupt:
            if hasattr(self, "folder"):
                with held_back():
                    logger.info(self._resume_hint())
            raise

    def _resume_hint(self, again: bool = True) -> str:
        if self.began_after and not self.saved:
            return f"{self.folder} does not contain the state of the run that it extends, so extend that run again"
        if not again:
            return f"the state after {self.saved} is saved in {self.folder}" if self.saved else "nothing was saved"
        after = f"after {self.saved}" if self.saved else "(from the start, because nothing was saved)"
        return f"resume {after} with: fcvit resume {shlex.quote(str(self.folder))}"

    def _share_folder(self, folder: Path | None = None) -> None:
        path = self.processes.broadcast(os.fsencode(self.folder.absolute()) if self.processes.first else b"")
        if not self.processes.first:
            self.folder = folder or Path(os.fsdecode(path))
        self.processes.resume_with(f"fcvit resume {shlex.quote(str(self.folder))}")
        if not self.processes.share(self.folder):
            logger.info(
                f"{self.folder}: only the machine of process 0 has the run folder; copy it to the same path on the "
                "other machines before you resume the run"
            )

    def copy_weights(self, source: Path) -> None:
        """Copy the weights files of the run that this run extends, then write the state."""
        if self.processes.first:
            for name in (LAST, LAST_EMA, BEST):
                if (source / name).exists():
                    files.replace_weights(self.folder / name, read_weights(source / name))
            self.copy_state(self.statistics)()  # last, because the state makes the run resumable

    def restore(self, folder: Path) -> None:
        """Restore the last state of the run in `folder`, or the previous one if the last one is damaged.

        Raises:
            UnreadableFile: The state is damaged or does not match the network.
        """
        try:
            self.progress, tensors = read_state(folder)
        except UnreadableFile as error:
            if not (folder / PREVIOUS).exists():
                raise
            self.progress, tensors = read_state(folder, PREVIOUS)
            self.damaged = True
            logger.info(f"{error}; using the previous state, after {self.progress.describe(self.steps)}")
        self.saved = self.progress.describe(self.steps)
        try:
            if not 0 <= self.progress.epoch_step <= self.steps:
                raise UnreadableFile(f"the state is after {self.saved}")
            self.trainer.restore(tensors, self.progress.step, self.progress.scaler)
        except UnreadableFile as error:
            raise UnreadableFile(f"{folder}: {error}") from error
        self.statistics = tensors.get("statistics")

    def copy_state(self, statistics: np.ndarray | None = None) -> Callable[[], None]:
        """Copy the current state, and return a function that replaces the state on disk with the copy.

        Args:
            statistics: Within an epoch, BatchNorm's statistics of all micro-batches (see `Statistics.values`).
        """
        from fcvit.training.step import STATISTICS, check_finite

        trainer, progress = self.trainer, self.progress
        progress.step, progress.scaler = trainer.step, trainer.scaler_state()
        if progress.epoch_step:
            progress.phases = dict(trainer.seconds)
        tensors, metadata = encode_state(progress, trainer.tensors())
        if statistics is not None:
            tensors[STATISTICS] = statistics
        step, saved = progress.step, progress.describe(self.steps)

        def write() -> None:
            check_finite(tensors, step)
            write_state(self.folder, tensors, metadata)
            self.saved = saved

        return write


def _weights(recipe: Recipe, start: Path | None) -> Weights | None:
    if start is not None:
        return read_weights(start, None, recipe.network())
    return read_weights(recipe.weights, recipe.ema, recipe.network()) if recipe.weights else None


def _accelerate(model: Any, recipe: Recipe, resolved_device: str) -> str:
    """Use this package's native operators in the model if they are available, and return "native" or "plain"."""
    if resolved_device != "cpu":
        if recipe.operators == "native":
            raise UsageError('operators = "native": these operators run only on the CPU; use auto or plain')
        return "plain"
    if recipe.operators == "plain":
        return "plain"
    from fcvit.inference.engines import accelerate

    try:
        accelerate(model)
    except MissingExtra as error:
        if recipe.operators == "native":
            raise
        logger.info(f"using Paddle's operators, which are several times slower: {error}")
        return "plain"
    return "native"


def _updates(weights: Weights | None) -> int:
    """Return the number of updates that the BatchNorm statistics of the initial weights have had."""
    tensors = weights.tensors if weights else {}
    return max((int(t) for name, t in tensors.items() if name.endswith("num_batches_tracked")), default=0)
