"""Measure images per second of decoding, of the model and of the evaluation, and the peak memory.

Run:  .venv/bin/python benchmarks/evaluate.py [--photos FOLDER] [--variant NAME] [--engine NAME] [--repeat N]
          [--json FILE]

The images are copies of the photographs in FOLDER, or generated JPEG files of ImageNet's usual sizes. The weights are
synthetic, for 224 x 224 images. fcvit_digits is so small that decoding takes a large share of the time.
Rates are measured from the end of the first batch, so the start of processes is not included. Decoding workers and the
model share the same cores, so with decoding rate d and model rate m the best rate is 1 / (1/d + 1/m). The model is
measured before and after each evaluation, and plain Pillow before and after decoding. Peak memory is measured for
evaluations in separate processes and includes the decoding workers. The ratios are printed last.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fcvit import evaluate
from fcvit.data.class_folders import read_dataset
from fcvit.data.loader import batches
from fcvit.data.transforms.preprocess import CenterCrop
from fcvit.evaluation.journal import Journal
from fcvit.inference.engines import create_engine
from fcvit.machine import processor_name
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import VARIANTS, Preprocessing
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors
from fcvit.weights.torch_file import write_zip

BATCH = 16
PIXELS = Preprocessing()  # the authors' preprocessing, 224 x 224
PEAK = """
import resource, sys
from fcvit import evaluate
evaluate(sys.argv[1], sys.argv[2], engines=sys.argv[3], device="cpu", workers=2, batch_size=16,
         preprocessing={"input_size": 64}, folder=sys.argv[4])
own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(own + 2 * child)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: generated images)")
    parser.add_argument("--engine", default="torch", choices=("torch", "paddle"))
    parser.add_argument(
        "--variant", default="fcvit_tiny", choices=("fcvit_tiny", "fcvit_digits"), help="default fcvit_tiny"
    )
    parser.add_argument("--repeat", type=int, default=5, help="number of repetitions (default 5)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        photographs(root / "data", arguments.photos, 200)
        count = 200 if arguments.variant == "fcvit_digits" else 80
        photographs(root / "few", arguments.photos, count)
        photographs(root / "many", arguments.photos, 2000)
        weights = root / "weights.pth"
        with weights.open("wb") as file:
            write_zip(file, synthetic_tensors(ModelSpec(VARIANTS[arguments.variant], 1000)))
        rates: dict[str, list[float]] = {}
        for _ in range(arguments.repeat):  # alternate, so that background load affects all measurements
            for what, measure in (
                ("plain before", lambda: plain(root / "many", cores)),
                ("decode", lambda: decode(root / "many", cores)),
                ("plain after", lambda: plain(root / "many", cores)),
                ("before", lambda: model(weights, arguments.engine)),
                ("whole", lambda: evaluation(weights, root / "few", arguments.engine, cores)),
                ("after", lambda: model(weights, arguments.engine)),
            ):
                rates.setdefault(what, []).append(measure())
        peaks = [peak(weights, root / data, arguments.engine, root / f"run-{data}") for data in ("data", "many")]
    for what, before, after in (("model", "before", "after"), ("plain", "plain before", "plain after")):
        rates[what] = [2 / (1 / b + 1 / a) for b, a in zip(rates.pop(before), rates.pop(after), strict=True)]
    medians = {what: statistics.median(values) for what, values in rates.items()}
    # The median of ratios of measurements that are adjacent in time.
    sides = list(zip(*(rates[what] for what in ("plain", "decode", "model", "whole")), strict=True))
    ratios = {
        "decode_over_plain": statistics.median(d / p for p, d, _, _ in sides),
        "whole_over_bound": statistics.median(w * (1 / d + 1 / m) for _, d, m, w in sides),
        "memory_2000_over_200": peaks[1] / peaks[0],
    }
    machine = f"{processor_name()}, {cores} cores, Python {platform.python_version()}"
    results = {"machine": machine, "engine": arguments.engine, "variant": arguments.variant}
    results |= {"images_per_second": rates, "peak_bytes": peaks}
    if arguments.json:
        arguments.json.write_text(json.dumps(results | {"ratios": ratios}, indent=2) + "\n")
    print(machine)
    print(f"{arguments.variant}, engine {arguments.engine}, batch size {BATCH}, median of {arguments.repeat} runs")
    print("images per second:")
    print(f"plain Pillow, {cores} processes: {medians['plain']:.0f}")
    print(f"decoding and transforms, {cores} workers: {medians['decode']:.0f}")
    print(f"model only: {medians['model']:.1f}")
    print(f"evaluation: {medians['whole']:.1f}")
    print(f"peak memory with 200 and 2,000 images: {peaks[0] / 1e6:.0f} and {peaks[1] / 1e6:.0f} MB")
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.3f}")


