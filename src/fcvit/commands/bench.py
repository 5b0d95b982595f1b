"""How fast engines are on this machine: interleaved, in processes of their own, beside PyTorch and the machine's peak.

A contender (engine, precision, batch size, threads) lives in a process of its own and waits while the others
compute, so that they share no allocator, no pool of threads and no thread that still spins. Those of one batch size
and number of threads are called in turn, round after round: a noisy minute hits all alike, and ratios are those of
neighbors in time. The images are the same for all, uint8; normalizing them is part of what is measured.
"""

import contextlib
import csv
import dataclasses
import importlib
import io
import itertools
import logging
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import run_folder as runs
from fcvit.errors import DoesNotFit, FcvitError, MissingExtra, UsageError
from fcvit.frameworks import import_framework
from fcvit.inference.engines import ENGINES, create_engine
from fcvit.machine import available_threads, peak_memory, processor_name
from fcvit.models.spec import ModelSpec, multiply_accumulates
from fcvit.models.variants import Preprocessing, Variant, get_variant, resolve_preprocessing
from fcvit.report.charts import Bar, speed_chart
from fcvit.report.progress import progress
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.reading import Weights, read_weights
from fcvit.weights.synthetic import synthetic_tensors

logger = logging.getLogger("fcvit")

# The reference: PyTorch as a user would have it without any of this.
REFERENCES = ("torch", "torch-channels-last", "torch-compile")
CONTENDERS = (*REFERENCES, *(name for name in ENGINES if name != "torch"))
PRECISIONS = ("float32", "bfloat16")
PEAK = "matrix product"
WRONG = 1e-2  # a float32 logit that is further off than this is wrong, whatever the rounding
_CALLS, _SECONDS = 3, 0.3  # of a turn, at least; the first call of a turn finds caches cold and is not counted
_PAUSE = 0.2  # until threads that spin for more work have gone to sleep
_HAVE_BFLOAT16 = (*REFERENCES, "openvino")
_NEEDED = {25: 4, 50: 1, 75: 4, 90: 10, 99: 100}  # samples that a percentile needs to say anything
_SIDE = 1536  # of the matrices whose product shows the peak


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is measured; `engine` is one of `CONTENDERS`."""

    engine: str
    precision: str
    batch_size: int
    threads: int

    def __str__(self) -> str:
        precision = "" if self.precision == "float32" else f" {self.precision}"
        return f"{self.engine}{precision}, batch {self.batch_size}, {self.threads} thread(s)"


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured of one contender.

    Attributes:
        calls: how many are counted.
        percentiles: milliseconds of a batch; None where there are too few calls for it.
        rounds: median milliseconds of a batch in each round.
        images_per_second: from the median.
        gflops: GFLOP/s of the network, two for a multiply-accumulate.
        of_reference: speed over the reference's at the same batch size and threads, median over neighbors in time.
        of_peak: `gflops` over those of the machine's matrix product; None where that could not be measured.
        load_seconds: from importing the framework to the first answer; what native and torch-compile compile, where
            it was not in a cache yet, included.
        export_seconds: the same of the first use, which made an export; None: it was in the cache, or there is none.
        memory: bytes that the process held at most, Python and libraries included.
        memory_before: bytes that it held at most before it loaded the engine: Python, this package, the weights.
        difference: largest absolute difference of a logit from the reference contender's; None without one.
    """

    contender: Contender
    calls: int
    percentiles: dict[int, float | None]
    rounds: tuple[float, ...]
    images_per_second: float
    gflops: float
    of_reference: float | None
    of_peak: float | None
    load_seconds: float
    export_seconds: float | None
    memory: int
    memory_before: int
    difference: float | None

    @property
    def wrong(self) -> bool:
        """Whether these are no roundings any more: in float32, NaN or `WRONG` and more."""
        return self.contender.precision == "float32" and self.difference is not None and not self.difference < WRONG


@dataclasses.dataclass(frozen=True)
class Bench:
    """A whole measurement.

    Attributes:
        network, size: in words; height and width in pixels.
        machine, versions: what it ran on.
        gmac: multiply-accumulates of one image, in 10^9.
        peak: GFLOP/s of the matrix product, by number of threads.
        reference: the engine that ratios and differences refer to.
        speeds: of all contenders that could be measured.
        skipped: the others, with the reason.
        folder: where it was written, or None.
    """

    network: str
    size: int
    machine: str
    versions: dict[str, str]
    gmac: float
    peak: dict[int, float]
    reference: str
    speeds: tuple[Speed, ...]
    skipped: tuple[tuple[str, str], ...]
    folder: Path | None


