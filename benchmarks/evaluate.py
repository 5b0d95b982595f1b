"""Measure images per second of decoding, of the model and of the evaluation, and the peak memory.

Run:  .venv/bin/python benchmarks/evaluate.py [--task TASK] [--photos FOLDER] [--variant NAME] [--engine NAME]
          [--repeat N] [--json FILE]

The weights are synthetic. For classification, the images are copies of the photographs in FOLDER, or generated JPEG
files of ImageNet's usual sizes, and the network takes 224 x 224 pixels. fcvit_digits is so small that decoding takes a
large share of the time. For segmentation, the images are generated JPEG files of 683 x 512 pixels with label maps of
150 classes.

Rates are measured from the end of the first batch, so the start of processes and the report are not included. Decoding
workers and the model share the same cores, so with decoding rate d and model rate m the best rate is 1 / (1/d + 1/m).
The model is measured before and after each evaluation. For classification, plain Pillow is measured before and after
decoding, and the peak memory of evaluations in separate processes, with their decoding workers. The ratios are printed
last.
"""

import argparse
import functools
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fcvit import evaluate
from fcvit.commands.bench import synthetic_weights
from fcvit.data.loader import batches
from fcvit.data.transforms.preprocess import decode
from fcvit.evaluation.journal import Journal
from fcvit.inference.engines import create_engine
from fcvit.machine import processor_name
from fcvit.models.variants import VARIANTS, Preprocessing
from fcvit.tasks.base import get_task
from fcvit.weights.reading import Weights
from fcvit.weights.torch_file import write_zip

CORES = os.cpu_count() or 1
BATCH = {"classification": 16, "segmentation": 1}
ENGINE = {"classification": "torch", "segmentation": "onnxruntime"}
PIXELS = Preprocessing()  # of classification: the authors' preprocessing, 224 x 224
HEIGHT, WIDTH, CLASSES = 512, 683, 150  # of segmentation
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
    parser.add_argument("--task", default="classification", choices=tuple(BATCH))
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: generated images)")
    parser.add_argument("--engine", help="default torch, for segmentation onnxruntime")
    parser.add_argument("--variant", default="fcvit_tiny", choices=VARIANTS, help="default fcvit_tiny")
    parser.add_argument("--repeat", type=int, default=5, help="number of repetitions (default 5)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    engine = arguments.engine or ENGINE[arguments.task]
    weights = synthetic_weights(VARIANTS[arguments.variant], arguments.task)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if arguments.task == "segmentation":
            write_images(root, 24)
            rates = measure(weights, engine, root, root, arguments.repeat)
            extra = {}
        else:
            few = 200 if arguments.variant == "fcvit_digits" else 80
            for folder, count in (("data", 200), ("few", few), ("many", 2000)):
                photographs(root / folder, arguments.photos, count)
            rates = measure(weights, engine, root / "few", root / "many", arguments.repeat)
            file = root / "weights.pth"
            with file.open("wb") as opened:
                write_zip(opened, weights.tensors)
            peaks = [peak(file, root / data, engine, root / f"run-{data}") for data in ("data", "many")]
            extra = {"memory_2000_over_200": peaks[1] / peaks[0]}
    # The median of ratios of measurements that are adjacent in time.
    sides = list(zip(*(rates[what] for what in ("decode", "model", "whole")), strict=True))
    ratios = {"whole_over_bound": statistics.median(w * (1 / d + 1 / m) for d, m, w in sides)} | extra
    if "plain" in rates:
        adjacent = zip(rates["decode"], rates["plain"], strict=True)
        ratios["decode_over_plain"] = statistics.median(d / p for d, p in adjacent)
    machine = f"{processor_name()}, {CORES} cores, Python {platform.python_version()}"
    if arguments.json:
        setting = {"task": arguments.task, "variant": arguments.variant, "engine": engine}
        content = {"machine": machine, **setting, "images_per_second": rates, "ratios": ratios}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(machine)
    batch = f"batch size {BATCH[arguments.task]}, median of {arguments.repeat} runs"
    print(f"{arguments.task}, {arguments.variant}, engine {engine}, {batch}")
    print("images per second:")
    for what, text in TEXTS.items():
        if what in rates:
            print(f"{text.format(CORES)}: {statistics.median(rates[what]):.1f}")
    if extra:
        print(f"peak memory with 200 and 2,000 images: {peaks[0] / 1e6:.0f} and {peaks[1] / 1e6:.0f} MB")
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.3f}")


