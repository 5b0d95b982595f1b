"""Prove that two weights files are one network: Paddle against the PyTorch twin, in numbers.

Gate A, the logic: both compute in float64; over the logits the largest difference is at most 1e-10
of their standard deviation. Gate B, the rounding: the rms error of Paddle's float32 against the
float64 reference is at most 3 times that of PyTorch's own float32. Besides: every tensor bit for
bit, and the first place inside the network that drifts. Top-1 agreement is no gate: on a handful of
images it notices hardly any mistake.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from cyclopts import Parameter

from fcvit.commands.options import Ema, File, Flag
from fcvit.errors import DoesNotFit, NumbersDisagree, UsageError
from fcvit.frameworks import import_framework, installed, on_paddle_device
from fcvit.models.spec import ModelSpec
from fcvit.report.progress import progress
from fcvit.verification.equivalence import FLOAT64_LIMIT, RATIO_LIMIT, error_ratio, float64_difference, images_needed
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.reading import Weights, cast, read_weights
from fcvit.weights.synthetic import has_near_zero_scale, synthetic_input, synthetic_tensors
from fcvit.weights.writing import differing_tensors

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Place:
    """One place in the network: its name there, and how far apart the two float64 runs are.

    `drift` is the largest difference over the standard deviation of the reference.
    """

    name: str
    drift: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two networks on the same numbers.

    Attributes:
        input_shape: (B, 3, H, W), standard normal numbers.
        gate_a: largest difference of the float64 outputs over their standard deviation.
        gate_b: rms error of Paddle's float32 over that of PyTorch's, both against float64.
        float32_max, float32_mean: absolute difference of the two float32 outputs.
        output_std: standard deviation of the reference outputs.
        drift: place by place, in the order of the forward pass; the last is the output.
    """

    input_shape: tuple[int, ...]
    float64_difference: float
    error_ratio: float
    float32_max: float
    float32_mean: float
    output_std: float
    drift: tuple[Place, ...]

    @property
    def first_over(self) -> Place | None:
        """The first place whose drift is over gate A's limit."""
        return next((place for place in self.drift if not place.drift <= FLOAT64_LIMIT), None)

    @property
    def passed(self) -> bool:
        return self.float64_difference <= FLOAT64_LIMIT and self.error_ratio <= RATIO_LIMIT and self.first_over is None


