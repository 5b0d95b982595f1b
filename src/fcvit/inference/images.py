"""Read images, batch them, compute outputs and decode predictions, for any task."""

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

_READING = threading.Lock()  # threads must not read a PIL image, or two PIL images of one file, at once
_ENCODED = (bytes, bytearray, memoryview, io.IOBase)
_LONGEST = 1000  # characters in a message
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
    """Yield the prediction of each image, or the error if it cannot be read. Only one batch is kept in memory.

    Args:
        images: Images as `several` accepts them.
        weights: Weights of the network.
        engine: Engine that computes the outputs.
        preprocessing: Preprocessing of the images.
        decode: Function that maps the engine's outputs for a batch to one prediction per image.
        batch_size: Largest number of images per batch.

    Raises:
        UsageError: An object is not an image.
        NumbersDisagree: The outputs are not finite.
    """
    numbered = enumerate(images, 1)
    with ThreadPoolExecutor(available_threads()) as pool:
        while batch := list(itertools.islice(numbered, batch_size)):
            pixels = list(pool.map(lambda image: _pixels(image[0], image[1], preprocessing), batch))
            good = {index: item for index, item in enumerate(pixels) if not isinstance(item, BadImages)}
            results: Iterator[Result] = iter(())
            if good:
                outputs = engine(np.stack(list(good.values())))
                _require_finite(outputs, weights, engine, [batch[index] for index in good])
                results = iter(decode(outputs))
            yield from (item if isinstance(item, BadImages) else next(results) for item in pixels)


def _require_finite(outputs: Any, weights: Weights, engine: Engine, batch: Sequence[tuple[int, ImageLike]]) -> None:
    for name, output in zip(output_names(weights.spec), as_list(outputs), strict=True):
        finite = np.isfinite(output).reshape(len(batch), -1).all(1)
        if not finite.all():
            number, image = batch[int(finite.argmin())]
            what = str(image) if isinstance(image, str | os.PathLike) else f"image {number}"
            raise NumbersDisagree(
                f"{weights.source.path}: the {name} of {what} are not finite; the weights are damaged, or "
                f"the values exceed the range of {engine.precision}"
            )


def _pixels(number: int, image: ImageLike, preprocessing: Preprocessing) -> np.ndarray | BadImages:
    """Return the preprocessed image as uint8 (3, S, S), or the error if it cannot be read."""
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
            return BadImages(f"{image!s:.200}: this is a folder; pass its images, for example from pathlib.Path.glob")
        return error if len(str(error)) < _LONGEST else BadImages(f"{error!s:.200}...")
    except Exception as error:  # PIL reads the file only now, and it may be damaged or closed
        if not isinstance(image, Image.Image):
            raise
        return BadImages(f"image {number}: {str(error)[:120]}")


def several(images: Any) -> Iterable[ImageLike]:
    """Return an iterable of images. A single image is returned in a list.

    Raises:
        UsageError: The argument contains no images, or a sequence or array contains an object that is not an image.
    """
    # Arrays of strings or objects contain paths.
    single_array = isinstance(images, np.ndarray) and images.ndim < 4 and images.dtype.kind not in "UO"
    if single_array or isinstance(images, str | os.PathLike | Image.Image):
        images = [images]
    elif isinstance(images, _ENCODED) or not isinstance(images, Iterable):
        raise UsageError(f"predict: {_not_an_image(images)}")
    if isinstance(images, Sequence | np.ndarray):
        for number, image in enumerate(images, 1):
            check_image(image, number)
    return images


def check_image(image: object, number: int) -> None:
    """Check the type and shape of an image object without reading a file.

    Raises:
        UsageError: The object is not an image.
    """
    if isinstance(image, np.ndarray):
        channels = image.shape[2:] or (1,)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or not image.size:
            raise UsageError(
                f"image {number}: array of shape {image.shape} and type {image.dtype}; expected uint8 from 0 to 255, "
                "(height, width, 3) in RGB"
            )
    elif not isinstance(image, str | os.PathLike | Image.Image):
        raise UsageError(f"image {number}: {_not_an_image(image)}")


def _not_an_image(value: object) -> str:
    remedy = " (decode a file in memory with PIL.Image.open(io.BytesIO(...)))" if isinstance(value, _ENCODED) else ""
    return f"an object of type {type(value).__name__:.60} is not an image; expected {_ACCEPTED}{remedy}"


def check_counts(top_k: object, batch_size: object) -> None:
    """Check the number of classes and the batch size.

    Raises:
        UsageError: A value is not an integer of at least 1.
    """
    for option, value in (("top-k", top_k), ("batch-size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise UsageError(f"--{option} {value!r:.40}: expected an integer of at least 1")