TEXTS = {
    "plain": "plain Pillow, {} processes",
    "decode": "decoding and transforms, {} workers",
    "model": "model only",
    "whole": "evaluation",
}


def measure(weights: Weights, engine: str, folder: Path, decoded: Path, repeat: int) -> dict[str, list[float]]:
    """Return the images per second of each part, of the images in `folder`, and for decoding of those in `decoded`."""
    task = get_task(weights.spec.task)
    batch = BATCH[task.name]
    preprocessing = weights.spec.variant.preprocessing if task.name == "segmentation" else PIXELS
    evaluator = task.evaluator([weights], decoded, task.options())
    transform, images = evaluator.transform(preprocessing), evaluator.dataset
    compute = create_engine(engine, weights, preprocessing, "cpu")
    image = getattr(transform, "decode", decode)(images.locations[0].path)
    pixels = np.stack([transform(image, images.targets[0], 0)[0]] * batch)
    options = {} if evaluator.fixed_preprocessing else {"preprocessing": preprocessing}
    rates: dict[str, list[float]] = {}
    for _ in range(repeat):  # alternate, so that background load affects all measurements
        read = functools.partial(decoding, evaluator.dataset, transform, batch)
        if task.name == "segmentation":
            decoded_per_second = read()
        else:
            pillow, decoded_per_second = around(lambda: plain(decoded), read)
            rates.setdefault("plain", []).append(pillow)
        whole = functools.partial(evaluation, weights, folder, engine, batch, options)
        alone, evaluated = around(lambda: model(compute, pixels), whole)
        for what, rate in (("decode", decoded_per_second), ("model", alone), ("whole", evaluated)):
            rates.setdefault(what, []).append(rate)
    return rates


def around(outer: Callable[[], float], inner: Callable[[], float]) -> tuple[float, float]:
    """Return the mean rate of `outer`, measured before and after `inner`, and the rate of `inner`."""
    before, rate, after = outer(), inner(), outer()
    return 2 / (1 / before + 1 / after), rate


def write_images(folder: Path, count: int) -> None:
    """Write images and label maps of large blocks with noise."""
    generator = np.random.default_rng(0)
    for name in ("images", "annotations"):
        (folder / name).mkdir()
    for index in range(count):
        blocks = generator.integers(0, CLASSES, (HEIGHT // 64, WIDTH // 64 + 1), np.uint8)
        label = blocks.repeat(64, 0).repeat(64, 1)[:, :WIDTH]
        noise = generator.integers(0, 60, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(label[..., None] + noise).save(folder / "images" / f"{index:03d}.jpg", quality=90)
        Image.fromarray(label).save(folder / "annotations" / f"{index:03d}.png")


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


def plain(folder: Path) -> float:
    paths = sorted(map(str, folder.rglob("*.jpg")))
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        pool.map(decode_with_pillow, [paths[:4]] * CORES, 1)  # warm-up
        began = time.perf_counter()
        pool.map(decode_with_pillow, [paths[core::CORES] for core in range(CORES)], 1)
        return len(paths) / (time.perf_counter() - began)


def decoding(images, transform, batch: int) -> float:
    """Return the images per second of reading images and targets in all worker processes."""
    count, began = 0, 0.0
    for read in batches(images, range(-(-len(images) // batch)), batch, [transform], CORES):
        if began:
            count += len(read.indices)
        else:
            began = time.perf_counter()
    return count / (time.perf_counter() - began)


def model(compute, pixels: np.ndarray) -> float:
    compute(pixels)
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 6:
        compute(pixels)
        rounds += 1
    return rounds * len(pixels) / (time.perf_counter() - began)


def evaluation(weights: Weights, folder: Path, engine: str, batch: int, options: dict) -> float:
    """Return the images per second of an evaluation, from the end of its first batch to the end of its last."""
    times: list[float] = []
    append = Journal.append

    def timed(*given):
        append(*given)
        times.append(time.perf_counter())

    Journal.append = timed
    try:
        done = evaluate(weights, folder, engines=engine, device="cpu", workers=CORES, batch_size=batch, **options)
    finally:
        Journal.append = append
    return (done.results[0].images - batch) / (times[-1] - times[0])


def peak(weights: Path, folder: Path, engine: str, run: Path) -> int:
    """Estimate the peak memory in bytes: that of a process plus twice that of its largest worker."""
    words = [sys.executable, "-c", PEAK, *map(str, (weights, folder, engine, run))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