@dataclasses.dataclass(frozen=True)
class Verification:
    """The proof, or what breaks it.

    Attributes:
        form: the network, in words.
        tensors: how many there are; `different` names those that are not equal bit for bit.
        comparison: on the weights themselves.
        lively: on weights by rule, made where the file's own are nearly untrained and hide the blocks.
        stored_as: type of the converted weights; the source is rounded to it first.
        blocks: whether the table shows every block.
        rounding_cost: largest change of the float64 logits that this rounding alone makes; 0 without.
    """

    spec: str
    tensors: int
    different: tuple[str, ...]
    comparison: Comparison
    lively: Comparison | None
    stored_as: str
    rounding_cost: float
    blocks: bool = dataclasses.field(default=False, repr=False)

    @property
    def passed(self) -> bool:
        return not self.different and self.comparison.passed and (self.lively is None or self.lively.passed)

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else NumbersDisagree.exit_code

    @property
    def problem(self) -> str:
        """Why the files are not one network; empty: they are."""
        return "" if self.passed else f"verification failed: {self.failure()}"

    def to_json(self) -> dict[str, Any]:
        failure = None if self.passed else self.failure()
        return dataclasses.asdict(self) | {"passed": self.passed, "failure": failure}

    def tables(self) -> "Iterator[Table]":
        """Show the checks, and the drift by stage or after every block."""
        from fcvit.report.tables import table, verdict

        checks = table(
            "check", "measured", "limit", "", title=f"verification of {self.spec}", right=("measured", "limit")
        )
        same = f"{self.tensors - len(self.different)} of {self.tensors}"
        checks.add_row("tensors equal bit for bit", same, str(self.tensors), verdict(not self.different))
        compared = [(self.comparison, "")]
        if self.lively:
            compared.append((self.lively, " (synthetic weights: the file's own hide the blocks)"))
        for one, note in compared:
            close, near = one.float64_difference <= FLOAT64_LIMIT, one.error_ratio <= RATIO_LIMIT
            difference, limit = f"{one.float64_difference:.1e}", f"{FLOAT64_LIMIT:.0e}"
            checks.add_row(f"float64 difference, largest over std{note}", difference, limit, verdict(close))
            ratio, limit = f"{one.error_ratio:.2f}", f"{RATIO_LIMIT:.0f}"
            checks.add_row(f"float32 rms error over PyTorch's{note}", ratio, limit, verdict(near))
        checks.add_row("largest float32 difference", f"{self.comparison.float32_max:.2e}", "", "")
        checks.add_row("mean float32 difference", f"{self.comparison.float32_mean:.2e}", "", "")
        if self.rounding_cost:
            checks.add_row(f"cost of storing as {self.stored_as}, largest", f"{self.rounding_cost:.2e}", "", "")
        yield checks
        drift = table(
            "place", "drift", "", title="drift by stage (float64, over the standard deviation)", right=("drift",)
        )
        for place in (self.lively or self.comparison).drift:
            if self.blocks or place.name.count(".") != 2:
                drift.add_row(place.name, f"{place.drift:.1e}", verdict(place.drift <= FLOAT64_LIMIT))
        yield drift

    def failure(self) -> str:
        """What is wrong, in one line."""
        if self.different:
            return f"{len(self.different)} tensor(s) differ, first {self.different[0]}"
        comparison = self.comparison if self.lively is None or not self.comparison.passed else self.lively
        if comparison.first_over:
            place = comparison.first_over
            return f"the networks part at {place.name}: drift {place.drift:.1e}, limit {FLOAT64_LIMIT:.0e}"
        return (
            f"gate A {comparison.float64_difference:.1e} (limit {FLOAT64_LIMIT:.0e}), "
            f"gate B {comparison.error_ratio:.2f} (limit {RATIO_LIMIT})"
        )


def can_verify() -> bool:
    """Whether both frameworks are installed."""
    return installed("paddle") and installed("torch")


def verify(
    converted: File,
    against: Annotated[File, Parameter(name="--against")],
    *,
    ema: Ema = None,
    variant: Annotated[Any, Parameter()] = None,
    blocks: Flag = False,
) -> Verification:
    """Verify that two weights files are one network: tensors, float64 equivalence, float32 error ratio, by stage.

    Args:
        converted: The file to check.
        against: The file it was made from.
        variant: What both must be (default: what the converted file says).
        blocks: Show the drift after every block, not only by stage.

    Raises:
        UnreadableFile, UsageError, DoesNotFit: a file cannot be read or the two are not one network.
        MissingExtra: Paddle or PyTorch is not installed.
    """
    choosable = [read_checkpoint(path).has_ema for path in (converted, against)]
    if ema and not any(choosable):
        raise UsageError(f"neither {converted} nor {against} has averaged weights; leave out --ema")
    ours_ema, source_ema = (ema if both else None for both in choosable)
    ours = read_weights(converted, ours_ema, variant)
    proof = verify_weights(ours, read_weights(against, source_ema, variant or ours.spec.variant))
    return dataclasses.replace(proof, blocks=blocks)


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
    lively = None
    if has_near_zero_scale(converted.tensors):
        rule = synthetic_tensors(one)
        lively = compare(dataclasses.replace(converted, tensors=rule), dataclasses.replace(source, tensors=rule))
    return Verification(
        str(one),
        len(converted.tensors),
        tuple(differing_tensors(converted, rounded)),
        comparison,
        lively,
        stored_as,
        0.0 if rounded is source else _rounding_cost(source, rounded, comparison.input_shape),
    )


def require(verification: Verification) -> None:
    """Nothing, if it passed.

    Raises:
        NumbersDisagree: it did not; the message says where.
    """
    if not verification.passed:
        raise NumbersDisagree(verification.problem)


