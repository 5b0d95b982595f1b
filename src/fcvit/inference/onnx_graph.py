"""Write the network as an ONNX graph, node by node from the weights.

Tracing leaves unnecessary chains of Shape, Gather and Identity nodes, and exporters have written wrong constants.
This module writes only the necessary nodes and folds layers together with `fcvit.inference.algebra`. The graph has no
BatchNorm. Neighboring weights contain the affine part of a norm in front of a 1x1 convolution or the head, the second
layer scale, and the division by the standard deviation of the preprocessing.

`fcvit.models` defines the network, and node names contain its layer names. Opset 20 is the first that has GELU as an
operator.
"""

from typing import Any

import numpy as np

from fcvit.errors import MissingExtra
from fcvit.inference import algebra
from fcvit.inference.detector import BOX_HEAD, MASK_HEAD
from fcvit.inference.interface import Interface, input_shape, output_shapes
from fcvit.models.spec import HEADS, is_counter
from fcvit.weights.reading import Weights

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise MissingExtra(f"onnx is not available ({error}); install it with: pip install 'fcvit[onnx]'") from None

OPSET = 20
IR_VERSION = 9  # the oldest version with this opset, because old runtimes reject new versions
PRODUCER = "fcvit"
EPS = 1e-5  # for all norms and for the similarity's standard deviation
_SPATIAL = np.array([1, 2, 3], np.int64)
_CHANNELS = np.array([1], np.int64)
# Size limit of a hidden feature map of the channel mixer for one image, so that it fits in a core's L2 cache.
_HIDDEN_BYTES = 1 << 20


def onnx_model(weights: Weights, interface: Interface, metadata: dict[str, str] | None = None, dtype: str = "float32"):  # noqa: ANN201
    """Return the graph as an `onnx.ModelProto` with any batch size.

    Args:
        weights: Weights of any network. The folding is computed in float64.
        interface: Input and outputs of the graph.
        metadata: Strings to store in the model, by key.
        dtype: "float32", or "float64" for a check with onnx's reference evaluator.

    Raises:
        UsageError: Probabilities are requested for a network without classes.
    """
    model = _Writer(weights, interface, np.dtype(dtype)).model()
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    return model


