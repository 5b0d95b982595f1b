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
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from fcvit.data.class_folders import LabeledImages, Location
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import BadImages, FcvitError

DIGEST = 8  # bytes kept of the SHA-256 of an image file
_CHUNK = 16  # images a task: enough that handing it over costs nothing beside decoding

Job = tuple[int, str, Location]
Result = TypeVar("Result")
Work = Callable[[int, str, Location], Result]


class View(Protocol):
    """What is made of a decoded image; workers get a copy of it.

    Called with the image and its position in the data set, it gives uint8 (3, size, size). It must depend
    on nothing else, so that the number of workers does not matter.
    """

    @property
    def size(self) -> int: ...

    def __call__(self, image: Image.Image, index: int, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that belong together: those with the positions `number * batch_size` and on.

    Attributes:
        number: of the batch.
        indices: positions in the data set of those that could be read, (B,).
        digests: the first 8 bytes of the SHA-256 of each file.
        pixels: for each view, uint8 (B, 3, S, S).
        bad: positions of the others, with the reason.
    """

    number: int
    indices: np.ndarray
    digests: tuple[bytes, ...]
    pixels: tuple[np.ndarray, ...]
    bad: tuple[tuple[int, str], ...]


def read_file(name: str, location: Location) -> bytes:
    """The bytes of an image file.

    Raises:
        BadImages: it cannot be read.
    """
    try:
        return location.read()
    except OSError as error:
        raise BadImages(f"{name}: {error.strerror or error}") from error


def decode_file(index: int, name: str, location: Location, views: Sequence[View]) -> tuple[bytes, list]:
    """Read an image once and make each view of it: its digest, and uint8 (3, S, S) arrays.

    Raises:
        BadImages: it cannot be read.
    """
    content = read_file(name, location)
    image = decode(io.BytesIO(content), name)
    try:
        made = [view(image, index) for view in views]
    except BadImages as error:
        raise BadImages(f"{name}: {error}") from error
    return hashlib.sha256(content).digest()[:DIGEST], made


def batches(
    images: LabeledImages,
    numbers: Sequence[int],
    batch_size: int,
    views: Sequence[View],
    workers: "int | Workers",
) -> Generator[Batch]:
    """The batches of these numbers, in this order.

    Args:
        images: the data set; batch n holds the images from n * batch_size.
        workers: processes that decode; 0: this one does, between the batches.
            `Workers` that are there already are used and left.

    Raises:
        FcvitError: no worker can be started.
    """
    pieces = [
        (number, start, min(start + _CHUNK, (number + 1) * batch_size, len(images)))
        for number in numbers
        for start in range(number * batch_size, min((number + 1) * batch_size, len(images)), _CHUNK)
    ]
    chunks = (
        list(zip(range(start, end), images.names[start:end], images.locations[start:end], strict=True))
        for _, start, end in pieces
    )
    # The batch that is being put together; what is behind it keeps the workers busy.
    work = functools.partial(decode_file, views=views)
    with contextlib.closing(_chunk_by_chunk(chunks, work, workers, -(-batch_size // _CHUNK))) as done:
        yield from _assemble(pieces, done, views)


def each(jobs: Sequence[Job], work: Work[Result], workers: "int | Workers") -> Generator[Result | BadImages]:
    """What a function makes of every image, in their order; of an image that cannot be read, why.

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
    chunks: Iterator[list[tuple[bytes, list[np.ndarray]] | BadImages]],
    views: Sequence[View],
) -> Iterator[Batch]:
    """Put the chunks of each batch together."""
    indices: list[int] = []
    digests: list[bytes] = []
    pixels: list[list[np.ndarray]] = [[] for _ in views]
    bad: list[tuple[int, str]] = []
    for place, (number, start, _) in enumerate(pieces):
        for index, result in enumerate(next(chunks), start):
            if isinstance(result, BadImages):
                bad.append((index, str(result)))
                continue
            digest, made = result
            indices.append(index)
            digests.append(digest)
            for stack, image in zip(pixels, made, strict=True):
                stack.append(image)
        if place + 1 == len(pieces) or pieces[place + 1][0] != number:
            stacks = tuple(
                np.stack(stack) if stack else np.empty((0, 3, view.size, view.size), np.uint8)
                for stack, view in zip(pixels, views, strict=True)
            )
            yield Batch(number, np.array(indices, np.int64), tuple(digests), stacks, tuple(bad))
            indices, digests, pixels, bad = [], [], [[] for _ in views], []


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
    """A worker leaves interruptions to the process it works for, and ends when that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about odd images
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
