"""Write a network as a list of operations for the native engine (`native/engine.cc`), and run it.

The layers are folded as in `fcvit.inference.onnx_graph`: no BatchNorm is left, and neighboring weights contain the
affine part of a norm in front of a 1x1 convolution or the head, and the second layer scale.

A map is (C / L, H, W, L) for each image, with L channels in a vector and zeros in the channels of an incomplete vector.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fcvit.errors import UsageError
from fcvit.inference import algebra
from fcvit.inference.detector import BOX_HEAD, MASK_HEAD, TRUNK, part_outputs
from fcvit.models.spec import HEADS, ModelSpec, is_counter
from fcvit.models.variants import Preprocessing
from fcvit.native.build import library
from fcvit.weights.reading import Weights

_KINDS = (
    "image", "stem", "downsample", "tokens", "pointwise", "norm", "mixer", "pool", "output", "features", "convolution",
    "resize", "enlarge",
)  # fmt: skip
_LINEAR, _GELU, _RELU = range(3)
_EPS = 1e-5
_SLOTS = ("x", "y", "z")
_NUMBERS = (
    "channels", "outputs", "height", "width", "kernel", "stride", "inner", "heads", "group", "activation", "within",
    "high", "wide",
)  # fmt: skip
_PIECE = 256  # Product::piece in gemm.h; groups of hidden channels are multiples, so that sums have the same order
_SMALL = 256  # positions of a map that the channel mixer computes as a whole
_HIDDEN_FLOATS = 1 << 16  # of the hidden maps of a small map in the channel mixer, which stay in the cache
_POSITIONS = 28  # in the last stage, from which a product with its weights is efficient
_NEAR, _FAR = 5 / 8, 3 / 2  # the points of winograd.h
_POINTS = ((_NEAR, _FAR), (-_NEAR, _FAR), (_FAR, _NEAR), (-_FAR, _NEAR))  # each with the other one
_WINOGRAD = np.array(  # the transform of the weights, (frequency, tap)
    [
        (1 / (_NEAR * _FAR) ** 2, 0, 0),
        *(np.array((1, p, p * p)) / (2 * p * p * (p * p - other**2)) for p, other in _POINTS),
        (0, 0, 1),
    ]
)
_ROIS = {BOX_HEAD: 112, MASK_HEAD: 8}  # that a thread computes together


class _Op(ctypes.Structure):
    """`Op` in layers.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", *_SLOTS, *_NUMBERS)),
        ("weights", ctypes.c_void_p * 10),
    )


class _Map(NamedTuple):
    """A map in the memory with this name."""

    slot: str
    channels: int
    height: int
    width: int

    def numbers(self) -> dict[str, int]:
        return {"channels": self.channels, "height": self.height, "width": self.width}


def unsupported(spec: ModelSpec) -> str | None:
    """Return why the native engine does not compute a network, or None if it does."""
    variant = spec.variant
    if spec.head not in _HEADS:
        return f"the native engine does not support the head {spec.head}"
    for name in ("spatial_attention", "channel_attention"):
        if getattr(variant, name):
            return f"the native engine does not support {name}"
    if max(*variant.kernel_sizes, variant.channel_kernel) > 255:
        return "the native engine supports kernels of at most 255"
    return None


