"""Measure the images per second of the engines on this CPU, compared with PyTorch.

Run:  .venv/bin/python benchmarks/inference.py [--variants NAME ...] [--batch-sizes N ...] [--threads N]
          [--engines NAME ...] [--task TASK] [--sizes HxW ...] [--rounds N] [--json FILE]

The script runs `fcvit bench` for several variants with synthetic weights. The contenders run alternately in separate
processes. All engines take uint8 images and normalize them. The ratios to PyTorch in channels_last are medians over
measurements that are adjacent in time, and are printed last. A detector is measured at 800 x 1333 and 400 x 640, one
image at a time: the whole detection, and its trunk (backbone, feature pyramid and RPN) alone.
"""

import argparse
import json
import logging
from pathlib import Path

from fcvit.commands.bench import CONTENDERS, bench
from fcvit.report.tables import console

ENGINES = tuple(name for name in CONTENDERS if name not in ("paddle", "paddle-inference"))  # these two are very slow
DETECTION = {
    "engines": ("torch-channels-last", "onnxruntime", "openvino"),
    "batch_sizes": [1],
    "sizes": ["800x1333", "400x640"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["fcvit_tiny", "fcvit_b12"], help="variants to measure")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="images per batch (default 8 and 1)")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads (default 2)")
    parser.add_argument("--engines", nargs="+", choices=CONTENDERS)
    parser.add_argument("--task", default="classification", choices=("classification", "segmentation", "detection"))
    parser.add_argument("--sizes", nargs="+", help="image sizes, height x width")
    parser.add_argument("--rounds", type=int, default=9, help="number of measurement rounds (default 9)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    detection = arguments.task == "detection"
    defaults = DETECTION if detection else {"engines": ENGINES, "batch_sizes": [8, 1], "sizes": [None]}
    parser.set_defaults(**defaults)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = [
        bench(
            variant=variant,
            task=arguments.task,
            engines=arguments.engines,
            batch_sizes=[batch],
            threads=[arguments.threads],
            size=size,
            precisions=["float32"] if detection else ["float32", "bfloat16"],
            rounds=arguments.rounds,
        )
        for variant in arguments.variants
        for size in arguments.sizes
        for batch in arguments.batch_sizes
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps([result.to_json() for result in results], indent=2, default=str) + "\n")
    for result in results:
        console().print(*result.tables())
    for result in results:
        for speed in result.speeds:
            if speed.of_reference is not None:
                print(f"{result.network}: {speed.contender}: {speed.of_reference:.2f} times {result.reference}")


if __name__ == "__main__":
    main()
