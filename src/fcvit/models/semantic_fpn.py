"""Semantic FPN in PaddlePaddle: the FCViT backbone with mmsegmentation's feature pyramid and segmentation head.

Ported from the behavior of mmsegmentation 0.19.0 (`FPN`, `FPNHead`, `EncoderDecoder`) as the authors configure it in
their `segmentation/` folder. The parameter names are those of their checkpoints: `backbone.`, `neck.`, `decode_head.`.

Shapes: B images, H x W pixels. Level i of the pyramid has stride 4, 8, 16, 32, and its size is rounded up.
"""

from collections.abc import Sequence

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.models.backbone import FCViTBackbone
from fcvit.models.layers import BatchNorm
from fcvit.models.spec import SemanticFPNOptions
from fcvit.models.variants import Variant

import_framework("paddle")  # hides warnings, and reports how to install it if it is missing

import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle import Tensor, nn  # noqa: E402


class SemanticFPN(nn.Layer):
    """FCViT with Semantic FPN.

    Args:
        variant: Architecture of the backbone.
        num_classes: Number of classes, at least 1.
        options: Widths of the pyramid and the head.
        drop_path_rate: Stochastic depth rate of the last block, 0 <= rate < 1.
        drop_rate: Dropout rate in the channel mixers, 0 <= rate < 1.
        head_dropout: Rate at which the head drops whole channels in training. 0.1 in the authors' configuration.

    Raises:
        UsageError: If a rate is out of range.
    """

    def __init__(
        self,
        variant: Variant,
        num_classes: int,
        options: SemanticFPNOptions | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        head_dropout: float = 0.1,
    ):
        super().__init__()
        self.variant, self.num_classes, self.options = variant, num_classes, options or SemanticFPNOptions()
        self.backbone = FCViTBackbone(variant, drop_path_rate, drop_rate)
        self.neck = FPN(variant.widths, self.options.neck)
        self.decode_head = FPNHead(self.options.neck, self.options.channels, num_classes, head_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) for normalized images (B, 3, H, W) of any size."""
        return resize_bilinear(self.decode_head(self.neck(self.backbone(x))), x.shape[2:])


class FPN(nn.Layer):
    """Feature pyramid: maps of the four stages to four maps with `channels` channels and the same sizes.

    Source: mmsegmentation 0.19.0, `models/necks/fpn.py`, with as many outputs as inputs.
    """

    def __init__(self, widths: tuple[int, ...], channels: int):
        super().__init__()
        self.lateral_convs = nn.LayerList([PlainConv(width, channels, 1) for width in widths])
        self.fpn_convs = nn.LayerList([PlainConv(channels, channels, 3) for _ in widths])

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        maps = [self.lateral_convs[level](stage) for level, stage in enumerate(stages)]
        for level in range(len(maps) - 1, 0, -1):
            # To the size of the finer map, which is not always the double.
            maps[level - 1] = maps[level - 1] + F.interpolate(maps[level], maps[level - 1].shape[2:], mode="nearest")
        return [self.fpn_convs[level](x) for level, x in enumerate(maps)]


class FPNHead(nn.Layer):
    """Segmentation head: four maps to logits (B, classes, H / 4, W / 4), rounded up.

    Source: mmsegmentation 0.19.0, `models/decode_heads/fpn_head.py`.
    """

    def __init__(self, neck: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.conv_seg = nn.Conv2D(channels, num_classes, 1)
        scale_heads = []
        for level in range(4):
            layers: list[nn.Layer] = []
            for index in range(max(level, 1)):
                layers.append(ConvNormReLU(channels if index else neck, channels))
                layers += [Doubling()] if level else []
            scale_heads.append(nn.Sequential(*layers))
        self.scale_heads = nn.LayerList(scale_heads)
        self.dropout = nn.Dropout2D(dropout)
        bound = channels**-0.5  # PyTorch's default, which the authors' training script leaves unchanged
        for parameter in (self.conv_seg.weight, self.conv_seg.bias):
            nn.initializer.Uniform(-bound, bound)(parameter)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.scale_heads[0](maps[0])
        for level in range(1, 4):
            x = x + resize_bilinear(self.scale_heads[level](maps[level]), x.shape[2:])
        return self.conv_seg(self.dropout(x))


class PlainConv(nn.Layer):
    """A convolution with bias, without norm and activation, under mmcv's name `conv`."""

    def __init__(self, width_in: int, width_out: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2D(width_in, width_out, kernel, padding=kernel // 2)
        _kaiming(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvNormReLU(nn.Layer):
    """A 3 x 3 convolution without bias, BatchNorm and ReLU, under mmcv's names `conv` and `bn`."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.conv = nn.Conv2D(width_in, width_out, 3, padding=1, bias_attr=False)
        self.bn = BatchNorm(width_out)
        _kaiming(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Doubling(nn.Layer):
    """Bilinear resizing to twice the height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return resize_bilinear(x, [2 * side for side in x.shape[2:]])


def resize_bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, C, H, W) to a height and width, like PyTorch's bilinear `interpolate` with align_corners=False.

    Paddle's `F.interpolate` computes its weights in float32, also for float64 maps. Here they are computed in float64,
    and each axis is one matrix product. On a CPU, selecting the neighbors by their indices takes ten times as long.
    """
    for axis in (2, 3):
        before, after = x.shape[axis], size[axis - 2]
        if before != after:
            weights = paddle.to_tensor(bilinear_weights(before, after), dtype="float64").astype(x.dtype)
            x = weights @ x if axis == 2 else paddle.matmul(x, weights, transpose_y=True)
    return x


def bilinear_weights(before: int, after: int) -> np.ndarray:
    """Return the weight of each input pixel in each output pixel of an axis, float64 (after, before)."""
    position = np.maximum((np.arange(after) + 0.5) * (before / after) - 0.5, 0)  # centers of pixels
    low = np.minimum(np.floor(position).astype(np.int64), before - 1)
    weights = np.zeros((after, before))
    weights[np.arange(after), low] = 1 - (position - low)
    weights[np.arange(after), np.minimum(low + 1, before - 1)] += position - low
    return weights


def _kaiming(conv: nn.Conv2D) -> None:
    """Initialize a convolution as mmcv's ConvModule does: Kaiming normal over the outputs, and a bias of 0."""
    fan_out = conv.weight.shape[0] * conv.weight.shape[2] * conv.weight.shape[3]
    nn.initializer.Normal(0.0, (2 / fan_out) ** 0.5)(conv.weight)
    if conv.bias is not None:
        nn.initializer.Constant(0.0)(conv.bias)