def bench(
    weights: "Weights | str | os.PathLike[str] | None" = None,
    *,
    variant: str | Variant | None = None,
    engines: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1, 8),
    threads: Sequence[int] = (),
    precisions: Sequence[str] = ("float32",),
    size: int | None = None,
    rounds: int = 7,
    reference: str | None = None,
    ema: bool | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Bench:
    """Measure every engine at every batch size, precision and number of threads.

    Args:
        weights: a file or weights in memory; None: weights by rule, which are as fast.
        variant: the network of weights by rule; None: fcvit_tiny.
        engines: of `CONTENDERS`; empty: all that are installed.
        batch_sizes: images at a time, from 1.
        threads: that compute; empty: one for each core.
        precisions: of `PRECISIONS`; those that an engine does not have are skipped.
        size: of the images in pixels; None: the weights' own.
        rounds: how often everybody has a turn, from 1; a turn is a third of a second or three calls.
        reference: one of the engines; None: torch-channels-last where it could be measured, else the first.
        ema: choose the averaged or raw weights of a file that has both.
        folder: a new folder for bench.json, bench.csv and bench.png; None: nothing is written.

    Raises:
        UsageError: a wrong name or number, or the folder is not empty; before anything is measured.
        MissingExtra: nothing could be measured, as nothing is installed.
        FcvitError: nothing could be measured; of the kind of the first engine's error.
        UnreadableFile, DoesNotFit: the weights.
    """
    names = tuple(dict.fromkeys(engines)) or CONTENDERS
    counts = tuple(dict.fromkeys(threads)) or (available_threads(),)
    for name in (*names, *([reference] if reference else [])):
        if name not in CONTENDERS:
            raise UsageError(f"--engine {name!r}: expected {', '.join(CONTENDERS)}")
    if reference and reference not in names:
        raise UsageError(f"--reference {reference} is not measured; add it to --engine")
    if rounds < 1 or min(batch_sizes, default=0) < 1 or min(counts) < 1 or (size is not None and size < 1):
        raise UsageError("rounds, batch sizes, threads and size are at least 1")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UsageError(f"--precision {precision!r}: expected {', '.join(PRECISIONS)}")
    asked = [
        Contender(name, precision, batch, count)
        for count, batch in itertools.product(counts, dict.fromkeys(batch_sizes))
        for precision, name in itertools.product(dict.fromkeys(precisions), names)
    ]
    listed = [one for one in asked if one.precision == "float32" or one.engine in _HAVE_BFLOAT16]
    if not listed:
        raise UsageError(f"--precision {','.join(precisions)}: {', '.join(names)} cannot; add float32")
    skipped = [(str(one), f"{one.engine} has no {one.precision} on a CPU") for one in asked if one not in listed]
    read = _weights(weights, variant, ema)
    pixels = resolve_preprocessing(None, read.preprocessing, read.spec.variant)
    pixels = dataclasses.replace(pixels, input_size=size or pixels.input_size)
    with contextlib.nullcontext() if folder is None else runs.run_folder(Path(folder), "bench") as target:
        measured = _measure(listed, read, pixels, rounds)
        if not measured.turns:
            one, error = next((job, error) for job, error in measured.errors.items() if isinstance(job, Contender))
            raise type(error)(f"no engine could be measured; {one}: {error}")
        skipped += [(_name(job), str(error)) for job, error in measured.errors.items()]
        found = dataclasses.replace(_bench(measured, read, pixels, reference, skipped), folder=target)
        if reference and found.reference != reference:
            logger.info(f"{reference} could not be measured: ratios are to {found.reference}")
        if target is not None:
            _write(found, target)
    return found


def _write(found: Bench, folder: Path) -> None:
    runs.write_json(folder / "bench.json", as_json_ready(found))
    runs.write_text(folder / "bench.csv", as_csv(found))
    try:
        runs.write_bytes(folder / "bench.png", speed_chart(rows_of_chart(found), *titles(found)))
    except MissingExtra as error:
        logger.info(f"no picture: {error}")


