"""Compositions of native operators as single Paddle functions, with all intermediate results in one tensor.

A composition is a function that calls the methods of a `Trace`. It is traced once for its sizes. The trace becomes a
plan: the calls of the kernels in the forward and the backward pass, with addresses relative to a few tensors. Running
a plan creates no tensors between the kernels.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.native.kernels import SUFFIXES, Gradients, PyLayer, dense, empty, kernel, like

import_framework("paddle")

from paddle import Tensor  # noqa: E402

Place = tuple[int, int]
"""The number of a tensor, and an offset in elements."""
NULL: Place = (0, 0)
ARENA, WORK, RESULT, FIRST = range(1, 5)  # all intermediate results, all gradients, y or dy, and the first input


@dataclasses.dataclass
class Value:
    """An input or a result. If it is the result of a GELU, `slope` is the derivative there.

    `gradient` is the sum of the gradients so far, for a GELU that of its input. An input has `output`, the place where
    its gradient is wanted.
    """

    place: Place
    count: int = 0
    slope: Place = NULL
    gradient: Place = NULL
    output: Place = NULL


class Call(NamedTuple):
    """A call of a kernel."""

    name: str
    places: Sequence[Place]
    sizes: Sequence[int]
    options: Sequence[float] = ()


class Trace:
    """Record the operators of a composition. Their sizes are those of the kernels in the C++ sources."""

    def __init__(self) -> None:
        self.taken = {ARENA: 0, WORK: 0}
        self.free: list[tuple[int, Place]] = []  # released places for gradients, with their numbers of elements
        self.sizes: dict[Place, int] = {}
        self.forward: list[Call] = []
        self.backward: list[Call] = []
        self.reverse: list[Callable[[], None]] = []  # each records the backward pass of an operator

    def take(self, base: int, count: int) -> Place:
        """Return a place of `count` elements. Places of gradients are used again after their release."""
        size, place = min((item for item in self.free if base == WORK and item[0] >= count), default=(0, NULL))
        if size:
            self.free.remove((size, place))
            return place
        place = base, self.taken[base]
        self.taken[base] += padded(count)
        self.sizes[place] = padded(count)
        return place

    def release(self, *gradients: Place) -> None:
        self.free += [(self.sizes[place], place) for place in gradients if place[0] == WORK]

    def differentiate(self, y: Value) -> None:
        """Record the backward pass of everything so far, from the gradient of the result `y`."""
        y.gradient = (RESULT, 0)
        if y.slope != NULL:
            y.gradient = self.take(WORK, y.count)
            self.backward.append(Call("multiply", ((RESULT, 0), y.slope, y.gradient), (y.count,)))
        for reverse in reversed(self.reverse):
            reverse()

    def layer_norm(self, x: Value, weight: Value, bias: Value, sizes: Sequence[int], eps: float) -> Value:
        """Normalize over positions and channels together."""
        statistics = self.take(ARENA, 2 * sizes[0])
        y = self._result(math.prod(sizes))
        self.forward.append(Call("layer_norm", (x.place, weight.place, bias.place, y.place, statistics), sizes, (eps,)))

        def reverse() -> None:
            more = x.gradient
            dx = self._gradient(x, y.count)
            places = (x.place, weight.place, statistics, y.gradient, dx, weight.output, bias.output, more)
            self.backward.append(Call("layer_norm_backward", places, sizes))
            self._through_gelu(x)
            self.release(y.gradient, more)

        self.reverse.append(reverse)
        return y

    def linear(self, x: Value, weight: Value, bias: Value, sizes: Sequence[int], gelu: bool = False) -> Value:
        """Multiply by a weight, and apply GELU if `gelu`."""
        y = self._weighted("linear", (x, weight, bias), sizes, sizes[0] * sizes[2], gelu)

        def reverse() -> None:
            places = (x.place, weight.place, x.slope, y.gradient, self._gradient(x), weight.output, bias.output)
            self.backward.append(Call("linear_backward", places, sizes))
            self.release(y.gradient)

        self.reverse.append(reverse)
        return y

    def depthwise(self, x: Value, weight: Value, bias: Value, sizes: Sequence[int], gelu: bool = False) -> Value:
        """Convolve each channel, and apply GELU if `gelu`."""
        y = self._weighted("depthwise", (x, weight, bias), sizes, math.prod(sizes[:4]), gelu)

        def reverse() -> None:
            places = (x.place, weight.place, y.gradient, self._gradient(x), weight.output, bias.output)
            self.backward.append(Call("depthwise_backward", places, sizes))
            self._through_gelu(x)
            self.release(y.gradient)

        self.reverse.append(reverse)
        return y

    def context(self, x: Value, *parameters: Value, sizes: Sequence[int], eps: float) -> Value:
        """Add the weighted global context with competition, as `fcvit.models.backbone.GlobalContext` computes it."""
        b, positions, width, heads, inner = sizes
        # Context, halves, winner, value, centered similarity and deviation, in the layout of `Kept` in operators.cc.
        kept = self.take(ARENA, b * (2 * width + 3 * inner + positions * heads + 1))
        y = self._result(b * positions * width)
        self.forward.append(Call("context", (x.place, *(p.place for p in parameters), y.place, kept), sizes, (eps,)))

        def reverse() -> None:
            fc1, _, fc2, _, weight, bias = (p.place for p in parameters)
            places = (x.place, fc1, fc2, weight, bias, kept, y.gradient, self._gradient(x, y.count))
            self.backward.append(Call("context_backward", (*places, *(p.output for p in parameters)), sizes, (eps,)))
            self._through_gelu(x)
            self.release(y.gradient)

        self.reverse.append(reverse)
        return y

    def residual(self, x: Value, branch: Value, scale: Value, factor: Value, sizes: Sequence[int]) -> Value:
        """Return x + branch scale factor, with a scale of each channel and a constant factor of each image, or none.

        `x` must have been the input of `layer_norm` before, which adds up both gradients.
        """
        y = self._result(math.prod(sizes))
        places = (x.place, branch.place, scale.place, factor.place, NULL, y.place)
        self.forward.append(Call("residual", places, sizes))

        def reverse() -> None:
            x.gradient = y.gradient
            places = (NULL, y.gradient, scale.place, factor.place, branch.slope, self._gradient(branch))
            self.backward.append(Call("residual", places, sizes))
            places = (branch.place, factor.place, y.gradient, scale.output)
            self.backward.append(Call("residual_scale", places, sizes))

        self.reverse.append(reverse)
        return y

    def _result(self, count: int) -> Value:
        return Value(self.take(ARENA, count), count)

    def _weighted(self, name: str, inputs: Sequence[Value], sizes: Sequence[int], count: int, gelu: bool) -> Value:
        z = self._result(count)
        y = dataclasses.replace(self._result(count), slope=z.place) if gelu else z
        places = (*(value.place for value in inputs), z.place, y.place if gelu else NULL)
        self.forward.append(Call(name, places, sizes))
        return y

    def _gradient(self, x: Value, needed: int = 0) -> Place:
        """Return where an operator writes the gradient of its input.

        `needed` is the number of elements if the kernel also writes a gradient that is not wanted.
        """
        unwanted = x.place[0] != ARENA and x.output == NULL
        x.gradient = self.take(WORK, x.count or needed) if x.place[0] == ARENA or (unwanted and needed) else x.output
        return x.gradient

    def _through_gelu(self, x: Value) -> None:
        if x.slope != NULL:
            self.backward.append(Call("multiply", (x.gradient, x.slope, x.gradient), (x.count,)))


def padded(count: int) -> int:
    """Return a number of elements that fills cache lines, and more, because equal distances would share cache sets."""
    return (count + 15) // 16 * 16 + 80


class Pass:
    """Calls of kernels, ready to be repeated with other tensors."""

    def __init__(self, calls: Sequence[Call], suffix: str):
        places = [place for call in calls for place in call.places]
        self.bases = np.array([base for base, _ in places])
        self.offsets = np.array([offset for _, offset in places]) * np.dtype(suffix).itemsize
        starts = itertools.accumulate((8 * len(call.places) for call in calls), initial=0)
        self.numbers = [(np.array(call.sizes, np.int64), np.array(call.options, np.float64)) for call in calls]
        self.calls = [
            (kernel(call.name, suffix), start, *(array.ctypes.data for array in arrays))
            for call, start, arrays in zip(calls, starts, self.numbers, strict=False)
        ]

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Run the calls. The tensors have the numbers from `ARENA`.

        Raises:
            MemoryError: A kernel ran out of memory.
        """
        addresses = np.array([0, *[0 if tensor is None else tensor.data_ptr() for tensor in tensors]])
        pointers = addresses[self.bases] + self.offsets
        first = pointers.ctypes.data
        for function, start, sizes, options in self.calls:
            if function(first + start, sizes, options):
                raise MemoryError("the native operators ran out of memory")


