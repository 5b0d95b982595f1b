"""The variants of FCViT in one frozen table: architecture, preprocessing and published figures.

Sources: the paper (arXiv 2212.12552) and the authors' repository (github.com/ma-xu/FCViT).
Uses only the standard library, so that every other module can import it.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypedDict

from fcvit.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_CLASSES = 1000
VALIDATION_IMAGES = 50_000  # in ImageNet-1K
ADE20K_CLASSES = 150
ADE20K_VALIDATION_IMAGES = 2_000
COCO_CLASSES = 80
COCO_VALIDATION_IMAGES = 5_000


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of an image for a network.

    The shorter side is resized to `floor(input_size / crop_fraction)`. The center of `input_size` x `input_size` is
    cropped, scaled to [0, 1] and normalized per channel (RGB).
    """

    input_size: int = 224
    crop_fraction: float = 0.9
    interpolation: str = "bicubic"  # Pillow's filter, antialiased
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 1 <= self.input_size <= 4096:
            raise UsageError(f"input size {self.input_size}: expected 1 to 4096 pixels")
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop fraction {self.crop_fraction}: expected more than 0, at most 1")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UsageError(f"interpolation {self.interpolation!r}: expected bilinear or bicubic")
        for field in ("mean", "std"):  # lists from JSON would not be equal to tuples
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise UsageError("mean and std: expected three numbers each, and std above 0")

    @property
    def resize(self) -> int:
        """Return the length of the shorter side after resizing, in pixels (authors: `floor(size / crop)`)."""
        return math.floor(self.input_size / self.crop_fraction)


