"""Names, shapes and layouts of a variant's parameters, as data.

Inside this package, weights have the authors' form: PyTorch's names and layouts. The kind of layer decides how
Paddle differs, never a tensor's shape or a part of its name. A square Linear must be transposed, and `fc1` is a
Linear in `gc1` but a convolution in other modules. Tests compare this table with the layers of both networks.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from fcvit.errors import DoesNotFit, UsageError, counted
from fcvit.models.variants import VARIANTS, Variant, published

CONV, LINEAR, NORM, BATCHNORM, SCALE = "conv", "linear", "norm", "batchnorm", "scale"
TRANSPOSED_CONV = "transposed_conv"  # its weight is [in, out, height, width] in both frameworks
COUNTER = "num_batches_tracked"

# Paddle's names of BatchNorm statistics. All other names are the same in both frameworks.
PADDLE_STATISTICS = {"running_mean": "_mean", "running_var": "_variance"}
LAST_NAMES = {"weight", "bias", "layer_scale_1", "layer_scale_2", "rescale_weight", "rescale_bias", COUNTER} | {
    *PADDLE_STATISTICS,
    *PADDLE_STATISTICS.values(),
}
"""Last parts of tensor names in an FCViT, in both frameworks."""
TORCH_STATISTICS = {paddle: torch for torch, paddle in PADDLE_STATISTICS.items()}
MOST_CHANNELS = 1 << 16


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape in PyTorch's layout, and the kind of its layer."""

    shape: tuple[int, ...]
    layer: str

    @property
    def transposed_in_paddle(self) -> bool:
        """Return whether Paddle stores the tensor transposed: a Linear weight is [in, out] instead of [out, in]."""
        return self.layer == LINEAR and len(self.shape) == 2

    @property
    def paddle_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed_in_paddle else self.shape


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a head that has none."""


@dataclasses.dataclass(frozen=True)
class SemanticFPNOptions:
    """The widths of Semantic FPN, and the size of its input. The defaults are the authors'.

    Args:
        neck: Channels of the feature pyramid.
        channels: Channels of the head.
        long_side: Largest length of an image's longer side in pixels, after the keep-ratio resize.
        short_side: Largest length of the shorter side.
        divisor: Both sides are then resized up to multiples of this.
    """

    neck: int = 256
    channels: int = 128
    long_side: int = 2048
    short_side: int = 512
    divisor: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, int) and 1 <= value <= MOST_CHANNELS):
                raise UsageError(f"{name} = {value!r}: expected a whole number from 1 to {MOST_CHANNELS:,}")


@dataclasses.dataclass(frozen=True)
class MaskRCNNOptions:
    """The widths and limits of Mask R-CNN, and the size of its input. The defaults are the authors'.

    A fraction is a score or an IoU from 0 to 1.

    Args:
        neck: Channels of the feature pyramid.
        rpn: Channels of the region proposal network (RPN).
        box_channels: Channels of the two fully connected layers of the box head.
        mask_channels: Channels of the mask head.
        masks: Whether there is a mask head. Without it, the network is a Faster R-CNN.
        anchor_scale: Side of the square anchor, in strides of its feature map.
        finest_scale: Boxes with a mean side of less than twice this length use the first feature map. The limit
            doubles with each map. In pixels of the input.
        proposals_before_nms: Largest number of boxes per feature map before NMS.
        proposal_iou: Largest IoU of two proposals of a feature map.
        max_proposals: Largest number of proposals per image.
        score_threshold: Detections have a higher score than this.
        detection_iou: Largest IoU of two detections of a class.
        max_detections: Largest number of detections per image.
        long_side: Largest length of an image's longer side in pixels, after the keep-ratio resize.
        short_side: Largest length of the shorter side.
    """

    neck: int = 256
    rpn: int = 256
    box_channels: int = 1024
    mask_channels: int = 256
    masks: bool = True
    anchor_scale: float = 8.0
    finest_scale: float = 56.0
    proposals_before_nms: int = 1000
    proposal_iou: float = 0.7
    max_proposals: int = 1000
    score_threshold: float = 0.05
    detection_iou: float = 0.5
    max_detections: int = 100
    long_side: int = 1333
    short_side: int = 800

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "masks":
                valid, expected = isinstance(value, bool), "true or false"
            elif name in ("proposal_iou", "detection_iou", "score_threshold"):
                valid, expected = _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"
            elif name in ("anchor_scale", "finest_scale"):
                valid, expected = _is_number(value) and 1e-3 <= value <= 1 << 16, "a number from 0.001 to 65,536"
            else:
                valid = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 16
                expected = "a whole number from 1 to 65,536"
            if not valid:
                raise UsageError(f"{name} = {value!r}: expected {expected}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Head:
    """The part of a network after the stages.

    Attributes:
        task: Task of the head, or "features" for none.
        tensors: Function that yields the head's tensors (authors' names, in order).
        marker: Tensor that identifies the head in a file.
        logits: Tensor with the number of classes as its first dimension, or "" if the head has no classes.
        background: Number of rows of `logits` that belong to no class.
        outputs: Function of spec, height and width that returns the name and shape (without the batch dimension) of
            each output.
        description: Description of the head, if the number of classes is not sufficient.
        prefix: Prefix of the trunk's tensors in the authors' files.
        options: Dataclass of the head's options.
        read_options: Function that returns the options of a network with tensors of the given shapes.
        any_size: Whether the sizes of its images differ, so that exports for engines accept any size.
    """

    task: str
    tensors: "Callable[[ModelSpec], Iterator[tuple[str, TensorSpec]]]"
    marker: str
    logits: str
    outputs: "Callable[[ModelSpec, int, int], dict[str, tuple[int, ...]]]"
    description: str = ""
    prefix: str = ""
    options: type = NoOptions
    read_options: "Callable[[Mapping[str, tuple[int, ...]]], Any]" = lambda _: NoOptions()
    any_size: bool = False
    background: int = 0


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A network, given by backbone and head. It provides the names, shapes and kinds of all tensors.

    Args:
        variant: Architecture of the backbone.
        num_classes: Number of classes. With 0, the network returns embeddings or features.
        head: A key of `HEADS`.
        options: Options of the head. None selects the defaults.
    """

    variant: Variant
    num_classes: int = 0
    head: str = "classifier"
    options: Any = None

    def __post_init__(self) -> None:
        if self.options is None:
            object.__setattr__(self, "options", HEADS[self.head].options())

    @property
    def task(self) -> str:
        """Return the task of the network, or "features" if it has no classes."""
        return HEADS[self.head].task if self.has_classes else "features"

    @property
    def has_classes(self) -> bool:
        return self.num_classes > 0

    @property
    def short_side(self) -> int | None:
        """Return the shorter side of the images that the head expects, or None if the preprocessing defines it."""
        return getattr(self.options, "short_side", None)

    def outputs(self, height: int = 1, width: int = 1) -> dict[str, tuple[int, ...]]:
        """Return the name and shape (without the batch dimension) of each output for images of the given size."""
        return HEADS[self.head].outputs(self, height, width)

    def __str__(self) -> str:
        parts = [HEADS[self.head].description] + ([counted(self.num_classes, "class")] if self.has_classes else [])
        return f"{self.variant.name}{_changes(self.variant)} ({', '.join(filter(None, parts)) or 'no head'})"


