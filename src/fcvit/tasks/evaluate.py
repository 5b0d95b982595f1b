"""Accuracy of weights on labelled images, with one engine or with several on the same images."""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fcvit import runs
from fcvit.classes import Classes, resolve_classes
from fcvit.deploy.engines import Engine, create_engine
from fcvit.errors import BadImages, DoesNotFit, UsageError
from fcvit.images.folder import LabelledFolder, read_labelled_folder
from fcvit.images.preprocess import preprocess, protocol
from fcvit.report.progress import progress
from fcvit.variants import (
    IMAGENET_CLASSES,
    Preprocessing,
    PreprocessingChange,
    Published,
    published,
    resolve_preprocessing,
)
from fcvit.weights.reading import Weights, read_weights

# Each image in flight is held as its crop only; two batches a worker keep the model fed.
_BATCHES_AHEAD = 2


@dataclasses.dataclass
class Sums:
    """What one engine got right: sums over samples, from which the figures follow."""

    images: int = 0
    correct: int = 0
    correct_in_k: int = 0
    loss: float = 0.0
    seconds: float = 0.0

    def add(self, logits: np.ndarray, labels: np.ndarray, k: int) -> None:
        """Count a batch: logits (B, C), labels (B,)."""
        rank = rank_of_truth(logits, labels)
        self.images += len(labels)
        self.correct += int((rank == 0).sum())
        self.correct_in_k += int((rank < k).sum())
        self.loss += float(cross_entropy(logits, labels).sum())


@dataclasses.dataclass(frozen=True)
class Result:
    """Figures of one engine.

    Attributes:
        engine, device: what computed them.
        images: how many were evaluated.
        top1, top_k: per cent; `k` is 5, or the class count where that is smaller.
        loss: cross-entropy, mean over the images.
        seconds: that this engine computed, decoding aside.
    """

    engine: str
    device: str
    images: int
    top1: float
    top_k: float
    k: int
    loss: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two engines on the same images: share of equal top-1 in per cent, absolute logit differences."""

    engines: tuple[str, str]
    top1_agreement: float
    max_difference: float
    mean_difference: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        results: one for each engine.
        agreement: of the first two engines; None for one.
        unreadable: images that were left out, with the reason.
        rule: how class folders became indices.
        protocol: the name of the preprocessing: "authors", "resize256-bilinear" or "custom".
        preprocessing: what it was.
        published_top1: of a published variant under this protocol on all of ImageNet-1K, else None.
        folder: where everything was written, or None.
        seconds: all of it.
    """

    results: tuple[Result, ...]
    agreement: Agreement | None
    unreadable: tuple[str, ...]
    rule: str
    protocol: str
    preprocessing: Preprocessing
    published_top1: float | None
    folder: Path | None
    seconds: float


