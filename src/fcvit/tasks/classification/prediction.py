"""Predict the most probable classes of images with a classifier."""

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.classes import Classes
from fcvit.data.transforms.preprocess import CenterCrop, rgb_image
from fcvit.errors import BadImages, DoesNotFit
from fcvit.inference.engines import Engine, PaddleEngine
from fcvit.inference.images import ImageLike, check_counts, collect, predictions, require_finite
from fcvit.metrics.classification import softmax, top_classes
from fcvit.models.variants import Preprocessing
from fcvit.report.image_grid import Tile, image_grid, png
from fcvit.tasks.predictor import Predictor
from fcvit.weights.reading import Weights

logger = logging.getLogger("fcvit")

if TYPE_CHECKING:
    from fcvit.models.classifier import FCViT

BATCH_SIZE = 32
_IMAGES_PER_GRID = 24


@dataclasses.dataclass(frozen=True)
class PredictionOptions:
    """Options of `fcvit predict` for classification.

    Args:
        top_k: Classification: number of classes per image.
    """

    top_k: int = 5

    def __post_init__(self) -> None:
        check_counts(self.top_k, BATCH_SIZE)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted class of an image: output index, class id, class name and softmax probability."""

    index: int
    id: str
    name: str
    probability: float


def rank(logits: np.ndarray, classes: Classes, top_k: int) -> list[list[Prediction]]:
    """Return the `top_k` most probable classes of each image, best first, from logits (B, C).

    Raises:
        DoesNotFit: The number of classes does not match the number of logits.
        NumbersDisagree: A logit is not finite.
    """
    if logits.shape[1] != len(classes):
        raise DoesNotFit(f"the model has {logits.shape[1]} outputs, but {len(classes)} class names were given")
    probabilities = softmax(logits)
    return [
        [Prediction(int(i), classes[i].id, classes[i].name, float(row[i])) for i in best]
        for best, row in zip(top_classes(logits, top_k), probabilities, strict=True)
    ]


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Classifier(Predictor):
    """A classifier with its preprocessing and class names.

    Attributes:
        weights: Weights of the model.
        engine: Engine that computes the logits.
        preprocessing: Preprocessing of the images.
        classes: Classes, one per output.
        decode: Function that maps logits, classes and top_k to the predictions of each image.
    """

    weights: Weights
    engine: Engine
    preprocessing: Preprocessing
    classes: Classes
    decode: Callable[[np.ndarray, Classes, int], list[list[Prediction]]] = rank

    def __repr__(self) -> str:
        return f"<Classifier {self.weights.source.path.name}: {self.weights.spec}, engine {self.engine.name}>"

    at_once: ClassVar[int | None] = None

    @property
    def row_columns(self) -> dict[str, type]:
        """Types of the columns in `rows`."""
        return {"index": int, "id": str, "name": str, "probability": float}

    def transform(self, options: PredictionOptions) -> CenterCrop:
        """Return the transform that decodes images for `compute`."""
        return CenterCrop(self.preprocessing)

    def compute(
        self, images: Sequence[ImageLike], pixels: np.ndarray, targets: Sequence[None], options: PredictionOptions
    ) -> list[list[Prediction]]:
        """Return the predictions for a batch of decoded images, uint8 (B, 3, S, S)."""
        logits = self.engine(pixels)
        require_finite(logits, self.weights, self.engine, list(enumerate(images, 1)))
        return self.decode(logits, self.classes, options.top_k)

    def pack(self, prediction: list[Prediction]) -> bytes:
        """Encode a prediction with everything that `draw` needs."""
        return json.dumps(self.rows(prediction)).encode()

    def unpack(self, content: bytes, image: ImageLike, options: PredictionOptions) -> list[Prediction]:
        """Invert `pack`."""
        return [Prediction(**row) for row in json.loads(content)]

    def rows(self, prediction: list[Prediction]) -> list[dict[str, Any]]:
        """Return the predictions of an image as rows for JSON and CSV, one per class."""
        return [dict(vars(row)) for row in prediction]

    def table(self, predictions: Sequence[tuple[Path, list[dict[str, Any]]]]) -> Any:
        """Return a table of images and their rows for the terminal."""
        from fcvit.report.tables import predictions as listing

        return listing(predictions)

    def draw(self, predictions: Iterable[tuple[Path, ImageLike, list[Prediction]]], folder: Path) -> None:
        """Write image grids with the best class of each image as PNG files into a folder. Existing files are kept."""
        rest, first = iter(predictions), 1
        while part := list(itertools.islice(rest, _IMAGES_PER_GRID)):
            path = folder / f"predictions-{first // _IMAGES_PER_GRID + 1:03d}.png"
            if not path.exists():
                tiles = [Tile(rgb_image(image), best[0].name, best[0].probability) for _, image, best in part]
                runs.write_bytes(path, png(image_grid(tiles, f"images {first} to {first + len(part) - 1}")))
            first += len(part)

    @functools.cached_property
    def model(self) -> "FCViT":
        """The Paddle network in evaluation mode, built on first access."""
        if type(self.engine) is PaddleEngine:
            return self.engine.model
        device = "cpu" if self.engine.device == "cpu" else "auto"
        return PaddleEngine(self.weights, self.preprocessing, device).model

    def predict(
        self,
        images: "ImageLike | Iterable[ImageLike]",
        top_k: int = 5,
        *,
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
    ) -> list[list[Prediction] | BadImages]:
        """Return the `top_k` most probable classes of each image, best first, or the error if it cannot be read.

        Args:
            images: A path, a PIL image or a uint8 array (height, width, 3) in RGB, or several of these. For a single
                image, the list contains one result.
            top_k: Number of classes, at least 1. Limited to the number of classes of the model.
            batch_size: Number of images per batch.
            progress: Show a progress bar on standard error.

        Raises:
            UsageError: An image has an unsupported type, or a number is less than 1.
            NumbersDisagree: A logit is not finite.
        """
        return collect(images, lambda several: self.stream(several, top_k, batch_size=batch_size), progress)

    def stream(
        self, images: Iterable[ImageLike], top_k: int = 5, *, batch_size: int = BATCH_SIZE
    ) -> Iterator[list[Prediction] | BadImages]:
        """Yield the results of `predict` one by one, with at most `batch_size` images in memory."""
        check_counts(top_k, batch_size)

        def decode(logits: np.ndarray) -> list[list[Prediction]]:
            return self.decode(logits, self.classes, int(top_k))

        return predictions(images, self.weights, self.engine, self.preprocessing, decode, int(batch_size))
