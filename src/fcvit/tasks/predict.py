"""Name what is in images."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcvit.classes import Classes, ClassName, as_classes, resolve_classes
from fcvit.deploy.engines import AUTO, Engine, PaddleEngine, create_engine
from fcvit.errors import BadImages, DoesNotFit, UsageError
from fcvit.images.preprocess import preprocess
from fcvit.metrics import softmax, top_classes
from fcvit.variants import Preprocessing, resolve_preprocessing
from fcvit.weights.names import Form
from fcvit.weights.reading import Weights, read_weights

if TYPE_CHECKING:
    from PIL import Image

    from fcvit.model import FCViT


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One class for one image: index of the output, the class's id and name, softmax probability."""

    index: int
    id: str
    name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with all that it takes to use it: its preprocessing and its class names.

    Attributes:
        engine: computes the logits; `model` is the Paddle network in it.
        preprocessing: what images go through.
        classes: one for each output.
    """

    engine: PaddleEngine
    preprocessing: Preprocessing
    classes: Classes

    @property
    def model(self) -> "FCViT":
        """The Paddle network, in evaluation mode."""
        return self.engine.model

    def predict(
        self, images: "Iterable[str | os.PathLike[str] | Image.Image]", top_k: int = 5
    ) -> list[list[Prediction]]:
        """The `top_k` most probable classes of each image, best first.

        Args:
            images: paths or Pillow images.
            top_k: at least 1; cut to the number of classes.

        Raises:
            BadImages: an image cannot be read.
            UsageError: a single path instead of several, or `top_k` below 1.
        """
        if isinstance(images, str | os.PathLike):
            raise UsageError("predict takes several images; give a list, also for one")
        _check_top_k(top_k)
        results = []
        for image in images:
            results += rank(self.engine(preprocess(image, self.preprocessing)[None]), self.classes, top_k)
        return results


def load(
    path: str | os.PathLike[str],
    *,
    ema: bool | None = None,
    classes: "Sequence[ClassName | str] | str | os.PathLike[str] | None" = None,
    device: str = "auto",
) -> Classifier:
    """Model, preprocessing and class names of a weights file, ready for `predict`.

    Args:
        path: a checkpoint of any format.
        ema: choose the averaged or raw weights of a file that has both.
        classes: other names than the file's: a list, or the path of one.
        device: auto, cpu, gpu or gpu:N.

    Raises:
        UnreadableFile, DoesNotFit, UsageError: the file; see `fcvit.weights.reading.read_weights`.
    """
    weights = read_weights(path, ema)
    form = _with_classes(weights)
    named = resolve_classes(None if classes is None else as_classes(classes), weights.classes, form.num_classes)
    preprocessing = resolve_preprocessing(None, weights.preprocessing, form.variant)
    return Classifier(PaddleEngine(weights, preprocessing, device), preprocessing, named)


def predict_files(
    weights: Weights,
    images: Sequence[Path],
    *,
    top_k: int = 5,
    engine_name: str = AUTO,
    classes: Classes | None = None,
    preprocessing: Preprocessing | None = None,
    device: str = "auto",
    threads: int | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[Path, list[Prediction] | BadImages]]:
    """Predict file by file; one that cannot be read gives its error instead.

    Raises:
        UsageError, DoesNotFit, MissingExtra: before the first image.
    """
    form = _with_classes(weights)
    _check_top_k(top_k)
    chosen = resolve_preprocessing(preprocessing, weights.preprocessing, form.variant)
    names = resolve_classes(classes, weights.classes, form.num_classes, announce)
    engine: Engine = create_engine(engine_name, weights, chosen, device, threads=threads, announce=announce)
    return _predict(engine, chosen, names, images, top_k)


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise UsageError(f"top-k is {top_k}: expected at least 1")


def _with_classes(weights: Weights) -> Form:
    form = weights.form
    if form.dense or not form.num_classes:
        raise DoesNotFit(f"{weights.source.path} is {form}: it has no classes to predict")
    return form


def _predict(
    engine: Engine, preprocessing: Preprocessing, classes: Classes, images: Sequence[Path], top_k: int
) -> Iterator[tuple[Path, list[Prediction] | BadImages]]:
    for path in images:
        try:
            batch = preprocess(path, preprocessing)[None]
        except BadImages as error:
            yield path, error
            continue
        yield path, rank(engine(batch), classes, top_k)[0]


def rank(logits: np.ndarray, classes: Classes, top_k: int) -> list[list[Prediction]]:
    """Logits (B, C) -> for each image its `top_k` classes, best first.

    Raises:
        DoesNotFit: not as many classes as logits.
    """
    if logits.shape[1] != len(classes):
        raise DoesNotFit(f"{logits.shape[1]} outputs, but {len(classes)} class names")
    probabilities = softmax(logits)
    return [
        [Prediction(int(i), classes[i].id, classes[i].name, float(row[i])) for i in best]
        for best, row in zip(top_classes(logits, top_k), probabilities, strict=True)
    ]
