"""Measure the speed of the engines on this machine, compared with plain PyTorch.

All engines get the same uint8 images. The measured time includes normalization. A loop of nothing but fused
multiply-adds (FMA) takes turns with them. Its speed is the limit of the processor.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.commands.options import Ema, File, Flag, Output, parse_size
from fcvit.data.transforms.detection import pad_batch
from fcvit.data.transforms.segmentation import aligned_size
from fcvit.errors import FcvitError, MissingExtra, NumbersDisagree, UsageError
from fcvit.inference.detector import TRUNK, parts
from fcvit.inference.engines import ENGINES, create_engine
from fcvit.inference.interface import as_list
from fcvit.inference.interleave import Timing, interleave, median_ratio, timed
from fcvit.inference.native_network import NativeNetwork, unsupported
from fcvit.machine import available_threads, processor_name
from fcvit.models.spec import ModelSpec, multiply_accumulates
from fcvit.models.variants import Preprocessing, Variant, get_variant, resolve_preprocessing
from fcvit.native import build as native
from fcvit.report.charts import Bar, speed_chart
from fcvit.report.progress import progress
from fcvit.text import csv_text
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.reading import Weights, read_weights
from fcvit.weights.synthetic import synthetic_tensors

logger = logging.getLogger("fcvit")

# PyTorch as it is used without this package.
REFERENCES = ("torch", "torch-channels-last", "torch-compile")
CONTENDERS = (*REFERENCES, *(name for name in ENGINES if name != "torch"))
PEAK = "FMA peak"  # a contender that only the others are compared with
PRECISIONS = ("float32", "bfloat16")
WRONG = 1e-2  # a larger difference of a float32 output cannot be a rounding error
_BOX_SPREAD = 4  # factor of the deltas of the proposals
_HAVE_BFLOAT16 = (*REFERENCES, "openvino")
_PEAK_ROUNDS = 10_000_000  # of the loop, about 20 ms


@dataclasses.dataclass(frozen=True)
class Contender:
    """A configuration to measure. `engine` is one of `CONTENDERS` or `PEAK`.

    `part` is "trunk" for a detector's trunk alone.
    """

    engine: str
    precision: str
    batch_size: int
    threads: int
    part: str = ""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.engine, self.precision.removeprefix("float32"), self.part)))

    def __str__(self) -> str:
        return f"{self.label.replace(',', '')}, batch {self.batch_size}, {self.threads} thread(s)"


@dataclasses.dataclass(frozen=True)
class Speed:
    """The measurements of one contender.

    Attributes:
        contender: The measured configuration.
        calls: Number of timed calls.
        median_ms: Median time per batch over all calls, in milliseconds.
        rounds_ms: Median time per batch in each round, in milliseconds.
        images_per_second: Throughput, computed from the median time.
        gflops: GFLOP/s of the network. A multiply-accumulate counts as two operations.
        peak: GFLOP/s of the FMA loop with the same number of threads, the median of the same rounds. None if it could
            not be compiled, and for other precisions than float32.
        of_peak: `gflops` over `peak`. Median of the ratios of the rounds. Algorithms that need fewer operations than
            counted, such as Winograd's, can exceed 1.
        of_reference: Speed relative to the reference with the same batch size, threads and part. Median of the ratios
            of the rounds. None without a reference.
        difference: Largest absolute difference between the outputs and the reference outputs, for a detector between
            the sorted scores. None without a reference.
    """

    contender: Contender
    calls: int
    median_ms: float
    rounds_ms: tuple[float, ...]
    images_per_second: float
    gflops: float
    peak: float | None
    of_peak: float | None
    of_reference: float | None
    difference: float | None

    @property
    def wrong(self) -> bool:
        """Return whether a float32 output is wrong: NaN, or at least `WRONG` away from the reference."""
        return self.contender.precision == "float32" and self.difference is not None and not self.difference < WRONG


@dataclasses.dataclass(frozen=True)
class Operators:
    """The measurements of one kind of operator of the native engine, for one image and one thread.

    Attributes:
        kind: Kind of operator, such as 1x1 convolutions.
        ms: Median time in milliseconds.
        gflops: GFLOP/s, 0 for operators whose operations are not counted.
        of_peak: `gflops` over the speed of the FMA loop.
    """

    kind: str
    ms: float
    gflops: float
    of_peak: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """The result of a benchmark.

    Attributes:
        network: Description of the network.
        size: Height and width of the images in pixels, without padding.
        machine: Description of the machine.
        versions: Versions of Python and the packages.
        gmac: Multiply-accumulates for one image, in 10^9.
        reference: Name of the engine that ratios and differences refer to.
        speeds: Measurements of all contenders that ran.
        skipped: The contenders that did not run, with the reason.
        profile: Time of the native engine by kind of operator, if it was requested. For a detector, of its trunk.
        folder: Folder of the written files, or None.
    """

    network: str
    size: tuple[int, int]
    machine: str
    versions: dict[str, str]
    gmac: float
    reference: str
    speeds: tuple[Speed, ...]
    skipped: tuple[tuple[str, str], ...]
    profile: tuple[Operators, ...] = ()
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"<Bench {self.network}: {len(self.speeds)} contenders, ratios to {self.reference}>"

    @property
    def _title(self) -> str:
        return f"{self.network} at {self.size[0]} x {self.size[1]}"

    @property
    def exit_code(self) -> int:
        return NumbersDisagree.exit_code if any(speed.wrong for speed in self.speeds) else 0

    def to_json(self) -> dict[str, Any]:
        """Return all fields. `wrong` marks wrong outputs, because JSON cannot store a difference of NaN."""
        speeds = [dataclasses.asdict(speed) | {"wrong": speed.wrong} for speed in self.speeds]
        return dataclasses.asdict(self) | {"speeds": speeds}

    def to_csv(self) -> str:
        """Return a CSV table with a row for each contender. Fields with the value None are empty."""
        rows = [vars(speed.contender) | vars(speed) | {"wrong": int(speed.wrong)} for speed in self.speeds]
        names = [name for name in rows[0] if name not in ("contender", "rounds_ms")]
        return csv_text([names, *([row[name] for name in names] for row in rows)], "\n")

    def tables(self) -> Iterator[Any]:
        from fcvit.report.tables import table

        columns = ("batch", "threads", "images/s", "median ms", "ratio", "GFLOP/s", "of peak", "outputs differ by")
        rows = []
        for speed in self.speeds:
            contender = speed.contender
            cells = [contender.label, str(contender.batch_size), str(contender.threads)]
            rate = speed.images_per_second
            cells += [f"{rate:.1f}" if rate >= 10 else f"{rate:.3g}", f"{speed.median_ms:.1f}"]
            cells += ["-" if speed.of_reference is None else f"{speed.of_reference:.2f}", f"{speed.gflops:.1f}"]
            cells += ["-" if speed.of_peak is None else f"{speed.of_peak:.0%}"]
            cells += ["-" if speed.difference is None else f"{speed.difference:.1e}{' WRONG' * speed.wrong}"]
            rows.append(cells)
        title = f"{self._title}, {self.machine}; ratios to {self.reference}"
        yield table("engine", *columns, rows=rows, title=title, right=columns)
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        image = f"{self.gmac:.3g} GMAC, uint8, time includes normalization"
        peaks = {speed.contender.threads: speed.peak for speed in self.speeds if speed.peak}
        limits = [f"{peak:.0f} GFLOP/s with {threads} thread(s)" for threads, peak in peaks.items()]
        yield table(rows=[("one image", image), *([(PEAK, ", ".join(limits))] * bool(limits)), ("versions", versions)])
        if self.profile:
            yield self._profile_table()
        if self.skipped:
            yield table("not measured", "reason", rows=self.skipped)
        if self.folder:
            yield f"written to {self.folder}"

    def _profile_table(self) -> Any:
        from fcvit.report.tables import table

        total = sum(one.ms for one in self.profile)
        rows = [
            (one.kind, f"{one.ms:.2f}", f"{one.ms / total:.0%}")
            + ((f"{one.gflops:.1f}", f"{one.of_peak:.0%}") if one.gflops else ("-", "-"))
            for one in self.profile
        ]
        columns = ("ms", "of time", "GFLOP/s", "of peak")
        title = f"native engine, {self._title}: one image, one thread"
        return table(
            "operators", *columns, rows=[*rows, ("total", f"{total:.2f}", "", "", "")], title=title, right=columns
        )

    def bars(self) -> list[tuple[str, list[Bar]]]:
        """Return the bars of the chart, grouped by batch size and number of threads, the fastest first."""
        groups: dict[str, list[Bar]] = {}
        for speed in self.speeds:
            contender = speed.contender
            batch, threads = contender.batch_size, contender.threads
            low, high = (1e3 * batch / extreme(speed.rounds_ms) for extreme in (max, min))
            reference = contender.engine == self.reference and contender.precision == "float32"
            title = f"{contender.part and f'{contender.part}, '}batch {batch}, {threads} thread{'s' * (threads > 1)}"
            group = groups.setdefault(title, [])
            group.append(Bar(contender.label, speed.images_per_second, low, high, reference))
        return [(name, sorted(bars, key=lambda bar: -bar.rate)) for name, bars in groups.items()]

    def write(self, folder: Path) -> None:
        """Write bench.json and bench.csv, and also bench.png if charts can be drawn."""
        runs.write_json(folder / "bench.json", self.to_json())
        runs.write_text(folder / "bench.csv", self.to_csv())
        about = f"{self.machine}; images per second including normalization (lines: range of the rounds)"
        try:
            picture = speed_chart(self.bars(), self._title, about)
        except MissingExtra as error:
            logger.info(f"bench.png is not written: {error}")
        else:
            runs.write_bytes(folder / "bench.png", picture)


def _separated(option: str, kind: Callable[[str], Any] = str) -> Parameter:
    """Return a parameter for an option with values separated by commas."""

    def convert(_: Any, tokens: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(kind(part) for token in tokens for part in token.value.split(",") if part)

    return Parameter(name=option, converter=convert, n_tokens=1, negative=(), show_default=False)


def bench(
    weights: Annotated[Any, Parameter()] = None,
    *,
    variant: Annotated[Any, Parameter()] = None,
    task: Literal["classification", "segmentation", "detection"] | None = None,
    engines: Annotated[Sequence[str], _separated("--engine")] = (),
    batch_sizes: Annotated[Sequence[int] | None, _separated("--batch-size", int)] = None,
    threads: Annotated[Sequence[int], _separated("--threads", int)] = (),
    precisions: Annotated[Sequence[str], _separated("--precision")] = ("float32",),
    size: Annotated[Any, Parameter()] = None,
    rounds: int = 7,
    reference: str | None = None,
    profile: Flag = False,
    ema: Ema = None,
    folder: Annotated[File | None, Output] = None,
    csv: File | None = None,
) -> Bench:
    """Measure the speed of the engines on this machine, compared with PyTorch. The engines take turns.

    Args:
        weights: A checkpoint of any format (in Python also a `Weights` object) (default: synthetic weights).
        variant: Variant of the synthetic weights (default: fcvit_tiny).
        task: Task of the synthetic weights (default: classification).
        engines: Engines, separated by commas (default: all installed engines, torch-channels-last, torch-compile).
        batch_sizes: Batch sizes, separated by commas (default: 1,8, for a detector 1).
        threads: Numbers of CPU threads, separated by commas (default: one per core).
        precisions: float32 (default) and bfloat16, separated by commas. Engines without a precision are skipped.
        size: Image size, for example 224 or 800x1333 (height x width; default: the input size of the weights, the
            shorter side for segmentation, and the largest size for detection).
        rounds: Number of rounds. In each round, every engine runs for at least 0.4 seconds and three calls.
        reference: Engine that ratios refer to (default: torch-channels-last if it was measured, else the first).
        profile: Also measure the native engine by kind of operator, with one image and one thread.
        folder: New folder for bench.json, bench.csv and bench.png.
        csv: File for the results as CSV.

    Raises:
        UsageError: A name or number is invalid, or the folder is not empty. Raised before any measurement.
        MissingExtra: Nothing could be measured, because no engine is installed.
        FcvitError: Nothing could be measured. The type is that of the first engine's error.
        UnreadableFile, DoesNotFit: The weights cannot be read.
    """
    names = tuple(dict.fromkeys(engines)) or CONTENDERS
    counts = tuple(dict.fromkeys(threads)) or (available_threads(),)
    for option, values, known in (("engine", names, CONTENDERS), ("precision", precisions, PRECISIONS)):
        for value in values:
            if value not in known:
                raise UsageError(f"--{option} {value!r}: expected {', '.join(known)}")
    if reference and reference not in names:
        raise UsageError(f"--reference {reference}: not among the measured engines; add it to --engine")
    size = parse_size(size)
    if (batch_sizes is not None and not batch_sizes) or min(rounds, *(batch_sizes or ()), *counts) < 1:
        raise UsageError("--rounds, --batch-size and --threads: expected at least 1")
    if csv is not None and not Path(csv).absolute().parent.is_dir():
        raise UsageError(f"--csv {csv}: the folder {Path(csv).absolute().parent} does not exist; create it first")
    read = _weights(weights, variant, task, ema)
    detector = read.spec.task == "detection"
    batches = dict.fromkeys(batch_sizes or ((1,) if detector else (1, 8)))
    settings = itertools.product(
        counts, batches, ("", TRUNK) if detector else ("",), dict.fromkeys(precisions), (*names, PEAK)
    )
    requested = [Contender(name, precision, batch, count, part) for count, batch, part, precision, name in settings]
    possible = [job for job in requested if job.precision == "float32" or job.engine in _HAVE_BFLOAT16]
    if all(job.engine == PEAK for job in possible):
        raise UsageError(f"--precision {','.join(precisions)}: not supported by {', '.join(names)}; add float32")
    impossible = [job for job in requested if job not in possible and job.engine != PEAK]
    skipped = [(str(job), f"{job.engine} has no {job.precision} on a CPU") for job in impossible]
    pixels = resolve_preprocessing(None, read.preprocessing, read.spec.variant)
    short = read.spec.short_side or pixels.input_size
    size = size or (short, read.spec.options.long_side if detector else short)
    pixels = dataclasses.replace(pixels, input_size=size[0])
    with contextlib.nullcontext() if folder is None else runs.run_folder(Path(folder), "bench") as target:
        timings: dict[Contender, Timing | FcvitError] = {}
        load = functools.partial(_load, weights=read, pixels=pixels, size=size)
        calls = 1 if detector else 3  # a detection takes seconds
        with contextlib.suppress(MissingExtra):  # the contenders that need it report the error
            native.library()
        with progress("measuring", (1 + rounds) * len(possible), "measurements") as advance:  # loading counts as one
            # To save memory, only contenders that are compared with each other are loaded at the same time.
            for _, group in itertools.groupby(possible, key=lambda job: (job.threads, job.batch_size, job.part)):
                timings |= interleave(load, list(group), rounds, calls=calls, advance=advance)
        errors = {job: error for job, error in timings.items() if isinstance(error, FcvitError)}
        if {job.engine for job in timings if job not in errors} <= {PEAK}:
            job, error = next((job, error) for job, error in errors.items() if job.engine != PEAK)
            raise type(error)(f"no engine could be measured: {job}: {error}")
        skipped += [(str(job), str(error)) for job, error in errors.items() if job.engine != PEAK]
        skipped += dict.fromkeys((PEAK, str(error)) for job, error in errors.items() if job.engine == PEAK)
        measured = {job: timing for job, timing in timings.items() if isinstance(timing, Timing)}
        operators: tuple[Operators, ...] = ()
        if profile:
            try:
                operators = _profile(read, pixels, size, rounds)
            except MissingExtra as error:
                skipped.append(("profile", str(error)))
        result = _bench(measured, read, size, reference, skipped)
        result = dataclasses.replace(result, profile=operators, folder=target)
        if reference and result.reference != reference:
            logger.info(f"{reference} could not be measured, so ratios refer to {result.reference}")
        if target is not None:
            result.write(target)
    if csv is not None:
        runs.write_text(Path(csv), result.to_csv())
    return result


def _weights(
    source: Weights | File | None, variant: Variant | str | None, task: str | None, ema: bool | None
) -> Weights:
    """Return weights that can be sent to another process: arrays in memory instead of views of a file."""
    if source is None:
        return synthetic_weights(get_variant(variant or "fcvit_tiny"), task or "classification")
    for option, value in (("variant", variant), ("task", task)):
        if value is not None:
            raise UsageError(f"--{option} applies to synthetic weights only; leave it out, the weights file defines it")
    read = source if isinstance(source, Weights) else read_weights(source, ema)
    checkpoint = Checkpoint(read.source.path, MEMORY, {}, None, b"")
    return dataclasses.replace(read, tensors={n: np.array(t) for n, t in read.tensors.items()}, source=checkpoint)


def synthetic_weights(variant: Variant, task: str = "classification") -> Weights:
    logger.info(f"no weights given: using {variant.name} with synthetic weights, which have the same speed")
    heads = {"segmentation": (150, "semantic_fpn"), "detection": (80, "mask_rcnn")}
    classes, head = heads.get(task, (1000, "classifier"))
    spec = ModelSpec(variant, classes, head)
    tensors = synthetic_tensors(spec)
    if task == "detection":
        # Proposals of different sizes, so that RoIs are on all feature maps.
        tensors["rpn_head.rpn_reg.weight"] *= np.float32(_BOX_SPREAD)
    source = Checkpoint(Path(f"{variant.name} synthetic"), MEMORY, {}, None, b"")
    return Weights(spec, tensors, source, "torch", None, None, (), ())


def _load(
    job: Contender, weights: Weights, pixels: Preprocessing, size: tuple[int, int]
) -> tuple[Callable[[], float], list[np.ndarray]]:
    if job.engine == PEAK:
        return fma_peak(job.threads), []
    detector = weights.spec.task == "detection"
    if detector and job.engine == "torch-compile":
        raise UsageError("torch-compile cannot compile the selection of boxes")
    if job.engine in REFERENCES:
        # Import PyTorch directly to keep its default, where waiting threads spin. `import_framework` makes them sleep,
        # which helps when other processes run, but is up to twice as slow on an idle machine.
        with contextlib.suppress(ImportError):
            importlib.import_module("torch")
    name = "torch" if job.engine in REFERENCES else job.engine
    engine: Any = create_engine(name, weights, pixels, "cpu", job.precision, job.threads)
    if job.engine in ("torch-channels-last", "torch-compile"):
        engine.model = engine.model.to(memory_format=engine.torch.channels_last)  # activations follow the weights
    if job.engine == "torch-compile":
        engine.model = engine.torch.compile(engine.model)
    images = np.random.default_rng(0).integers(0, 256, (job.batch_size, 3, *size), np.uint8)
    if not detector:
        return timed(lambda: engine(images)), as_list(engine(images))
    padded, sizes = pad_batch(list(images))
    if job.part:
        return timed(lambda: engine(padded)), engine(padded)
    results = engine.detect(padded, sizes)
    scores = [np.pad(one.scores, (0, weights.spec.options.max_detections - len(one.scores))) for one in results]
    return timed(lambda: engine.detect(padded, sizes)), scores


def fma_peak(threads: int) -> Callable[[], float]:
    """Return a function that returns the GFLOP/s of a loop of nothing but FMAs, which runs on all threads at once.

    Raises:
        MissingExtra: The native library cannot be compiled.
    """
    loop, pool = native.library().fcvit_fma_peak, ThreadPoolExecutor(threads)

    def operations(_: int) -> float:
        result = (ctypes.c_double * 2)()
        loop(ctypes.c_int64(_PEAK_ROUNDS), result)
        return result[1]

    def measure() -> float:
        began = time.perf_counter()
        return sum(pool.map(operations, range(threads))) / (time.perf_counter() - began) / 1e9

    return measure


def _profile(weights: Weights, pixels: Preprocessing, size: tuple[int, int], rounds: int) -> tuple[Operators, ...]:
    """Measure the native engine by kind of operator, in turns with the FMA loop."""
    if reason := unsupported(weights.spec):
        raise MissingExtra(reason)
    peak, network = fma_peak(1), NativeNetwork(weights, pixels, 1, parts(weights.spec)[0])
    images = np.random.default_rng(0).integers(0, 256, (1, 3, *size), np.uint8)
    if weights.spec.task == "detection":
        images = pad_batch(list(images))[0]
    times: dict[str, list[float]] = {}
    rates: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        limit = peak()
        for kind, seconds, operations in network.profile(images, 1):
            times.setdefault(kind, []).append(1e3 * seconds)
            gflops = operations and operations / seconds / 1e9
            rates.setdefault(kind, []).append((gflops, gflops / limit))
    return tuple(
        Operators(kind, statistics.median(ms), *map(statistics.median, zip(*rates[kind], strict=True)))
        for kind, ms in times.items()
    )


def _bench(
    timings: dict[Contender, Timing],
    weights: Weights,
    size: tuple[int, int],
    reference: str | None,
    skipped: Sequence[tuple[str, str]],
) -> Bench:
    loops = {job: timing.rounds for job, timing in timings.items() if job.engine == PEAK}
    timings = {job: timing for job, timing in timings.items() if job.engine != PEAK}
    present = list(dict.fromkeys(contender.engine for contender in timings))
    if reference not in present:
        reference = "torch-channels-last" if "torch-channels-last" in present else present[0]
    padded = aligned_size(size) if weights.spec.task == "detection" else size
    gmac, trunk_gmac = (multiply_accumulates(weights.spec, *padded, trunk=trunk) / 1e9 for trunk in (False, True))
    medians = {job: [1e3 * statistics.median(turn) for turn in timing.rounds] for job, timing in timings.items()}
    speeds = []
    for contender, timing in timings.items():
        samples = [1e3 * second for turn in timing.rounds for second in turn]
        median = statistics.median(samples)
        rate = 1e3 * contender.batch_size / median
        base = dataclasses.replace(contender, engine=reference, precision="float32")
        operations = 2 * (trunk_gmac if contender.part else gmac) * contender.batch_size  # in 10^9
        peak = of_peak = ratio = difference = None
        if loop := loops.get(dataclasses.replace(contender, engine=PEAK)):
            limits = [statistics.median(turn) for turn in loop]
            peak = statistics.median(limits)
            of_peak = median_ratio([1e3 * operations / ms for ms in medians[contender]], limits)
        if base in timings:
            ratio = median_ratio(medians[base], medians[contender])
            difference = _difference(timing.about, timings[base].about)
        times = (len(samples), median, tuple(medians[contender]), rate, 1e3 * operations / median)
        speeds.append(Speed(contender, *times, peak, of_peak, ratio, difference))
    machine = f"{processor_name()}, {available_threads()} cores"
    about = (str(weights.spec), size, machine, runs.versions(), gmac, reference)
    return Bench(*about, tuple(speeds), tuple(skipped))


def _difference(outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Return the largest absolute difference, or NaN if an output contains NaN or the shapes differ."""
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        return math.nan
    return float(np.max([np.abs(one - other).max() for one, other in zip(outputs, expected, strict=True)]))