class NativeNetwork:
    """A network, or a part of a detector, computed by the native engine on the CPU in float32.

    Args:
        weights: Weights of a network for which `unsupported` is None.
        preprocessing: Mean and standard deviation for uint8 images.
        threads: Number of threads of a call.
        part: A part of a detector (see `fcvit.inference.detector.parts`), or "".
        level: Instruction set (see `fcvit.native.build.library`). None selects the best of this processor.

    Raises:
        UsageError: The engine does not support the network.
        MissingExtra: The engine cannot be compiled.
    """

    def __init__(
        self, weights: Weights, preprocessing: Preprocessing, threads: int, part: str = "", level: str | None = None
    ):
        if reason := unsupported(weights.spec):
            raise UsageError(reason)
        self.library, self.threads = library(level), threads
        self.layers, self.part = _Layers(weights, preprocessing, self.library.fcvit_lanes()), part
        self.program = functools.lru_cache(16)(functools.partial(_Program, self.layers, part))
        self.memory: list[np.ndarray] = []
        run, memory = self.library.fcvit_engine_run, self.library.fcvit_engine_memory
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        memory.argtypes, memory.restype = [pointer, *[number] * 4], number
        run.argtypes = [pointer, number, number, pointer, pointer, *[number] * 4, pointer, pointer]

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for uint8 RGB or normalized float32 images (B, 3, H, W), or for features of RoIs."""
        return self._run(images, self.threads)[0]

    def profile(self, images: np.ndarray, rounds: int) -> list[tuple[str, float, float]]:
        """Return each kind of operator with its seconds on one thread (median of the rounds) and its operations."""
        self._run(images, 1)
        times = [self._run(images, 1)[1] for _ in range(rounds)]
        median = np.median(times, axis=0)
        program = self.program(*images.shape[1:], self.images_together(images, 1), False)
        total: dict[str, tuple[float, float]] = {}
        for (kind, flops), seconds in zip(program.costs, median, strict=True):
            known = total.get(kind, (0.0, 0.0))
            total[kind] = (known[0] + seconds, known[1] + flops * len(images))
        return [(kind, *numbers) for kind, numbers in total.items()]

    def images_together(self, images: np.ndarray, threads: int) -> int:
        """Return the number of images that a thread computes together: more than one if they are small."""
        if self.part in _ROIS:
            return max(1, min(_ROIS[self.part], -(-len(images) // threads)))
        stride = 32
        positions = -(-images.shape[2] // stride) * -(-images.shape[3] // stride)
        return max(1, min(_POSITIONS // positions, -(-len(images) // threads)))

    def _run(self, images: np.ndarray, threads: int) -> tuple[list[np.ndarray], np.ndarray]:
        batch, together = len(images), self.images_together(images, threads)
        program = self.program(*images.shape[1:], together, batch < together * threads)
        outputs = [np.empty((batch, *shape), np.float32) for shape in program.outputs]
        pointers = (ctypes.c_void_p * len(outputs))(*(output.ctypes.data for output in outputs))
        seconds = np.zeros(len(program.ops))
        images = np.ascontiguousarray(images)
        size = self.library.fcvit_engine_memory(program.ops, len(program.ops), program.floats, together, threads)
        try:
            memory = self.memory.pop()  # kept from an earlier call; concurrent calls have memory of their own
        except IndexError:
            memory = _aligned(size)
        if len(memory) < size:
            memory = _aligned(size)
        addresses = (memory.ctypes.data, images.ctypes.data)
        numbers = (images.dtype == np.uint8, batch, together, threads)
        times = seconds.ctypes.data if threads == 1 else None
        if self.library.fcvit_engine_run(
            program.ops, len(program.ops), program.floats, *addresses, *numbers, pointers, times
        ):
            raise MemoryError("the native engine: no thread could be created")
        self.memory.append(memory)
        return outputs, seconds


class _Layers:
    """The weights of a network, folded and packed when they are first used."""

    def __init__(self, weights: Weights, preprocessing: Preprocessing, lanes: int):
        self.spec, self.variant, self.lanes, self.preprocessing = (
            weights.spec,
            weights.spec.variant,
            lanes,
            preprocessing,
        )
        prefix = HEADS[weights.spec.head].prefix
        self.tensors = {n.removeprefix(prefix): t for n, t in weights.tensors.items() if not is_counter(n)}
        self.arrays: dict[str, np.ndarray] = {}

    def pointer(self, name: str, create: Callable[[], np.ndarray]) -> int:
        """Return the address of an array, which is created once."""
        if name not in self.arrays:  # two threads may create it at once, and both must use the same array
            array = create()
            memory = _aligned(array.size)
            memory[:] = array.ravel()
            self.arrays.setdefault(name, memory)
        return self.arrays[name].ctypes.data

    def tensor(self, name: str) -> np.ndarray:
        return self.tensors[name].astype(np.float64)

    def pair(self, name: str) -> algebra.Pair:
        return self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")

    def vector(self, name: str, create: Callable[[], np.ndarray]) -> int:
        """Return the address of a vector of channels, filled up with zeros."""
        return self.pointer(name, lambda: _fill(create(), 0, 2 * self.lanes))

    def product(self, name: str, create: Callable[[], algebra.Pair], pixels: bool = False) -> tuple[int, int]:
        """Return the addresses of the packed weights (N, C, ...) of a product and its bias.

        Its input is a map, or with `pixels` the image, which has the three channels of a pixel next to each other.
        """

        def packed() -> np.ndarray:
            weight = create()[0]
            if pixels:
                weight = weight.transpose(0, 2, 3, 1)
            else:
                weight = _fill(weight.reshape(*weight.shape[:2], -1), 1, self.lanes)
                weight = weight.reshape(len(weight), -1, self.lanes, weight.shape[2]).transpose(0, 1, 3, 2)
            weight = _fill(weight.reshape(len(weight), -1), 0, 2 * self.lanes)
            return weight.reshape(-1, 2 * self.lanes, weight.shape[1]).transpose(0, 2, 1)

        return self.pointer(f"{name} weight", packed), self.vector(f"{name} bias", lambda: create()[1])

    def winograd(self, name: str, create: Callable[[], algebra.Pair]) -> tuple[int]:
        """Return the address of the weights (N, C, 3, 3) and biases of a convolution, packed for `Winograd`."""

        def packed() -> np.ndarray:
            weight, bias = create()
            frequencies = (_WINOGRAD @ weight @ _WINOGRAD.T).transpose(2, 3, 1, 0)  # (6, 6, C, N)
            frequencies = _fill(_fill(frequencies, 2, self.lanes), 3, 2 * self.lanes)
            panels = frequencies.reshape(36, frequencies.shape[2], -1, 2 * self.lanes).swapaxes(1, 2)
            return np.concatenate([panels.ravel(), _fill(bias, 0, 2 * self.lanes)])

        return (self.pointer(f"{name} winograd", packed),)

    def depthwise(self, name: str) -> tuple[int, int]:
        """Return the addresses of the taps (C / L, kernel, kernel, L) and the bias."""

        def taps() -> np.ndarray:
            weight = _fill(self.tensor(f"{name}.weight"), 0, 2 * self.lanes)
            return weight.reshape(-1, self.lanes, weight.shape[-1] ** 2).transpose(0, 2, 1)

        return self.pointer(f"{name} taps", taps), self.vector(f"{name} bias", lambda: self.tensor(f"{name}.bias"))

    def plain(self, name: str) -> int:
        return self.vector(name, lambda: self.tensor(name))

    def rows(self, name: str) -> tuple[int, int]:
        """Return the addresses of the weights of a linear layer (N, C), with full vectors of inputs, and its bias."""
        weight = self.pointer(f"{name} rows", lambda: _fill(self.tensor(f"{name}.weight"), 1, self.lanes))
        return weight, self.plain(f"{name}.bias")

    def conv_norm(self, name: str) -> algebra.Pair:
        return algebra.scale_outputs(self.pair(f"{name}.proj"), *self.batch_norm(f"{name}.norm"))

    def head_conv(self, name: str) -> algebra.Pair:
        """Return a convolution of Semantic FPN's head, which has no bias, with its BatchNorm."""
        weight = self.tensor(f"{name}.conv.weight")
        return algebra.scale_outputs((weight, np.zeros(len(weight))), *self.batch_norm(f"{name}.bn"))

    def batch_norm(self, name: str) -> algebra.Pair:
        statistics = self.tensor(f"{name}.running_mean"), self.tensor(f"{name}.running_var")
        return algebra.batch_norm(*self.pair(name), *statistics, _EPS)

    def after_norm(self, layer: str, norm: str) -> algebra.Pair:
        """Return a 1x1 convolution or linear layer with the affine part of the norm in front of it."""
        scale, shift = self.pair(norm)
        return algebra.scale_inputs(algebra.shift_inputs(self.pair(layer), shift), scale)


