"""Verify numerically that two sets of weights define the same network: Paddle against the PyTorch reference.

The float64 equivalence check tests the logic: the largest difference of the outputs must be at most 1e-10 of their
standard deviation. The float32 error ratio tests the rounding: the rms error of Paddle's float32 against the float64
reference must be at most 3 times that of PyTorch's float32. In addition, every tensor is compared bit for bit, and the
first layer that exceeds the limit is reported. Top-1 agreement is not used, because on a few images it detects hardly
any error.

A detector is compared stage by stage: backbone, neck, RPN outputs, and the features and outputs of the second stage for
given RoIs. Then its proposals and detections are compared as sets (`fcvit.verification.objects`).
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.errors import DoesNotFit, NumbersDisagree
from fcvit.models.spec import ModelSpec
from fcvit.report.progress import progress
from fcvit.verification.equivalence import (
    FLOAT64_LIMIT,
    MIN_OUTPUTS,
    RATIO_LIMIT,
    error_ratio,
    float64_difference,
    images_needed,
)
from fcvit.verification.objects import LIMITS, ObjectComparison, compare_objects
from fcvit.verification.traces import Trace, trace_paddle, trace_torch
from fcvit.weights.reading import Weights, cast
from fcvit.weights.synthetic import has_near_zero_scale, synthetic_input, synthetic_tensors
from fcvit.weights.writing import differing_tensors

if TYPE_CHECKING:
    from rich.table import Table


_BLOCK = re.compile(r"network\.[0-9]+\.[0-9]+$")


@dataclasses.dataclass(frozen=True)
class LayerDrift:
    """The difference of the two float64 runs after a layer.

    Attributes:
        name: Name of the layer.
        drift: Largest difference, divided by the standard deviation of the reference.
        error_ratio: float32 error ratio of an output of the network or of a detector's stage. It is None for other
            layers, and for outputs with too few values.
    """

    name: str
    drift: float
    error_ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences of two networks on the same inputs.

    Attributes:
        input_shape: Shape of the standard normal inputs, (B, 3, H, W).
        float64_difference: Largest difference of the float64 outputs, divided by their standard deviation.
        error_ratio: Rms error of Paddle's float32 outputs, divided by that of PyTorch's. Both are against float64. If
            there are several outputs, it is the largest of their ratios.
        float32_max: Largest absolute difference of the two float32 outputs.
        float32_mean: Mean absolute difference of the two float32 outputs.
        output_std: Standard deviation of the reference outputs.
        drift: Difference after each layer, in the order of the forward pass. The last layer is the output.
        objects: Comparisons of a detector's proposals and detections in float64 and float32.
    """

    input_shape: tuple[int, ...]
    float64_difference: float
    error_ratio: float
    float32_max: float
    float32_mean: float
    output_std: float
    drift: tuple[LayerDrift, ...]
    objects: tuple[ObjectComparison, ...] = ()

    @property
    def first_over(self) -> LayerDrift | None:
        """Return the first layer with a drift over the limit, or None."""
        return next((layer for layer in self.drift if not layer.drift <= FLOAT64_LIMIT), None)

    @property
    def passed(self) -> bool:
        close = self.float64_difference <= FLOAT64_LIMIT and self.error_ratio <= RATIO_LIMIT
        return close and self.first_over is None and all(one.passed for one in self.objects)


