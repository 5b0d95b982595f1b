"""Run an existing FCViT model with the native operators, channels last, on the model's own parameters.

`fcvit.models` defines the computation. It also runs in all cases that the operators do not support: on other devices,
in other precisions and while a graph is traced.
"""

import itertools
import math
from typing import Any

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.backbone import Block, FCViTBackbone
from fcvit.models.classifier import FCViT
from fcvit.models.layers import NORM_EPS, SIMILARITY_EPS, ConvNorm, DropPath, LayerNorm2D
from fcvit.models.mask_rcnn.network import MaskRCNN
from fcvit.models.semantic_fpn import SemanticFPN
from fcvit.native import build
from fcvit.native.allocator import keep_memory
from fcvit.native.composition import NULL, Trace, Value, compute
from fcvit.native.dense import accelerate_heads, first_view, last_view
from fcvit.native.kernels import SUFFIXES
from fcvit.native.operators import batch_norm, layer_norm, linear, strided

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor, nn  # noqa: E402


def accelerate(model: FCViT | FCViTBackbone | SemanticFPN | MaskRCNN) -> None:
    """Make `model` use the native operators on a CPU, in training and evaluation. Results are equal up to rounding.

    The parameters, their names and the random numbers of drop path do not change. From now on, this process keeps
    freed memory (`keep_memory`).

    Raises:
        MissingExtra: The operators cannot be compiled on this machine.
        UsageError: The model has another type.
    """
    if isinstance(model, SemanticFPN | MaskRCNN):
        accelerate(model.backbone)
        accelerate_heads(model)
        return
    accelerated: Any = {FCViT: NativeFCViT, FCViTBackbone: NativeFCViTBackbone}.get(type(model))
    if accelerated is None:
        if isinstance(model, NativeFCViT | NativeFCViTBackbone):
            return
        known = "FCViT, FCViTBackbone, SemanticFPN and MaskRCNN"
        raise UsageError(f"only {known} can be accelerated, not {type(model).__name__}")
    build.library()
    keep_memory()
    model.__class__ = accelerated


class NativeFCViT(FCViT):
    """An accelerated `FCViT`."""

    def features(self, x: Tensor) -> list[Tensor]:
        return [first_view(stage) for stage in _stages(self, x)] if _applies(self, x) else super().features(x)

    def forward(self, x: Tensor) -> Tensor:
        if not _applies(self, x):
            return super().forward(x)
        x = _norm(self.norm, _stages(self, x)[-1]).mean([1, 2])
        return x if self.head is None else linear(x, self.head.weight, self.head.bias, transposed=True)


class NativeFCViTBackbone(FCViTBackbone):
    """An accelerated `FCViTBackbone`."""

    def forward(self, x: Tensor) -> list[Tensor]:
        if not _applies(self, x):
            return super().forward(x)
        norms = (self.norm0, self.norm2, self.norm4, self.norm6)
        return [first_view(_norm(norm, stage)) for norm, stage in zip(norms, _stages(self, x), strict=True)]


def _applies(model: nn.Layer, x: Tensor) -> bool:
    """Return whether the operators support the input. If not, the Paddle network computes it or raises an error."""
    return (
        paddle.in_dynamic_mode()
        and x.place.is_cpu_place()
        and x.dtype in SUFFIXES
        and x.dtype == model.patch_embed.proj.weight.dtype
        and x.ndim == 4
        and x.shape[1] == 3
        and x.size > 0
    )


def _stages(model: nn.Layer, x: Tensor) -> list[Tensor]:
    """Return the outputs of the four stages, each (B, H, W, C)."""
    x = _conv_norm(model.patch_embed, last_view(x))
    outputs = []
    for index, module in enumerate(model.network):
        if index % 2:
            x = _conv_norm(module, x)
            continue
        for block in module:
            x = _block(block, x)
        outputs.append(x)
    return outputs


def _conv_norm(module: ConvNorm, x: Tensor) -> Tensor:
    x = strided(x, module.proj.weight, module.proj.bias, module.proj._stride[0])
    norm = module.norm
    if not norm.training or math.prod(x.shape[:3]) < 2:  # Paddle's layer raises an error for a single position
        return last_view(norm(first_view(x)))
    return batch_norm(
        x, norm.weight, norm.bias, running=(norm._mean, norm._variance), eps=NORM_EPS, momentum=norm._momentum
    )