class _Writer:
    """A builder that collects nodes and constants. Values are names, and methods return the name of their result."""

    def __init__(self, weights: Weights, interface: Interface, dtype: np.dtype):
        self.spec, self.v, self.interface, self.dtype = weights.spec, weights.spec.variant, interface, dtype
        prefix = HEADS[weights.spec.head].prefix
        tensors = {n.removeprefix(prefix): t for n, t in weights.tensors.items() if not is_counter(n)}
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple, str] = {}
        self.initializers: list[onnx.TensorProto] = []
        self.layer_name = ""  # the layer that is being written
        self.sides: tuple[int, int] | None = None  # height and width of the current stage, if known
        self.shape = ""  # name of the value that contains (H, W), if they are not known

    def model(self) -> "onnx.ModelProto":
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        given, shape = input_shape(self.spec, self.interface)
        writer = PART_WRITERS.get(self.interface.part)
        results = writer(self, given) if writer else self.network(given)
        shapes = output_shapes(self.spec, self.interface)
        for result, name in zip(results, shapes, strict=True):
            self.rename(result, name)
        pixels = TensorProto.UINT8 if self.interface.uint8 else kind
        graph = helper.make_graph(
            self.nodes,
            self.v.name,
            [_value(given, pixels, shape)],
            [_value(name, kind, shape) for name, shape in shapes.items()],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=PRODUCER)

    # Single nodes

    def op(self, kind: str, *inputs: "str | np.ndarray", **attributes: Any) -> str:
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        output = f"{self.layer_name}.{kind}_{len(self.nodes)}".lstrip(".")
        self.nodes.append(helper.make_node(kind, names, [output], name=output, **attributes))
        return output

    def constant(self, value: np.ndarray) -> str:
        """Return the name of a constant. Equal constants share a name, and floats have the data type of the graph."""
        value = np.asarray(value, self.dtype if np.asarray(value).dtype.kind == "f" else None, order="C")
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.constants:
            name = self.constants[key] = f"{self.layer_name}.constant_{len(self.constants)}".lstrip(".")
            self.initializers.append(numpy_helper.from_array(value, name))
        return self.constants[key]

    def rename(self, value: str, name: str) -> None:
        node = next(node for node in self.nodes if node.output[0] == value)
        node.output[0] = name
        for later in self.nodes:
            for index, source in enumerate(later.input):
                if source == value:
                    later.input[index] = name

    def pair(self, name: str) -> algebra.Pair:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def conv(self, x: str, layer: algebra.Pair, stride: int = 1, groups: int = 1) -> str:
        """Convolve in one or two dimensions, padded by half the kernel."""
        weight, bias = layer
        kernel = list(weight.shape[2:])
        pads = [side // 2 for side in kernel] * 2
        steps = [stride] * len(kernel)
        return self.op("Conv", x, weight, bias, kernel_shape=kernel, pads=pads, strides=steps, group=groups)

    def linear(self, x: str, layer: algebra.Pair) -> str:
        return self.op("Gemm", x, *layer, transB=1)

    def mean(self, x: str) -> str:
        """Average over positions, then channels: (B, 1, 1, 1). One long sum in float32 would be less exact."""
        return self.op("ReduceMean", self.op("GlobalAveragePool", x), _CHANNELS)

    def scale(self, x: str, scale: np.ndarray) -> str:
        return self.op("Mul", x, _column(scale))

    # The layers of `fcvit.models`

    def network(self, x: str) -> list[str]:
        """Write the network and return all outputs."""
        self.layer_name = "patch_embed"
        if self.interface.uint8:
            x = self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(self.dtype))
            # Subtract the mean before the stem, because its zero padding must represent the mean.
            x = self.op("Sub", x, _column(255 * np.array(self.interface.preprocessing.mean)))
        self.sides = self.interface.size
        image = x
        x = self.conv_norm(x, self.layer_name, 4)
        maps = []
        for stage in range(4):
            if stage:
                self.layer_name = f"network.{2 * stage - 1}"
                x = self.conv_norm(x, self.layer_name, 2)
            if self.sides is None and self.v.global_context and self.v.weighted_context:
                self.shape = self.op("Shape", x, start=2)
            for block in range(self.v.depths[stage]):
                x = self.block(x, stage, f"network.{2 * stage}.{block}")
            maps.append(x)
        self.image = image
        return HEAD_WRITERS[self.spec.head](self, maps)

    def semantic_fpn(self, maps: list[str]) -> list[str]:
        total = ""
        for level, x in enumerate(self.fpn(maps)):
            for index in range(max(level, 1)):
                self.layer_name = f"decode_head.scale_heads.{level}.{2 * index}"
                x = self.op("Relu", self.conv(x, self.folded_conv(self.layer_name)))
                if level:
                    x = self.op("Resize", x, "", np.array([1, 1, 2, 2], np.float32), mode="linear")
            total = self.op("Add", total, self.resize(x, total, "linear")) if level else x
        self.layer_name = "decode_head.conv_seg"
        logits = self.resize(self.conv(total, self.pair(self.layer_name)), self.image, "linear")
        return [self.op("Softmax", logits, axis=1) if self.interface.probabilities else logits]

    def fpn(self, maps: list[str]) -> list[str]:
        """Write the norms of the stages and the four levels of the feature pyramid."""
        levels = [
            self.conv(x, self.pair(f"neck.lateral_convs.{level}.conv"))
            for level, x in enumerate(self.backbone_norms(maps))
        ]
        for level in (3, 2, 1):
            self.layer_name = f"neck.lateral_convs.{level - 1}"
            above = self.resize(levels[level], levels[level - 1], "nearest")
            levels[level - 1] = self.op("Add", levels[level - 1], above)
        for level, x in enumerate(levels):
            self.layer_name = f"neck.fpn_convs.{level}"
            levels[level] = self.conv(x, self.pair(f"{self.layer_name}.conv"))
        return levels

    def detector_trunk(self, maps: list[str]) -> list[str]:
        """Write the feature pyramid, whose maps are returned channels last, and the RPN on five levels."""
        levels = self.fpn(maps)
        features = [self.op("Transpose", x, perm=[0, 2, 3, 1]) for x in levels]
        self.layer_name = "neck"
        levels.append(self.op("MaxPool", levels[-1], kernel_shape=[1, 1], strides=[2, 2]))
        self.layer_name = "rpn_head.rpn_conv"
        hidden = [self.op("Relu", self.conv(x, self.pair(self.layer_name))) for x in levels]
        outputs = []
        for self.layer_name in ("rpn_head.rpn_cls", "rpn_head.rpn_reg"):
            outputs += [self.conv(x, self.pair(self.layer_name)) for x in hidden]
        return features + outputs

    def box_head(self, x: str) -> list[str]:
        self.layer_name = "roi_head.bbox_head"
        x = self.op("Flatten", x)
        for index in range(2):
            self.layer_name = f"roi_head.bbox_head.shared_fcs.{index}"
            x = self.op("Relu", self.linear(x, self.pair(self.layer_name)))
        return [self.linear(x, self.pair(f"roi_head.bbox_head.{name}")) for name in ("fc_cls", "fc_reg")]

    def mask_head(self, x: str) -> list[str]:
        for index in range(4):
            self.layer_name = f"roi_head.mask_head.convs.{index}"
            x = self.op("Relu", self.conv(x, self.pair(f"{self.layer_name}.conv")))
        self.layer_name = "roi_head.mask_head.upsample"
        x = self.op("Relu", self.op("ConvTranspose", x, *self.pair(self.layer_name), strides=[2, 2]))
        return [self.conv(x, self.pair("roi_head.mask_head.conv_logits"))]

    def folded_conv(self, name: str) -> algebra.Pair:
        """Return a convolution without bias with its BatchNorm folded in."""
        weight = self.tensors[f"{name}.conv.weight"]
        statistics = self.tensors[f"{name}.bn.running_mean"], self.tensors[f"{name}.bn.running_var"]
        scale, shift = algebra.batch_norm(*self.pair(f"{name}.bn"), *statistics, EPS)
        return algebra.scale_outputs((weight, np.zeros(len(weight))), scale, shift)

    def resize(self, x: str, like: str, mode: str) -> str:
        """Resize a map to the height and width of another value."""
        sizes = self.op("Concat", self.op("Shape", x, end=2), self.op("Shape", like, start=2), axis=0)
        if mode == "nearest":
            options = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        else:
            options = {"coordinate_transformation_mode": "half_pixel"}
        return self.op("Resize", x, "", "", sizes, mode=mode, **options)

    def backbone_norms(self, maps: list[str]) -> list[str]:
        return [self.norm(x, self.pair(f"norm{2 * stage}"), f"norm{2 * stage}") for stage, x in enumerate(maps)]

    def classifier(self, maps: list[str]) -> list[str]:
        x = maps[-1]
        scale, shift = self.pair("norm")
        if not self.spec.num_classes:
            return [self.op("Flatten", self.op("GlobalAveragePool", self.norm(x, (scale, shift), "norm")))]
        x = self.op("Flatten", self.op("GlobalAveragePool", self.norm(x, None, "norm")))
        self.layer_name = "head"
        x = self.linear(x, algebra.scale_inputs(algebra.shift_inputs(self.pair("head"), shift), scale))
        return [self.op("Softmax", x, axis=1) if self.interface.probabilities else x]

    def conv_norm(self, x: str, name: str, stride: int) -> str:
        norm = f"{name}.norm"
        statistics = self.tensors[f"{norm}.running_mean"], self.tensors[f"{norm}.running_var"]
        scale, shift = algebra.batch_norm(*self.pair(norm), *statistics, EPS)
        layer = algebra.scale_outputs(self.pair(f"{name}.proj"), scale, shift)
        if name == "patch_embed" and self.interface.uint8:
            layer = algebra.scale_inputs(layer, 1 / (255 * np.array(self.interface.preprocessing.std)))
        if self.sides is not None:
            self.sides = (-(-self.sides[0] // stride), -(-self.sides[1] // stride))
        return self.conv(x, layer, stride)

    def norm(self, x: str, affine: algebra.Pair | None, name: str) -> str:
        """Normalize over channels and positions. `affine` is None if the next layer contains the affine part."""
        self.layer_name = name
        centered = self.op("Sub", x, self.mean(x))
        variance = self.mean(self.op("Mul", centered, centered))
        factor = self.op("Reciprocal", self.op("Sqrt", self.op("Add", variance, np.array(EPS))))
        if affine is None:
            return self.op("Mul", centered, factor)
        scale, shift = affine
        return self.op("Add", self.op("Mul", centered, self.scale(factor, scale)), _column(shift))

    def block(self, x: str, stage: int, name: str) -> str:
        scales = [self.tensors.get(f"{name}.layer_scale_{branch}") for branch in (1, 2)]
        normed = self.norm(x, self.pair(f"{name}.norm1"), f"{name}.norm1")
        tokens = self.token_mixer(normed, stage, f"{name}.token_mixer")
        if scales[0] is not None:
            tokens = self.scale(tokens, scales[0])
        x = self.op("Add", x, tokens)
        return self.channel_mixer(x, stage, name, scales[1])

    def token_mixer(self, x: str, stage: int, name: str) -> str:
        width = self.v.widths[stage]
        for mix in (1, 2) if self.v.second_mix else (1,):
            if self.v.global_context:
                x = self.context(x, width, f"{name}.gc{mix}")
            self.layer_name = f"{name}.dw{mix}"
            x = self.conv(x, self.pair(self.layer_name), groups=width)
            bottleneck = self.v.token_width(width) is not None
            for layer in (f"{name}.fc{mix}.0", f"{name}.fc{mix}.2") if bottleneck else (f"{name}.fc{mix}",):
                self.layer_name = layer
                x = self.op("Gelu", self.conv(x, self.pair(layer)))
        return self.spatial_attention(x, width, f"{name}.spatial_att.spatial_att") if self.v.spatial_attention else x

    def context(self, x: str, width: int, name: str) -> str:
        """Add the global context."""
        self.layer_name = name
        heads, share = self.v.heads, width // self.v.heads
        context = self.op("Flatten", self.op("GlobalAveragePool", x))
        value = self.bottleneck(context, width // self.v.reduction, name)
        if not self.v.weighted_context:
            return self.op("Add", x, self.op("Reshape", value, _target(0, width, 1, 1)))
        flat = self.op("Reshape", x, _target(0, heads, share, -1))
        similarity = self.op("MatMul", self.op("Reshape", context, _target(0, heads, 1, share)), flat)
        centered = self.op("Sub", similarity, self.op("ReduceMean", similarity, _SPATIAL))  # (B, heads, 1, positions)
        variance = self.unbiased(self.op("ReduceMean", self.op("Mul", centered, centered), _SPATIAL))
        # The similarity omits its factor share ** -0.5, so the epsilon is divided by it.
        deviation = self.op("Add", self.op("Sqrt", variance), np.array(EPS * share**0.5))
        weight = self.scale(self.op("Div", centered, deviation), self.tensors[f"{name}.rescale_weight"])
        weight = self.op("Add", weight, _column(self.tensors[f"{name}.rescale_bias"]))
        value = self.op("Reshape", value, _target(0, heads, share, 1))
        mixed = self.op("Add", flat, self.op("Mul", weight, value))  # (B, heads, share, positions)
        if self.sides is not None:
            return self.op("Reshape", mixed, _target(0, width, *self.sides))
        return self.op("Reshape", mixed, self.op("Concat", _target(0, width), self.shape, axis=0))

    def unbiased(self, variance: str) -> str:
        """Turn the mean of squares over heads and positions into the unbiased variance."""
        heads = self.v.heads
        if self.sides is not None:
            count = heads * self.sides[0] * self.sides[1]
            return self.op("Mul", variance, np.array(count / max(count - 1, 1)))
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        positions = self.op("Cast", self.op("ReduceProd", self.shape, keepdims=0), to=kind)
        count = self.op("Mul", positions, np.array(float(heads)))
        others = self.op("Max", self.op("Sub", count, np.array(1.0)), np.array(1.0))
        return self.op("Mul", variance, self.op("Div", count, others))

    def bottleneck(self, x: str, inner: int, name: str) -> str:
        if not self.v.competition:
            return self.linear(self.op("Gelu", self.linear(x, self.pair(f"{name}.fc.0"))), self.pair(f"{name}.fc.2"))
        weight, bias = self.pair(f"{name}.fc1")
        halves = [self.linear(x, (weight[part], bias[part])) for part in (slice(inner), slice(inner, None))]
        return self.linear(self.op("Max", *halves), self.pair(f"{name}.fc2"))

    def channel_mixer(self, x: str, stage: int, block: str, layer_scale: np.ndarray | None) -> str:
        """Add the channel mixer, with the preceding norm and the following scale folded into its weights."""
        name = f"{block}.channel_mixer"
        scale, shift = self.pair(f"{block}.norm2")
        first = algebra.scale_inputs(algebra.shift_inputs(self.pair(f"{name}.fc1"), shift), scale)
        last = self.pair(f"{name}.fc2")
        attention = self.v.channel_attention
        if layer_scale is not None and not attention:
            last = algebra.scale_outputs(last, layer_scale)
        normed = self.norm(x, None, f"{block}.norm2")
        result = None if attention else x
        for part in self.channel_groups(self.v.widths[stage] * self.v.mlp_ratios[stage]):
            self.layer_name = f"{name}.fc1"
            hidden = self.conv(normed, (first[0][part], first[1][part]))
            if self.v.channel_dwconv:
                self.layer_name = f"{name}.dwconv"
                weight, bias = self.pair(self.layer_name)
                hidden = self.conv(hidden, (weight[part], bias[part]), groups=len(bias[part]))
            hidden = self.op("Gelu", hidden)
            self.layer_name = f"{name}.fc2"
            piece = self.conv(hidden, (last[0][:, part], last[1] * (part.start == 0)))  # add the bias only once
            result = piece if result is None else self.op("Add", piece, result)
        assert result is not None
        if not attention:
            return result
        result = self.channel_attention(result, f"{name}.channel_att")
        return self.op("Add", x, result if layer_scale is None else self.scale(result, layer_scale))

    def channel_groups(self, channels: int) -> list[slice]:
        """Divide the hidden channels into groups of full 16-element vectors that fit in a core's cache."""
        count = 1
        if self.sides is not None:
            size = channels * self.sides[0] * self.sides[1] * self.dtype.itemsize
            while size > count * _HIDDEN_BYTES and channels % (2 * count) == 0 and channels // (2 * count) % 16 == 0:
                count *= 2
        step = channels // count
        return [slice(start, start + step) for start in range(0, channels, step)]

    def spatial_attention(self, x: str, width: int, name: str) -> str:
        self.layer_name = name
        mask = self.conv(x, self.pair(f"{name}.0"), groups=width)
        mask = self.conv(self.op("Gelu", self.conv(mask, self.pair(f"{name}.1"))), self.pair(f"{name}.3"))
        return self.op("Mul", x, self.op("Sigmoid", mask))

    def channel_attention(self, x: str, name: str) -> str:
        self.layer_name = name
        pooled = self.op("GlobalAveragePool", self.op("Gelu", x))  # (B, C, 1, 1), for the convolution (B, 1, C)
        gate = self.conv(self.op("Reshape", pooled, _target(0, 1, -1)), self.pair(f"{name}.channelConv1"))
        gate = self.conv(self.op("Gelu", gate), self.pair(f"{name}.channelConv2"))
        return self.op("Add", x, self.op("Reshape", gate, _target(0, -1, 1, 1)))


HEAD_WRITERS = {
    "classifier": _Writer.classifier,
    "backbone": _Writer.backbone_norms,
    "semantic_fpn": _Writer.semantic_fpn,
    "mask_rcnn": _Writer.detector_trunk,
}
"""Head of a spec -> the method that writes the head. That of a detector is written as separate graphs."""
PART_WRITERS = {BOX_HEAD: _Writer.box_head, MASK_HEAD: _Writer.mask_head}
"""Part of a detector without its backbone -> the method that writes the part."""


def _value(name: str, kind: int, shape: tuple[int | None, ...]) -> "onnx.ValueInfoProto":
    """Describe an input or output with any batch size. Unknown lengths get names."""
    lengths = [f"{name}_{axis}" if length is None else length for axis, length in enumerate(shape, 1)]
    return helper.make_tensor_value_info(name, kind, ["batch", *lengths])


def _column(vector: np.ndarray) -> np.ndarray:
    """Reshape (C,) to (C, 1, 1), to broadcast with (B, C, H, W)."""
    return np.asarray(vector)[:, None, None]


def _target(*shape: int) -> np.ndarray:
    """Return a shape for Reshape, in which 0 keeps a dimension and -1 is inferred."""
    return np.array(shape, np.int64)
