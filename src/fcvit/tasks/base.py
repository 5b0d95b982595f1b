"""The interface between tasks and the training and evaluation loops, and the registry of tasks.

A task is a module with a `TASK` object, registered here by name. The name is stored in the header of checkpoints
(through the head), in recipes and in `run.json`. The loops use a task only through the protocols in this module.
`get_task` imports the module of a task on first use.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from fcvit.errors import DoesNotFit, UsageError
from fcvit.models.variants import Preprocessing

if TYPE_CHECKING:
    from paddle import Tensor, nn

    from fcvit.data.loader import Batch, Dataset, Transform
    from fcvit.data.transforms.pixel_batch import PixelBatch
    from fcvit.inference.engines import Engine
    from fcvit.tasks.recipe import Recipe
    from fcvit.weights.reading import Weights

TASKS = {
    "classification": "fcvit.tasks.classification.task",
    "segmentation": "fcvit.tasks.segmentation.task",
    "detection": "fcvit.tasks.detection.task",
}
DEFAULT_TASK = "classification"
"""The task of recipes and results without a task name."""


class TrainingTask(Protocol):
    """The data, network and loss of one training run.

    A task with `groups`, the group of each training image, gets micro-batches of one group (see
    `fcvit.training.batches.grouped`).

    Attributes:
        train, val: Training and validation splits. `val` is None if there is no validation.
        notes: Readable notes on how the splits were read.
        identity: Values that determine the results of the run, in addition to images, weights and packages.
        preprocessing: Preprocessing for which the network is trained.
        score: Column of the log that selects the best weights. Higher is better.
        shown: Columns of the log to print for each epoch: name -> (label, format).
    """

    train: "Dataset"
    val: "Dataset | None"
    notes: Sequence[str]
    identity: Mapping[str, Any]
    preprocessing: Preprocessing
    score: str
    shown: Mapping[str, tuple[str, str]]

    def network(self) -> "nn.Layer":
        """Return the network at the start of the run."""
        ...

    def transform(self, epoch: int) -> "Transform":
        """Return the transform of an image and its target in an epoch. It is pickled for the workers."""
        ...

    def inputs(self, batch: "Batch", epoch: int) -> tuple["PixelBatch", Any]:
        """Return the images, which are then normalized to the network's input, and the targets for the loss.

        It is called in a thread while the network computes an earlier batch.
        """
        ...

    def draw(self, images: np.ndarray, targets: Any) -> np.ndarray:
        """Return pictures for a preview, uint8 (B, H', W', 3), of network inputs as uint8 (B, H, W, 3) with targets."""
        ...

    def loss(self, outputs: Any, targets: Any) -> "dict[str, Tensor]":
        """Return the named losses of a micro-batch, averaged over its images. Training minimizes their sum."""
        ...

    def weights(self, model: "nn.Layer", **options: Any) -> "Weights":
        """Return the network's weights with the metadata of a checkpoint. For the options, see `weights_of`."""
        ...

    def evaluator(self, loaded: "Sequence[Weights]") -> "Evaluator":
        """Return the evaluator for the validation split."""
        ...

    def row(self, result: Any) -> dict[str, float]:
        """Return the columns of the log for an evaluation result."""
        ...


class Evaluator(Protocol):
    """The data of one evaluation, and the computation of records and reports from the network's outputs.

    Attributes:
        dataset: Samples, in the order of the records.
        notes: Readable notes on how the data set was read.
        rule: A readable description of how targets were read.
        dtype: NumPy structure of the record of one sample and one configuration.
        outputs: Number of outputs of the network per sample, or 0 if it varies.
        at_once: Number of samples for which outputs are computed and recorded together, or None for a whole batch. It
            must be 1 if the sizes of images differ.
        fixed_preprocessing: Whether `--protocol` and the preprocessing options do not apply.
    """

    dataset: "Dataset"
    notes: Sequence[str]
    rule: str
    dtype: np.dtype
    outputs: int
    at_once: int | None
    fixed_preprocessing: bool

    def identity(self) -> dict[str, Any]:
        """Return values that determine the records, in addition to weights, engines and sample names, as JSON."""
        ...

    def transform(self, preprocessing: Preprocessing) -> "Transform":
        """Return the transform of an image and its target. It is pickled for the workers."""
        ...

    def compute(self, engine: "Engine", images: Sequence[np.ndarray], targets: Sequence[Any]) -> Any:
        """Return the outputs of an engine for a batch. An array (B, ...) is checked for NaN and infinity."""
        ...

    def record(self, outputs: Any, targets: Sequence[Any], reference: Any) -> tuple[np.ndarray, Sequence[bytes]]:
        """Return the records of a batch, as an array of `dtype` and byte strings of any length.

        Args:
            outputs: Result of `compute`.
            targets: Targets of the samples.
            reference: Outputs of the reference configuration, or None for the reference itself.
        """
        ...

    def report(self, evaluated: "Evaluated") -> "Report":
        """Compute the report from all records."""
        ...