def _changes(variant: Variant) -> str:
    """Describe the options that differ from the variant with the same name."""
    known = VARIANTS.get(variant.name, variant)
    fields = (f.name for f in dataclasses.fields(variant) if f.name not in ("preprocessing", "layer_scale"))
    changed = [f"{name}={getattr(variant, name)}" for name in fields if getattr(variant, name) != getattr(known, name)]
    return f" with {', '.join(changed)}" if changed else ""


def paddle_name(name: str) -> str:
    """Convert the authors' name of a tensor to its name in the Paddle network."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{PADDLE_STATISTICS[last]}" if last in PADDLE_STATISTICS else name


def torch_name(name: str) -> str:
    """Invert `paddle_name`."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{TORCH_STATISTICS[last]}" if last in TORCH_STATISTICS else name


def torch_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Convert shapes in either layout to the authors' names and PyTorch's layout."""
    paddle = any(name.rpartition(".")[2] in TORCH_STATISTICS for name in shapes)
    return {torch_name(n): shape[::-1] if paddle and len(shape) == 2 else shape for n, shape in shapes.items()}


def is_counter(name: str) -> bool:
    """Return whether the name is BatchNorm's `num_batches_tracked`, which Paddle does not have."""
    return name.rpartition(".")[2] == COUNTER


