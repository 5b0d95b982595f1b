"""Inference on this CPU: images per second of every engine, beside PyTorch's formats.

Run:  .venv/bin/python benchmarks/inference.py [--variants NAME ...] [--batch-sizes N ...] [--threads N]
          [--engines NAME ...] [--rounds N] [--json FILE]

What `fcvit bench` measures, for several variants on synthetic weights: contenders in processes of their own,
interleaved. Images are uint8 and normalized inside, by every engine. Ratios are those to PyTorch in channels last
between neighbors in time, then the median; they come last.
"""

import argparse
import json
import logging
from pathlib import Path

from fcvit.commands.bench import CONTENDERS, bench
from fcvit.report.tables import console

ENGINES = tuple(name for name in CONTENDERS if name not in ("paddle", "paddle-inference"))  # too slow to wait for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["fcvit_tiny", "fcvit_b12"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = [
        bench(
            variant=variant,
            engines=arguments.engines,
            batch_sizes=[batch],
            threads=[arguments.threads],
            precisions=["float32", "bfloat16"],
            rounds=arguments.rounds,
        )
        for variant in arguments.variants
        for batch in arguments.batch_sizes
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps([one.to_json() for one in results], indent=2, default=str) + "\n")
    for one in results:
        console().print(*one.tables())
    for one in results:
        for speed in one.speeds:
            if speed.of_reference is not None:
                print(f"{one.network}: {speed.contender}: {speed.of_reference:.2f} times {one.reference}")


if __name__ == "__main__":
    main()
