"""Verify that two sets of weights are one network: Paddle against the PyTorch reference, in numbers.

The logic, by the float64 equivalence check: the largest difference of the outputs is at most 1e-10 of their standard
deviation. The rounding, by the float32 error ratio: the rms error of Paddle's float32 against the float64 reference is
at most 3 times that of PyTorch's own float32. Besides: every tensor bit for bit, and the first layer inside the network
that drifts. Top-1 agreement decides nothing: on a handful of images it notices hardly any mistake.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.errors import DoesNotFit, NumbersDisagree
from fcvit.models.spec import ModelSpec
from fcvit.report.progress import progress
from fcvit.verification.equivalence import FLOAT64_LIMIT, RATIO_LIMIT, error_ratio, float64_difference, images_needed
from fcvit.verification.traces import trace_paddle, trace_torch
from fcvit.weights.reading import Weights, cast
from fcvit.weights.synthetic import has_near_zero_scale, synthetic_input, synthetic_tensors
from fcvit.weights.writing import differing_tensors

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class LayerDrift:
    """The largest difference of the two float64 runs behind a layer, over the standard deviation of the reference."""

    name: str
    drift: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The difference of two networks on the same numbers.

    Attributes:
        input_shape: (B, 3, H, W), standard normal numbers.
        float64_difference: largest difference of the float64 outputs over their standard deviation.
        error_ratio: rms error of Paddle's float32 over that of PyTorch's, both against float64.
        float32_max, float32_mean: absolute difference of the two float32 outputs.
        output_std: standard deviation of the reference outputs.
        drift: layer by layer, in the order of the forward pass; the last is the output.
    """

    input_shape: tuple[int, ...]
    float64_difference: float
    error_ratio: float
    float32_max: float
    float32_mean: float
    output_std: float
    drift: tuple[LayerDrift, ...]

    @property
    def first_over(self) -> LayerDrift | None:
        """The first layer whose drift is over the limit."""
        return next((layer for layer in self.drift if not layer.drift <= FLOAT64_LIMIT), None)

    @property
    def passed(self) -> bool:
        return self.float64_difference <= FLOAT64_LIMIT and self.error_ratio <= RATIO_LIMIT and self.first_over is None