def is_statistic(name: str) -> bool:
    """Return whether the name is a running statistic of BatchNorm or its counter, in either framework."""
    return name.rpartition(".")[2] in {*PADDLE_STATISTICS, *TORCH_STATISTICS, COUNTER}


def tensor_specs(spec: ModelSpec) -> dict[str, TensorSpec]:
    """Return the shape and kind of every tensor by the authors' name, in the authors' order."""
    return dict(_entries(spec))


def parameter_count(spec: ModelSpec) -> int:
    """Count the trainable parameters, without running statistics and counters."""
    total = 0
    for name, entry in tensor_specs(spec).items():
        if not name.endswith((*PADDLE_STATISTICS, COUNTER)):
            total += math.prod(entry.shape)
    return total


def multiply_accumulates(spec: ModelSpec, height: int, width: int, trunk: bool = False) -> int:
    """Count the multiply-accumulates of all convolutions and linear layers for an image of the given size in pixels.

    For a detector, they include the heads for the largest numbers of proposals and detections, unless only its `trunk`
    with the RPN is counted.
    """
    positions = []
    for stride in (4, 2, 2, 2, 2):
        height, width = -(-height // stride), -(-width // stride)
        positions.append(height * width)
    total = 0
    for name, entry in tensor_specs(spec).items():
        weights = math.prod(entry.shape)
        if not name.endswith(".weight") or entry.layer not in (CONV, TRANSPOSED_CONV, LINEAR):
            continue
        name = name.removeprefix(HEADS[spec.head].prefix)
        if name.startswith("rpn_head."):
            total += weights * sum(positions)
        elif name.startswith("roi_head."):
            total += 0 if trunk else weights * _roi_positions(spec, name)
        elif entry.layer == LINEAR:
            total += weights  # in the context and the head, computed once per image
        elif len(entry.shape) == 3:  # a convolution along the channels
            total += weights * spec.variant.widths[_stage(name)]
        else:
            total += weights * positions[_stage(name)]
    return total


def _roi_positions(spec: ModelSpec, name: str) -> int:
    """Return how often a layer of the second stage of a detector is computed for an image."""
    if name.startswith("roi_head.bbox_head."):
        return spec.options.max_proposals
    # The last convolution follows the transposed one, which doubles 14 x 14 positions.
    return spec.options.max_detections * (28 * 28 if "conv_logits" in name else 14 * 14)


def _stage(name: str) -> int:
    """Return the stage whose size is the output size of a layer. `network.1` downsamples to the second stage."""
    first, number, *rest = name.split(".")
    if first == "network":
        return (int(number) + 1) // 2
    if first == "neck":
        return int(rest[0])
    if number == "scale_heads":  # every second entry of a scale head doubles the size
        return int(rest[0]) - int(rest[1]) // 2
    return 0


def _entries(spec: ModelSpec) -> Iterator[tuple[str, TensorSpec]]:
    head = HEADS[spec.head]
    yield from ((head.prefix + name, entry) for name, entry in _trunk(spec.variant))
    yield from head.tensors(spec)


def _trunk(v: Variant) -> Iterator[tuple[str, TensorSpec]]:
    yield from _conv_norm("patch_embed", 3, v.widths[0], 7)
    for stage, (depth, width) in enumerate(zip(v.depths, v.widths, strict=True)):
        if stage:
            yield from _conv_norm(f"network.{2 * stage - 1}", v.widths[stage - 1], width, 3)
        for block in range(depth):
            yield from _block(v, f"network.{2 * stage}.{block}", width, width * v.mlp_ratios[stage])


def _classifier(spec: ModelSpec) -> Iterator[tuple[str, TensorSpec]]:
    width = spec.variant.widths[-1]
    yield from _layer("norm", NORM, (width,))
    if spec.num_classes:
        yield from _layer("head", LINEAR, (spec.num_classes, width))


def _backbone_norms(spec: ModelSpec) -> Iterator[tuple[str, TensorSpec]]:
    for stage, width in enumerate(spec.variant.widths):
        yield from _layer(f"norm{2 * stage}", NORM, (width,))


def _backbone_and_neck(spec: ModelSpec) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the norms of a backbone and the tensors of mmsegmentation's and mmdetection's FPN."""
    neck = spec.options.neck
    yield from ((f"backbone.{name}", entry) for name, entry in _backbone_norms(spec))
    for stage, width in enumerate(spec.variant.widths):
        yield from _layer(f"neck.lateral_convs.{stage}.conv", CONV, (neck, width, 1, 1))
    for stage in range(4):
        yield from _layer(f"neck.fpn_convs.{stage}.conv", CONV, (neck, neck, 3, 3))


def _semantic_fpn(spec: ModelSpec) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the tensors of mmsegmentation's FPN and FPNHead, in the order of its files."""
    neck, channels = spec.options.neck, spec.options.channels
    yield from _backbone_and_neck(spec)
    yield from _layer("decode_head.conv_seg", CONV, (spec.num_classes, channels, 1, 1))
    for stage in range(4):
        for index in range(max(stage, 1)):
            name = f"decode_head.scale_heads.{stage}.{2 * index}"
            yield f"{name}.conv.weight", TensorSpec((channels, channels if index else neck, 3, 3), CONV)
            yield from _batch_norm(f"{name}.bn", channels)


def _semantic_fpn_options(shapes: Mapping[str, tuple[int, ...]]) -> SemanticFPNOptions:
    names = ("neck.lateral_convs.0.conv.weight", "decode_head.scale_heads.0.0.conv.weight")
    for name in names:
        shape = shapes.get(name)
        if not shape or not 1 <= shape[0] <= MOST_CHANNELS:
            state = "is missing" if shape is None else f"has shape {list(shape)}"
            raise DoesNotFit(
                f"not a Semantic FPN: {name} {state}, expected 1 to {MOST_CHANNELS:,} channels; the file must use the "
                "names of mmsegmentation (see docs/guides/convert.md)"
            )
    return SemanticFPNOptions(*(shapes[name][0] for name in names))


def _mask_rcnn(spec: ModelSpec) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the tensors of mmdetection's Mask R-CNN, in the order of its files."""
    options, classes = spec.options, spec.num_classes
    neck, hidden, masks = options.neck, options.box_channels, options.mask_channels
    yield from _backbone_and_neck(spec)
    yield from _layer("rpn_head.rpn_conv", CONV, (options.rpn, neck, 3, 3))
    yield from _layer("rpn_head.rpn_cls", CONV, (3, options.rpn, 1, 1))
    yield from _layer("rpn_head.rpn_reg", CONV, (12, options.rpn, 1, 1))
    yield from _layer("roi_head.bbox_head.fc_cls", LINEAR, (classes + 1, hidden))
    yield from _layer("roi_head.bbox_head.fc_reg", LINEAR, (4 * classes, hidden))
    yield from _layer("roi_head.bbox_head.shared_fcs.0", LINEAR, (hidden, 7 * 7 * neck))
    yield from _layer("roi_head.bbox_head.shared_fcs.1", LINEAR, (hidden, hidden))
    if options.masks:
        for index in range(4):
            shape = (masks, masks if index else neck, 3, 3)
            yield from _layer(f"roi_head.mask_head.convs.{index}.conv", CONV, shape)
        yield from _layer("roi_head.mask_head.upsample", TRANSPOSED_CONV, (masks, masks, 2, 2))
        yield from _layer("roi_head.mask_head.conv_logits", CONV, (classes, masks, 1, 1))


def _mask_rcnn_options(shapes: Mapping[str, tuple[int, ...]]) -> MaskRCNNOptions:
    names = {
        "neck": "neck.lateral_convs.0.conv.weight",
        "rpn": "rpn_head.rpn_conv.weight",
        "box_channels": "roi_head.bbox_head.shared_fcs.1.weight",
    }
    masks = any(name.startswith("roi_head.mask_head.") for name in shapes)
    if masks:
        names["mask_channels"] = "roi_head.mask_head.conv_logits.weight"
    widths: dict[str, Any] = {}
    for field, name in names.items():
        shape = shapes.get(name) or ()
        axis = 1 if field == "mask_channels" else 0
        if len(shape) <= axis or not 1 <= shape[axis] <= 1 << 16:
            state = f"has shape {list(shape)}" if name in shapes else "is missing"
            raise DoesNotFit(
                f"not a Mask R-CNN: {name} {state}, expected 1 to 65,536 channels; the file must use the names of "
                "mmdetection (see docs/guides/convert.md)"
            )
        widths[field] = shape[axis]
    return MaskRCNNOptions(**widths, masks=masks)


def _logits(spec: ModelSpec, height: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"logits": (spec.num_classes,)} if spec.num_classes else {"embeddings": (spec.variant.widths[-1],)}


def _pixel_logits(spec: ModelSpec, height: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"logits": (spec.num_classes, height, width)}


def _detections(spec: ModelSpec, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the outputs for an image with the largest number of detections."""
    count = spec.options.max_detections
    shapes: dict[str, tuple[int, ...]] = {"boxes": (count, 4), "scores": (count,), "labels": (count,)}
    return shapes | ({"mask_logits": (count, 28, 28)} if spec.options.masks else {})


def _features(spec: ModelSpec, height: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, channels in enumerate(spec.variant.widths):
        height, width = (-(-side // (2 if stage else 4)) for side in (height, width))
        shapes[f"features.{stage}"] = (channels, height, width)
    return shapes


HEADS = {
    "classifier": Head("classification", _classifier, "norm.weight", "head.weight", _logits),
    "backbone": Head("features", _backbone_norms, "norm0.weight", "", _features, "dense-prediction backbone"),
    "semantic_fpn": Head(
        "segmentation",
        _semantic_fpn,
        "decode_head.conv_seg.weight",
        "decode_head.conv_seg.weight",
        _pixel_logits,
        "Semantic FPN",
        "backbone.",
        options=SemanticFPNOptions,
        read_options=_semantic_fpn_options,
        any_size=True,
    ),
    "mask_rcnn": Head(
        "detection",
        _mask_rcnn,
        "roi_head.bbox_head.fc_cls.weight",
        "roi_head.bbox_head.fc_cls.weight",
        _detections,
        "Mask R-CNN",
        "backbone.",
        options=MaskRCNNOptions,
        read_options=_mask_rcnn_options,
        any_size=True,
        background=1,
    ),
}
"""All heads by name. A new head needs a row here and in `NETWORKS` of `models.build` and `reference.build`."""


def _block(v: Variant, prefix: str, width: int, mlp_width: int) -> Iterator[tuple[str, TensorSpec]]:
    if v.layer_scale is not None:
        yield f"{prefix}.layer_scale_1", TensorSpec((width,), SCALE)
        yield f"{prefix}.layer_scale_2", TensorSpec((width,), SCALE)
    yield from _layer(f"{prefix}.norm1", NORM, (width,))
    for mix in (1, 2) if v.second_mix else (1,):
        if v.global_context:
            yield from _context(v, f"{prefix}.token_mixer.gc{mix}", width)
        kernel = v.kernel_sizes[mix - 1]
        yield from _layer(f"{prefix}.token_mixer.dw{mix}", CONV, (width, 1, kernel, kernel))
        inner = v.token_width(width)
        if inner is None:
            yield from _layer(f"{prefix}.token_mixer.fc{mix}", CONV, (width, width, 1, 1))
        else:
            yield from _layer(f"{prefix}.token_mixer.fc{mix}.0", CONV, (inner, width, 1, 1))
            yield from _layer(f"{prefix}.token_mixer.fc{mix}.2", CONV, (width, inner, 1, 1))
    if v.spatial_attention:
        att, kernel = f"{prefix}.token_mixer.spatial_att.spatial_att", v.spatial_attention_kernel
        inner = width // v.spatial_attention_reduction
        yield from _layer(f"{att}.0", CONV, (width, 1, kernel, kernel))
        yield from _layer(f"{att}.1", CONV, (inner, width, 1, 1))
        yield from _layer(f"{att}.3", CONV, (width, inner, 1, 1))
    yield from _layer(f"{prefix}.norm2", NORM, (width,))
    yield from _layer(f"{prefix}.channel_mixer.fc1", CONV, (mlp_width, width, 1, 1))
    if v.channel_dwconv:
        yield from _layer(f"{prefix}.channel_mixer.dwconv", CONV, (mlp_width, 1, v.channel_kernel, v.channel_kernel))
    yield from _layer(f"{prefix}.channel_mixer.fc2", CONV, (width, mlp_width, 1, 1))
    if v.channel_attention:
        for index, kernel in enumerate(v.channel_attention_kernels, 1):
            yield from _layer(f"{prefix}.channel_mixer.channel_att.channelConv{index}", CONV, (1, 1, kernel))


def _context(v: Variant, prefix: str, width: int) -> Iterator[tuple[str, TensorSpec]]:
    inner = width // v.reduction
    if v.weighted_context:
        yield f"{prefix}.rescale_weight", TensorSpec((v.heads,), SCALE)
        yield f"{prefix}.rescale_bias", TensorSpec((v.heads,), SCALE)
    if v.competition:
        yield from _layer(f"{prefix}.fc1", LINEAR, (2 * inner, width))
        yield from _layer(f"{prefix}.fc2", LINEAR, (width, inner))
    else:
        yield from _layer(f"{prefix}.fc.0", LINEAR, (inner, width))
        yield from _layer(f"{prefix}.fc.2", LINEAR, (width, inner))


def _conv_norm(prefix: str, width_in: int, width_out: int, kernel: int) -> Iterator[tuple[str, TensorSpec]]:
    yield from _layer(f"{prefix}.proj", CONV, (width_out, width_in, kernel, kernel))
    yield from _batch_norm(f"{prefix}.norm", width_out)


def _batch_norm(prefix: str, width: int) -> Iterator[tuple[str, TensorSpec]]:
    yield from _layer(prefix, BATCHNORM, (width,))
    yield f"{prefix}.running_mean", TensorSpec((width,), BATCHNORM)
    yield f"{prefix}.running_var", TensorSpec((width,), BATCHNORM)
    yield f"{prefix}.{COUNTER}", TensorSpec((), BATCHNORM)


def _layer(prefix: str, layer: str, shape: tuple[int, ...]) -> Iterator[tuple[str, TensorSpec]]:
    out = shape[0]
    yield f"{prefix}.weight", TensorSpec(shape, layer)
    yield f"{prefix}.bias", TensorSpec((out,), layer)


def recognize(shapes: Mapping[str, tuple[int, ...]], expected: Variant | None = None) -> ModelSpec:
    """Return the network that has tensors with these names and shapes (authors' names, PyTorch's layout).

    Some properties are not visible in the tensors: the initial layer scale, the preprocessing, and the number of heads
    if the context is not weighted. They are taken from `expected`, or else from the named variant of this architecture,
    or else from the published settings. The result is certain only after a strict comparison of all names and shapes.

    Raises:
        DoesNotFit: If the tensors are not an FCViT's. The message names what is missing.
    """
    name = next((name for name, head in HEADS.items() if head.marker in shapes), "classifier")
    head = HEADS[name]
    num_classes = max((shapes.get(head.logits) or (0,))[0] - head.background, 0)
    options = head.read_options(shapes)
    if expected is not None:
        return ModelSpec(expected, num_classes, name, options)
    read = _read_variant({tensor.removeprefix(head.prefix): shape for tensor, shape in shapes.items()}, head.prefix)
    # Prefer a named variant with exactly the same tensors.
    architecture = tensor_specs(ModelSpec(read, num_classes, name, options))
    for known in sorted(VARIANTS.values(), key=lambda v: published(v) is None):
        same_size = (known.depths, known.widths) == (read.depths, read.widths)
        if same_size and tensor_specs(ModelSpec(known, num_classes, name, options)) == architecture:
            return ModelSpec(known, num_classes, name, options)
    return ModelSpec(read, num_classes, name, options)


def _read_variant(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Variant:
    """Return the variant with these tensors, whose names have lost the prefix that they have in the file."""

    def has(name: str) -> bool:
        return f"network.0.0.{name}" in shapes

    def length(name: str, rank: int, axis: int = 0, stage: int = 0) -> int:
        """Return a dimension of a tensor in the first block of a stage."""
        name = f"network.{2 * stage}.0.{name}"
        shape = shapes.get(name)
        if shape is None or len(shape) != rank or not all(shape):
            state = "is missing" if shape is None else f"has shape {list(shape)}"
            raise DoesNotFit(
                f"not an FCViT: {prefix}{name} {state}, expected a tensor with {rank} dimension(s); "
                "the file must use the authors' names (see docs/guides/convert.md)"
            )
        return shape[axis]

    def lengths(name: str, rank: int, axis: int = 0) -> list[int]:
        return [length(name, rank, axis, stage) for stage in range(4)]

    widths = lengths("norm1.weight", 1)
    depths = [
        next(block for block in itertools.count() if f"network.{2 * stage}.{block}.norm1.weight" not in shapes)
        for stage in range(4)
    ]
    if max(widths) > MOST_CHANNELS:
        raise DoesNotFit(f"not an FCViT: widths {widths}")
    hidden = lengths("channel_mixer.fc1.weight", 4)
    context, attention, pooled = "token_mixer.gc1", "token_mixer.spatial_att.spatial_att", "channel_mixer.channel_att"
    second_mix = has("token_mixer.dw2.weight")
    options: dict[str, Any] = {
        "depths": tuple(depths),
        "widths": tuple(widths),
        "mlp_ratios": tuple(max(h // w, 1) for h, w in zip(hidden, widths, strict=True)),
        "layer_scale": 1e-5 if has("layer_scale_1") else None,
        "global_context": any(name.startswith(f"network.0.0.{context}.") for name in shapes),
        "second_mix": second_mix,
        "kernel_sizes": (
            length("token_mixer.dw1.weight", 4, 2),
            length("token_mixer.dw2.weight", 4, 2) if second_mix else 11,
        ),
        "spatial_attention": has(f"{attention}.0.weight"),
        "channel_dwconv": has("channel_mixer.dwconv.weight"),
        "channel_attention": has(f"{pooled}.channelConv1.weight"),
    }
    if options["global_context"]:
        options["weighted_context"] = has(f"{context}.rescale_weight")
        options["competition"] = not has(f"{context}.fc.0.weight")
        inner = lengths(f"{context}.{'fc2' if options['competition'] else 'fc.2'}.weight", 2, 1)
        options["reduction"] = _divisor(widths, inner, preferred=8)
    if options.get("weighted_context"):
        options["heads"] = length(f"{context}.rescale_weight", 1)
    else:
        options["heads"] = next(h for h in (8, 4, 2, 1) if all(w % h == 0 for w in widths))
    if has("token_mixer.fc1.weight"):
        options["token_factor"] = 1
    else:
        options["token_factor"], options["token_minimum"] = _bottleneck(widths, lengths("token_mixer.fc1.0.weight", 4))
    if options["spatial_attention"]:
        options["spatial_attention_kernel"] = length(f"{attention}.0.weight", 4, 2)
        options["spatial_attention_reduction"] = _divisor(widths, lengths(f"{attention}.1.weight", 4), preferred=8)
    elif min(widths) < 8:
        options["spatial_attention_reduction"] = 1
    if options["channel_dwconv"]:
        options["channel_kernel"] = length("channel_mixer.dwconv.weight", 4, 2)
    if options["channel_attention"]:
        kernels = (length(f"{pooled}.channelConv{number}.weight", 3, 2) for number in (1, 2))
        options["channel_attention_kernels"] = tuple(kernels)
    try:
        return Variant("custom", **options)
    except ValueError as error:
        raise DoesNotFit(f"not an FCViT: {error}") from None


def _divisor(widths: list[int], inner: list[int], preferred: int) -> int:
    """Return an r with `width // r == inner` in every stage. If there are several, they define the same network."""
    fitting = [r for r in range(1, min(widths) + 1) if [w // r for w in widths] == inner]
    if not fitting:
        raise DoesNotFit(f"not an FCViT: no reduction turns the widths {widths} into the bottlenecks {inner}")
    return preferred if preferred in fitting else fitting[0]


def _bottleneck(widths: list[int], inner: list[int]) -> tuple[int, int]:
    """Return a (factor, minimum) with `max(width // factor, minimum) == inner` in every stage."""
    candidates = [(8, 16), *((f, m) for m in (16, min(inner), 1) for f in range(2, max(widths) + 1))]
    for factor, minimum in candidates:
        if [max(w // factor, minimum) for w in widths] == inner:
            return factor, minimum
    raise DoesNotFit(f"not an FCViT: no factor and minimum turn the widths {widths} into the bottlenecks {inner}")