@dataclasses.dataclass(frozen=True)
class Verification:
    """The checks of two sets of weights and their results.

    Attributes:
        spec: Description of the network.
        tensors: Number of tensors.
        different: Names of the tensors that are not equal bit for bit.
        comparison: Comparison with the given weights.
        synthetic: Comparison with synthetic weights, or None. It is done if the given weights are nearly untrained, so
            that their layer scales hide the blocks.
        stored_as: Type of the converted weights. The source weights are rounded to it first.
        rounding_cost: Largest change of the float64 logits from this rounding, or 0 without rounding.
        blocks: Whether the table contains every block.
    """

    spec: str
    tensors: int
    different: tuple[str, ...]
    comparison: Comparison
    synthetic: Comparison | None
    stored_as: str
    rounding_cost: float
    blocks: bool = dataclasses.field(default=False, repr=False)

    @property
    def passed(self) -> bool:
        return not self.different and self.comparison.passed and (self.synthetic is None or self.synthetic.passed)

    def __repr__(self) -> str:
        return f"<Verification of {self.spec}: {'passed' if self.passed else self.failure()}>"

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else NumbersDisagree.exit_code

    @property
    def problem(self) -> str:
        """Return why the files are not the same network, or an empty string if they are."""
        return "" if self.passed else f"verification failed: {self.failure()}"

    def to_json(self) -> dict[str, Any]:
        failure = None if self.passed else self.failure()
        return dataclasses.asdict(self) | {"passed": self.passed, "failure": failure}

    def tables(self) -> "Iterator[Table]":
        """Yield the table of checks, and the table of the drift by stage or by block."""
        from fcvit.report.tables import table, verdict

        equal = f"{self.tensors - len(self.different)} of {self.tensors}"
        rows: list[Sequence[Any]] = [
            ("tensors equal bit for bit", equal, str(self.tensors), verdict(not self.different))
        ]
        compared = [(self.comparison, "")]
        if self.synthetic:
            compared.append((self.synthetic, " (synthetic weights, because the file's layer scales are near zero)"))
        for one, note in compared:
            close, near = one.float64_difference <= FLOAT64_LIMIT, one.error_ratio <= RATIO_LIMIT
            difference, limit = f"{one.float64_difference:.1e}", f"{FLOAT64_LIMIT:.0e}"
            rows.append((f"largest float64 difference / std{note}", difference, limit, verdict(close)))
            ratio, limit = f"{one.error_ratio:.2f}", f"{RATIO_LIMIT:.0f}"
            rows.append((f"float32 error ratio{note}", ratio, limit, verdict(near)))
            for same in one.objects:
                name = f"{same.name} that differ in {same.dtype}{note}"
                rows.append((name, f"{same.unmatched} of {same.count}", str(same.limit), verdict(same.passed)))
        rows.append(("largest float32 difference", f"{self.comparison.float32_max:.2e}"))
        rows.append(("mean float32 difference", f"{self.comparison.float32_mean:.2e}"))
        for dtype in LIMITS if self.comparison.objects else ():
            same = [one for one in self.comparison.objects if one.dtype == dtype]
            score, box = max(one.score_difference for one in same), max(one.box_difference for one in same)
            rows.append((f"largest {dtype} difference of a score", f"{score:.1e}"))
            rows.append((f"largest {dtype} difference of a box", f"{box:.1e} pixels"))
        for same in self.comparison.objects[:1]:
            rows.append((f"smallest margin of a decision: {same.decision}", f"{same.margin:.1e}"))
        if self.rounding_cost:
            rows.append((f"largest change from rounding to {self.stored_as}", f"{self.rounding_cost:.2e}"))
        right = ("measured", "limit")
        yield table("check", *right, "", rows=rows, title=f"verification of {self.spec}", right=right)
        layers = [
            one for one in (self.synthetic or self.comparison).drift if self.blocks or not _BLOCK.search(one.name)
        ]
        rows = [
            (one.name, f"{one.drift:.1e}", verdict(one.drift <= FLOAT64_LIMIT), _ratio(one.error_ratio))
            for one in layers
        ]
        title = "drift by stage (largest float64 difference / std)"
        yield table(
            "layer", "drift", "", "float32 error ratio", rows=rows, title=title, right=("drift", "float32 error ratio")
        )

    def failure(self) -> str:
        """Return the reason for the failure in one line."""
        if self.different:
            return f"{len(self.different)} tensor(s) differ, first {self.different[0]}"
        comparison = self.comparison if self.synthetic is None or not self.comparison.passed else self.synthetic
        if comparison.first_over:
            layer = comparison.first_over
            return f"the first difference is in {layer.name}: drift {layer.drift:.1e}, limit {FLOAT64_LIMIT:.0e}"
        if different := [one for one in comparison.objects if not one.passed]:
            return str(different[0])
        return (
            f"float64 difference {comparison.float64_difference:.1e} (limit {FLOAT64_LIMIT:.0e}), "
            f"float32 error ratio {comparison.error_ratio:.2f} (limit {RATIO_LIMIT})"
        )