def _weights(
    given: "Weights | str | os.PathLike[str] | None",
    variant: str | Variant | None,
    ema: bool | None,
) -> Weights:
    """A classifier's weights that can be sent to another process."""
    if given is None:
        return synthetic_weights(get_variant(variant or "fcvit_tiny"))
    if variant is not None:
        raise UsageError("--variant is for weights by rule; a file of weights says itself which variant it is")
    read = given if isinstance(given, Weights) else read_weights(given, ema)
    if not read.spec.has_classes:
        raise DoesNotFit(f"{read.source.path} is {read.spec}: engines compute the logits of a classifier")
    return _portable(read)


def synthetic_weights(variant: Variant) -> Weights:
    logger.info(f"no weights given: {variant.name} with weights by rule, which are as fast as trained ones")
    spec = ModelSpec(variant, 1000)
    source = Checkpoint(Path(f"{variant.name} by rule"), MEMORY, {}, None, b"")
    return Weights(spec, synthetic_tensors(spec), source, "torch", None, None, (), ())


def _portable(weights: Weights) -> Weights:
    """The same in memory: what views a file cannot be sent to another process."""
    source = Checkpoint(weights.source.path, MEMORY, {}, None, b"")
    return dataclasses.replace(weights, tensors={n: np.array(t) for n, t in weights.tensors.items()}, source=source)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """What a process says when it is ready; `notes`: what its engine announced, as it made an export."""

    seconds: float = 0.0
    memory_before: int = 0
    notes: tuple[str, ...] = ()
    logits: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Turn:
    """Seconds of each call, and the bytes that the process held at most until then."""

    samples: list[float]
    memory: int


Job = Contender | int  # a number is the matrix product by that many threads
Worker = tuple[Any, Connection]


@dataclasses.dataclass
class _Measured:
    """Turns and loading of each contender that came through; why the others did not; turns of the peak by threads."""

    turns: dict[Contender, list[_Turn]]
    loads: dict[Contender, _Loaded]
    first_loads: dict[Contender, float]  # seconds, where an export was made
    errors: dict[Job, FcvitError]
    peaks: dict[int, list[_Turn]]


def _measure(
    listed: Sequence[Contender],
    weights: Weights,
    pixels: Preprocessing,
    rounds: int,
) -> _Measured:
    """Group by group: only those that are compared live at the same time."""
    found = _Measured({}, {}, {}, {}, {})
    groups: dict[tuple[int, int], list[Job]] = {}
    for one in listed:
        groups.setdefault((one.threads, one.batch_size), [one.threads]).append(one)
    turns = (1 + rounds) * sum(map(len, groups.values()))  # loading takes about as long as one
    with progress("measuring", turns, "turns") as advance:
        for group in groups.values():
            _interleave(group, weights, pixels, rounds, found, advance)
    return found


def _interleave(
    group: Sequence[Job],
    weights: Weights,
    pixels: Preprocessing,
    rounds: int,
    found: _Measured,
    advance: Callable[[int], None],
) -> None:
    workers: dict[Job, Worker] = {}

    def load(job: Job) -> _Loaded | FcvitError:
        workers[job] = _start(job, weights, pixels)
        return _receive(workers[job])

    def give_up(job: Job, error: FcvitError, left: int) -> None:
        found.errors[job] = error
        _stop(workers.pop(job))
        if isinstance(job, Contender):
            found.turns.pop(job, None)
        advance(left)

    try:
        for job in group:
            answer = load(job)
            if isinstance(answer, _Loaded) and isinstance(job, Contender) and answer.notes:
                # An export was made and checked, which takes other time and memory than to use it: once more.
                for note in answer.notes:
                    logger.info(note)
                found.first_loads[job] = answer.seconds
                _stop(workers.pop(job))
                answer = load(job)
            advance(1)
            if isinstance(answer, FcvitError):
                give_up(job, answer, rounds)
            elif isinstance(job, Contender):
                found.loads[job], found.turns[job] = answer, []
        for turn in range(rounds):
            for job in list(workers):
                answer = _ask(workers[job])
                advance(1)
                if isinstance(answer, FcvitError):
                    give_up(job, answer, rounds - turn - 1)
                elif isinstance(job, Contender):
                    found.turns[job].append(answer)
                else:
                    found.peaks.setdefault(job, []).append(answer)
                time.sleep(_PAUSE)
    finally:
        for worker in workers.values():
            _stop(worker)


def _name(job: Job) -> str:
    return str(job) if isinstance(job, Contender) else f"{PEAK}, {job} thread(s)"


