"""The questions that training, evaluation and prediction ask of a task. They ask nothing else and name no task.

A task is a module with a `TASK` object, registered here by name. The name is stored in the header of
checkpoints (as that of the head), in recipes and in `run.json`. The loops import this file alone; the registry
imports a task's module when it is asked for.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fcvit.errors import DoesNotFit, UsageError
from fcvit.models.variants import Preprocessing

if TYPE_CHECKING:
    from paddle import Tensor, nn

    from fcvit.data.loader import Batch, Dataset, Transform
    from fcvit.inference.engines import Engine
    from fcvit.tasks.recipe import Recipe
    from fcvit.weights.reading import Weights

TASKS = {"classification": "fcvit.tasks.classification.task"}
DEFAULT_TASK = "classification"
"""The task of recipes and results that name none."""


class TrainingTask(Protocol):
    """A task for one training run: its data, its network, its loss.

    Attributes:
        train, val: the splits; val None: no validation.
        notes: how they were found, for people.
        identity: what decides the numbers of the run besides images, weights and packages.
        preprocessing: what the network is trained for.
        score: the figure of the log that selects the best weights; more is better.
        shown: column of the log -> (label, format), what people want to see of an epoch.
    """

    train: "Dataset"
    val: "Dataset | None"
    notes: Sequence[str]
    identity: Mapping[str, Any]
    preprocessing: Preprocessing
    score: str
    shown: Mapping[str, tuple[str, str]]

    def network(self) -> "nn.Layer":
        """Return the network as the run begins with it."""
        ...

    def transform(self, epoch: int) -> "Transform":
        """Return what becomes of an image and its target in an epoch; workers get a copy."""
        ...

    def inputs(self, batch: "Batch", epoch: int) -> tuple[np.ndarray, Any]:
        """Return the network's input, float32 (B, 3, H, W), and what the loss compares its outputs with."""
        ...

    def loss(self, outputs: Any, targets: Any) -> "dict[str, Tensor]":
        """Return the named losses of a micro-batch, means over its images; their sum is minimized."""
        ...

    def weights(self, model: "nn.Layer", **options: Any) -> "Weights":
        """Return the network's weights with all that a checkpoint says; options as in `weights_of`."""
        ...

    def evaluator(self, loaded: "Sequence[Weights]") -> "Evaluator":
        """Return what evaluates weights on the validation split."""
        ...

    def row(self, result: Any) -> dict[str, float]:
        """Return the columns that an evaluation's result adds to the log."""
        ...


class Evaluator(Protocol):
    """A task for one evaluation: its data, and from outputs to records, figures and files.

    Attributes:
        dataset: the samples, in the order of the records.
        notes: how it was found, for people.
        rule: how targets were read, for people.
        dtype: of the record of a sample by one configuration (a NumPy structure).
        outputs: numbers that the network gives for a sample; 0: they vary.
    """

    dataset: "Dataset"
    notes: Sequence[str]
    rule: str
    dtype: np.dtype
    outputs: int

    def identity(self) -> dict[str, Any]:
        """Return what decides the records besides weights, engines and names of the samples, as JSON."""
        ...

    def transform(self, preprocessing: Preprocessing) -> "Transform":
        """Return what becomes of an image and its target; workers get a copy."""
        ...

    def record(
        self, outputs: np.ndarray, targets: Sequence[Any], reference: np.ndarray | None
    ) -> tuple[np.ndarray, Sequence[bytes]]:
        """Return what is kept of each sample of a batch: a record of `dtype`, and bytes of any length.

        Args:
            outputs: of the network, (B, ...).
            targets: of the samples.
            reference: outputs of the configuration that this one is compared with; None: it is that one.
        """
        ...

    def report(self, evaluated: "Evaluated") -> "Report":
        """Return the figures of all records at once."""
        ...


class Evaluated(Protocol):
    """All records of an evaluation, as the runner hands them over.

    Attributes:
        configurations: see `fcvit.evaluation.settings.Configuration`.
        batch_size, precisions: of the run.
        index, digests: position in the data set and digest of each sample that could be read, (N,).
        records: (N, configurations) of the evaluator's `dtype`.
        bytes_of: the variable-length part of each record, by (sample, configuration).
        left_out: (name, reason) of each sample that could not be read.
        seconds, devices: of each configuration.
        about: settings for the files of the results.
    """

    configurations: Any
    batch_size: int
    precisions: Any
    index: np.ndarray
    digests: np.ndarray
    records: np.ndarray
    bytes_of: Any
    left_out: Any
    seconds: Any
    devices: Any
    about: Any


class Report(Protocol):
    """The figures of an evaluation and how they are written and shown.

    Attributes:
        results: one for each configuration.
        hints: what looks wrong in the data, for people.
    """

    results: Sequence[Any]
    hints: Sequence[str]

    def write(self, folder: Path) -> None:
        """Write the results into a folder for each configuration, then the pictures and the page."""
        ...

    def tables(self) -> Iterator[Any]:
        """Yield what the terminal shows."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        ...


class Task(Protocol):
    """A task by name.

    Attributes:
        name: as checkpoints, recipes and runs store it.
        recipe: the dataclass of its recipes.
        options: the dataclass of what an evaluation of it may be asked besides `fcvit.evaluation.settings.Settings`.
    """

    name: str
    recipe: "type[Recipe]"
    options: type

    def training(self, recipe: "Recipe", weights: "Weights | None") -> TrainingTask:
        """Prepare a training."""
        ...

    def evaluator(self, loaded: "Sequence[Weights]", data: Path, options: Any) -> Evaluator:
        """Prepare an evaluation of weights on the data at a path."""
        ...

    def predictor(
        self, weights: "Weights", preprocessing: Preprocessing, classes: Any, create: "Callable[[], Engine]"
    ) -> Any:
        """Return what `fcvit.load` gives: an object with `predict` and `stream` (see `fcvit.inference.images`).

        For `fcvit predict` it has `rows(prediction)` (for JSON and CSV), `table(pairs)` and `draw(pairs, folder)` of
        paths with their predictions.

        Args:
            weights, preprocessing: of the network.
            classes: other names of the classes; None: the weights' own.
            create: makes the engine, once all else fits.
        """
        ...

    def compare(self, first: Path, second: Path, folder: Path | None) -> Any:
        """Compare two results of evaluations over the same samples; write the comparison into a folder."""
        ...


def get_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TASKS:
        raise UsageError(f"task {name!r:.60}: expected {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name]).TASK


def task_of(loaded: "Sequence[Weights]") -> Task:
    """Return the task that weights were trained for.

    Raises:
        DoesNotFit: they have no head, or are of different tasks.
    """
    tasks = list(dict.fromkeys(weights.spec.task for weights in loaded))
    if len(tasks) > 1:
        raise DoesNotFit(f"the weights are for different tasks ({', '.join(tasks)}); name them one by one")
    if tasks[0] not in TASKS:
        weights = loaded[0]
        raise DoesNotFit(f"{weights.source.path} is {weights.spec}: it has no classes")
    return get_task(tasks[0])
