"""Classify images: one implementation for the command line and `fcvit.load`."""

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from fcvit.data.classes import Classes, ClassName, as_classes, resolve_classes
from fcvit.data.transforms.preprocess import preprocess
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UsageError
from fcvit.inference.engines import AUTO, Engine, PaddleEngine, create_engine
from fcvit.machine import available_threads
from fcvit.metrics.classification import first_not_finite, softmax, top_classes
from fcvit.models.variants import IMAGENET_CLASSES, Preprocessing, resolve_preprocessing
from fcvit.report.progress import progress as progress_of
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")

if TYPE_CHECKING:
    from fcvit.models.network import FCViT

BATCH_SIZE = 32
_READING = threading.Lock()  # a PIL image, or two of one file, must not be read by two threads
_ENCODED = (bytes, bytearray, memoryview, io.IOBase)
_LONGEST = 1000  # characters of a message
ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"
_ACCEPTED = "a path, a PIL image, a uint8 array (height, width, 3) in RGB, or several of these"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One class for one image: index of the output, the class's id and name, softmax probability."""

    index: int
    id: str
    name: str
    probability: float


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Classifier:
    """A model with all that it takes to use it: its preprocessing and its class names.

    Attributes:
        weights: of the model.
        engine: computes the logits.
        preprocessing: applied to images.
        classes: one for each output.
    """

    weights: Weights
    engine: Engine
    preprocessing: Preprocessing
    classes: Classes

    def __repr__(self) -> str:
        return f"<Classifier {self.weights.source.path.name}: {self.weights.spec}, engine {self.engine.name}>"

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
        several = _several(images)
        total = len(several) if isinstance(several, Sequence | np.ndarray) else 0
        if total:  # of an iterator, an image is seen when its turn comes
            for number, image in enumerate(several, 1):
                _check_image(image, number)
        results: list[list[Prediction] | BadImages] = []
        shown = progress_of("predicting", total) if progress and total else contextlib.nullcontext(lambda _: None)
        with shown as advance:
            for result in self.stream(several, top_k, batch_size=batch_size):
                results.append(result)
                advance(1)
        return results

    def stream(
        self, images: Iterable[ImageLike], top_k: int = 5, *, batch_size: int = BATCH_SIZE
    ) -> Iterator[list[Prediction] | BadImages]:
        """Yield what `predict` returns, image by image; at most `batch_size` of them are in memory."""
        check_counts(top_k, batch_size)
        return self._stream(images, int(top_k), int(batch_size))

    def _stream(
        self, images: Iterable[ImageLike], top_k: int, batch_size: int
    ) -> Iterator[list[Prediction] | BadImages]:
        numbered = enumerate(images, 1)
        with ThreadPoolExecutor(available_threads()) as pool:
            while batch := list(itertools.islice(numbered, batch_size)):
                pixels = list(pool.map(self._pixels, batch))
                good = {place: one for place, one in enumerate(pixels) if not isinstance(one, BadImages)}
                ranked: Iterator[list[Prediction]] = iter(())
                if good:
                    logits = self.engine(np.stack(list(good.values())))
                    if (row := first_not_finite(logits)) is not None:
                        number, image = batch[list(good)[row]]
                        raise NumbersDisagree(
                            f"{self.weights.source.path}: the logits of {_name(image, number)} are not finite; the "
                            f"weights are damaged, or {self.engine.precision} is too narrow for them"
                        )
                    ranked = iter(rank(logits, self.classes, top_k))
                yield from (one if isinstance(one, BadImages) else next(ranked) for one in pixels)

    def _pixels(self, numbered: tuple[int, ImageLike]) -> np.ndarray | BadImages:
        """uint8 (3, S, S), or why there are none."""
        number, image = numbered
        _check_image(image, number)
        try:
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
            elif isinstance(image, Image.Image):
                with _READING:
                    image.load()
            return preprocess(image, self.preprocessing)
        except BadImages as error:
            if isinstance(image, str | os.PathLike) and os.path.isdir(image):  # noqa: PTH112 -- never raises
                return BadImages(f"{image!s:.200}: a folder; give the images in it, as from pathlib.Path.glob")
            return error if len(str(error)) < _LONGEST else BadImages(f"{error!s:.200}...")
        except Exception as error:  # a PIL image reads its file now, which may be damaged or closed
            if not isinstance(image, Image.Image):
                raise
            return BadImages(f"image {number}: {str(error)[:120]}")


