"""Images decoded by worker processes that run ahead by a bounded number: batches, or what a function finds.

Processes rather than threads: decoding then never waits for the interpreter that feeds the model.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from fcvit.data.sources import Location
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import BadImages, FcvitError

DIGEST = 8  # bytes kept of the SHA-256 of an image file
_CHUNK = 16  # images a task: enough that handing it over costs nothing beside decoding

Job = tuple[Any, ...]  # what the work is called with: position, name and place of an image, and more
Result = TypeVar("Result")
Work = Callable[..., Result]


class Dataset(Protocol):
    """Samples that are not yet read: each has a name, a place and a target."""

    root: Path
    names: tuple[str, ...]
    locations: tuple[Location, ...]

    @property
    def targets(self) -> Sequence[Any]:
        """The target of each sample, or the place where a transform reads it."""
        ...

    def __len__(self) -> int: ...

    def take(self, order: Sequence[int]) -> "Dataset":
        """Return the samples at these positions, in this order."""
        ...

    def listing(self) -> str:
        """Return a hash of names and targets, which a continued run compares."""
        ...


class Transform(Protocol):
    """Turn a decoded image and its target into what the network sees; workers get a copy of it.

    Called with the image, its target and its position in the data set, it gives the pixels, uint8 (3, H, W), and the
    target as the network sees it. It must depend on nothing else, so that the number of workers does not matter.
    """

    def __call__(self, image: Image.Image, target: Any, index: int, /) -> tuple[np.ndarray, Any]: ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples that belong together: those with the positions `number * batch_size` and on.

    Attributes:
        number: of the batch.
        indices: positions in the data set of those that could be read, (B,).
        digests: the first 8 bytes of the SHA-256 of each file.
        pixels: for each transform, uint8 (B, 3, H, W), or a list where sizes differ.
        targets: for each transform, the target of each sample.
        bad: positions of the others, with the reason.
    """

    number: int
    indices: np.ndarray
    digests: tuple[bytes, ...]
    pixels: tuple[Any, ...]
    targets: tuple[list[Any], ...]
    bad: tuple[tuple[int, str], ...]


def read_file(name: str, location: Location) -> bytes:
    """Read the bytes of an image file.

    Raises:
        BadImages: it cannot be read.
    """
    try:
        return location.read()
    except OSError as error:
        raise BadImages(f"{name}: {error.strerror or error}") from error


def decode_file(
    index: int, name: str, location: Location, target: Any, transforms: Sequence[Transform]
) -> tuple[bytes, list[tuple[np.ndarray, Any]]]:
    """Read an image once and apply each transform to it: its digest, and pixels and target for each.

    Raises:
        BadImages: it cannot be read.
    """
    content = read_file(name, location)
    image = decode(io.BytesIO(content), name)
    try:
        samples = [transform(image, target, index) for transform in transforms]
    except BadImages as error:
        raise BadImages(f"{name}: {error}") from error
    return hashlib.sha256(content).digest()[:DIGEST], samples