def three_channels(value: "str | Sequence[float]", largest: float = 1) -> tuple[float, float, float]:
    """Return a mean or standard deviation for three channels from one or three numbers or their text.

    Raises:
        ValueError: If the value has another form, or a number is not between 0 and `largest`.
    """
    words = value.strip("()[] ").replace(",", " ").split() if isinstance(value, str) else value
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not all(0 <= number <= largest for number in numbers):
        raise ValueError(f"expected one or three numbers from 0 to {largest}, the value range of the images")
    red, green, blue = numbers * (3 // len(numbers))
    return red, green, blue


class PreprocessingChange(TypedDict, total=False):
    """Fields of a `Preprocessing` to replace."""

    input_size: int
    crop_fraction: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


RESIZE256_BILINEAR = Preprocessing(crop_fraction=0.875, interpolation="bilinear")
"""Resize(256, bilinear) + CenterCrop(224), used for evaluation by the earlier Paddle port."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network: sizes, options of the architecture, and preprocessing.

    An ablation is `dataclasses.replace(variant, competition=False)`.

    Args:
        name: Any name. The four published names are keys of `VARIANTS`.
        depths: Number of blocks in each of the four stages.
        widths: Number of channels in each stage, divisible by `heads` and at least `reduction`.
        mlp_ratios: Ratio of the channel mixer's hidden width to the stage's width.
        global_context: Whether to add the global context before each depthwise convolution.
        weighted_context: Whether to weight the context at each position by its similarity with the position. If false,
            every position gets the same context.
        competition: Whether the two halves of the context's bottleneck compete by their maximum. If false, the
            bottleneck is a plain MLP with GELU.
        heads: Number of heads of the similarity.
        reduction: Ratio of the width to the context's bottleneck.
        second_mix: Whether to mix tokens twice in a block.
        kernel_sizes: Sizes of the first and second depthwise convolution in the token mixer (odd).
        token_factor: Divisor for the channels of the 1x1 bottleneck after each depthwise convolution. A factor of 1 or
            less replaces the bottleneck with a single 1x1 convolution.
        token_minimum: Minimum channels of the bottleneck, which has `max(width // token_factor, token_minimum)`.
        spatial_attention: Whether to multiply the tokens by a sigmoid mask.
        spatial_attention_kernel: Size of the depthwise convolution in the spatial attention.
        spatial_attention_reduction: Ratio of the width to the bottleneck in the spatial attention.
        channel_dwconv: Whether the channel mixer has a depthwise convolution.
        channel_kernel: Size of the depthwise convolution in the channel mixer.
        channel_attention: Whether to add a 1-d convolution over the pooled channels.
        channel_attention_kernels: Sizes of the two convolutions in the channel attention.
        layer_scale: Initial value of the learned scale of each residual branch, or None for no scale.
        preprocessing: Preprocessing of the images.
    """

    name: str
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    mlp_ratios: tuple[int, int, int, int]
    global_context: bool = True
    weighted_context: bool = True
    competition: bool = True
    heads: int = 8
    reduction: int = 8
    second_mix: bool = True
    kernel_sizes: tuple[int, int] = (11, 11)
    token_factor: int = 8
    token_minimum: int = 16
    spatial_attention: bool = False
    spatial_attention_kernel: int = 3
    spatial_attention_reduction: int = 8
    channel_dwconv: bool = True
    channel_kernel: int = 3
    channel_attention: bool = False
    channel_attention_kernels: tuple[int, int] = (3, 5)
    layer_scale: float | None = 1e-5
    preprocessing: Preprocessing = Preprocessing()

    def __post_init__(self) -> None:
        for field in ("depths", "widths", "mlp_ratios"):
            values = getattr(self, field)
            if len(values) != 4 or not all(isinstance(v, int) and v >= 1 for v in values):
                raise UsageError(
                    f"variant {self.name!r}: {field} must be four whole numbers of 1 or more, not {values}"
                )
        if not self.name.isprintable() or not 0 < len(self.name) <= 100:
            raise UsageError(f"variant {self.name!r:.120}: a name must be one printable line of at most 100 characters")
        if len(self.kernel_sizes) != 2 or len(self.channel_attention_kernels) != 2:
            raise UsageError(
                f"variant {self.name!r}: kernel_sizes and channel_attention_kernels must be two numbers each"
            )
        if max(self.depths) > 1000 or max(self.widths) > 1 << 16 or max(self.mlp_ratios) > 1000:
            raise UsageError(f"variant {self.name!r}: too large: {self.depths}, {self.widths}, {self.mlp_ratios}")
        kernels = (
            *self.kernel_sizes,
            self.spatial_attention_kernel,
            self.channel_kernel,
            *self.channel_attention_kernels,
        )
        if not all(k >= 1 and k % 2 for k in kernels):
            raise UsageError(f"variant {self.name!r}: kernel sizes must be odd, not {kernels}")
        if self.heads < 1 or self.reduction < 1 or self.token_minimum < 1 or self.spatial_attention_reduction < 1:
            raise UsageError(f"variant {self.name!r}: heads, reductions and token_minimum must be at least 1")
        for width in self.widths:
            if width % self.heads or width < self.reduction or width < self.spatial_attention_reduction:
                raise UsageError(
                    f"variant {self.name!r}: width {width} must be divisible by {self.heads} heads "
                    f"and at least the reductions ({self.reduction}, {self.spatial_attention_reduction})"
                )

    def token_width(self, width: int) -> int | None:
        """Return the channels of the token mixer's bottleneck in a stage of `width`, or None without a bottleneck."""
        return None if self.token_factor <= 1 else max(width // self.token_factor, self.token_minimum)


@dataclasses.dataclass(frozen=True)
class Published:
    """The authors' published figures for a variant, and sizes that were counted from their code.

    Attributes:
        top1: ImageNet-1K top-1 accuracy in percent, as reported by the authors.
        earlier_port_top1: Top-1 accuracy in percent of an earlier Paddle port with Resize(256, bilinear).
        parameters_label: Number of parameters as printed in the paper, where M is 2^20.
        parameters: Counted trainable parameters of the classifier with 1,000 classes.
        gmac: Counted multiply-accumulates of convolutions and linear layers at 224 x 224, in 10^9.
        url: Folder with the authors' checkpoint, which must be downloaded manually.
        ade20k_miou: mIoU in percent on ADE20K's validation images of Semantic FPN on this backbone after 40,000
            iterations, at a single scale and without flips (README of the authors' `segmentation` folder), or None.
        coco_ap: Box AP and mask AP in percent on COCO's val2017 of Mask R-CNN on this backbone after 12 epochs (README
            of the authors' `detection` folder), or None.
    """

    top1: float
    earlier_port_top1: float
    parameters_label: str
    parameters: int
    gmac: float
    url: str
    ade20k_miou: float | None = None
    coco_ap: tuple[float, float] | None = None


_DRIVE = "https://drive.google.com/drive/folders/"

_TABLE: tuple[tuple[Variant, Published | None], ...] = (
    (
        Variant("fcvit_tiny", (3, 3, 5, 2), (32, 64, 160, 320), (8, 8, 4, 4)),
        Published(74.9, 74.5, "4.6M", 4_784_752, 0.900, _DRIVE + "1YSa8tkXkUQT94mgo-L7q4pv5KiHRTAaR"),
    ),
    (
        Variant("fcvit_b12", (2, 2, 6, 2), (64, 128, 320, 512), (8, 8, 4, 4)),
        Published(
            80.9, 80.5, "14M", 14_701_832, 2.643, _DRIVE + "1QuyalIGhJeD2pxcVxR0_gJNrk2mZ8WEb", 43.3, (42.3, 38.6)
        ),
    ),
    (
        Variant(
            "fcvit_b24",
            (4, 4, 12, 4),
            (64, 128, 320, 512),
            (8, 8, 4, 4),
            preprocessing=Preprocessing(crop_fraction=0.95),
        ),
        Published(
            82.5, 81.5, "25.7M", 26_960_232, 5.055, _DRIVE + "1II2v1rhNe9sgLJtoSR-cgSh2mpPQMt4t", 45.5, (44.1, 39.9)
        ),
    ),
    (
        Variant(
            "fcvit_b48",
            (8, 8, 24, 8),
            (64, 128, 320, 512),
            (8, 8, 4, 4),
            preprocessing=Preprocessing(crop_fraction=0.95),
        ),
        Published(83.6, 82.6, "49.1M", 51_477_032, 9.877, _DRIVE + "16joP1cQwbx4oICL-WbPC1SqGNoc4-NZm"),
    ),
    # Not from the paper. It is small enough to ship trained on digits and to test every code path with.
    (
        Variant(
            "fcvit_digits",
            (1, 1, 2, 1),
            (16, 24, 32, 48),
            (4, 4, 4, 4),
            preprocessing=Preprocessing(input_size=32, crop_fraction=1.0),
        ),
        None,
    ),
)

VARIANTS: Mapping[str, Variant] = MappingProxyType({variant.name: variant for variant, _ in _TABLE})
"""All named variants. `published(variant)` is not None for the paper's variants."""


def get_variant(variant: "str | Variant") -> Variant:
    """Return the variant with this name. Return a `Variant` unchanged.

    Raises:
        UsageError: If the name is unknown. The message suggests the nearest name.
    """
    if isinstance(variant, Variant):
        return variant
    if variant in VARIANTS:
        return VARIANTS[variant]
    near = difflib.get_close_matches(str(variant), VARIANTS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown variant {variant!r}{hint} (known: {', '.join(VARIANTS)})")


def published(variant: Variant) -> Published | None:
    """Return the published figures of exactly this variant, or None if it is not a published variant."""
    return next((row for known, row in _TABLE if known == variant), None)


def resolve_preprocessing(
    argument: Preprocessing | PreprocessingChange | None, file: Preprocessing | None, variant: Variant
) -> Preprocessing:
    """Return the preprocessing of the argument if given, else that of the file, else that of the variant.

    A `PreprocessingChange` replaces single fields of the preprocessing that would be returned without it.
    """
    if isinstance(argument, Preprocessing):
        return argument
    return dataclasses.replace(file or variant.preprocessing, **(argument or {}))
