"""How fast engines are on this machine: interleaved, in processes of their own, beside PyTorch and the machine's peak.

A contender (engine, precision, batch size, threads) lives in a process of its own and waits while the others
compute, so that they share no allocator, no pool of threads and no thread that still spins. All are called in
turn, round after round: a noisy minute hits all alike, and ratios are those of neighbours in time.
"""

import contextlib
import csv
import dataclasses
import importlib
import io
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import runs
from fcvit.deploy.engines import ENGINES, create_engine
from fcvit.errors import FcvitError, MissingExtra, UsageError
from fcvit.frameworks import import_framework
from fcvit.machine import available_threads, peak_memory, processor_name
from fcvit.report.charts import speed_chart
from fcvit.report.progress import progress
from fcvit.variants import Preprocessing, Variant, get_variant, resolve_preprocessing
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.lively import lively_tensors
from fcvit.weights.names import Form, multiply_accumulates
from fcvit.weights.reading import Weights, read_weights

# The reference: PyTorch as a user would have it without any of this.
REFERENCES = ("torch", "torch-channels-last", "torch-compile")
CONTENDERS = (*REFERENCES, *(name for name in ENGINES if name != "torch"))
PEAK = "matrix product"
WRONG = 1e-2  # a float32 logit that is further off than this is wrong, whatever the rounding
_CALLS, _SECONDS = 3, 0.3  # of a turn, at least; the first call of a turn finds caches cold and is not counted
_PAUSE = 0.2  # until threads that spin for more work have gone to sleep
_NEEDED = {50: 1, 90: 10, 99: 100}  # samples that a percentile needs to say anything
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
        images_per_second: from the median.
        of_reference: speed over the reference's at the same batch size and threads, median over neighbours in time.
        of_peak: share of the machine's matrix product, by the multiply-accumulates of the network.
        load_seconds: until the first answer; with an export that was not in the cache yet, that included.
        memory: bytes that the process held at most, Python and libraries included.
        difference: largest absolute difference of a logit from the reference contender's; None without one.
    """

    contender: Contender
    calls: int
    percentiles: dict[int, float | None]
    images_per_second: float
    of_reference: float | None
    of_peak: float
    load_seconds: float
    memory: int
    difference: float | None

    @property
    def wrong(self) -> bool:
        """Whether these are no roundings any more."""
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
    variant: str | Variant = "fcvit_tiny",
    engines: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1, 8),
    threads: Sequence[int] = (),
    precisions: Sequence[str] = ("float32",),
    size: int | None = None,
    rounds: int = 7,
    reference: str | None = None,
    ema: bool | None = None,
    folder: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Measure every engine at every batch size, precision and number of threads.

    Args:
        weights: a file or weights in memory; None: weights by rule, which are as fast, of `variant`.
        engines: of `CONTENDERS`; empty: all that are installed.
        batch_sizes: images at a time, from 1.
        threads: that compute; empty: one for each core.
        precisions: those that an engine does not have are skipped.
        size: of the images in pixels; None: the weights' own.
        rounds: how often everybody has a turn, from 1; a turn is a third of a second or three calls.
        reference: one of the engines; None: torch-channels-last where it could be measured, else the first.
        ema: choose the averaged or raw weights of a file that has both.
        folder: a new folder for bench.json, bench.csv and bench.png; None: nothing is written.
        announce: is told what a person should know.

    Raises:
        UsageError: a wrong name or number.
        MissingExtra: nothing could be measured.
        UnreadableFile, DoesNotFit: the weights.
    """
    names = tuple(engines) or CONTENDERS
    counts = tuple(threads) or (available_threads(),)
    for name in (*names, *([reference] if reference else [])):
        if name not in CONTENDERS:
            raise UsageError(f"--engine {name!r}: expected {', '.join(CONTENDERS)}")
    if reference and reference not in names:
        raise UsageError(f"--reference {reference} is not measured; add it to --engine")
    if rounds < 1 or min(batch_sizes, default=0) < 1 or min(counts) < 1 or (size is not None and size < 1):
        raise UsageError("rounds, batch sizes, threads and size are at least 1")
    read = _by_rule(get_variant(variant), announce) if weights is None else weights
    read = _portable(read if isinstance(read, Weights) else read_weights(read, ema))
    pixels = resolve_preprocessing(None, read.preprocessing, read.form.variant)
    pixels = dataclasses.replace(pixels, input_size=size or pixels.input_size)
    listed = [
        Contender(name, precision, batch, count)
        for count, batch, precision, name in itertools.product(counts, batch_sizes, precisions, names)
        if precision in _PRECISIONS.get(name, ("float32",))
    ]
    skipped: list[tuple[str, str]] = []
    measured = _interleave(listed, read, pixels, counts, rounds, skipped)
    if not measured.samples:
        raise MissingExtra(f"no engine could be measured; {skipped[0][0] if skipped else ''}: {skipped[0][1]}")
    found = _bench(measured, read, pixels, reference, skipped)
    if folder is None:
        return found
    with runs.run_folder(Path(folder), "bench") as target:
        found = dataclasses.replace(found, folder=target)
        runs.write_json(target / "bench.json", as_json_ready(found))
        runs.write_text(target / "bench.csv", as_csv(found))
        try:
            runs.write_bytes(target / "bench.png", speed_chart(rows_of_chart(found), *titles(found)))
        except MissingExtra as error:
            announce(f"no picture: {error}")
    return found