class Evaluated(Protocol):
    """All records of an evaluation.

    Attributes:
        configurations: Evaluation configurations (see `fcvit.evaluation.settings.Configuration`).
        batch_size, precisions: Batch size and precisions of the run.
        index, digests: Position in the data set and digest of each readable sample, (N,).
        records: Records of the evaluator's `dtype`, (N, configurations).
        bytes_of: Variable-length part of each record, by (sample, configuration).
        left_out: Name and reason of each sample that could not be read.
        seconds, devices: Computing time and devices of each configuration.
        about: Information about the run for the result files.
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
    """The results of an evaluation, and the methods that write and display them.

    Attributes:
        results: One result per configuration.
        hints: Readable warnings about likely errors in the data.
    """

    results: Sequence[Any]
    hints: Sequence[str]

    def write(self, folder: Path) -> None:
        """Write the results of each configuration into its own folder, then the charts and the report page."""
        ...

    def tables(self) -> Iterator[Any]:
        """Yield the tables for the terminal."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return all results as JSON."""
        ...


class OwnData(NamedTuple):
    """The data of a user, as far as fine-tuning needs it.

    Attributes:
        images: Number of training images.
        same_classes: Whether its classes are those of the weights, so that their head can be kept.
        listed: What was compared, with a verb, for example "class folders match".
        fields: Recipe fields that follow from the data or the recipe.
        notes: Recipe field -> readable note, which is shown unless the user passes this field.
    """

    images: int
    same_classes: bool
    listed: str
    fields: Mapping[str, Any] = {}
    notes: Mapping[str, str] = {}


class Task(Protocol):
    """A task, such as image classification.

    Attributes:
        name: Name in checkpoints, recipes and run folders.
        own_images: Name of the shipped recipe for fine-tuning on own images.
        recipe: Dataclass of the task's recipes.
        options: Dataclass of the task's evaluation options, in addition to `fcvit.evaluation.settings.Settings`.
        prediction: Dataclass of the task's prediction options. It raises `UsageError` if a value is invalid.
    """

    name: str
    own_images: str
    recipe: "type[Recipe]"
    options: type
    prediction: type

    def training(self, recipe: "Recipe", weights: "Weights | None") -> TrainingTask:
        """Prepare a training run."""
        ...

    def known_fields(self, weights: "Weights") -> Mapping[str, Any]:
        """Return the recipe fields that follow from weights of this task."""
        ...

    def own_data(self, recipe: "Recipe", weights: "Weights") -> OwnData:
        """Read the data of a recipe for fine-tuning weights of any task. The recipe has a new head."""
        ...

    def recognize(self, data: Path, weights: "Weights", fields: Mapping[str, Any]) -> str | None:
        """Return a description of data in the format of this task, "" if this is not certain, or None for other data.

        The default task is chosen if no other task recognizes the data. Its method returns None.

        Args:
            data: Path of the data.
            weights: Weights of the default task or without a head.
            fields: Recipe fields that the user passed.
        """
        ...

    def evaluator(self, loaded: "Sequence[Weights]", data: Path, options: Any) -> Evaluator:
        """Prepare an evaluation of weights on the data at a path."""
        ...

    def predictor(
        self, weights: "Weights", preprocessing: Preprocessing, classes: Any, create: "Callable[[], Engine]"
    ) -> Any:
        """Return the predictor that `fcvit.load` returns.

        It has `predict` and `stream` for Python (see `fcvit.inference.images`), and is a `Predictor` for `fcvit
        predict`.

        Args:
            weights, preprocessing: Weights and preprocessing of the network.
            classes: Class names that replace those of the weights, or None.
            create: Function that creates the engine. It is called after all other arguments were checked.
        """
        ...

    def compare(self, first: Path, second: Path, folder: Path | None) -> Any:
        """Compare two evaluation results on the same samples. Write the comparison if a folder is given."""
        ...


def get_task(name: str) -> Task:
    """Return the task with the given name.

    Raises:
        UsageError: The task does not exist.
    """
    if name not in TASKS:
        raise UsageError(f"task {name!r:.60}: expected {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name]).TASK


def task_of(loaded: "Sequence[Weights]") -> Task:
    """Return the task for which weights were trained.

    Raises:
        DoesNotFit: The weights have no head, or belong to different tasks.
    """
    tasks = list(dict.fromkeys(weights.spec.task for weights in loaded))
    if len(tasks) > 1:
        raise DoesNotFit(f"the weights are for different tasks ({', '.join(tasks)}); evaluate each task separately")
    if tasks[0] not in TASKS:
        weights = loaded[0]
        raise DoesNotFit(f"{weights.source.path}: {weights.spec} has no head; use a checkpoint with a head")
    return get_task(tasks[0])
