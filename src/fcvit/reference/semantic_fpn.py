"""Semantic FPN in PyTorch, the reference for `fcvit.models.semantic_fpn`. It was written from the facts, not from it.

Names and behavior are those of mmsegmentation 0.19.0 with the authors' backbone.
"""

from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec
from fcvit.reference.backbone import FCViTBackbone

import_framework("torch")  # reports how to install it if it is missing

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402


class SemanticFPN(nn.Module):
    """FCViT with Semantic FPN: images (B, 3, H, W) to logits (B, classes, H, W)."""

    def __init__(self, spec: ModelSpec, head_dropout: float = 0.1):
        super().__init__()
        self.backbone = FCViTBackbone(spec.variant)
        self.neck = FeaturePyramid(spec.variant.widths, spec.options.neck)
        self.decode_head = SegmentationHead(spec.options.neck, spec.options.channels, spec.num_classes, head_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return bilinear(self.decode_head(self.neck(self.backbone(x))), x)


class FeaturePyramid(nn.Module):
    """Lateral 1 x 1 convolutions, a top-down sum, and a 3 x 3 convolution for each level."""

    def __init__(self, widths: tuple[int, ...], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvOnly(width, channels, 1) for width in widths)
        self.fpn_convs = nn.ModuleList(ConvOnly(channels, channels, 3) for _ in widths)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = []
        above = None
        for lateral, smooth, stage in list(zip(self.lateral_convs, self.fpn_convs, stages, strict=True))[::-1]:
            level = lateral(stage)
            if above is not None:
                level = level + F.interpolate(above, size=level.shape[-2:], mode="nearest")
            outputs.insert(0, smooth(level))
            above = level
        return outputs


class SegmentationHead(nn.Module):
    """Each level is convolved and doubled until it has stride 4. The sum is classified."""

    def __init__(self, neck: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.scale_heads = nn.ModuleList(scale_head(neck, channels, doublings) for doublings in range(4))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, levels: list[Tensor]) -> Tensor:
        finest, *others = (head(level) for head, level in zip(self.scale_heads, levels, strict=True))
        total = finest
        for other in others:
            total = total + bilinear(other, finest)
        return self.conv_seg(self.dropout(total))


class ConvOnly(nn.Module):
    """mmcv's ConvModule without norm and activation."""

    def __init__(self, width_in: int, width_out: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvBlock(nn.Module):
    """mmcv's ConvModule with a 3 x 3 convolution without bias, BatchNorm and ReLU."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def scale_head(neck: int, channels: int, doublings: int) -> nn.Sequential:
    layers: list[nn.Module] = [ConvBlock(neck, channels)]
    for number in range(doublings):
        layers += [ConvBlock(channels, channels)] if number else []
        layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


def bilinear(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
