"""Similarity maps: the time of a pass that keeps them over that of a plain one, in the same network.

Run:  .venv/bin/python benchmarks/similarity.py [--variant NAME] [--size N] [--rounds N] [--json FILE]

One image, float32, both networks on synthetic weights; plain and keeping passes in turn, the
ratio of neighbors in time, then the median. The maps are taken to NumPy in the time. Prints its ratios last.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from fcvit.commands.bench import synthetic_weights
from fcvit.frameworks import import_framework
from fcvit.machine import available_threads, processor_name
from fcvit.models.variants import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="fcvit_tiny", choices=list(VARIANTS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    weights = synthetic_weights(VARIANTS[arguments.variant], print)
    images = np.random.default_rng(0).normal(size=(1, 3, arguments.size, arguments.size)).astype(np.float32)
    found = {}
    for name, passes in (("paddle", paddle_passes(weights, images)), ("torch", torch_passes(weights, images))):
        times: list[list[float]] = []
        for _ in range(arguments.rounds + 1):
            times.append([])
            for compute in passes:
                began = time.perf_counter()
                compute()
                times[-1].append(time.perf_counter() - began)
        plain, keeping = zip(*times[1:], strict=True)
        ratio = statistics.median(one / other for one, other in zip(keeping, plain, strict=True))
        found[name] = {"plain": statistics.median(plain), "keeping": statistics.median(keeping), "ratio": ratio}
    machine = f"{processor_name()}, {available_threads()} cores"
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "seconds": found}, indent=2) + "\n")
    print(f"{arguments.variant} at {arguments.size} x {arguments.size}, {machine}; medians of {arguments.rounds}")
    for name, row in found.items():
        print(f"{name}: plain {1e3 * row['plain']:.1f} ms, with the maps {1e3 * row['keeping']:.1f} ms")
    for name, row in found.items():
        print(f"{name}: {row['ratio']:.2f} times a plain pass")


def paddle_passes(weights, images):
    paddle = import_framework("paddle")
    from fcvit.models.build import build_classifier

    model, x = build_classifier(weights), paddle.to_tensor(images)

    def plain():
        with paddle.no_grad():
            model(x).numpy()

    def keeping():
        with paddle.no_grad():
            for one in model.similarity(x):
                one.standardised.numpy()
                one.rescaled.numpy()

    return plain, keeping


def torch_passes(weights, images):
    torch = import_framework("torch")
    from fcvit.reference.build import build_reference

    model, x = build_reference(weights.spec, weights.tensors), torch.from_numpy(images)

    def plain():
        with torch.inference_mode():
            model(x).numpy()

    def keeping():
        with torch.inference_mode():
            for one in model.similarity(x):
                one.standardised.numpy()
                one.rescaled.numpy()

    return plain, keeping


if __name__ == "__main__":
    main()