def compare(ours: Weights, reference: Weights) -> Comparison:
    """Run the Paddle network on `ours` and the twin on `reference`, in float64 and float32."""
    images = synthetic_input(input_shape(ours.spec), "verify/")
    runs = (
        (trace_torch, reference, "float64"),
        (trace_paddle, ours, "float64"),
        (trace_paddle, ours, "float32"),
        (trace_torch, reference, "float32"),
    )
    places = []
    with progress("verifying", len(runs), "runs") as advance:  # over half a minute on the largest variant
        for trace, weights, dtype in runs:
            places.append(trace(weights, images, dtype))
            advance(1)
    expected, found, *single = places
    drift = tuple(Place(name, float64_difference(found[name], value)) for name, value in expected.items())
    outputs = [name for name in expected if name.startswith("output")]
    paddle_32, torch_32 = (np.concatenate([run[name].ravel() for name in outputs]) for run in single)
    exact = np.concatenate([expected[name].ravel() for name in outputs])
    return Comparison(
        images.shape,
        max(place.drift for place in drift if place.name in outputs),
        error_ratio(paddle_32, torch_32, exact),
        float(np.abs(paddle_32.astype(np.float64) - torch_32).max()),
        float(np.abs(paddle_32.astype(np.float64) - torch_32).mean()),
        float(exact.std()),
        drift,
    )


def input_shape(spec: ModelSpec) -> tuple[int, int, int, int]:
    """Two images of the network's own size, more where they are small and the logits few."""
    size = spec.variant.preprocessing.input_size
    return images_needed(spec.num_classes or spec.variant.widths[-1], size * size), 3, size, size


def trace_paddle(weights: Weights, images: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """What the Paddle network computes, place by place: stem, blocks, stages, norms, outputs."""
    paddle = import_framework("paddle")
    from fcvit.models.build import build_network

    places: dict[str, np.ndarray] = {}
    with on_paddle_device("cpu"):
        model = build_network(weights, dtype)
        with _hooks(dict(model.named_sublayers()), "register_forward_post_hook", places), paddle.no_grad():
            output = model(paddle.to_tensor(images.astype(dtype)))
        return _with_outputs(places, output)


def trace_torch(weights: Weights, images: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The same of the twin."""
    torch = import_framework("torch")
    from fcvit.reference.build import build_reference

    model = build_reference(weights.spec, weights.tensors, getattr(torch, dtype))
    places: dict[str, np.ndarray] = {}
    with _hooks(dict(model.named_modules()), "register_forward_hook", places), torch.inference_mode():
        output = model(torch.from_numpy(images.astype(dtype)))
    return _with_outputs(places, output)


@contextlib.contextmanager
def _hooks(layers: Mapping[str, object], register: str, places: dict[str, np.ndarray]) -> Iterator[None]:
    def record(name: str):  # noqa: ANN202 -- the hook of either framework
        def hook(_layer, _inputs, output) -> None:  # noqa: ANN001
            places[name] = output.numpy()

        return hook

    handles = [
        getattr(layer, register)(record(name))
        for name, layer in layers.items()
        if name in ("patch_embed", "norm", "norm0", "norm2", "norm4", "norm6") or _is_part(name)
    ]
    yield
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]


def _is_part(name: str) -> bool:
    """`network.I` or `network.I.J`: a stage, a downsampling, a block."""
    first, *rest = name.split(".")
    return first == "network" and 1 <= len(rest) <= 2 and all(part.isdecimal() for part in rest)


def _with_outputs(places: dict[str, np.ndarray], output) -> dict[str, np.ndarray]:  # noqa: ANN001
    outputs = output if isinstance(output, list | tuple) else [output]
    return places | {f"output{index if len(outputs) > 1 else ''}": value.numpy() for index, value in enumerate(outputs)}


def _round(source: Weights, converted: Weights) -> Weights:
    if len(converted.dtypes) != 1:
        raise DoesNotFit(f"{converted.source.path} mixes types: {', '.join(converted.dtypes)}")
    return cast(source, converted.dtypes[0])


def _rounding_cost(source: Weights, rounded: Weights, shape: tuple[int, ...]) -> float:
    images = synthetic_input(shape, "verify/")
    before, after = (trace_torch(weights, images, "float64") for weights in (source, rounded))
    return max(float(np.abs(before[n] - after[n]).max()) for n in before if n.startswith("output"))
