"""Load a network with its preprocessing and class names: `fcvit.load` and `fcvit.Predictor`, also for Ray Data."""

import dataclasses
import functools
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from fcvit.data.loader import Transform
from fcvit.errors import BadImages, DoesNotFit, MissingExtra, UsageError
from fcvit.inference.engines import AUTO, Engine, create_engine
from fcvit.inference.exported import read_network
from fcvit.inference.images import EncodedImage, ImageLike
from fcvit.models.variants import Preprocessing, resolve_preprocessing
from fcvit.tasks.base import task_of
from fcvit.weights.reading import Weights

_LOADED = ("weights", "engine")  # fields that are not pickled
_IMAGES = ("bytes", "image", "path")  # columns of a batch that can contain the images, the preferred one first
_ARROW_TYPES = {int: "int64", float: "float64", str: "string", bytes: "binary"}
logger = logging.getLogger("fcvit")


def load(
    path: "Weights | str | os.PathLike[str]",
    *,
    ema: bool | None = None,
    classes: Any = None,
    device: str = "auto",
    engine: str = AUTO,
    threads: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Any:
    """Load the network, preprocessing and class names from a weights file, ready for `predict`.

    Args:
        path: A checkpoint of any format, an exported file (.onnx, .xml or .json), or weights in memory.
        ema: Whether to use the EMA or the raw weights of a file that contains both.
        classes: Class list to use instead of that of the file: a list, or the path of a file.
        device: auto, cpu, gpu or gpu:N.
        engine: Name of the engine. "auto" selects the fastest installed engine that passes the numerical check, and
            for an exported file its runtime.
        threads: Number of CPU threads. None means one per core, in a worker of Ray one per assigned CPU.
        preprocessing: Preprocessing to use instead of that of the weights.

    Returns:
        A `fcvit.Predictor` for the task of the weights: a `fcvit.Classifier`, a `fcvit.Segmenter` for segmentation, or
        a `fcvit.Detector` for detection.

    Raises:
        UnreadableFile, DoesNotFit, UsageError: The file is invalid. See `fcvit.weights.reading.read_weights`.
        MissingExtra, NumbersDisagree: The engine cannot be used. See `fcvit.inference.engines.create_engine`.
    """
    weights = path if isinstance(path, Weights) else read_network(path, ema)
    for note in weights.notes:
        logger.info(note)
    chosen = resolve_preprocessing(preprocessing, weights.preprocessing, weights.spec.variant)

    def create() -> Engine:
        return create_engine(engine, weights, chosen, device, threads=threads or _ray_threads())

    predictor = task_of([weights]).predictor(weights, chosen, classes, create)
    if not isinstance(path, Weights):
        vars(predictor)["origin"] = Origin(str(Path(path).absolute()), "", ema, engine, device, threads)
    return predictor


class Origin(NamedTuple):
    """The file of a predictor, its SHA-256 ("" for not computed yet), and the options of `load` for the engine."""

    path: str
    sha256: str
    ema: bool | None
    engine: str
    device: str
    threads: int | None


@functools.cache
def _loaded(origin: Origin, preprocessing: Preprocessing) -> tuple[Weights, Engine]:
    """Load the weights and the engine of an unpickled predictor, once in each process.

    Raises:
        DoesNotFit: The file was changed.
    """
    weights = read_network(origin.path, origin.ema)
    if weights.source.sha256 != origin.sha256:
        raise DoesNotFit(f"{origin.path}: the file has changed since the predictor was pickled; load it again")
    threads = origin.threads or _ray_threads()
    return weights, create_engine(origin.engine, weights, preprocessing, origin.device, threads=threads)


def _ray_threads() -> int | None:
    """Return the number of CPUs that Ray assigned to this worker, at least 1, or None outside of a worker of Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


class _LoadsFile(type):
    """The type of `Predictor`, by which `Predictor(path)` is `load(path)`. Its dataclasses are built from fields."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return super().__call__(*arguments, **options) if dataclasses.is_dataclass(cls) else load(*arguments, **options)


class Predictor(metaclass=_LoadsFile):
    """A network with its preprocessing and class names. `fcvit.Predictor(path, ...)` is `fcvit.load(path, ...)`.

    `ds.map_batches(fcvit.Predictor, fn_constructor_args=("weights.safetensors",), compute=ActorPoolStrategy(size=2))`
    predicts the images of a data set of Ray. For the columns, see `__call__`.

    A predictor that was loaded from a file can be pickled. The pickle contains the path and the SHA-256 of the file,
    not the weights. The file is read on the first use in another process, once in each process.

    Attributes:
        weights, engine, preprocessing, classes: What was loaded.
        origin: The file from which the predictor was loaded, or None.
        row_columns: Columns of the rows and their types: int, float or str.
        at_once: Number of images for which predictions are computed together, or None for a whole batch. It must be 1
            if the sizes of images differ.
        stream: Method that yields the predictions of images one by one (see `fcvit.inference.images`).
    """

    origin: Origin | None = None
    at_once: ClassVar[int | None]
    stream: Any

    if TYPE_CHECKING:  # fields and properties of the dataclass of a task

        @property
        def weights(self) -> Weights: ...
        @property
        def engine(self) -> Engine: ...
        @property
        def preprocessing(self) -> Preprocessing: ...
        @property
        def classes(self) -> Any: ...
        @property
        def row_columns(self) -> Mapping[str, type]: ...

    def transform(self, options: Any) -> Transform:
        """Return the transform of an image for some prediction options. It is pickled for the workers."""
        raise NotImplementedError

    def compute(self, images: Sequence[str], pixels: Any, targets: Sequence[Any], options: Any) -> Sequence[Any]:
        """Return the prediction for each image.

        Args:
            images: Names of the images.
            pixels, targets: Results of the transform.
            options: Prediction options.
        """
        raise NotImplementedError

    def rows(self, prediction: Any) -> list[dict[str, Any]]:
        """Return a prediction as rows for JSON and CSV."""
        raise NotImplementedError

    def table(self, predictions: Any) -> Any:
        """Return a table for the terminal, from pairs of a path and rows."""
        raise NotImplementedError

    def pack(self, prediction: Any) -> bytes:
        """Encode a prediction with everything that `draw` needs."""
        raise NotImplementedError

    def unpack(self, content: bytes, image: Any, options: Any) -> Any:
        """Invert `pack`. The image is a path or a PIL image."""
        raise NotImplementedError

    def draw(self, predictions: Any, folder: Path) -> None:
        """Write pictures to a folder, from an iterator of paths, images and predictions. Existing files are kept."""
        raise NotImplementedError

    @property
    def batch_columns(self) -> Mapping[str, Any]:
        """Columns that `__call__` adds, and their types. A list contains the type of its elements."""
        return {"predictions": [self.row_columns]}

    def batch_values(self, prediction: Any) -> dict[str, Any]:
        """Return a prediction as values of `batch_columns`."""
        return {"predictions": self.rows(prediction)}

    def __getstate__(self) -> dict[str, Any]:
        if self.origin is None:
            raise UsageError(
                "this predictor was not loaded from a file, and cannot be pickled; save its weights, and load the path"
            )
        kept = {name: value for name, value in vars(self).items() if name in _fields(self) and name not in _LOADED}
        return kept | {"origin": self.origin._replace(sha256=self.origin.sha256 or self.weights.source.sha256)}

    def __getattr__(self, name: str) -> Any:
        """Load the file when the weights or the engine are used for the first time after unpickling."""
        if name not in _LOADED or self.origin is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        vars(self).update(zip(_LOADED, _loaded(self.origin, self.preprocessing), strict=True))
        return vars(self)[name]

    def __call__(self, batch: Mapping[str, np.ndarray], **options: Any) -> Any:
        """Predict a batch of Ray Data, in the batch format "numpy".

        The images are in the first of these columns: `bytes` (the content of image files), `image` (uint8 arrays, or
        structs of bytes and path as in data sets of Hugging Face), `path`.

        Args:
            batch: Columns by name.
            options: Options of `predict`, for example `top_k`. Pass them as `fn_kwargs` to `map_batches`.

        Returns:
            A pyarrow.Table with the columns of the batch except `bytes` and `image`, and with the columns
            `batch_columns` and
            `error`. If an image cannot be read, its error is the reason, and the other columns are null.

        Raises:
            UsageError: The batch has none of the columns, or an option is invalid.
            MissingExtra: pyarrow is not installed.
        """
        try:
            arrow = importlib.import_module("pyarrow")
        except ImportError as error:
            raise MissingExtra(f"pyarrow is not available ({error}); install it: pip install 'fcvit[ray]'") from error
        source = next((name for name in _IMAGES if name in batch), None)
        if source is None:
            listed = ", ".join(map(str, batch))
            raise UsageError(f"predict: the batch has the columns {listed:.200}; expected {', '.join(_IMAGES)}")
        kept = {name: values for name, values in batch.items() if name not in _IMAGES[:2]}
        if "path" not in kept and all(isinstance(value, Mapping) for value in batch[source]):
            kept["path"] = np.array([value.get("path") for value in batch[source]], object)
        paths = kept.get("path", [None] * len(batch[source]))
        images = [_image(value, path, n) for n, (value, path) in enumerate(zip(batch[source], paths, strict=True), 1)]
        results: list[dict[str, Any]] = []
        for result in self.stream(images, **options):
            bad = isinstance(result, BadImages)
            results.append({"error": str(result)} if bad else self.batch_values(result))
        columns = {name: _arrow_array(arrow, np.asarray(values)) for name, values in kept.items()}
        for name, kind in {**self.batch_columns, "error": str}.items():
            columns[name] = arrow.array([result.get(name) for result in results], _arrow_type(arrow, kind))
        return arrow.table(columns)


def _fields(predictor: Predictor) -> set[str]:
    return {field.name for field in dataclasses.fields(predictor)}  # pyrefly: ignore[bad-argument-type]


def _image(value: Any, path: Any, number: int) -> ImageLike:
    """Return the image in a cell of a batch. A null value is an empty file."""
    if isinstance(value, Mapping):
        path = value.get("path")
        value = path if value.get("bytes") is None else value["bytes"]
    if value is None or isinstance(value, bytes):
        return EncodedImage(value or b"", str(path or f"image {number} of the batch"))
    return value


def _arrow_array(arrow: ModuleType, values: np.ndarray) -> Any:
    """Return a column as an Arrow array, whose elements are tensors if the column has more than one dimension."""
    return arrow.array(values) if values.ndim == 1 else arrow.FixedShapeTensorArray.from_numpy_ndarray(values)


def _arrow_type(arrow: ModuleType, kind: Any) -> Any:
    """Return the Arrow type for an entry of `Predictor.batch_columns`."""
    if isinstance(kind, list):
        return arrow.list_(_arrow_type(arrow, kind[0]))
    if isinstance(kind, Mapping):
        return arrow.struct({name: _arrow_type(arrow, one) for name, one in kind.items()})
    return arrow.type_for_alias(_ARROW_TYPES[kind])
