"""Measure the images per second of the evaluation of a segmentation network, compared with its best possible rate.

Run:  .venv/bin/python benchmarks/evaluate_segmentation.py [--variant NAME] [--engine NAME] [--images N] [--repeat N]
          [--json FILE]

The images are generated JPEG files of 683 x 512 pixels with label maps of 150 classes. The weights are synthetic.
Decoding workers and the model share the same cores, so with decoding rate d and model rate m the best rate of the
evaluation is 1 / (1/d + 1/m). The model is measured before and after each evaluation. The evaluation is measured from
the end of its first image to the end of its last, without the start of processes and the report.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fcvit import evaluate
from fcvit.commands.bench import synthetic_weights
from fcvit.data.loader import batches
from fcvit.evaluation.journal import Journal
from fcvit.inference.engines import create_engine
from fcvit.machine import processor_name
from fcvit.models.variants import VARIANTS
from fcvit.tasks.segmentation.evaluation import Options, SegmentationEvaluator

HEIGHT, WIDTH, CLASSES = 512, 683, 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="fcvit_tiny", choices=VARIANTS, help="default fcvit_tiny")
    parser.add_argument("--engine", default="onnxruntime", help="default onnxruntime")
    parser.add_argument("--images", type=int, default=24, help="number of images (default 24)")
    parser.add_argument("--repeat", type=int, default=5, help="number of repetitions (default 5)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    weights = synthetic_weights(VARIANTS[arguments.variant], "segmentation")
    cores = os.cpu_count() or 1
    rates: dict[str, list[float]] = {"decode": [], "model": [], "whole": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, arguments.images)
        evaluator = SegmentationEvaluator([weights], folder, Options())
        preprocessing = weights.spec.variant.preprocessing
        transform = evaluator.transform(preprocessing)
        engine = create_engine(arguments.engine, weights, preprocessing, "cpu")
        pixels = transform(transform.decode(folder / evaluator.dataset.names[0]), evaluator.dataset.targets[0], 0)[0]
        for _ in range(arguments.repeat):  # alternate, so that background load affects all measurements
            rates["decode"].append(decoding(evaluator, transform, cores))
            before = model(engine, pixels)
            rates["whole"].append(evaluation(weights, folder, arguments.engine, cores))
            rates["model"].append(2 / (1 / before + 1 / model(engine, pixels)))
    ratio = statistics.median(w * (1 / d + 1 / m) for d, m, w in zip(*rates.values(), strict=True))
    if arguments.json:
        arguments.json.write_text(json.dumps({"images_per_second": rates, "whole_over_bound": ratio}, indent=2) + "\n")
    print(f"{processor_name()}, {cores} cores; {arguments.variant} with Semantic FPN, engine {arguments.engine}")
    for what, values in rates.items():
        print(f"{what}: {statistics.median(values):.2f} images/s")
    print(f"whole_over_bound: {ratio:.3f}")


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


def decoding(evaluator, transform, cores: int) -> float:
    """Return the images per second of reading images and label maps in all worker processes."""
    indices, count, began = range(len(evaluator.dataset)), 0, 0.0
    for batch in batches(evaluator.dataset, indices, 1, [transform], cores):
        if began:
            count += len(batch.indices)
        else:
            began = time.perf_counter()
    return count / (time.perf_counter() - began)


def model(engine, pixels: np.ndarray) -> float:
    engine(pixels[None])
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 6:
        engine(pixels[None])
        rounds += 1
    return rounds / (time.perf_counter() - began)


def evaluation(weights, folder: Path, engine: str, cores: int) -> float:
    times: list[float] = []
    append = Journal.append

    def timed(*given):
        append(*given)
        times.append(time.perf_counter())

    Journal.append = timed
    try:
        evaluate(weights, folder, engines=engine, device="cpu", workers=cores, batch_size=1)
    finally:
        Journal.append = append
    return (len(times) - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    main()
