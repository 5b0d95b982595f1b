"""Necks and heads of Semantic FPN and Mask R-CNN with the native operators, channels last.

Between the layers, maps have the shape (B, C, H, W) and are views of memory in channels last, so that converting them
takes no time. `fcvit.models` defines the computation, and runs where the operators do not support the input.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fcvit.frameworks import import_framework
from fcvit.models.mask_rcnn.network import BoxHead, FiveLevelFPN, MaskHead, MaskRCNN, RPNHead
from fcvit.models.semantic_fpn import FPN, ConvNormReLU, FPNHead, SemanticFPN
from fcvit.native.kernels import SUFFIXES
from fcvit.native.operators import batch_norm, conv3x3, linear, resize

import_framework("paddle")

import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle import Tensor, nn  # noqa: E402


def accelerate_heads(model: SemanticFPN | MaskRCNN) -> None:
    """Make the neck and the heads of `model` use the native operators. Parameters keep their names."""
    for layer in (model, *model.sublayers()):
        layer.__class__ = NATIVE.get(type(layer), type(layer))


def last_view(x: Tensor) -> Tensor:
    """Return a view (B, H, W, C) of (B, C, H, W)."""
    return paddle.transpose(x, [0, 2, 3, 1])


def first_view(x: Tensor) -> Tensor:
    """Return a view (B, C, H, W) of (B, H, W, C)."""
    return paddle.transpose(x, [0, 3, 1, 2])


def _instead_of(plain: type[nn.Layer]) -> Callable[..., Any]:
    """Make a method replace `plain.forward` for the inputs that the operators support."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def choose(self: nn.Layer, x: Tensor | Sequence[Tensor]) -> Any:
            first = x if isinstance(x, Tensor) else x[0]
            _, parameter = next(iter(self.named_parameters()))
            same = first.dtype in SUFFIXES and first.dtype == parameter.dtype
            supported = paddle.in_dynamic_mode() and first.place.is_cpu_place() and same and first.size > 0
            return (forward if supported else plain.forward)(self, x)

        return choose

    return decorate


class NativeSemanticFPN(SemanticFPN):
    """An accelerated `SemanticFPN`."""

    @_instead_of(SemanticFPN)
    def forward(self, x: Tensor) -> Tensor:
        logits = self.decode_head(self.neck(self.backbone(x)))
        return first_view(resize(last_view(logits), x.shape[2:]))


class NativeFPN(FPN):
    """An accelerated `FPN`."""

    @_instead_of(FPN)
    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        maps = [_linear(block.conv, last_view(x)) for block, x in zip(self.lateral_convs, stages, strict=True)]
        for level in range(len(maps) - 1, 0, -1):
            maps[level - 1] = maps[level - 1] + resize(maps[level], maps[level - 1].shape[1:3], nearest=True)
        return [first_view(_conv(block.conv, x)) for block, x in zip(self.fpn_convs, maps, strict=True)]


class NativeFiveLevelFPN(FiveLevelFPN, NativeFPN):
    """An accelerated `FiveLevelFPN`."""


class NativeFPNHead(FPNHead):
    """An accelerated `FPNHead`."""

    @_instead_of(FPNHead)
    def forward(self, maps: list[Tensor]) -> Tensor:
        total: Any = None
        for layers, x in zip(self.scale_heads, map(last_view, maps), strict=True):
            for layer in layers:
                x = _conv_norm_relu(layer, x) if isinstance(layer, ConvNormReLU) else resize(x, _double(x))
            total = x if total is None else total + resize(x, total.shape[1:3])
        if self.training and self.dropout.p > 0:  # the same random numbers as for the whole map
            kept = self.dropout(paddle.ones([total.shape[0], total.shape[3], 1, 1], total.dtype))
            total = total * kept.transpose([0, 2, 3, 1])
        return first_view(_linear(self.conv_seg, total))


class NativeRPNHead(RPNHead):
    """An accelerated `RPNHead`."""

    @_instead_of(RPNHead)
    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [_conv(self.rpn_conv, last_view(x), relu=True) for x in maps]
        logits, deltas = ([first_view(_linear(conv, x)) for x in hidden] for conv in (self.rpn_cls, self.rpn_reg))
        return logits, deltas


class NativeBoxHead(BoxHead):
    """An accelerated `BoxHead`."""

    @_instead_of(BoxHead)
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(linear(x, layer.weight, layer.bias, transposed=True))
        scores, deltas = (linear(x, fc.weight, fc.bias, transposed=True) for fc in (self.fc_cls, self.fc_reg))
        return scores, deltas


class NativeMaskHead(MaskHead):
    """An accelerated `MaskHead`."""

    @_instead_of(MaskHead)
    def forward(self, x: Tensor) -> Tensor:
        x = last_view(x)
        for block in self.convs:
            x = _conv(block.conv, x, relu=True)
        # Each pixel becomes 2 x 2 pixels: two products, for the upper and the lower ones.
        b, h, w, c = x.shape
        weights, bias = self.upsample.weight.transpose([2, 0, 3, 1]).reshape([2, c, -1]), self.upsample.bias.tile([2])
        rows = [linear(x, weight, bias, transposed=True).reshape([b, h, 2 * w, -1]) for weight in weights]
        x = paddle.stack(rows, 2).reshape([b, 2 * h, 2 * w, -1])
        return first_view(_linear(self.conv_logits, F.relu(x)))


NATIVE: Any = {
    SemanticFPN: NativeSemanticFPN,
    FPN: NativeFPN,
    FiveLevelFPN: NativeFiveLevelFPN,
    FPNHead: NativeFPNHead,
    RPNHead: NativeRPNHead,
    BoxHead: NativeBoxHead,
    MaskHead: NativeMaskHead,
}


def _linear(conv: nn.Conv2D, x: Tensor) -> Tensor:
    return linear(x, conv.weight, conv.bias)


def _conv(conv: nn.Conv2D, x: Tensor, relu: bool = False) -> Tensor:
    return conv3x3(x, conv.weight, conv.bias, relu)


def _double(x: Tensor) -> list[int]:
    return [2 * side for side in x.shape[1:3]]


def _conv_norm_relu(layer: ConvNormReLU, x: Tensor) -> Tensor:
    norm: Any = layer.bn  # its type stubs say that it may have no parameters
    if norm.training:
        x = conv3x3(x, layer.conv.weight, None)
        if x.size == x.shape[-1]:
            norm(first_view(x))  # raises an error for a single position
        running = norm._mean, norm._variance
        return batch_norm(x, norm.weight, norm.bias, running, norm._epsilon, norm._momentum, relu=True)
    scale = norm.weight * paddle.rsqrt(norm._variance + norm._epsilon)
    weight, bias = layer.conv.weight * scale.reshape([-1, 1, 1, 1]), norm.bias - norm._mean * scale
    return conv3x3(x, weight, bias, relu=True)