_PRECISIONS = {"openvino": ("float32", "bfloat16"), "torch": ("float32", "bfloat16")}


def _by_rule(variant: Variant, announce: Callable[[str], None]) -> Weights:
    announce(f"no weights given: {variant.name} with weights by rule, which are as fast as trained ones")
    form = Form(variant, 1000)
    source = Checkpoint(Path(f"{variant.name} by rule"), MEMORY, {}, None, b"")
    return Weights(form, lively_tensors(form), source, "torch", None, None, (), ())


def _portable(weights: Weights) -> Weights:
    """The same in memory: what views a file cannot be sent to another process."""
    source = Checkpoint(weights.source.path, MEMORY, {}, None, b"")
    return dataclasses.replace(weights, tensors={n: np.array(t) for n, t in weights.tensors.items()}, source=source)


@dataclasses.dataclass
class _Measured:
    """`samples[contender]` has a list of seconds for each round; `flops` the same of the peak."""

    samples: dict[Contender, list[list[float]]]
    flops: dict[int, list[float]]
    loads: dict[Contender, tuple[float, int]]
    logits: dict[Contender, np.ndarray]


def _interleave(
    listed: Sequence[Contender],
    weights: Weights,
    pixels: Preprocessing,
    counts: Sequence[int],
    rounds: int,
    skipped: list[tuple[str, str]],
) -> _Measured:
    found = _Measured({}, {count: [] for count in counts}, {}, {})
    workers: dict[Contender | int, tuple[Any, Connection]] = {}
    context = multiprocessing.get_context("spawn")
    try:
        with progress("loading", len(listed), "contenders") as advance:
            for job in (*counts, *listed):
                workers[job] = _start(context, job, weights, pixels)
                answer = _receive(workers[job])
                if isinstance(job, Contender):
                    advance(1)
                    if isinstance(answer, str):
                        skipped.append((str(job), answer))
                        _stop(workers.pop(job))
                        continue
                    found.loads[job], found.logits[job] = answer
                    found.samples[job] = []
        with progress("measuring", rounds * len(workers), "turns") as advance:
            for _ in range(rounds):
                for job in list(workers):
                    workers[job][1].send(True)
                    answer = _receive(workers[job])
                    advance(1)
                    if isinstance(job, int):
                        found.flops[job].append(min(answer))
                    elif isinstance(answer, str):
                        skipped.append((str(job), answer))
                        _stop(workers.pop(job))
                        del found.samples[job]
                    else:
                        found.samples[job].append(answer)
                    time.sleep(_PAUSE)
    finally:
        for worker in workers.values():
            _stop(worker)
    return found


def _start(context: Any, job: Contender | int, weights: Weights, pixels: Preprocessing) -> tuple[Any, Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(job, weights, pixels, theirs), daemon=True)
    with _blas_threads(job) if isinstance(job, int) else contextlib.nullcontext():
        process.start()
    theirs.close()
    return process, ours


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


def _receive(worker: tuple[Any, Connection]) -> Any:
    """What the process answers; a reason, as text, if it ended."""
    try:
        return worker[1].recv()
    except EOFError:
        worker[0].join()
        return f"its process ended with {worker[0].exitcode}"


