"""The predictions of a classifier: the best classes of each image."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.classes import Classes
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import BadImages, DoesNotFit
from fcvit.inference.engines import Engine, PaddleEngine
from fcvit.inference.images import ImageLike, check_counts, predictions, several
from fcvit.metrics.classification import softmax, top_classes
from fcvit.models.variants import Preprocessing
from fcvit.report.image_grid import Tile, image_grid, png
from fcvit.report.progress import progress as progress_of
from fcvit.weights.reading import Weights

logger = logging.getLogger("fcvit")

if TYPE_CHECKING:
    from fcvit.models.classifier import FCViT

BATCH_SIZE = 32
_IN_A_GRID = 24  # images in a picture


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One class for one image: index of the output, the class's id and name, softmax probability."""

    index: int
    id: str
    name: str
    probability: float


def rank(logits: np.ndarray, classes: Classes, top_k: int) -> list[list[Prediction]]:
    """Return the `top_k` most probable classes of each image, best first, from logits (B, C).

    Raises:
        DoesNotFit: not as many classes as logits.
        NumbersDisagree: logits that are not finite.
    """
    if logits.shape[1] != len(classes):
        raise DoesNotFit(f"{logits.shape[1]} outputs, but {len(classes)} class names")
    probabilities = softmax(logits)
    return [
        [Prediction(int(i), classes[i].id, classes[i].name, float(row[i])) for i in best]
        for best, row in zip(top_classes(logits, top_k), probabilities, strict=True)
    ]


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Classifier:
    """A model with all that it takes to use it: its preprocessing and its class names.

    Attributes:
        weights: of the model.
        engine: computes the logits.
        preprocessing: applied to images.
        classes: one for each output.
        decode: logits, classes, top_k -> a prediction for each image.
    """

    weights: Weights
    engine: Engine
    preprocessing: Preprocessing
    classes: Classes
    decode: Callable[[np.ndarray, Classes, int], list[list[Prediction]]] = rank

    def __repr__(self) -> str:
        return f"<Classifier {self.weights.source.path.name}: {self.weights.spec}, engine {self.engine.name}>"

    def rows(self, prediction: list[Prediction]) -> list[dict[str, Any]]:
        """Return a prediction as JSON and CSV have it: a row for each class."""
        return [dataclasses.asdict(row) for row in prediction]

    def table(self, predictions: Sequence[tuple[Path, list[Prediction]]]) -> Any:
        """Return the table of images and their predictions for a terminal."""
        from fcvit.report.tables import predictions as listing

        return listing(predictions)

    def draw(self, predictions: Sequence[tuple[Path, list[Prediction]]], folder: Path) -> None:
        """Draw images with their best classes into a folder, as many as a picture holds."""
        for start in range(0, len(predictions), _IN_A_GRID):
            part = predictions[start : start + _IN_A_GRID]
            tiles = [Tile(decode(path), best[0].name, best[0].probability) for path, best in part]
            title = f"images {start + 1} to {start + len(part)} of {len(predictions)}"
            runs.write_bytes(folder / f"predictions-{start // _IN_A_GRID + 1:03d}.png", png(image_grid(tiles, title)))

    @functools.cached_property
    def model(self) -> "FCViT":
        """The Paddle network, in evaluation mode; built when it is first asked for."""
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
        """Return for each image its `top_k` most probable classes, best first, or the error of one that is unreadable.

        Args:
            images: a path, a PIL image or a uint8 array (height, width, 3) in RGB; or several of these. A single one
                gives a list of one result.
            top_k: at least 1; cut to the number of classes.
            batch_size: images that are computed together.
            progress: show it on the standard error.

        Raises:
            UsageError: an object of another type, or a number below 1.
            NumbersDisagree: logits that are not finite.
        """
        images = several(images)
        total = len(images) if isinstance(images, Sequence | np.ndarray) else 0
        results: list[list[Prediction] | BadImages] = []
        shown = progress_of("predicting", total) if progress and total else contextlib.nullcontext(lambda _: None)
        with shown as advance:
            for result in self.stream(images, top_k, batch_size=batch_size):
                results.append(result)
                advance(1)
        return results

    def stream(
        self, images: Iterable[ImageLike], top_k: int = 5, *, batch_size: int = BATCH_SIZE
    ) -> Iterator[list[Prediction] | BadImages]:
        """Yield what `predict` returns, image by image; at most `batch_size` of them are in memory."""
        check_counts(top_k, batch_size)

        def decode(logits: np.ndarray) -> list[list[Prediction]]:
            return self.decode(logits, self.classes, int(top_k))

        return predictions(images, self.weights, self.engine, self.preprocessing, decode, int(batch_size))