@dataclasses.dataclass(frozen=True)
class Verification:
    """The checks of two sets of weights, and what failed.

    Attributes:
        spec: the network, in words.
        tensors: how many there are; `different` names those that are not equal bit for bit.
        comparison: on the weights themselves.
        synthetic: on synthetic weights, compared where the file's own are nearly untrained and hide the blocks.
        stored_as: type of the converted weights; the source is rounded to it first.
        blocks: whether the table shows every block.
        rounding_cost: largest change of the float64 logits that this rounding alone makes; 0 without.
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
        """The reason why the files are not one network; empty: they are."""
        return "" if self.passed else f"verification failed: {self.failure()}"

    def to_json(self) -> dict[str, Any]:
        failure = None if self.passed else self.failure()
        return dataclasses.asdict(self) | {"passed": self.passed, "failure": failure}

    def tables(self) -> "Iterator[Table]":
        """Show the checks, and the drift by stage or after every block."""
        from fcvit.report.tables import table, verdict

        same = f"{self.tensors - len(self.different)} of {self.tensors}"
        rows: list[Sequence[Any]] = [
            ("tensors equal bit for bit", same, str(self.tensors), verdict(not self.different))
        ]
        compared = [(self.comparison, "")]
        if self.synthetic:
            compared.append((self.synthetic, " (synthetic weights: the file's own hide the blocks)"))
        for one, note in compared:
            close, near = one.float64_difference <= FLOAT64_LIMIT, one.error_ratio <= RATIO_LIMIT
            difference, limit = f"{one.float64_difference:.1e}", f"{FLOAT64_LIMIT:.0e}"
            rows.append((f"float64 difference, largest over std{note}", difference, limit, verdict(close)))
            ratio, limit = f"{one.error_ratio:.2f}", f"{RATIO_LIMIT:.0f}"
            rows.append((f"float32 rms error over PyTorch's{note}", ratio, limit, verdict(near)))
        rows.append(("largest float32 difference", f"{self.comparison.float32_max:.2e}"))
        rows.append(("mean float32 difference", f"{self.comparison.float32_mean:.2e}"))
        if self.rounding_cost:
            rows.append((f"cost of storing as {self.stored_as}, largest", f"{self.rounding_cost:.2e}"))
        right = ("measured", "limit")
        yield table("check", *right, "", rows=rows, title=f"verification of {self.spec}", right=right)
        layers = [one for one in (self.synthetic or self.comparison).drift if self.blocks or one.name.count(".") != 2]
        rows = [(one.name, f"{one.drift:.1e}", verdict(one.drift <= FLOAT64_LIMIT)) for one in layers]
        title = "drift by stage (float64, over the standard deviation)"
        yield table("layer", "drift", "", rows=rows, title=title, right=("drift",))

    def failure(self) -> str:
        """Return what is wrong, in one line."""
        if self.different:
            return f"{len(self.different)} tensor(s) differ, first {self.different[0]}"
        comparison = self.comparison if self.synthetic is None or not self.comparison.passed else self.synthetic
        if comparison.first_over:
            layer = comparison.first_over
            return f"the networks part at {layer.name}: drift {layer.drift:.1e}, limit {FLOAT64_LIMIT:.0e}"
        return (
            f"float64 difference {comparison.float64_difference:.1e} (limit {FLOAT64_LIMIT:.0e}), "
            f"float32 error ratio {comparison.error_ratio:.2f} (limit {RATIO_LIMIT})"
        )


def verify_weights(converted: Weights, source: Weights) -> Verification:
    """Compare two sets of weights: tensors first, then the networks that hold them.

    Raises:
        DoesNotFit: they are not of one form, or the converted ones mix types.
        MissingExtra: Paddle or PyTorch is not installed.
    """
    one, other = converted.spec, source.spec
    if dataclasses.replace(one, variant=other.variant) != other or list(converted.tensors) != list(source.tensors):
        raise DoesNotFit(f"{converted.source.path} is {one}, {source.source.path} is {other}: not one network")
    stored_as = "/".join(converted.dtypes)
    rounded = source if converted.dtypes == source.dtypes else _round(source, converted)
    # The Paddle network takes the side that is stored for Paddle.
    swap = converted.layout == "torch" and source.layout == "paddle"
    ours, reference = (rounded, converted) if swap else (converted, rounded)
    comparison = compare(ours, reference)
    synthetic = None
    if has_near_zero_scale(converted.tensors):
        rule = synthetic_tensors(one)
        synthetic = compare(dataclasses.replace(converted, tensors=rule), dataclasses.replace(source, tensors=rule))
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
    """Raise `NumbersDisagree`, which says where, unless the verification passed."""
    if not verification.passed:
        raise NumbersDisagree(verification.problem)


def compare(ours: Weights, reference: Weights) -> Comparison:
    """Run the Paddle network on `ours` and PyTorch's on `reference`, in float64 and float32."""
    images = synthetic_input(input_shape(ours.spec), "verify/")
    runs = (
        (trace_torch, reference, "float64"),
        (trace_paddle, ours, "float64"),
        (trace_paddle, ours, "float32"),
        (trace_torch, reference, "float32"),
    )
    traces = []
    with progress("verifying", len(runs), "runs") as advance:  # over half a minute on the largest variant
        for trace, weights, dtype in runs:
            traces.append(trace(weights, images, dtype))
            advance(1)
    expected, computed, *single = traces
    drift = tuple(LayerDrift(name, float64_difference(computed[name], value)) for name, value in expected.items())
    outputs = [name for name in expected if name.startswith("output")]
    paddle_32, torch_32 = (np.concatenate([run[name].ravel() for name in outputs]) for run in single)
    exact = np.concatenate([expected[name].ravel() for name in outputs])
    return Comparison(
        images.shape,
        max(layer.drift for layer in drift if layer.name in outputs),
        error_ratio(paddle_32, torch_32, exact),
        float(np.abs(paddle_32.astype(np.float64) - torch_32).max()),
        float(np.abs(paddle_32.astype(np.float64) - torch_32).mean()),
        float(exact.std()),
        drift,
    )


def input_shape(spec: ModelSpec) -> tuple[int, int, int, int]:
    """Return the shape of two images of the network's own size, more where they are small and the logits few."""
    size = spec.variant.preprocessing.input_size
    return images_needed(spec.num_classes or spec.variant.widths[-1], size * size), 3, size, size


def _round(source: Weights, converted: Weights) -> Weights:
    if len(converted.dtypes) != 1:
        raise DoesNotFit(f"{converted.source.path} mixes types: {', '.join(converted.dtypes)}")
    return cast(source, converted.dtypes[0])


def _rounding_cost(source: Weights, rounded: Weights, shape: tuple[int, ...]) -> float:
    images = synthetic_input(shape, "verify/")
    before, after = (trace_torch(weights, images, "float64") for weights in (source, rounded))
    return max(float(np.abs(before[n] - after[n]).max()) for n in before if n.startswith("output"))
