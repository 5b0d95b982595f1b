"""Measure how fast the engines are on this machine, beside PyTorch as one would use it without this package.

The images are the same for all, uint8; normalizing them is part of what is measured.
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.commands.options import Ema, File, Output
from fcvit.errors import FcvitError, MissingExtra, NumbersDisagree, UsageError
from fcvit.inference.engines import ENGINES, create_engine
from fcvit.inference.interface import as_list
from fcvit.inference.interleave import Timing, interleave, median_ratio, timed
from fcvit.machine import available_threads, processor_name
from fcvit.models.spec import ModelSpec, multiply_accumulates
from fcvit.models.variants import Preprocessing, Variant, get_variant, resolve_preprocessing
from fcvit.report.charts import Bar, speed_chart
from fcvit.report.progress import progress
from fcvit.text import csv_text
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.reading import Weights, read_weights
from fcvit.weights.synthetic import synthetic_tensors

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("fcvit")

# The reference: PyTorch as a user would have it without any of this.
REFERENCES = ("torch", "torch-channels-last", "torch-compile")
CONTENDERS = (*REFERENCES, *(name for name in ENGINES if name != "torch"))
PRECISIONS = ("float32", "bfloat16")
WRONG = 1e-2  # a float32 output that is further off than this is wrong, whatever the rounding
_HAVE_BFLOAT16 = (*REFERENCES, "openvino")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One thing to measure; `engine` is one of `CONTENDERS`."""

    engine: str
    precision: str
    batch_size: int
    threads: int

    @property
    def label(self) -> str:
        return self.engine if self.precision == "float32" else f"{self.engine}, {self.precision}"

    def __str__(self) -> str:
        return f"{self.label.replace(',', '')}, batch {self.batch_size}, {self.threads} thread(s)"


@dataclasses.dataclass(frozen=True)
class Speed:
    """The measurements of one contender.

    Attributes:
        calls: how many are counted.
        median_ms, rounds_ms: median milliseconds of a batch, over all calls and in each round.
        images_per_second: from the median.
        gflops: GFLOP/s of the network, two for a multiply-accumulate.
        of_reference: speed over the reference's at the same batch size and threads, median over neighbors in time.
        difference: largest absolute difference of an output from the reference contender's; None without one.
    """

    contender: Contender
    calls: int
    median_ms: float
    rounds_ms: tuple[float, ...]
    images_per_second: float
    gflops: float
    of_reference: float | None
    difference: float | None

    @property
    def wrong(self) -> bool:
        """Return whether this is more than rounding: in float32, NaN or `WRONG` and more."""
        return self.contender.precision == "float32" and self.difference is not None and not self.difference < WRONG