def photographs(folder: Path, source: Path | None, count: int) -> None:
    """Write `count` photographs to one class folder of ImageNet."""
    class_folder = folder / "n01440764"
    class_folder.mkdir(parents=True)
    if source:
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        for index, path in zip(range(count), itertools.cycle(paths), strict=False):
            shutil.copyfile(path, class_folder / f"{index:04d}.jpg")
        return
    generator = np.random.default_rng(0)
    for index in range(count):
        size = ((500, 375), (375, 500), (500, 333), (640, 480))[index % 4]
        coarse = generator.integers(0, 256, (60, 60, 3), np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        image.save(class_folder / f"{index:04d}.jpg", quality=90)


def decode_with_pillow(paths: list[str]) -> float:
    """Decode and transform images with plain Pillow and return the time in seconds."""
    began = time.perf_counter()
    for path in paths:
        with Image.open(path) as file:
            image = file.convert("RGB")
        width, height = image.size
        scale = 248
        size = (scale, int(scale * height / width)) if width <= height else (int(scale * width / height), scale)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((length - 224) / 2) for length in size)
        np.asarray(image.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1).copy()
    return time.perf_counter() - began


def plain(folder: Path, cores: int) -> float:
    paths = sorted(map(str, folder.rglob("*.jpg")))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(decode_with_pillow, [paths[:4]] * cores, 1)  # warm-up
        began = time.perf_counter()
        pool.map(decode_with_pillow, [paths[core::cores] for core in range(cores)], 1)
        return len(paths) / (time.perf_counter() - began)


def decode(folder: Path, cores: int) -> float:
    images = read_dataset(folder, None, None, 1000)
    count, began = 0, 0.0
    for batch in batches(images, range(-(-len(images) // BATCH)), BATCH, [CenterCrop(PIXELS)], cores):
        if began:
            count += len(batch.indices)
        else:
            began = time.perf_counter()
    return count / (time.perf_counter() - began)


def model(weights: Path, engine: str) -> float:
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 3, 224, 224), np.uint8)
    compute = create_engine(engine, read_weights(weights), PIXELS, "cpu")
    compute(pixels)
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 6:
        compute(pixels)
        rounds += 1
    return rounds * BATCH / (time.perf_counter() - began)


def evaluation(weights: Path, folder: Path, engine: str, cores: int) -> float:
    """Return the images per second of an evaluation, from the end of its first batch to the end of its last."""
    times: list[float] = []
    append = Journal.append

    def timed(*given):
        append(*given)
        times.append(time.perf_counter())

    Journal.append = timed
    try:
        done = evaluate(
            weights, folder, engines=engine, device="cpu", workers=cores, batch_size=BATCH, preprocessing=PIXELS
        )
    finally:
        Journal.append = append
    return (done.results[0].images - BATCH) / (times[-1] - times[0])


def peak(weights: Path, folder: Path, engine: str, run: Path) -> int:
    """Estimate the peak memory in bytes: that of a process plus twice that of its largest worker."""
    words = [sys.executable, "-c", PEAK, *map(str, (weights, folder, engine, run))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