def evaluate(
    weights: Weights | str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    engines: Sequence[str] = ("paddle",),
    protocol_name: str = "authors",
    preprocessing: Preprocessing | PreprocessingChange | None = None,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
    ema: bool | None = None,
    folder: str | os.PathLike[str] | None = None,
    record: bool = False,
    announce: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Evaluate weights on a folder of class folders.

    Args:
        weights: a file of any format, or weights in memory.
        data: see `read_labelled_folder`.
        engines: names of `fcvit.deploy.engines.ENGINES`; all see the same batches.
        protocol_name: "authors" or "resize256-bilinear".
        preprocessing: another one, or single fields of it, which makes the protocol "custom";
            None: the file's, else the variant's.
        batch_size, workers: at least 1; workers decode while the model computes.
        device: auto, cpu, gpu or gpu:N.
        ema: choose the averaged or raw weights of a file that has both.
        folder: a new folder for `run.json`, `metrics.json` and `predictions.csv`; None: nothing is
            written, or, with `record`, the folder is `runs/eval` or the first free one after it.
        announce: is told before the first batch how class folders became indices.

    Raises:
        UnreadableFile, UsageError, DoesNotFit, MissingExtra: before the first batch.
        BadImages: not a single image can be read. Single bad ones are listed in the result.
    """
    if batch_size < 1 or workers < 1:
        raise UsageError(f"--batch-size {batch_size}, --workers {workers}: expected at least 1")
    engines = (engines,) if isinstance(engines, str) else tuple(engines)
    if preprocessing and protocol_name != "authors":
        raise UsageError(f"--protocol {protocol_name} is a fixed preprocessing; leave out the one or the other")
    if not engines or len(set(engines)) != len(engines):
        raise UsageError(f"--engine {','.join(engines)!r}: expected different engines, separated by commas")
    if not isinstance(weights, Weights):
        weights = read_weights(weights, ema)
    form = weights.form
    if form.dense or not form.num_classes:
        raise DoesNotFit(f"{weights.source.path} is {form}: it has no classes to evaluate")
    chosen = protocol(protocol_name, resolve_preprocessing(preprocessing, weights.preprocessing, form.variant))
    protocol_name = "custom" if preprocessing else protocol_name
    images = read_labelled_folder(Path(data), weights.classes, form.num_classes)
    announce(images.rule)
    classes = resolve_classes(None, weights.classes, form.num_classes)
    running = [create_engine(name, weights, chosen, device) for name in engines]
    k = min(5, form.num_classes)
    sums = [Sums() for _ in running]
    pair = _PairSums()
    unreadable: list[str] = []
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        place = sink = None
        if folder is not None or record:
            place = stack.enter_context(runs.run_folder(None if folder is None else Path(folder), "eval"))
            sink = stack.enter_context(_prediction_file(place, k))
        advance = stack.enter_context(progress("evaluating", len(images.paths)))
        for paths, batch, labels, bad in _batches(images, chosen, batch_size, workers):
            unreadable += bad
            if paths:
                logits = []
                for engine, total in zip(running, sums, strict=True):
                    started = time.perf_counter()
                    logits.append(engine(batch))
                    total.seconds += time.perf_counter() - started
                    total.add(logits[-1], labels, k)
                if len(logits) > 1:
                    pair.add(logits[0], logits[1])
                if sink is not None:
                    sink.writerows(_rows(paths, labels, logits[0], classes, k))
            advance(len(paths) + len(bad))
        if not sums[0].images:
            raise BadImages(f"{data}: none of {len(images.paths)} images can be read, first: {unreadable[0]}")
        figures = published(form.variant)
        evaluation = Evaluation(
            tuple(_result(engine, total, k) for engine, total in zip(running, sums, strict=True)),
            pair.agreement((running[0].name, running[1].name)) if len(running) > 1 else None,
            tuple(unreadable),
            images.rule,
            protocol_name,
            chosen,
            _published_top1(figures, protocol_name) if figures and form.num_classes == IMAGENET_CLASSES else None,
            place,
            time.perf_counter() - began,
        )
        if place is not None:
            about = {
                "weights": str(weights.source.path),
                "weights_sha256": weights.source.sha256,
                "data": str(data),
                "classes": images.mapping,
                "versions": runs.versions(),
            }
            runs.write_json(place / "metrics.json", dataclasses.asdict(evaluation) | about)
    return evaluation


def rank_of_truth(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, (B, C), (B,) -> (B,); of equal logits the lower index is first."""
    truth = logits[np.arange(len(labels)), labels][:, None]
    before = np.arange(logits.shape[1])[None] < labels[:, None]
    return ((logits > truth) | ((logits == truth) & before)).sum(axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64, (B, C) -> (B, C)."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per sample, in float64: (B, C), (B,) -> (B,)."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return log_total - logits[np.arange(len(labels)), labels]


def top_classes(logits: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, best first, (B, C) -> (B, k); of equal logits the lower index is first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


@dataclasses.dataclass
class _PairSums:
    images: int = 0
    same: int = 0
    numbers: int = 0
    largest: float = 0.0
    total: float = 0.0

    def add(self, one: np.ndarray, other: np.ndarray) -> None:
        difference = np.abs(one.astype(np.float64) - other)
        self.images += len(one)
        self.same += int((one.argmax(1) == other.argmax(1)).sum())
        self.numbers += difference.size
        self.largest = max(self.largest, float(difference.max()))
        self.total += float(difference.sum())

    def agreement(self, engines: tuple[str, str]) -> Agreement:
        return Agreement(engines, 100 * self.same / self.images, self.largest, self.total / self.numbers)


def _batches(
    images: LabelledFolder, preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray, list[str]]]:
    """Paths, uint8 images (B, 3, S, S), labels and unreadable files, batch by batch, in order.

    Threads are enough: Pillow decodes and resizes without holding Python's lock.
    """

    def load(path: str) -> np.ndarray | BadImages:
        try:
            return preprocess(images.root / path, preprocessing)
        except BadImages as error:
            return error

    pending: collections.deque = collections.deque()
    starts = iter(range(0, len(images.paths), batch_size))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def submit() -> None:
            for start in starts:
                paths = images.paths[start : start + batch_size]
                labels = images.labels[start : start + batch_size]
                pending.append((paths, labels, [pool.submit(load, path) for path in paths]))
                return

        for _ in range(_BATCHES_AHEAD * workers):
            submit()
        try:
            while pending:
                paths, labels, futures = pending.popleft()
                loaded = [future.result() for future in futures]
                submit()
                good = [i for i, image in enumerate(loaded) if isinstance(image, np.ndarray)]
                bad = [str(image) for image in loaded if isinstance(image, BadImages)]
                batch = np.stack([loaded[i] for i in good]) if good else np.empty((0, 3, 1, 1), np.uint8)
                yield [paths[i] for i in good], batch, np.array([labels[i] for i in good], np.int64), bad
        finally:
            pool.shutdown(cancel_futures=True)


def _rows(
    paths: Sequence[str], labels: np.ndarray, logits: np.ndarray, classes: Classes, k: int
) -> Iterator[list[object]]:
    probabilities = softmax(logits)
    for path, label, best, row in zip(paths, labels, top_classes(logits, k), probabilities, strict=True):
        ranked = [value for index in best for value in (classes[index].id, f"{row[index]:.6f}")]
        yield [path, classes[label].id, *ranked]


@contextlib.contextmanager
def _prediction_file(folder: Path, k: int) -> Iterator["csv.Writer"]:
    """`predictions.csv`, written as the images come and complete once it has its name."""
    path = folder / "predictions.csv"
    temporary = folder / ".predictions.csv.tmp"
    try:
        # A path need not be UTF-8; its bytes are kept as they are.
        with temporary.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
            writer = csv.writer(file)
            ranked = [f"{what}_{place}" for place in range(1, k + 1) for what in ("class", "probability")]
            writer.writerow(["path", "truth", *ranked])
            yield writer
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _published_top1(figures: Published, protocol_name: str) -> float | None:
    """What was published under this protocol: by the authors, or by the earlier port."""
    return {"authors": figures.top1, "resize256-bilinear": figures.earlier_port_top1}.get(protocol_name)


def _result(engine: Engine, total: Sums, k: int) -> Result:
    share = 100 / total.images
    return Result(
        engine.name,
        engine.device,
        total.images,
        share * total.correct,
        share * total.correct_in_k,
        k,
        total.loss / total.images,
        total.seconds,
    )