class _Program:
    """The operations for images of one size.

    Attributes:
        ops: The operations.
        floats: Size of the memory of one image.
        outputs: Shapes of the outputs without the batch dimension.
        costs: Name and floating-point operations of each operation, for one image.
    """

    def __init__(self, layers: _Layers, part: str, channels: int, height: int, width: int, images: int, team: bool):
        self.layers, self.lanes, self.images, self.team = layers, layers.lanes, images, team
        self.variant = layers.variant
        shapes = part_outputs(layers.spec, part, height, width)
        self.outputs, self.names = list(shapes.values()), list(shapes)
        self.costs: list[tuple[str, float]] = []
        self.sizes: dict[str, int] = {}
        self.written: list[tuple[dict[str, int], dict[str, str], list[int | None]]] = []
        _PARTS[part](self, channels, height, width)
        offsets, self.floats = {}, 0
        for name, size in self.sizes.items():
            offsets[name] = self.floats
            self.floats += -(-size // 16) * 16
        self.ops = (_Op * len(self.written))()
        for op, (numbers, slots, weights) in zip(self.ops, self.written, strict=True):
            for name, number in numbers.items():
                setattr(op, name, number)
            for slot in _SLOTS:
                setattr(op, slot, offsets[slots[slot]] if slot in slots else -1)
            op.weights = (ctypes.c_void_p * 10)(*weights)

    def op(self, kind: str, slots: dict[str, str], *weights: int | None, flops: float = 0.0, **numbers: int) -> None:
        self.written.append(({"kind": _KINDS.index(kind), **numbers}, slots, list(weights)))
        self.costs.append((kind, flops))

    def slot(self, name: str, floats: int) -> str:
        """Reserve memory for each image. Maps that are not needed at the same time share a name."""
        self.sizes[name] = max(self.sizes.get(name, 0), floats)
        return name

    def padded(self, channels: int) -> int:
        return -(-channels // self.lanes) * self.lanes

    def map(self, name: str, channels: int, height: int, width: int) -> str:
        return self.slot(name, self.padded(channels) * height * width)

    def stages(self, height: int, width: int) -> list[_Map]:
        """Write stem and stages. Return the map of each stage."""
        v, mean = self.variant, 255 * np.array(self.layers.preprocessing.mean)
        std = 255 * np.array(self.layers.preprocessing.std)
        self.slot("image", 3 * (height + 6) * (width + 6) + 64)
        normalize = (self.layers.pointer("std", lambda: 1 / std), self.layers.pointer("mean", lambda: -mean / std))
        self.op("image", {"y": "image"}, *normalize, height=height, width=width, kernel=7)
        maps = []
        for stage, channels in enumerate(v.widths):
            stride, kernel, given = (4, 7, 3) if not stage else (2, 3, v.widths[stage - 1])
            high, wide = -(-height // stride), -(-width // stride)
            name = f"network.{2 * stage - 1}" if stage else "patch_embed"
            weights = self.layers.product(name, functools.partial(self.layers.conv_norm, name), pixels=not stage)
            slots = {"x": maps[-1].slot if stage else "image", "y": self.map(f"{stage} 0", channels, high, wide)}
            if stage:
                slots["z"] = self.slot("copy", self.padded(given) * (height + 2) * (width + 2))
            numbers = {"channels": given, "outputs": channels, "height": height, "width": width, "stride": stride}
            flops = 2 * high * wide * channels * given * kernel**2
            self.op("downsample" if stage else "stem", slots, *weights, flops=flops, **numbers)
            height, width = high, wide
            now, other = slots["y"], self.map(f"{stage} 1", channels, height, width)
            for block in range(v.depths[stage]):
                result = self.block(f"network.{2 * stage}.{block}", stage, now, other, height, width)
                now, other = result, other if result == now else now
            maps.append(_Map(now, channels, height, width))
        return maps

    def block(self, name: str, stage: int, x: str, y: str, height: int, width: int) -> str:
        """Write a block for map x, with memory y for another map. Return the one of both that has the result."""
        channels = self.variant.widths[stage]
        hidden = channels * self.variant.mlp_ratios[stage]
        size = {"channels": channels, "height": height, "width": width}
        first, second = (self.map(f"branch {index}", channels, height, width) for index in (0, 1))
        given = x
        mixes = (1, 2) if self.variant.second_mix else (1,)
        for mix in mixes:
            last = mix == mixes[-1]
            self.tokens(f"{name}.token_mixer", mix, f"{name}.norm1" if mix == 1 else None, given, first, size)
            self.bottleneck(name, mix, first, y if last else second, x if last else None, size)
            given = second
        self.norm(y, first, size)
        fc1, dw, fc2 = (f"{name}.channel_mixer.{layer}" for layer in ("fc1", "dwconv", "fc2"))
        first_layer = self.layers.product(fc1, lambda: self.layers.after_norm(fc1, f"{name}.norm2"))

        def contract() -> algebra.Pair:
            scale = self.layers.tensors.get(f"{name}.layer_scale_2")
            return self.layers.pair(fc2) if scale is None else algebra.scale_outputs(self.layers.pair(fc2), scale)

        last_layer, positions = self.layers.product(fc2, contract), height * width
        flops = 4 * positions * channels * hidden
        if not self.variant.channel_dwconv:
            one = self.layers.vector("one", lambda: np.ones(max(self.variant.widths)))
            slots = {"x": first, "y": x, "z": y}
            numbers = {"outputs": channels, "inner": hidden, "within": _GELU}
            self.op("pointwise", slots, *first_layer, *last_layer, one, flops=flops, **numbers, **size)
            return x
        slots, group = {"x": y, "y": first}, _PIECE
        if positions <= _SMALL:
            group *= max(1, _HIDDEN_FLOATS // (positions * self.images * _PIECE))
            if self.team:  # wait less often for other threads
                group = self.padded(hidden)
            slots["z"] = self.slot("hidden", min(group, self.padded(hidden)) * positions)
        kernel = self.variant.channel_kernel
        flops += 2 * positions * hidden * kernel**2
        weights = (*first_layer, *self.layers.depthwise(dw), *last_layer)
        self.op("mixer", slots, *weights, flops=flops, inner=hidden, kernel=kernel, group=group, **size)
        return y

    def tokens(self, mixer: str, mix: int, norm: str | None, x: str, y: str, size: dict[str, int]) -> None:
        """Write norm, global context and depthwise convolution."""
        v, layers, name = self.variant, self.layers, f"{mixer}.gc{mix}"
        channels, positions, kernel = size["channels"], size["height"] * size["width"], v.kernel_sizes[mix - 1]
        affine = (None, None) if norm is None else (layers.plain(f"{norm}.weight"), layers.plain(f"{norm}.bias"))
        context: tuple[int | None, ...] = (None,) * 6
        flops = 2 * positions * channels * kernel**2
        numbers = {"kernel": kernel}
        if v.global_context:
            inner = channels // v.reduction
            numbers |= {"heads": v.heads, "inner": inner, "activation": _LINEAR if v.competition else _GELU}
            ends = ("fc1", "fc2") if v.competition else ("fc.0", "fc.2")
            context = (*layers.rows(f"{name}.{ends[0]}"), *layers.rows(f"{name}.{ends[1]}"), None, None)
            if v.weighted_context:
                context = (*context[:4], *(layers.plain(f"{name}.rescale_{kind}") for kind in ("weight", "bias")))
                flops += 4 * positions * channels
        work = 2 * self.padded(channels) + 16 + self.padded(v.heads) * positions
        slots = {"x": x, "y": y, "z": self.slot("work", work)}
        self.op(
            "tokens", slots, *affine, *context, *layers.depthwise(f"{mixer}.dw{mix}"), flops=flops, **size, **numbers
        )

    def bottleneck(self, block: str, mix: int, x: str, y: str, residual: str | None, size: dict[str, int]) -> None:
        """Write the 1x1 convolutions after a depthwise convolution, and the end of the token mixer."""
        name, channels, layers = f"{block}.token_mixer.fc{mix}", size["channels"], self.layers
        inner = self.variant.token_width(channels) or 0
        names = (f"{name}.0", f"{name}.2") if inner else (name,)
        weights = [address for one in names for address in layers.product(one, functools.partial(layers.pair, one))]
        slots = {"x": x, "y": y}
        if residual is not None:
            slots["z"] = residual
            scale = f"{block}.layer_scale_1"
            one = layers.tensors.get(scale, np.ones(channels))
            weights = [*weights, *(None,) * (4 - len(weights)), layers.vector(scale, lambda: one)]
        flops = 2 * size["height"] * size["width"] * channels * (2 * inner or channels)
        numbers = {"outputs": channels, "inner": inner, "activation": _GELU, "within": _GELU}
        self.op("pointwise", slots, *weights, flops=flops, **numbers, **size)

    def norm(self, x: str, y: str, size: dict[str, int], affine: tuple[int | None, ...] = (None, None)) -> None:
        """Write a norm. Without `affine`, the next layer contains its scale and shift."""
        work = self.slot("work", 2 * self.padded(size["channels"]) + 16)
        self.op("norm", {"x": x, "y": y, "z": work}, *affine, **size)

    def output(self, name: str, x: _Map, channels_last: bool = False) -> None:
        self.op("output", {"x": x.slot}, inner=self.names.index(name), kernel=int(not channels_last), **x.numbers())

    def layer(
        self,
        kind: str,
        x: _Map,
        slot: str,
        outputs: int,
        name: str,
        create: Callable[[], algebra.Pair] | None = None,
        relu: bool = False,
    ) -> _Map:
        """Write a linear layer or 1x1 convolution ("pointwise"), or a convolution with kernel 3 ("convolution").

        Operations are counted as in the definition of a convolution. Winograd's method needs fewer.
        """
        y = _Map(self.map(slot, outputs, x.height, x.width), outputs, x.height, x.width)
        create = create or functools.partial(self.layers.pair, name)
        weights = (self.layers.product if kind == "pointwise" else self.layers.winograd)(name, create)
        flops = 2 * x.height * x.width * x.channels * outputs * (1 if kind == "pointwise" else 9)
        numbers = {"outputs": outputs, "activation": _RELU * relu, **x.numbers()}
        self.op(kind, {"x": x.slot, "y": slot}, *weights, flops=flops, **numbers)
        return y

    def resize(
        self, x: _Map, slot: str, size: tuple[int, int], kernel: int = 2, stride: int = 0, add: bool = False
    ) -> _Map:
        """Write a map in another size, bilinear with kernel 2. `add` adds it to what the memory contains."""
        slots = {"x": x.slot, "y": self.map(slot, x.channels, *size)} | ({"z": slot} if add else {})
        self.op("resize", slots, kernel=kernel, stride=stride, high=size[0], wide=size[1], **x.numbers())
        return _Map(slot, x.channels, *size)

    def network(self, channels: int, height: int, width: int) -> None:
        _HEADS[self.layers.spec.head](self, self.stages(height, width))

    def classifier(self, maps: list[_Map]) -> None:
        x, layers, classes = maps[-1], self.layers, self.layers.spec.num_classes
        pooled = _Map(self.map("pooled", x.channels, 1, 1), x.channels, 1, 1)
        work = self.slot("work", 2 * self.padded(x.channels) + 16)
        self.op("pool", {"x": x.slot, "y": pooled.slot, "z": work}, **x.numbers())

        def head() -> algebra.Pair:
            if classes:
                return layers.after_norm("head", "norm")
            scale, shift = layers.pair("norm")
            return np.diag(scale), shift

        logits = self.layer("pointwise", pooled, "logits", classes or x.channels, "head", head)
        self.output(self.names[0], logits)

    def backbone(self, maps: list[_Map]) -> None:
        for stage, x in enumerate(maps):
            affine = tuple(self.layers.plain(f"norm{2 * stage}.{kind}") for kind in ("weight", "bias"))
            self.output(f"features.{stage}", self.stage_norm(x, affine))

    def stage_norm(self, x: _Map, affine: tuple[int | None, ...] = (None, None)) -> _Map:
        y = x._replace(slot=self.map("branch 0", *x[1:]))
        self.norm(x.slot, y.slot, x.numbers(), affine)
        return y

    def fpn(self, maps: list[_Map]) -> list[_Map]:
        """Write the levels of the feature pyramid. The lateral convolutions contain the affine part of the norms."""
        neck, levels, above = self.layers.spec.options.neck, [], None
        for level, x in reversed([*enumerate(maps)]):
            name = f"neck.lateral_convs.{level}.conv"
            lateral = functools.partial(self.layers.after_norm, name, f"norm{2 * level}")
            y = self.layer("pointwise", self.stage_norm(x), f"neck {level % 2}", neck, name, lateral)
            if above:
                self.resize(above, y.slot, y[2:], kernel=1, add=True)
            above = y
            levels.insert(0, self.layer("convolution", y, f"level {level}", neck, f"neck.fpn_convs.{level}.conv"))
        return levels

    def semantic_fpn(self, maps: list[_Map]) -> None:
        channels, classes = self.layers.spec.options.channels, self.layers.spec.num_classes
        total, *coarse = self.fpn(maps)
        for level, x in enumerate([total, *coarse]):
            for index in range(max(level, 1)):
                name = f"decode_head.scale_heads.{level}.{2 * index}"
                convolution = functools.partial(self.layers.head_conv, name)
                x = self.layer("convolution", x, "neck 0" if level else "total", channels, name, convolution, relu=True)
                double = (2 * x.height, 2 * x.width)
                # The last doubling and the resizing to the size of the sum are one step if that is the double.
                if level and (index < level - 1 or double != total[2:]):
                    x = self.resize(x, "neck 1", double)
            if level:
                self.resize(x, "total", total[2:], add=True)
            else:
                total = x
        x = self.layer("pointwise", total, "neck 0", classes, "decode_head.conv_seg")
        _, high, wide = self.outputs[0]
        self.op("enlarge", {"x": x.slot}, inner=0, high=high, wide=wide, **x.numbers())

    def detector(self, maps: list[_Map]) -> None:
        levels = self.fpn(maps)
        for level, x in enumerate(levels):
            self.output(f"maps.{level}", x, channels_last=True)
        half = (-(-x.height // 2), -(-x.width // 2))
        for level, x in enumerate([*levels, self.resize(levels[-1], "level 4", half, kernel=1, stride=2)]):
            hidden = self.layer(
                "convolution", x, "neck 0", self.layers.spec.options.rpn, "rpn_head.rpn_conv", relu=True
            )
            for output, name in (("logits", "rpn_head.rpn_cls"), ("deltas", "rpn_head.rpn_reg")):
                output = f"{output}.{level}"
                channels = self.outputs[self.names.index(output)][0]
                self.output(output, self.layer("pointwise", hidden, "neck 1", channels, name))

    def box_head(self, *shape: int) -> None:
        x = self.features(math.prod(shape), 1, 1)
        for index, name in enumerate(("shared_fcs.0", "shared_fcs.1")):
            hidden, name = self.layers.spec.options.box_channels, f"roi_head.bbox_head.{name}"
            x = self.layer("pointwise", x, f"hidden {index}", hidden, name, relu=True)
        for output, shape, name in zip(self.names, self.outputs, ("fc_cls", "fc_reg"), strict=True):
            self.output(output, self.layer("pointwise", x, "hidden 0", shape[0], f"roi_head.bbox_head.{name}"))

    def mask_head(self, *shape: int) -> None:
        """Write the mask head. Its transposed convolution is four 1x1 convolutions, each for every fourth position."""
        x, hidden, layers = self.features(*shape), self.layers.spec.options.mask_channels, self.layers
        for index in range(4):
            name = f"roi_head.mask_head.convs.{index}.conv"
            x = self.layer("convolution", x, f"map {index % 2}", hidden, name, relu=True)
        upsample, name, classes = "roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits", self.outputs[0][0]
        last = layers.product(name, functools.partial(layers.pair, name))

        def quarter(index: int) -> algebra.Pair:
            weight, bias = layers.pair(upsample)
            return weight[:, :, index // 2, index % 2].T, bias

        y = x._replace(slot=self.map("map 0", classes, *x[2:]), channels=classes)
        for index in range(4):
            first = layers.product(f"{upsample} {index}", functools.partial(quarter, index))
            numbers = {"inner": hidden, "outputs": classes, "within": _RELU, **x.numbers()}
            flops = 2 * x.height * x.width * hidden * (hidden + classes)
            self.op("pointwise", {"x": x.slot, "y": y.slot}, *first, *last, flops=flops, **numbers)
            self.op("output", {"x": y.slot}, kernel=2, stride=index, inner=0, **y.numbers())

    def features(self, *shape: int) -> _Map:
        """Write the input of a head."""
        x = _Map(self.map("features", *shape), *shape)
        self.op("features", {"y": x.slot}, **x.numbers())
        return x


_HEADS = {
    "classifier": _Program.classifier,
    "backbone": _Program.backbone,
    "semantic_fpn": _Program.semantic_fpn,
    "mask_rcnn": _Program.detector,
}
_PARTS = {
    "": _Program.network, TRUNK: _Program.network, BOX_HEAD: _Program.box_head, MASK_HEAD: _Program.mask_head,
}  # fmt: skip


def _fill(array: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    """Append zeros so that the length of an axis is a multiple."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return np.pad(array, widths)


def _aligned(size: int) -> np.ndarray:
    """Return uninitialized float32 memory that begins at a cache line."""
    line = 64
    memory = np.empty(size + line // 4, np.float32)
    start = -memory.ctypes.data % line // 4
    return memory[start : start + size]