def _several(images: "ImageLike | Iterable[ImageLike]") -> Iterable[ImageLike]:
    """Return images as they are, one alone in a list."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim < 4 and images.dtype.kind not in "UO":  # those would be paths
        return [images]
    if isinstance(images, _ENCODED) or not isinstance(images, Iterable):
        raise UsageError(f"predict: {_no_image(images)}")
    return images


def check_counts(top_k: object, batch_size: object) -> None:
    """Check what counts classes and images.

    Raises:
        UsageError: not a whole number from 1.
    """
    for option, value in (("top-k", top_k), ("batch-size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise UsageError(f"--{option} {value!r:.40}: expected a whole number, at least 1")


def _check_image(image: object, number: int) -> None:
    """Check type and shape; what a file holds is seen later."""
    if isinstance(image, np.ndarray):
        channels = image.shape[2:] or (1,)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or not image.size:
            raise UsageError(
                f"image {number}: an array {image.shape} of {image.dtype}; expected uint8 from 0 to 255, (height, "
                "width, 3) in RGB"
            )
    elif not isinstance(image, str | os.PathLike | Image.Image):
        raise UsageError(f"image {number}: {_no_image(image)}")


def _no_image(thing: object) -> str:
    remedy = "; PIL.Image.open(io.BytesIO(...)) reads an encoded one" if isinstance(thing, _ENCODED) else ""
    return f"an object of type {type(thing).__name__:.60} is no image; expected {_ACCEPTED}{remedy}"


def _name(image: object, number: int) -> str:
    return str(image) if isinstance(image, str | os.PathLike) else f"image {number}"


def load(
    path: "Weights | str | os.PathLike[str]",
    *,
    ema: bool | None = None,
    classes: "Sequence[ClassName | str] | str | os.PathLike[str] | None" = None,
    device: str = "auto",
    engine: str = AUTO,
    threads: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Classifier:
    """Model, preprocessing and class names of a weights file, ready for `predict`.

    Args:
        path: a checkpoint of any format, or weights in memory.
        ema: choose the averaged or raw weights of a file that has both.
        classes: other names than the file's: a list, or the path of one.
        device: auto, cpu, gpu or gpu:N.
        engine: what computes, as in `fcvit predict`: "auto" is the fastest one that is installed and right.
        threads: that compute on a CPU; None: one for each core.
        preprocessing: another one than the weights'.

    Raises:
        UnreadableFile, DoesNotFit, UsageError: the file; see `fcvit.weights.reading.read_weights`.
        MissingExtra, NumbersDisagree: the engine; see `fcvit.inference.engines.create_engine`.
    """
    weights = path if isinstance(path, Weights) else read_weights(path, ema)
    for note in weights.notes:
        logger.info(note)
    spec = weights.spec
    if spec.dense or not spec.num_classes:
        raise DoesNotFit(f"{weights.source.path} is {spec}: it has no classes to predict")
    given = None if classes is None else as_classes(classes)
    named = resolve_classes(given, weights.classes, spec.num_classes)
    chosen = resolve_preprocessing(preprocessing, weights.preprocessing, spec.variant)
    made = create_engine(engine, weights, chosen, device, threads=threads)
    if classes is None and weights.classes is None and spec.num_classes == IMAGENET_CLASSES:
        logger.info("the weights name no classes: ImageNet's are assumed; --classes FILE gives others")
    return Classifier(weights, made, chosen, named)


def rank(logits: np.ndarray, classes: Classes, top_k: int) -> list[list[Prediction]]:
    """Logits (B, C) -> for each image its `top_k` classes, best first.

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
