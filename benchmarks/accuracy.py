"""Measure the differences of the Paddle network and the PyTorch reference from the authors' outputs (tests/golden).

Run:  .venv/bin/python benchmarks/accuracy.py [--json FILE]

For each published variant and input (2, 3, 224, 224), the table shows the largest float64 difference of Paddle and of
the reference, divided by the standard deviation of the logits. It also shows the float32 error ratio of Paddle to the
PyTorch float32 logits in the goldens.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from fcvit.models.spec import ModelSpec
from fcvit.models.variants import VARIANTS, published
from fcvit.verification.equivalence import error_ratio, float64_difference
from fcvit.verification.traces import trace_paddle, trace_torch
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    rows = []
    for name, variant in VARIANTS.items():
        if published(variant) is None:
            continue
        spec = ModelSpec(variant, 1000)
        weights = Weights(spec, synthetic_tensors(spec), None, "torch", None, None, (), ())
        images = synthetic_input((2, 3, 224, 224))
        with np.load(GOLDEN / f"{name}.npz") as golden:
            exact, torch_32 = golden["logits"], golden["float32_logits"]
        paddle_32 = trace_paddle(weights, images, "float32")["output"]
        rows.append(
            {
                "variant": name,
                "paddle_float64": float64_difference(trace_paddle(weights, images, "float64")["output"], exact),
                "reference_float64": float64_difference(trace_torch(weights, images, "float64")["output"], exact),
                "error_ratio": error_ratio(paddle_32, torch_32, exact),
                "float32_max": float(np.abs(paddle_32 - torch_32).max()),
                "float32_mean": float(np.abs(paddle_32 - torch_32).mean()),
            }
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print("| variant | Paddle float64 | reference float64 | largest float32 | mean float32 | error ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['variant']} | {row['paddle_float64']:.1e} | {row['reference_float64']:.1e} "
            f"| {row['float32_max']:.1e} | {row['float32_mean']:.1e} | {row['error_ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