def verify_weights(converted: Weights, source: Weights) -> Verification:
    """Compare two sets of weights: first the tensors, then the outputs of the networks.

    Raises:
        DoesNotFit: If the weights belong to different networks, or the converted weights have mixed types.
        MissingExtra: If Paddle or PyTorch is not installed.
    """
    one, other = converted.spec, source.spec
    if dataclasses.replace(one, variant=other.variant) != other or list(converted.tensors) != list(source.tensors):
        raise DoesNotFit(f"{converted.source.path} is {one}, but {source.source.path} is {other}: not the same network")
    stored_as = "/".join(converted.dtypes)
    rounded = source if converted.dtypes == source.dtypes else _round(source, converted)
    # The Paddle network gets the weights that are stored for Paddle.
    swap = converted.layout == "torch" and source.layout == "paddle"
    ours, reference = (rounded, converted) if swap else (converted, rounded)
    comparison = compare(ours, reference)
    synthetic = None
    if has_near_zero_scale(converted.tensors):
        tensors = synthetic_tensors(one)
        synthetic = compare(
            dataclasses.replace(converted, tensors=tensors), dataclasses.replace(source, tensors=tensors)
        )
    return Verification(
        str(one),
        len(converted.tensors),
        tuple(differing_tensors(converted, rounded)),
        comparison,
        synthetic,
        stored_as,
        0.0 if rounded is source else _rounding_cost(source, rounded, comparison.input_shape),
    )


def require(verification: Verification) -> None:
    """Raise `NumbersDisagree` with the reason unless the verification passed."""
    if not verification.passed:
        raise NumbersDisagree(verification.problem)


def compare(ours: Weights, reference: Weights) -> Comparison:
    """Run the Paddle network with `ours` and the PyTorch network with `reference`, in float64 and float32."""
    images = synthetic_input(input_shape(ours.spec), "verify/")
    runs = (
        (trace_torch, reference, "float64"),
        (trace_paddle, ours, "float64"),
        (trace_paddle, ours, "float32"),
        (trace_torch, reference, "float32"),
    )
    traces = []
    with progress("verifying", len(runs), "runs") as advance:  # takes over half a minute for the largest variant
        for trace, weights, dtype in runs:
            traces.append(trace(weights, images, dtype))
            advance(1)
    expected, computed, *single = traces
    single_ours, single_reference = single
    drift = tuple(
        LayerDrift(
            name,
            float64_difference(computed[name], value),
            error_ratio(single_ours[name], single_reference[name], value)
            if name in expected.outputs and (value.size >= MIN_OUTPUTS or len(expected.outputs) == 1)
            else None,
        )
        for name, value in expected.items()
    )
    paddle_32, torch_32, exact = (_joined(run) for run in (single_ours, single_reference, expected))
    objects = tuple(
        compare_objects(name, dtype, run.objects[name], reference, expected.margins)
        for dtype, run in (("float64", computed), ("float32", single_ours))
        for name, reference in expected.objects.items()
    )
    return Comparison(
        images.shape,
        max(layer.drift for layer in drift if layer.name in expected.outputs),
        max(layer.error_ratio for layer in drift if layer.error_ratio is not None),
        float(np.abs(paddle_32.astype(np.float64) - torch_32).max()),
        float(np.abs(paddle_32.astype(np.float64) - torch_32).mean()),
        float(exact.std()),
        drift,
        objects,
    )


def input_shape(spec: ModelSpec) -> tuple[int, int, int, int]:
    """Return the input shape for a comparison, at the network's input size.

    It contains two images, or more if the images are small and the network has few outputs. A detector gets two images
    with odd sizes of its maps.
    """
    if spec.task == "detection":
        return 2, 3, 200, 264
    size = spec.variant.preprocessing.input_size
    return images_needed(spec.num_classes or spec.variant.widths[-1], size * size), 3, size, size


def _round(source: Weights, converted: Weights) -> Weights:
    if len(converted.dtypes) != 1:
        raise DoesNotFit(f"{converted.source.path} has tensors of mixed types: {', '.join(converted.dtypes)}")
    return cast(source, converted.dtypes[0])


def _rounding_cost(source: Weights, rounded: Weights, shape: tuple[int, ...]) -> float:
    images = synthetic_input(shape, "verify/")
    before, after = (trace_torch(weights, images, "float64") for weights in (source, rounded))
    return max(float(np.abs(before[name] - after[name]).max()) for name in before.outputs)


def _joined(trace: Trace) -> np.ndarray:
    return np.concatenate([trace[name].ravel() for name in trace.outputs])


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