def _start(job: Job, weights: Weights, pixels: Preprocessing) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(job, weights, pixels, theirs), daemon=True)
    with _blas_threads(job) if isinstance(job, int) else contextlib.nullcontext(), _deaf_to_interrupts():
        process.start()
    theirs.close()
    return process, ours


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that start in the block leave Ctrl-C to this one, which gets it after the block and ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # or it would start in the block, and undo this
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _blas_threads(threads: int) -> Iterator[None]:
    """For processes that start in the block: NumPy's library reads them as it loads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)


def _ask(worker: Worker) -> Any:
    """A turn."""
    try:
        worker[1].send(True)
    except OSError:  # it ended while it waited
        return _ended(worker)
    return _receive(worker)


def _receive(worker: Worker) -> Any:
    """What the process answers; an error if it ended."""
    try:
        return worker[1].recv()
    except (EOFError, OSError):
        return _ended(worker)


def _ended(worker: Worker) -> FcvitError:
    worker[0].join()
    code = worker[0].exitcode
    if code >= 0:
        return FcvitError(f"its process ended with exit code {code}")
    name = signal.Signals(-code).name
    return FcvitError(f"its process ended by {name}{'; out of memory?' if name == 'SIGKILL' else ''}")


def _stop(worker: Worker) -> None:
    process, pipe = worker
    pipe.close()
    process.terminate()
    process.join(5)
    process.kill()  # a library may not end when it is told to
    process.join()


def work(job: Job, weights: Weights, pixels: Preprocessing, pipe: Connection) -> None:
    """What a process does: load, answer, then a turn for each message."""
    try:
        if isinstance(job, int):
            compute = _matrix_product()
            pipe.send(_Loaded())
        else:
            notes: list[str] = []
            handler = logging.Handler()
            handler.emit = lambda record: notes.append(record.getMessage())
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            shape = (job.batch_size, 3, pixels.input_size, pixels.input_size)
            images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            before, began = peak_memory(), time.perf_counter()
            engine = _engine(job, weights, pixels)
            logits = engine(images)
            pipe.send(_Loaded(time.perf_counter() - began, before, tuple(notes), logits))

            def compute() -> object:
                return engine(images)

        while pipe.recv():
            pipe.send(_Turn(_samples(compute), peak_memory()))
    except (EOFError, BrokenPipeError):  # the other end has gone
        return
    except FcvitError as error:
        pipe.send(error)
    except Exception as error:  # of whatever library: the others go on
        lines = str(error).strip().splitlines()
        pipe.send(FcvitError(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__))


def _samples(compute: Callable[[], object]) -> list[float]:
    """Seconds of each call but the first."""
    compute()
    samples: list[float] = []
    while len(samples) < _CALLS or sum(samples) < _SECONDS:
        began = time.perf_counter()
        compute()
        samples.append(time.perf_counter() - began)
    return samples


def _matrix_product() -> Callable[[], object]:
    left = np.random.default_rng(0).standard_normal((_SIDE, _SIDE)).astype(np.float32)
    out = np.empty_like(left)
    return lambda: np.matmul(left, left, out=out)


def _engine(job: Contender, weights: Weights, pixels: Preprocessing) -> Callable[[np.ndarray], np.ndarray]:
    if job.engine in REFERENCES:
        # Its threads wait as PyTorch lets them: `import_framework` would let them sleep, which is gentler beside
        # other work and, alone on a machine, up to twice as slow.
        with contextlib.suppress(ImportError):
            importlib.import_module("torch")
    if job.engine not in ("torch-channels-last", "torch-compile"):
        return create_engine(job.engine, weights, pixels, "cpu", job.precision, job.threads)
    engine: Any = create_engine("torch", weights, pixels, "cpu", job.precision, job.threads)
    torch = import_framework("torch")
    engine.model = engine.model.to(memory_format=torch.channels_last)  # the images follow its weights
    if job.engine == "torch-compile":
        engine.model = torch.compile(engine.model)
    return engine


def _bench(
    measured: _Measured,
    weights: Weights,
    pixels: Preprocessing,
    reference: str | None,
    skipped: Sequence[tuple[str, str]],
) -> Bench:
    present = list(dict.fromkeys(contender.engine for contender in measured.turns))
    if reference not in present:
        reference = "torch-channels-last" if "torch-channels-last" in present else present[0]
    gmac = multiply_accumulates(weights.spec, pixels.input_size, pixels.input_size) / 1e9
    peak = {
        count: 2 * _SIDE**3 / statistics.median(min(turn.samples) for turn in turns) / 1e9
        for count, turns in measured.peaks.items()
        if count not in measured.errors
    }
    speeds = []
    for contender, turns in measured.turns.items():
        samples = [second for turn in turns for second in turn.samples]
        rate = contender.batch_size / statistics.median(samples)
        medians = _medians(turns)
        beside = dataclasses.replace(contender, engine=reference, precision="float32")
        ratio = difference = None
        loaded = measured.loads[contender]
        if beside in measured.turns:
            pairs = zip(_medians(measured.turns[beside]), medians, strict=True)
            ratio = statistics.median(one / own for one, own in pairs)
            difference = _difference(loaded.logits, measured.loads[beside].logits)
        speeds.append(
            Speed(
                contender,
                calls=len(samples),
                percentiles={rank: percentile(samples, rank) for rank in _NEEDED},
                rounds=tuple(1e3 * median for median in medians),
                images_per_second=rate,
                gflops=2 * gmac * rate,
                of_reference=ratio,
                of_peak=2 * gmac * rate / peak[contender.threads] if contender.threads in peak else None,
                load_seconds=loaded.seconds,
                export_seconds=measured.first_loads.get(contender),
                memory=max(turn.memory for turn in turns),
                memory_before=loaded.memory_before,
                difference=difference,
            )
        )
    machine = f"{processor_name()}, {available_threads()} cores"
    return Bench(
        str(weights.spec),
        pixels.input_size,
        machine,
        runs.versions(),
        gmac,
        peak,
        reference,
        tuple(speeds),
        tuple(skipped),
        None,
    )


def _medians(turns: Sequence[_Turn]) -> list[float]:
    return [statistics.median(turn.samples) for turn in turns]


def _difference(found: np.ndarray | None, expected: np.ndarray | None) -> float:
    """The largest; NaN where there is one, or where the shapes are not even the same."""
    if found is None or expected is None or found.shape != expected.shape:
        return math.nan
    return float(np.abs(found - expected).max())


def percentile(samples: Sequence[float], rank: int) -> float | None:
    """Milliseconds below which `rank` per cent of the samples (seconds) lie; None where they are too few to say."""
    if len(samples) < _NEEDED[rank]:
        return None
    ordered = sorted(samples)
    if rank == 50:
        return 1e3 * statistics.median(ordered)
    return 1e3 * ordered[math.ceil(rank / 100 * len(ordered)) - 1]


def as_json_ready(found: Bench) -> dict[str, Any]:
    """Everything, for JSON; `wrong` says of each what a difference of NaN, which JSON does not have, would."""
    speeds = [dataclasses.asdict(speed) | {"wrong": speed.wrong} for speed in found.speeds]
    return dataclasses.asdict(found) | {"speeds": speeds}


def as_csv(found: Bench) -> str:
    """A row for each contender; what is None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Speed)[1:] if field.name not in ("percentiles", "rounds")]
    ranks = [f"p{rank}_ms" for rank in _NEEDED]
    writer.writerow([*(field.name for field in dataclasses.fields(Contender)), *ranks, *names, "wrong"])
    for speed in found.speeds:
        values = [*dataclasses.astuple(speed.contender), *speed.percentiles.values()]
        values += [*(getattr(speed, name) for name in names), int(speed.wrong)]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def titles(found: Bench) -> tuple[str, str]:
    """Title and subtitle of the picture."""
    return (
        f"{found.network} at {found.size} x {found.size}",
        f"{found.machine}; images per second, normalization included; lines: the middle half of all calls",
    )


def rows_of_chart(found: Bench) -> list[tuple[str, list[Bar]]]:
    """Groups of bars, the fastest first: batch and threads, then a bar for each engine and precision."""
    groups: dict[str, list[Bar]] = {}
    for speed in found.speeds:
        one = speed.contender
        name = one.engine if one.precision == "float32" else f"{one.engine}, {one.precision}"
        rates = [
            1e3 * one.batch_size / ms if ms else speed.images_per_second for ms in map(speed.percentiles.get, (75, 25))
        ]
        group = groups.setdefault(f"batch {one.batch_size}, {one.threads} thread{'s' * (one.threads > 1)}", [])
        reference = one.engine == found.reference and one.precision == "float32"
        group.append(Bar(name, speed.images_per_second, rates[0], rates[1], reference))
    return [(name, sorted(bars, key=lambda bar: -bar.rate)) for name, bars in groups.items()]