@dataclasses.dataclass(frozen=True)
class Bench:
    """A whole measurement.

    Attributes:
        network, size: in words; height and width in pixels.
        machine, versions: what it ran on.
        gmac: multiply-accumulates of one image, in 10^9.
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
    reference: str
    speeds: tuple[Speed, ...]
    skipped: tuple[tuple[str, str], ...]
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"<Bench {self.network}: {len(self.speeds)} contenders, ratios to {self.reference}>"

    @property
    def exit_code(self) -> int:
        return NumbersDisagree.exit_code if any(speed.wrong for speed in self.speeds) else 0

    def to_json(self) -> dict[str, Any]:
        """Return everything; `wrong` says of each what a difference of NaN, which JSON does not have, would."""
        speeds = [dataclasses.asdict(speed) | {"wrong": speed.wrong} for speed in self.speeds]
        return dataclasses.asdict(self) | {"speeds": speeds}

    def to_csv(self) -> str:
        """Return a row for each contender; what is None is empty."""
        rows = [vars(speed.contender) | vars(speed) | {"wrong": int(speed.wrong)} for speed in self.speeds]
        names = [name for name in rows[0] if name not in ("contender", "rounds_ms")]
        return csv_text([names, *([row[name] for name in names] for row in rows)], "\n")

    def tables(self) -> "Iterator[Table | str]":
        from fcvit.report.tables import table

        columns = ("batch", "threads", "images/s", "median ms", "ratio", "GFLOP/s", "outputs differ by")
        rows = []
        for speed in self.speeds:
            one = speed.contender
            cells = [one.label, str(one.batch_size), str(one.threads)]
            cells += [f"{speed.images_per_second:.1f}", f"{speed.median_ms:.1f}"]
            cells += ["-" if speed.of_reference is None else f"{speed.of_reference:.2f}", f"{speed.gflops:.1f}"]
            cells += ["-" if speed.difference is None else f"{speed.difference:.1e}{' WRONG' * speed.wrong}"]
            rows.append(cells)
        title = f"{self.network} at {self.size} x {self.size}, {self.machine}; ratios to {self.reference}"
        yield table("engine", *columns, rows=rows, title=title, right=columns)
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        image = f"{self.gmac:.3g} GMAC; uint8, normalizing included"
        yield table(rows=[("one image", image), ("versions", versions)])
        if self.skipped:
            yield table("not measured", "reason", rows=self.skipped)
        if self.folder:
            yield f"written to {self.folder}"

    def bars(self) -> list[tuple[str, list[Bar]]]:
        """Return the bars of a chart, the fastest first, in a group for each batch size and number of threads."""
        groups: dict[str, list[Bar]] = {}
        for speed in self.speeds:
            one = speed.contender
            low, high = (1e3 * one.batch_size / extreme(speed.rounds_ms) for extreme in (max, min))
            reference = one.engine == self.reference and one.precision == "float32"
            group = groups.setdefault(f"batch {one.batch_size}, {one.threads} thread{'s' * (one.threads > 1)}", [])
            group.append(Bar(one.label, speed.images_per_second, low, high, reference))
        return [(name, sorted(bars, key=lambda bar: -bar.rate)) for name, bars in groups.items()]

    def write(self, folder: Path) -> None:
        """Write bench.json, bench.csv and, where charts can be drawn, bench.png."""
        runs.write_json(folder / "bench.json", self.to_json())
        runs.write_text(folder / "bench.csv", self.to_csv())
        about = f"{self.machine}; images per second, normalization included; lines: the range of the rounds"
        try:
            picture = speed_chart(self.bars(), f"{self.network} at {self.size} x {self.size}", about)
        except MissingExtra as error:
            logger.info(f"no picture: {error}")
        else:
            runs.write_bytes(folder / "bench.png", picture)


def _separated(option: str, kind: Callable[[str], Any] = str) -> Parameter:
    """Define an option whose values are separated by commas on the command line."""

    def convert(_: Any, tokens: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(kind(part) for token in tokens for part in token.value.split(",") if part)

    return Parameter(name=option, converter=convert, n_tokens=1, negative=(), show_default=False)


def bench(
    weights: Annotated[Any, Parameter()] = None,
    *,
    variant: Annotated[Any, Parameter()] = None,
    engines: Annotated[Sequence[str], _separated("--engine")] = (),
    batch_sizes: Annotated[Sequence[int], _separated("--batch-size", int)] = (1, 8),
    threads: Annotated[Sequence[int], _separated("--threads", int)] = (),
    precisions: Annotated[Sequence[str], _separated("--precision")] = ("float32",),
    size: int | None = None,
    rounds: int = 7,
    reference: str | None = None,
    ema: Ema = None,
    folder: Annotated[File | None, Output] = None,
    csv: File | None = None,
) -> Bench:
    """Measure how fast the engines are on this machine, in turn, beside PyTorch.

    Args:
        weights: A checkpoint of any format, in Python also weights in memory (default: synthetic ones, as fast).
        variant: The network of synthetic weights (default: fcvit_tiny).
        engines: Separated by commas (default: all that are installed, and torch, torch-channels-last, torch-compile).
        batch_sizes: Images at a time, separated by commas (default: 1,8).
        threads: Threads that compute, separated by commas (default: one for each core).
        precisions: float32 (default), bfloat16, separated by commas; engines that do not have one are skipped.
        size: Height and width of the images in pixels (default: the weights' own).
        rounds: Number of measurement rounds; a turn takes 0.3 seconds or three calls.
        reference: What ratios refer to (default: torch-channels-last where it could be measured, else the first).
        folder: New folder for bench.json, bench.csv and bench.png.
        csv: Write the table into this file.

    Raises:
        UsageError: A wrong name or number, or the folder is not empty; before anything is measured.
        MissingExtra: Nothing could be measured, as nothing is installed.
        FcvitError: Nothing could be measured; of the kind of the first engine's error.
        UnreadableFile, DoesNotFit: The weights.
    """
    names = tuple(dict.fromkeys(engines)) or CONTENDERS
    counts = tuple(dict.fromkeys(threads)) or (available_threads(),)
    for option, values, known in (("engine", names, CONTENDERS), ("precision", precisions, PRECISIONS)):
        for value in values:
            if value not in known:
                raise UsageError(f"--{option} {value!r}: expected {', '.join(known)}")
    if reference and reference not in names:
        raise UsageError(f"--reference {reference} is not measured; add it to --engine")
    if not batch_sizes or min(rounds, *batch_sizes, *counts, 1 if size is None else size) < 1:
        raise UsageError("rounds, batch sizes, threads and size are at least 1")
    if csv is not None and not Path(csv).absolute().parent.is_dir():
        raise UsageError(f"--csv {csv}: there is no folder {Path(csv).absolute().parent}")
    settings = itertools.product(counts, dict.fromkeys(batch_sizes), dict.fromkeys(precisions), names)
    requested = [Contender(name, precision, batch, count) for count, batch, precision, name in settings]
    possible = [one for one in requested if one.precision == "float32" or one.engine in _HAVE_BFLOAT16]
    if not possible:
        raise UsageError(f"--precision {','.join(precisions)}: {', '.join(names)} cannot; add float32")
    skipped = [(str(one), f"{one.engine} has no {one.precision} on a CPU") for one in requested if one not in possible]
    read = _weights(weights, variant, ema)
    pixels = resolve_preprocessing(None, read.preprocessing, read.spec.variant)
    pixels = dataclasses.replace(pixels, input_size=size or pixels.input_size)
    with contextlib.nullcontext() if folder is None else runs.run_folder(Path(folder), "bench") as target:
        timings = _measure(possible, read, pixels, rounds)
        errors = {one: error for one, error in timings.items() if isinstance(error, FcvitError)}
        if len(errors) == len(timings):
            one, error = next(iter(errors.items()))
            raise type(error)(f"no engine could be measured; {one}: {error}")
        skipped += [(str(one), str(error)) for one, error in errors.items()]
        measured = {one: timing for one, timing in timings.items() if isinstance(timing, Timing)}
        result = dataclasses.replace(_bench(measured, read, pixels, reference, skipped), folder=target)
        if reference and result.reference != reference:
            logger.info(f"{reference} could not be measured: ratios are to {result.reference}")
        if target is not None:
            result.write(target)
    if csv is not None:
        runs.write_text(Path(csv), result.to_csv())
    return result


def _weights(source: Weights | File | None, variant: Variant | str | None, ema: bool | None) -> Weights:
    """Return weights that can be sent to another process: in memory, not as views of a file."""
    if source is None:
        return synthetic_weights(get_variant(variant or "fcvit_tiny"))
    if variant is not None:
        raise UsageError("--variant is for synthetic weights; a file of weights says itself which variant it is")
    read = source if isinstance(source, Weights) else read_weights(source, ema)
    checkpoint = Checkpoint(read.source.path, MEMORY, {}, None, b"")
    return dataclasses.replace(read, tensors={n: np.array(t) for n, t in read.tensors.items()}, source=checkpoint)


def synthetic_weights(variant: Variant) -> Weights:
    logger.info(f"no weights given: {variant.name} with synthetic weights, which are as fast as trained ones")
    spec = ModelSpec(variant, 1000)
    source = Checkpoint(Path(f"{variant.name} synthetic"), MEMORY, {}, None, b"")
    return Weights(spec, synthetic_tensors(spec), source, "torch", None, None, (), ())


def _measure(
    contenders: Sequence[Contender], weights: Weights, pixels: Preprocessing, rounds: int
) -> dict[Contender, Timing | FcvitError]:
    """Measure group by group: only those that are compared live at the same time."""
    timings: dict[Contender, Timing | FcvitError] = {}
    load = functools.partial(_load, weights=weights, pixels=pixels)
    with progress("measuring", (1 + rounds) * len(contenders), "turns") as advance:  # loading counts as one
        for _, group in itertools.groupby(contenders, key=lambda one: (one.threads, one.batch_size)):
            timings |= interleave(load, list(group), rounds, advance=advance)
    return timings


def _load(job: Contender, weights: Weights, pixels: Preprocessing) -> tuple[Callable[[], float], list[np.ndarray]]:
    if job.engine in REFERENCES:
        # Its threads wait as PyTorch lets them: `import_framework` would let them sleep, which is gentler beside
        # other work and, alone on a machine, up to twice as slow.
        with contextlib.suppress(ImportError):
            importlib.import_module("torch")
    name = "torch" if job.engine in REFERENCES else job.engine
    engine: Any = create_engine(name, weights, pixels, "cpu", job.precision, job.threads)
    if job.engine in ("torch-channels-last", "torch-compile"):
        engine.model = engine.model.to(memory_format=engine.torch.channels_last)  # the images follow its weights
    if job.engine == "torch-compile":
        engine.model = engine.torch.compile(engine.model)
    shape = (job.batch_size, 3, pixels.input_size, pixels.input_size)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return timed(lambda: engine(images)), as_list(engine(images))


def _bench(
    timings: dict[Contender, Timing],
    weights: Weights,
    pixels: Preprocessing,
    reference: str | None,
    skipped: Sequence[tuple[str, str]],
) -> Bench:
    present = list(dict.fromkeys(contender.engine for contender in timings))
    if reference not in present:
        reference = "torch-channels-last" if "torch-channels-last" in present else present[0]
    gmac = multiply_accumulates(weights.spec, pixels.input_size, pixels.input_size) / 1e9
    medians = {one: [1e3 * statistics.median(turn) for turn in timing.rounds] for one, timing in timings.items()}
    speeds = []
    for contender, timing in timings.items():
        samples = [1e3 * second for turn in timing.rounds for second in turn]
        median = statistics.median(samples)
        rate = 1e3 * contender.batch_size / median
        base = dataclasses.replace(contender, engine=reference, precision="float32")
        ratio = difference = None
        if base in timings:
            ratio = median_ratio(medians[base], medians[contender])
            difference = _difference(timing.about, timings[base].about)
        times = (len(samples), median, tuple(medians[contender]), rate, 2 * gmac * rate)
        speeds.append(Speed(contender, *times, ratio, difference))
    machine = f"{processor_name()}, {available_threads()} cores"
    about = (str(weights.spec), pixels.input_size, machine, runs.versions(), gmac, reference)
    return Bench(*about, tuple(speeds), tuple(skipped))


def _difference(outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference; NaN where there is one, or where the shapes are not even the same."""
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        return math.nan
    return float(np.max([np.abs(one - other).max() for one, other in zip(outputs, expected, strict=True)]))
