"""Measure images per second of predicting many images in several ways, beside an evaluation of the same images.

Run:  .venv/bin/python benchmarks/predict.py [--images N] [--weights FILE] [--data FOLDER] [--engine NAME]
          [--workers N] [--repeat N] [--json FILE]

Without --data, the images are copies of the package's digits, which are so small that the work around the network
takes a large share of the time. The ways take turns. Rates are measured from the end of the first batch to the end of
the last, so the start of processes is not included. Ratios are those of the same round.
"""

import argparse
import importlib.resources
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fcvit
from fcvit.cli import main as command_line
from fcvit.commands.quickstart import write_images
from fcvit.data.folders import images_below
from fcvit.evaluation.journal import Journal
from fcvit.machine import processor_name

ASSETS = Path(str(importlib.resources.files("fcvit") / "assets"))
BATCH = 32
REFERENCE = "fcvit eval"


class Work(NamedTuple):
    """What every way does: weights, class folders of images, engine, decoding processes, and a new folder for files."""

    weights: Path
    data: Path
    engine: str
    workers: int
    folder: Path


def predict_command(work: Work) -> float:
    output = work.folder / "predictions.jsonl"
    rate = _rate_of_command(work, "predict", str(work.data), "-o", str(output))
    assert len(output.read_bytes().splitlines()) == len(images_below(work.data))
    return rate


def evaluation(work: Work) -> float:
    return _rate_of_command(work, "eval", "--data", str(work.data), "-o", str(work.folder / "eval"))


def load_and_predict(work: Work) -> float:
    """Measure `fcvit.load(...).stream`, which `predict` collects in a list."""
    predictor = fcvit.load(work.weights, engine=work.engine, device="cpu")
    paths = images_below(work.data)
    times = [time.perf_counter() for _ in predictor.stream(paths, batch_size=BATCH)]
    return (len(paths) - BATCH) / (times[-1] - times[BATCH - 1])


def ray_data(work: Work) -> float:
    """Measure two actors with one CPU each. Reading has another one, so this process and Ray share the cores."""
    import ray.data

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = [str(path) for path in images_below(work.data)]
    read = ray.data.read_binary_files(files, include_paths=True, override_num_blocks=-(-len(files) // BATCH))
    batches = read.map_batches(
        fcvit.Predictor,
        fn_constructor_args=(str(work.weights.absolute()),),
        fn_constructor_kwargs={"engine": work.engine, "device": "cpu"},
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    times: list[tuple[float, int]] = []
    for batch in batches.iter_batches(batch_size=None, prefetch_batches=0):
        times.append((time.perf_counter(), len(batch["path"])))
    ray.shutdown()
    return sum(count for _, count in times[1:]) / (times[-1][0] - times[0][0])


WAYS: dict[str, Callable[[Work], float]] = {
    "fcvit predict": predict_command,
    "fcvit.load().predict": load_and_predict,
    "Ray Data, 2 actors": ray_data,
    REFERENCE: evaluation,
}
"""Name -> function that returns images per second. Add a way here."""


def _rate_of_command(work: Work, *words: str) -> float:
    """Return the images per second of a command, from the end of its first batch to the end of its last."""
    times: list[tuple[float, int]] = []
    append = Journal.append

    def timed(journal, frame):
        append(journal, frame)
        times.append((time.perf_counter(), len(frame.records)))

    Journal.append = timed
    options = ("--engine", work.engine, "--device", "cpu", "--workers", str(work.workers), "--batch-size", str(BATCH))
    try:
        assert command_line([*words, "--weights", str(work.weights), *options, "-q"]) == 0
    finally:
        Journal.append = append
    return sum(count for _, count in times[1:]) / (times[-1][0] - times[0][0])


def write_digits(folder: Path, count: int) -> None:
    with np.load(ASSETS / "digits_held_out.npz", allow_pickle=False) as archive:
        chosen = np.arange(count) % len(archive["labels"])
        write_images(archive["images"][chosen], archive["labels"][chosen], folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000, help="number of generated images (default 4,000)")
    parser.add_argument("--weights", type=Path, default=ASSETS / "digits.pth.tar", help="default the package's digits")
    parser.add_argument("--data", type=Path, help="class folders of images (default: generated images)")
    parser.add_argument("--engine", default="onnxruntime", help="default onnxruntime")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="default one per core")
    parser.add_argument("--repeat", type=int, default=5, help="number of rounds (default 5)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = arguments.data or root / "images"
        if arguments.data is None:
            write_digits(data, arguments.images)
        for turn in range(arguments.repeat):
            for position, (way, measure) in enumerate(WAYS.items()):
                folder = root / f"{turn}-{position}"
                folder.mkdir()
                rates[way].append(measure(Work(arguments.weights, data, arguments.engine, arguments.workers, folder)))
    print(f"{processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {arguments.engine}")
    ratios = {
        way: [rate / other for rate, other in zip(measured, rates[REFERENCE], strict=True)]
        for way, measured in rates.items()
    }
    for way, measured in rates.items():
        median, ratio = statistics.median(measured), statistics.median(ratios[way])
        print(f"{way:22} {median:8.1f} images/s, {ratio:.2f} of {REFERENCE}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rates": rates, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