def _stop(worker: tuple[Any, Connection]) -> None:
    process, pipe = worker
    pipe.close()
    process.terminate()
    process.join()


def work(job: Contender | int, weights: Weights, pixels: Preprocessing, pipe: Connection) -> None:
    """What a process does: load, answer, then a turn for each message."""
    try:
        if isinstance(job, int):
            compute = _matrix_product()
            pipe.send(None)
        else:
            began = time.perf_counter()
            engine = _engine(job, weights, pixels)
            shape = (job.batch_size, 3, pixels.input_size, pixels.input_size)
            images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            logits = engine(images)
            pipe.send(((time.perf_counter() - began, peak_memory()), logits))

            def compute() -> object:
                return engine(images)

        while pipe.recv():
            pipe.send(_turn(compute))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except (FcvitError, RuntimeError, MemoryError, OSError) as error:
        pipe.send(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)


def _turn(compute: Callable[[], object]) -> list[float]:
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
    present = list(dict.fromkeys(contender.engine for contender in measured.samples))
    if reference not in present:
        reference = "torch-channels-last" if "torch-channels-last" in present else present[0]
    gmac = multiply_accumulates(weights.form, pixels.input_size, pixels.input_size) / 1e9
    peak = {count: 2 * _SIDE**3 / statistics.median(values) / 1e9 for count, values in measured.flops.items()}
    speeds = []
    for contender, turns in measured.samples.items():
        samples = list(itertools.chain(*turns))
        rate = contender.batch_size / statistics.median(samples)
        beside = dataclasses.replace(contender, engine=reference, precision="float32")
        ratio = difference = None
        if beside in measured.samples:
            pairs = zip(measured.samples[beside], turns, strict=True)
            ratio = statistics.median(statistics.median(one) / statistics.median(own) for one, own in pairs)
            difference = float(np.abs(measured.logits[contender] - measured.logits[beside]).max())
        seconds, memory = measured.loads[contender]
        speeds.append(
            Speed(
                contender,
                len(samples),
                {rank: percentile(samples, rank) for rank in _NEEDED},
                rate,
                ratio,
                2 * gmac * rate / peak[contender.threads],
                seconds,
                memory,
                difference,
            )
        )
    machine = f"{processor_name()}, {available_threads()} cores"
    return Bench(
        str(weights.form),
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


def percentile(samples: Sequence[float], rank: int) -> float | None:
    """Milliseconds below which `rank` per cent of the samples (seconds) lie; None where they are too few to say."""
    if len(samples) < _NEEDED[rank]:
        return None
    ordered = sorted(samples)
    if rank == 50:
        return 1e3 * statistics.median(ordered)
    return 1e3 * ordered[math.ceil(rank / 100 * len(ordered)) - 1]


def as_json_ready(found: Bench) -> dict[str, Any]:
    """Everything, for JSON."""
    return dataclasses.asdict(found)


def as_csv(found: Bench) -> str:
    """A row for each contender."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = [f"p{rank}_ms" for rank in _NEEDED]
    names = ("images_per_second", "of_reference", "of_peak", "load_seconds", "memory", "difference")
    writer.writerow(["engine", "precision", "batch_size", "threads", "calls", *ranks, *names])
    for speed in found.speeds:
        row = [*dataclasses.astuple(speed.contender), speed.calls, *speed.percentiles.values()]
        writer.writerow(["" if v is None else v for v in (*row, *(getattr(speed, name) for name in names))])
    return text.getvalue()


def titles(found: Bench) -> tuple[str, str]:
    """Title and subtitle of the picture."""
    return (
        f"{found.network} at {found.size} x {found.size}",
        f"{found.machine}; images per second, normalisation included",
    )


def rows_of_chart(found: Bench) -> list[tuple[str, list[tuple[str, float, bool]]]]:
    """Groups of bars: batch and threads, then engine, images per second, whether it is the reference."""
    groups: dict[str, list[tuple[str, float, bool]]] = {}
    for speed in found.speeds:
        one = speed.contender
        name = one.engine if one.precision == "float32" else f"{one.engine}, {one.precision}"
        group = groups.setdefault(f"batch {one.batch_size}, {one.threads} thread{'s' * (one.threads > 1)}", [])
        group.append((name, speed.images_per_second, one.engine == found.reference and one.precision == "float32"))
    return [(name, sorted(bars, key=lambda bar: -bar[1])) for name, bars in groups.items()]