class Plan(NamedTuple):
    """Both passes of a composition, and the numbers of elements of their intermediate results and gradients."""

    forward: Pass
    backward: Pass
    arena: int
    work: int


@functools.lru_cache(1024)  # networks take images of many sizes
def _plan(compose: Callable[..., Value], wanted: tuple[bool, ...], suffix: str, settings: Any) -> Plan:
    trace, count = Trace(), len(wanted)
    inputs = [Value((FIRST + i, 0), output=(FIRST + count + i, 0) if wanted[i] else NULL) for i in range(count)]
    y = compose(trace, *inputs, **dict(settings))
    arena = trace.taken[ARENA] - padded(y.count)  # the result is the last, and has a tensor of its own
    forward = [
        call._replace(places=[(RESULT, 0) if place == y.place else place for place in call.places])
        for call in trace.forward
    ]
    trace.differentiate(y)
    return Plan(Pass(forward, suffix), Pass(trace.backward, suffix), arena, trace.taken[WORK])


def compute(
    compose: Callable[..., Value], shape: Sequence[int], inputs: Sequence[Tensor | None], **settings: Any
) -> Tensor:
    """Compute a composition as one Paddle function.

    Args:
        compose: Takes a `Trace`, the inputs as `Value`s and the settings, and returns the result.
        shape: The shape of the result.
        inputs: Activations and parameters of the same data type, or None.
        settings: Hashable settings.

    Raises:
        TypeError: The tensors have different data types.
        MemoryError: A kernel ran out of memory.
    """
    return Composition.apply(*inputs, compose=compose, shape=shape, settings=tuple(settings.items()))


class Composition(PyLayer):
    """The Paddle function of a composition."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor | None, compose: Any, shape: Sequence[int], settings: Any) -> Tensor:
        inputs = [None if tensor is None else dense(tensor) for tensor in given]
        first: Any = inputs[0]
        dtype = first.dtype
        if any(tensor is not None and tensor.dtype is not dtype for tensor in inputs):
            raise TypeError(f"{compose.__name__}: the tensors have different data types")
        ctx.wanted = tuple(tensor is not None and not tensor.stop_gradient for tensor in given)
        ctx.plan = _plan(compose, ctx.wanted, SUFFIXES[dtype], settings)
        arena, y = empty([ctx.plan.arena], dtype), empty(list(shape), dtype)
        ctx.plan.forward.run((arena, None, y, *inputs))
        ctx.save_for_backward(arena, *inputs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        arena, *inputs = ctx.saved_tensor()
        gradients = [like(tensor) if want else None for tensor, want in zip(inputs, ctx.wanted, strict=True)]
        work = empty([ctx.plan.work], dy.dtype)
        ctx.plan.backward.run((arena, work, dense(dy), *inputs, *gradients))
        return tuple(g for tensor, g in zip(inputs, gradients, strict=True) if tensor is not None)
