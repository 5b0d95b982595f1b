"""Measure the time of a forward pass with similarity maps relative to a plain forward pass.

Run:  .venv/bin/python benchmarks/similarity.py [--variant NAME] [--size N] [--rounds N] [--json FILE]

The Paddle network and the PyTorch reference compute one float32 image with synthetic weights. Both kinds of pass
alternate, and the ratio is the median over adjacent passes (`fcvit.inference.interleave`). The time includes the
conversion of the maps to NumPy. The ratios are printed last.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fcvit.commands.bench import synthetic_weights
from fcvit.errors import FcvitError
from fcvit.frameworks import import_framework
from fcvit.inference.interleave import interleave, median_ratio, timed
from fcvit.machine import available_threads, processor_name
from fcvit.models.variants import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="fcvit_tiny", choices=list(VARIANTS), help="default fcvit_tiny")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels (default 224)")
    parser.add_argument("--rounds", type=int, default=15, help="number of measurement rounds (default 15)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    load = functools.partial(load_passes, variant=arguments.variant, size=arguments.size)
    results = {}
    for name, timing in interleave(load, ("paddle", "torch"), arguments.rounds, calls=1, seconds=0).items():
        if isinstance(timing, FcvitError):
            raise timing
        plain, keeping = zip(*(times for (times,) in timing.rounds), strict=True)
        medians = {"plain": statistics.median(plain), "keeping": statistics.median(keeping)}
        results[name] = medians | {"ratio": median_ratio(keeping, plain)}
    machine = f"{processor_name()}, {available_threads()} cores"
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "seconds": results}, indent=2) + "\n")
    print(f"{arguments.variant} at {arguments.size} x {arguments.size}, {machine}; median of {arguments.rounds} rounds")
    for name, row in results.items():
        print(f"{name}: plain {1e3 * row['plain']:.1f} ms, with maps {1e3 * row['keeping']:.1f} ms")
    for name, row in results.items():
        print(f"{name}: {row['ratio']:.2f} times the time of a plain pass")


def load_passes(name: str, variant: str, size: int) -> tuple[Callable[[], list[float]], None]:
    """Return a function and None. The function runs a pass without and a pass with maps, and returns their seconds."""
    weights = synthetic_weights(VARIANTS[variant])
    images = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    framework = import_framework(name)
    if name == "paddle":
        from fcvit.models.build import build_classifier

        model, x, without_gradients = build_classifier(weights), framework.to_tensor(images), framework.no_grad
    else:
        from fcvit.reference.build import build_reference

        model = build_reference(weights.spec, weights.tensors)
        x, without_gradients = framework.from_numpy(images), framework.inference_mode

    def plain() -> None:
        with without_gradients():
            model(x).numpy()

    def with_maps() -> None:
        with without_gradients():
            for maps in model.similarity(x):
                maps.standardized.numpy()
                maps.rescaled.numpy()

    return lambda: [timed(plain)(), timed(with_maps)()], None


if __name__ == "__main__":
    main()