def batches(
    dataset: Dataset,
    numbers: Sequence[int],
    batch_size: int,
    transforms: Sequence[Transform],
    workers: "int | Workers",
) -> Generator[Batch]:
    """Yield the batches of these numbers, in this order.

    Args:
        dataset: batch n holds its samples from n * batch_size.
        workers: processes that decode; 0: this one does, between the batches.
            `Workers` that are there already are used and left.

    Raises:
        FcvitError: no worker can be started.
    """
    pieces = [
        (number, start, min(start + _CHUNK, (number + 1) * batch_size, len(dataset)))
        for number in numbers
        for start in range(number * batch_size, min((number + 1) * batch_size, len(dataset)), _CHUNK)
    ]
    columns = (range(len(dataset)), dataset.names, dataset.locations, dataset.targets)
    chunks = (list(zip(*(column[start:end] for column in columns), strict=True)) for _, start, end in pieces)
    # The batch that is being put together; what is behind it keeps the workers busy.
    work = functools.partial(decode_file, transforms=transforms)
    with contextlib.closing(_chunk_by_chunk(chunks, work, workers, -(-batch_size // _CHUNK))) as done:
        yield from _assemble(pieces, done, len(transforms))


def each(jobs: Sequence[Job], work: Work[Result], workers: "int | Workers") -> Generator[Result | BadImages]:
    """Yield the result of a function for every image, in order, or the error of one that cannot be read.

    Args:
        jobs: position, name and place of each image.
        work: is called with these three, perhaps in another process: a function at the top of a module.
        workers: as in `batches`.

    Raises:
        FcvitError: no worker can be started.
    """
    chunks = (jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK))
    with contextlib.closing(_chunk_by_chunk(chunks, work, workers)) as done:
        for results in done:
            yield from results


def _chunk_by_chunk(
    chunks: Iterator[Sequence[Job]], work: Work[Result], workers: "int | Workers", needed: int = 1
) -> Generator[list[Result | BadImages]]:
    """`needed`: chunks that whoever asks takes at a time."""
    if workers == 0:
        yield from (_work(jobs, work) for jobs in chunks)
        return
    with contextlib.ExitStack() as stack:
        pool = workers if isinstance(workers, Workers) else stack.enter_context(contextlib.closing(Workers(workers)))
        yield from _run_ahead(pool, chunks, work, needed + 2 * pool.count)


def _work(jobs: Sequence[Job], work: Work[Result]) -> list[Result | BadImages]:
    results: list[Result | BadImages] = []
    for job in jobs:
        try:
            results.append(work(*job))
        except BadImages as error:
            results.append(error)
    return results


def _run_ahead(
    pool: "Workers", chunks: Iterator[Sequence[Job]], work: Work[Result], ahead: int
) -> Iterator[list[Result | BadImages]]:
    pending: collections.deque[tuple[Sequence[Job], concurrent.futures.Future[list[Result | BadImages]]]]
    pending = collections.deque()
    while True:
        while len(pending) < ahead and (jobs := next(chunks, None)):
            pending.append((jobs, pool.submit(jobs, work)))
        if not pending:
            return
        jobs, future = pending.popleft()
        try:
            yield future.result()
        except BrokenProcessPool:
            pool.restart()
            yield _one_by_one(pool, jobs, work)
            pending = collections.deque((jobs, pool.submit(jobs, work)) for jobs, _ in pending)


def _one_by_one(pool: "Workers", jobs: Sequence[Job], work: Work[Result]) -> list[Result | BadImages]:
    """Find the image that ends whatever process decodes it: a bad one, like any other."""
    results: list[Result | BadImages] = []
    for job in jobs:
        for _ in range(2):  # a process may die for another reason; the same image twice is no chance
            try:
                results += pool.submit([job], work).result()
                break
            except BrokenProcessPool:
                pool.restart()
        else:
            results.append(BadImages(f"{job[1]}: the process that decodes it ends unexpectedly"))
    return results


def _assemble(
    pieces: Sequence[tuple[int, int, int]],
    chunks: Iterator[list[tuple[bytes, list[tuple[np.ndarray, Any]]] | BadImages]],
    transforms: int,
) -> Iterator[Batch]:
    """Put the chunks of each batch together."""
    good: list[tuple[int, bytes, list[tuple[np.ndarray, Any]]]] = []
    bad: list[tuple[int, str]] = []
    for piece, (number, start, _) in enumerate(pieces):
        for index, result in enumerate(next(chunks), start):
            if isinstance(result, BadImages):
                bad.append((index, str(result)))
            else:
                good.append((index, *result))
        if piece + 1 == len(pieces) or pieces[piece + 1][0] != number:
            samples = [[transformed[which] for *_, transformed in good] for which in range(transforms)]
            yield Batch(
                number,
                np.array([index for index, *_ in good], np.int64),
                tuple(digest for _, digest, _ in good),
                tuple(_stack([pixels for pixels, _ in one]) for one in samples),
                tuple([target for _, target in one] for one in samples),
                tuple(bad),
            )
            good, bad = [], []


def _stack(pixels: list[np.ndarray]) -> Any:
    """Return one array of images of one size, others as they are."""
    if len({one.shape for one in pixels}) > 1:
        return pixels
    return np.stack(pixels) if pixels else np.empty((0, 3, 0, 0), np.uint8)


class Workers:
    """Worker processes; others in their place where one dies.

    Raises:
        FcvitError: on `restart`, where not even a process without work lives.
    """

    def __init__(self, count: int):
        self.count = count
        self._start()

    def _start(self) -> None:
        # Spawned: a fork of a process in which Paddle's threads run may hang.
        context = multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(self.count, mp_context=context, initializer=_begin_worker)

    def submit(self, jobs: Sequence[Job], work: Work[Result]) -> "concurrent.futures.Future[list[Result | BadImages]]":
        try:
            return self.pool.submit(_work, jobs, work)
        except BrokenProcessPool as error:  # noticed before the result was asked for
            failed: concurrent.futures.Future[list[Result | BadImages]] = concurrent.futures.Future()
            failed.set_exception(error)
            return failed

    def restart(self) -> None:
        self.close()
        self._start()
        try:
            self.pool.submit(int).result()
        except BrokenProcessPool as error:
            raise FcvitError(
                "processes that decode images end as soon as they begin: a script that calls fcvit needs "
                '`if __name__ == "__main__":`; --workers 0 decodes without processes'
            ) from error

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Leave interruptions to the process that this worker serves, and end when that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about odd images
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
