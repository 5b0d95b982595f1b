"""Run an existing FCViT model with the native operators, channels last, on the model's own parameters.

`fcvit.models` defines the computation. It also runs in all cases that the operators do not support: on other devices,
in other precisions and while a graph is traced.
"""

import math
from typing import Any

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.backbone import Block, ChannelMixer, FCViTBackbone, GlobalContext, TokenMixer
from fcvit.models.classifier import FCViT
from fcvit.models.layers import NORM_EPS, SIMILARITY_EPS, ConvNorm, DropPath, LayerNorm2D
from fcvit.models.mask_rcnn.network import MaskRCNN
from fcvit.models.semantic_fpn import SemanticFPN
from fcvit.native import build
from fcvit.native.allocator import keep_memory
from fcvit.native.dense import accelerate_heads, first_view
from fcvit.native.operators import (
    SUFFIXES,
    batch_norm,
    channels_first,
    channels_last,
    context,
    depthwise,
    layer_norm,
    linear,
    pool,
    residual,
    strided,
    whole_block,
)

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
        return [channels_first(stage) for stage in _stages(self, x)] if _applies(self, x) else super().features(x)

    def forward(self, x: Tensor) -> Tensor:
        if not _applies(self, x):
            return super().forward(x)
        x = pool(_norm(self.norm, _stages(self, x)[-1]))
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
    x = _conv_norm(model.patch_embed, x, channels_first=True)
    outputs = []
    for index, module in enumerate(model.network):
        if index % 2:
            x = _conv_norm(module, x)
            continue
        for block in module:
            x = _block(block, x)
        outputs.append(x)
    return outputs


def _conv_norm(module: ConvNorm, x: Tensor, **layout: bool) -> Tensor:
    x = strided(x, module.proj.weight, module.proj.bias, module.proj._stride[0], **layout)
    norm = module.norm
    if not norm.training or math.prod(x.shape[:3]) < 2:  # Paddle's layer raises an error for a single position
        return channels_last(norm(channels_first(x)))
    return batch_norm(
        x, norm.weight, norm.bias, running=(norm._mean, norm._variance), eps=NORM_EPS, momentum=norm._momentum
    )


def _norm(norm: LayerNorm2D, x: Tensor) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, NORM_EPS)


def _block(block: Block, x: Tensor) -> Tensor:
    tokens, channels = block.token_mixer, block.channel_mixer
    contexts = [getattr(tokens, f"gc{mix}") for mix in tokens.mixes if tokens.has_context]
    common = all(context.weighted and context.competition for context in contexts)
    if common and not (tokens.has_attention or channels.has_attention or _drops(channels)):
        factors = [_factor(block.drop_path, x) for _ in range(2)]
        eps = (NORM_EPS, SIMILARITY_EPS)
        return whole_block(x, *_parameters(block), factors=factors, sizes=_sizes(block), eps=eps)
    tokens = _token_mixer(block.token_mixer, _norm(block.norm1, x))
    x = residual(x, tokens, block.layer_scale_1 if block.has_scale else None, _factor(block.drop_path, x))
    channels = _channel_mixer(block.channel_mixer, _norm(block.norm2, x))
    return residual(x, channels, block.layer_scale_2 if block.has_scale else None, _factor(block.drop_path, x))


def _drops(mixer: ChannelMixer) -> bool:
    return mixer.drop.training and mixer.drop.p > 0


def _convs(fc: nn.Layer) -> list[Any]:
    """Return the convolutions of a bottleneck, or the only one."""
    return [fc[0], fc[2]] if isinstance(fc, nn.Sequential) else [fc]


def _sizes(block: Block) -> list[int]:
    """Return the sizes of a block in `block.cc`, without those of its input."""
    tokens, channels = block.token_mixer, block.channel_mixer
    kernels = [getattr(tokens, f"dw{mix}").weight.shape[-1] for mix in tokens.mixes]
    heads, inner = (tokens.gc1.heads, tokens.gc1.fc2.weight.shape[0]) if tokens.has_context else (0, 0)
    bottleneck = tokens.fc1[0].weight.shape[0] if isinstance(tokens.fc1, nn.Sequential) else 0
    hidden, width, *_ = channels.fc1.weight.shape
    third = channels.dwconv.weight.shape[-1] if channels.has_dwconv else 0
    sizes = [width, len(kernels), kernels[0], kernels[-1], third, heads, inner, bottleneck, hidden, block.has_scale]
    return [int(size) for size in sizes]


def _parameters(block: Block) -> list[Tensor]:
    """Return the parameters of a block in the order of `Parameters` in `block.cc`."""
    tokens, channels = block.token_mixer, block.channel_mixer
    layers: list[Any] = [block.norm1]
    for mix in tokens.mixes:
        layers += [getattr(tokens, f"gc{mix}")] if tokens.has_context else []
        layers += [getattr(tokens, f"dw{mix}"), *_convs(getattr(tokens, f"fc{mix}"))]
    layers += [block.norm2, channels.fc1, *([channels.dwconv] if channels.has_dwconv else []), channels.fc2]
    parameters = []
    for layer in layers:
        parameters += _context_parameters(layer) if isinstance(layer, GlobalContext) else [layer.weight, layer.bias]
    return parameters + ([block.layer_scale_1, block.layer_scale_2] if block.has_scale else [])


def _context_parameters(layer: GlobalContext) -> list[Tensor]:
    fc1, fc2 = layer.fc1, layer.fc2
    return [fc1.weight, fc1.bias, fc2.weight, fc2.bias, layer.rescale_weight, layer.rescale_bias]


def _factor(drop_path: DropPath, x: Tensor) -> Tensor | None:
    """Return the factor that the layer draws for each image (B, 1, 1, 1), or None if the layer has no effect."""
    if not drop_path.training or drop_path.rate == 0:
        return None
    return drop_path.mask(x.shape[0]).astype(x.dtype) / (1 - drop_path.rate)


def _token_mixer(mixer: TokenMixer, x: Tensor) -> Tensor:
    for mix in mixer.mixes:
        if mixer.has_context:
            x = _context(getattr(mixer, f"gc{mix}"), x)
        dw, fc = getattr(mixer, f"dw{mix}"), getattr(mixer, f"fc{mix}")
        x = depthwise(x, dw.weight, dw.bias)
        for conv in _convs(fc):
            x = linear(x, conv.weight, conv.bias, gelu=True)
    return _plain(mixer.spatial_att, x) if mixer.has_attention else x


def _context(layer: GlobalContext, x: Tensor) -> Tensor:
    if not layer.weighted or not layer.competition:
        first = channels_first(x)
        return channels_last(first + layer(first))
    return context(x, *_context_parameters(layer), eps=SIMILARITY_EPS)


def _channel_mixer(mixer: ChannelMixer, x: Tensor) -> Tensor:
    x = linear(x, mixer.fc1.weight, mixer.fc1.bias, gelu=not mixer.has_dwconv)
    if mixer.has_dwconv:
        x = depthwise(x, mixer.dwconv.weight, mixer.dwconv.bias, gelu=True)
    x = linear(mixer.drop(x), mixer.fc2.weight, mixer.fc2.bias)
    x = mixer.drop(x)
    return _plain(mixer.channel_att, x) if mixer.has_attention else x


def _plain(layer: nn.Layer, x: Tensor) -> Tensor:
    """Run a layer that no published model uses with its Paddle implementation."""
    return channels_last(layer(channels_first(x)))