def _norm(norm: LayerNorm2D, x: Tensor) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, NORM_EPS)


def _block(block: Block, x: Tensor) -> Tensor:
    tokens, channels = block.token_mixer, block.channel_mixer
    contexts = [getattr(tokens, f"gc{mix}") for mix in tokens.mixes if tokens.has_context]
    common = all(context.weighted and context.competition for context in contexts)
    dropout = channels.drop.training and channels.drop.p > 0
    if not common or tokens.has_attention or channels.has_attention or dropout:  # no published model
        return last_view(block(first_view(x)))
    factors = [_factor(block.drop_path, x) for _ in range(2)]
    return compute(_compose, x.shape, (x, *factors, *_parameters(block)), sizes=(*x.shape, *_sizes(block)))


def _compose(trace: Trace, x: Value, *others: Value, sizes: tuple[int, ...]) -> Value:
    """Compose a block of `sizes`, those of x and those of `_sizes`, as `fcvit.models.backbone.Block` does."""
    b, h, w, c, scaled, heads, inner, bottleneck, hidden, third, *kernels = sizes
    rows, whole = b * h * w, (b, h * w, c)
    factor1, factor2, *parameters = others
    rest = iter(parameters)

    def two() -> tuple[Value, Value]:
        return next(rest), next(rest)

    scale1, scale2 = two() if scaled else (Value(NULL), Value(NULL))
    y = trace.layer_norm(x, *two(), sizes=whole, eps=NORM_EPS)
    for kernel in kernels:
        if heads:
            y = trace.context(y, *itertools.islice(rest, 6), sizes=(*whole, heads, inner), eps=SIMILARITY_EPS)
        y = trace.depthwise(y, *two(), sizes=(b, h, w, c, kernel))
        if bottleneck:
            y = trace.linear(y, *two(), sizes=(rows, c, bottleneck, 0), gelu=True)
        y = trace.linear(y, *two(), sizes=(rows, bottleneck or c, c, 0), gelu=True)
    x = trace.residual(x, y, scale1, factor1, sizes=whole)
    y = trace.layer_norm(x, *two(), sizes=whole, eps=NORM_EPS)
    y = trace.linear(y, *two(), sizes=(rows, c, hidden, 0), gelu=not third)
    if third:
        y = trace.depthwise(y, *two(), sizes=(b, h, w, hidden, third), gelu=True)
    y = trace.linear(y, *two(), sizes=(rows, hidden, c, 0))
    return trace.residual(x, y, scale2, factor2, sizes=whole)


def _sizes(block: Block) -> list[int]:
    """Return the sizes of a block, and 0 for what it does not have."""
    tokens, channels = block.token_mixer, block.channel_mixer
    kernels = [getattr(tokens, f"dw{mix}").weight.shape[-1] for mix in tokens.mixes]
    heads, inner = (tokens.gc1.heads, tokens.gc1.fc2.weight.shape[0]) if tokens.has_context else (0, 0)
    bottleneck = tokens.fc1[0].weight.shape[0] if isinstance(tokens.fc1, nn.Sequential) else 0
    third = channels.dwconv.weight.shape[-1] if channels.has_dwconv else 0
    return [int(block.has_scale), heads, inner, bottleneck, channels.fc1.weight.shape[0], third, *kernels]


def _parameters(block: Block) -> list[Any]:
    """Return the parameters of a block in the order in which `_compose` takes them."""
    tokens, channels = block.token_mixer, block.channel_mixer
    layers: list[nn.Layer] = [block, block.norm1]
    for mix in tokens.mixes:
        if tokens.has_context:
            context = getattr(tokens, f"gc{mix}")
            layers += [context.fc1, context.fc2, context]
        fc = getattr(tokens, f"fc{mix}")
        layers += [getattr(tokens, f"dw{mix}"), *([fc[0], fc[2]] if isinstance(fc, nn.Sequential) else [fc])]
    layers += [block.norm2, channels.fc1, *([channels.dwconv] if channels.has_dwconv else []), channels.fc2]
    return [parameter for layer in layers for parameter in layer._parameters.values()]  # those of its own


def _factor(drop_path: DropPath, x: Tensor) -> Tensor | None:
    """Return the factor that the layer draws for each image (B, 1, 1, 1), or None if the layer has no effect."""
    if not drop_path.training or drop_path.rate == 0:
        return None
    return drop_path.mask(x.shape[0]).astype(x.dtype) / (1 - drop_path.rate)
