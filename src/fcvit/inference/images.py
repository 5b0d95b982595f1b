"""Read images, batch them, compute outputs, decode them to predictions. No task is named here."""

import io
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from fcvit.data.transforms.preprocess import preprocess
from fcvit.errors import BadImages, NumbersDisagree, UsageError
from fcvit.inference.engines import Engine
from fcvit.inference.interface import as_list, output_names
from fcvit.machine import available_threads
from fcvit.models.variants import Preprocessing
from fcvit.weights.reading import Weights

_READING = threading.Lock()  # a PIL image, or two of one file, must not be read by two threads
_ENCODED = (bytes, bytearray, memoryview, io.IOBase)
_LONGEST = 1000  # characters of a message
ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"
_ACCEPTED = "a path, a PIL image, a uint8 array (height, width, 3) in RGB, or several of these"
Result = TypeVar("Result")


def predictions(
    images: Iterable[ImageLike],
    weights: Weights,
    engine: Engine,
    preprocessing: Preprocessing,
    decode: Callable[[Any], Sequence[Result]],
    batch_size: int,
) -> Iterator[Result | BadImages]:
    """Yield the prediction of each image, or the error of one that cannot be read; one batch is in memory.

    Args:
        images: see `several`.
        weights: of the network.
        engine: computes its outputs.
        preprocessing: applied to the images.
        decode: what the engine returns for a batch -> a prediction for each image of it.
        batch_size: images that are computed together.

    Raises:
        UsageError: an object of another type.
        NumbersDisagree: outputs that are not finite.
    """
    numbered = enumerate(images, 1)
    with ThreadPoolExecutor(available_threads()) as pool:
        while batch := list(itertools.islice(numbered, batch_size)):
            pixels = list(pool.map(lambda image: _pixels(image[0], image[1], preprocessing), batch))
            good = {index: one for index, one in enumerate(pixels) if not isinstance(one, BadImages)}
            results: Iterator[Result] = iter(())
            if good:
                outputs = engine(np.stack(list(good.values())))
                _require_finite(outputs, weights, engine, [batch[index] for index in good])
                results = iter(decode(outputs))
            yield from (one if isinstance(one, BadImages) else next(results) for one in pixels)


def _require_finite(outputs: Any, weights: Weights, engine: Engine, batch: Sequence[tuple[int, ImageLike]]) -> None:
    for name, output in zip(output_names(weights.spec), as_list(outputs), strict=True):
        finite = np.isfinite(output).reshape(len(batch), -1).all(1)
        if not finite.all():
            number, image = batch[int(finite.argmin())]
            what = str(image) if isinstance(image, str | os.PathLike) else f"image {number}"
            raise NumbersDisagree(
                f"{weights.source.path}: the {name} of {what} are not finite; the weights are damaged, or "
                f"{engine.precision} is too narrow for them"
            )


def _pixels(number: int, image: ImageLike, preprocessing: Preprocessing) -> np.ndarray | BadImages:
    """Return uint8 (3, S, S), or the error of an image that cannot be read."""
    check_image(image, number)
    try:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
        elif isinstance(image, Image.Image):
            with _READING:
                image.load()
        return preprocess(image, preprocessing)
    except BadImages as error:
        if isinstance(image, str | os.PathLike) and os.path.isdir(image):  # noqa: PTH112 -- never raises
            return BadImages(f"{image!s:.200}: a folder; give the images in it, as from pathlib.Path.glob")
        return error if len(str(error)) < _LONGEST else BadImages(f"{error!s:.200}...")
    except Exception as error:  # a PIL image reads its file now, which may be damaged or closed
        if not isinstance(image, Image.Image):
            raise
        return BadImages(f"image {number}: {str(error)[:120]}")


def several(images: Any) -> Iterable[ImageLike]:
    """Return images as they are, one alone in a list.

    Raises:
        UsageError: no images; where they can be looked at before their turn, also one of another type among them.
    """
    # An array of texts or objects would be paths.
    one_array = isinstance(images, np.ndarray) and images.ndim < 4 and images.dtype.kind not in "UO"
    if one_array or isinstance(images, str | os.PathLike | Image.Image):
        images = [images]
    elif isinstance(images, _ENCODED) or not isinstance(images, Iterable):
        raise UsageError(f"predict: {_no_image(images)}")
    if isinstance(images, Sequence | np.ndarray):
        for number, image in enumerate(images, 1):
            check_image(image, number)
    return images


def check_image(image: object, number: int) -> None:
    """Check type and shape of an object; the content of a file is seen later.

    Raises:
        UsageError: it is no image.
    """
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


def check_counts(top_k: object, batch_size: object) -> None:
    """Check the numbers of classes and images.

    Raises:
        UsageError: not a whole number from 1.
    """
    for option, value in (("top-k", top_k), ("batch-size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise UsageError(f"--{option} {value!r:.40}: expected a whole number, at least 1")
