"""Read images, batch them, compute outputs and decode predictions, for any task."""

import collections
import contextlib
import functools
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from fcvit.data.transforms.preprocess import preprocess
from fcvit.errors import BadImages, NumbersDisagree, UsageError
from fcvit.inference.engines import Engine
from fcvit.inference.interface import as_list
from fcvit.machine import available_threads
from fcvit.models.variants import Preprocessing
from fcvit.report.progress import progress as progress_of
from fcvit.weights.reading import Weights

_READING = threading.Lock()  # threads must not read a PIL image, or two PIL images of one file, at once
_ENCODED = (bytes, bytearray, memoryview, io.IOBase)
_LONGEST = 1000  # characters in a message


class EncodedImage(io.BytesIO):
    """The content of an image file in memory, with a name for messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | EncodedImage
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
    read = functools.partial(preprocess, preprocessing=preprocessing)
    with ThreadPoolExecutor(engine.threads or available_threads()) as pool:
        while batch := list(itertools.islice(numbered, batch_size)):
            pixels = list(pool.map(lambda numbered: _read(numbered[0], numbered[1], read), batch))
            good = {index: item for index, item in enumerate(pixels) if not isinstance(item, BadImages)}
            results: Iterator[Result] = iter(())
            if good:
                outputs = engine(np.stack(list(good.values())))
                require_finite(outputs, weights, engine, [batch[index] for index in good])
                results = iter(decode(outputs))
            yield from (item if isinstance(item, BadImages) else next(results) for item in pixels)


def read_ahead(
    images: Iterable[ImageLike], read: Callable[[Any], Result]
) -> Iterator[tuple[int, ImageLike, Result | BadImages]]:
    """Yield the number of each image from 1, the image, and its content, or the error if it cannot be read.

    A thread reads the next image meanwhile.

    Args:
        images: Images as `several` accepts them.
        read: Function that reads a path or a loaded PIL image.

    Raises:
        UsageError: An object is not an image.
    """
    pending: collections.deque[Any] = collections.deque()
    with ThreadPoolExecutor(1) as pool:
        for number, image in enumerate(images, 1):
            pending.append((number, image, pool.submit(_read, number, image, read)))
            if len(pending) > 1:
                first, earlier, content = pending.popleft()
                yield first, earlier, content.result()
        for number, image, content in pending:
            yield number, image, content.result()


def collect(
    images: Any, stream: Callable[[Iterable[ImageLike]], Iterator[Result]], progress: bool = False
) -> list[Result]:
    """Return the results of a stream for a single image or several images.

    Args:
        images: Images as `several` accepts them.
        stream: Function that yields one result per image.
        progress: Show a progress bar on standard error, if the number of images is known.

    Raises:
        UsageError: An object is not an image.
    """
    images = several(images)
    total = len(images) if isinstance(images, Sequence | np.ndarray) else 0
    results: list[Result] = []
    shown = progress_of("predicting", total) if progress and total else contextlib.nullcontext(lambda _: None)
    with shown as advance:
        for result in stream(images):
            results.append(result)
            advance(1)
    return results


def require_finite(outputs: Any, weights: Weights, engine: Engine, batch: Sequence[tuple[int, ImageLike]]) -> None:
    """Check the outputs of an engine for a batch of numbered images.

    Raises:
        NumbersDisagree: An output is not finite.
    """
    for name, output in zip(weights.spec.outputs(), as_list(outputs), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(output.sum()):  # faster than a check of every value
                continue
        finite = np.isfinite(output).reshape(len(batch), -1).all(1)
        if not finite.all():
            number, image = batch[int(finite.argmin())]
            what = str(image) if isinstance(image, str | os.PathLike) else f"image {number}"
            raise NumbersDisagree(
                f"{weights.source.path}: the {name} of {what} are not finite; the weights are damaged, or "
                f"the values exceed the range of {engine.precision}"
            )


def _read(number: int, image: ImageLike, read: Callable[[Any], Result]) -> Result | BadImages:
    """Return what a function reads from an image, or the error if it cannot be read."""
    check_image(image, number)
    try:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
        elif isinstance(image, Image.Image):
            with _READING:
                image.load()
        return read(image)
    except BadImages as error:
        if isinstance(image, str | os.PathLike) and os.path.isdir(image):  # noqa: PTH112 -- never raises
            return BadImages(f"{image!s:.200}: this is a folder; pass its images, for example from pathlib.Path.glob")
        return error if len(str(error)) < _LONGEST else BadImages(f"{error!s:.200}...")
    except Exception as error:  # PIL reads the file only now, and it may be damaged or closed
        if not isinstance(image, Image.Image):
            raise
        return BadImages(f"image {number}: {str(error)[:120]}")


def with_unique_names(results: Iterable[tuple[Path, ImageLike, Result]]) -> Iterator[tuple[str, Path, Result]]:
    """Yield a name for the files of each result, its path and the result. A repeated name gets a number."""
    used: set[str] = set()
    for path, _, result in results:
        name, number = path.stem, 1
        while name.casefold() in used:
            number += 1
            name = f"{path.stem}-{number}"
        used.add(name.casefold())
        yield name, path, result


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
    elif not isinstance(image, str | os.PathLike | Image.Image | EncodedImage):
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
