"""The variants of FCViT: architecture, preprocessing and published figures, in one frozen table.

Sources: the paper (arXiv 2212.12552) and the authors' repository (github.com/ma-xu/FCViT).
Standard library only, so that every other module may know it.
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
VALIDATION_IMAGES = 50_000  # of ImageNet-1K


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of an image for the network.

    The shorter side is resized to `floor(input_size / crop_fraction)`, the center of
    `input_size` x `input_size` is cut out, scaled to [0, 1] and normalized per channel (RGB).
    """

    input_size: int = 224
    crop_fraction: float = 0.9
    interpolation: str = "bicubic"  # Pillow's, antialiased
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 1 <= self.input_size <= 4096:
            raise UsageError(f"input size {self.input_size}: expected 1 to 4096 pixels")
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop fraction {self.crop_fraction}: expected more than 0, at most 1")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UsageError(f"interpolation {self.interpolation!r}: expected bilinear or bicubic")
        for field in ("mean", "std"):  # lists come from JSON, and would not be equal to tuples
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise UsageError("mean and std: expected three numbers each, those of std above 0")

    @property
    def resize(self) -> int:
        """Length of the shorter side after resizing, in pixels (authors: `floor(size / crop)`)."""
        return math.floor(self.input_size / self.crop_fraction)


def three_channels(value: "str | Sequence[float]", largest: float = 1) -> tuple[float, float, float]:
    """Return a mean or standard deviation for three channels, from one number or three, or text of them.

    Raises:
        ValueError: it is something else, or a number is not from 0 to `largest`.
    """
    words = value.strip("()[] ").replace(",", " ").split() if isinstance(value, str) else value
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not all(0 <= number <= largest for number in numbers):
        raise ValueError(f"expected one number or three, from 0 to {largest} as the images are")
    red, green, blue = numbers * (3 // len(numbers))
    return red, green, blue


class PreprocessingChange(TypedDict, total=False):
    """Single fields of a `Preprocessing` to be replaced."""

    input_size: int
    crop_fraction: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


RESIZE256_BILINEAR = Preprocessing(crop_fraction=0.875, interpolation="bilinear")
"""Resize(256, bilinear) + CenterCrop(224): what the earlier Paddle port evaluated with."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One network: sizes, the options of the architecture, and its preprocessing.

    An ablation is `dataclasses.replace(variant, competition=False)`.

    Args:
        name: free; the four published names are keys of `VARIANTS`.
        depths: blocks in each of the four stages.
        widths: channels of each stage; divisible by `heads` and at least `reduction`.
        mlp_ratios: hidden width of the channel mixer over the stage's width.
        global_context: add the global context before each depthwise convolution.
        weighted_context: weight the context at each position by its similarity with it;
            off: the same context everywhere.
        competition: halves of the context's bottleneck compete by their maximum;
            off: a plain bottleneck with GELU.
        heads: heads of the similarity.
        reduction: width over bottleneck of the context.
        second_mix: mix tokens twice in a block.
        kernel_sizes: of the first and second depthwise convolution of the token mixer (odd).
        token_factor, token_minimum: the 1x1 bottleneck after each has
            `max(width // token_factor, token_minimum)` channels; a factor of 1 or less
            makes it a single 1x1 convolution.
        spatial_attention: gate the tokens by a sigmoid mask, its depthwise convolution of size
            `spatial_attention_kernel`, its bottleneck `width // spatial_attention_reduction`.
        channel_dwconv, channel_kernel: the depthwise convolution of the channel mixer, its size.
        channel_attention: add a 1-d convolution over the pooled channels, sizes
            `channel_attention_kernels`.
        layer_scale: initial value of the learned scale of each residual branch; None: no scale.
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
                raise UsageError(f"variant {self.name!r}: {field} are four whole numbers from 1, not {values}")
        if not self.name.isprintable() or not 0 < len(self.name) <= 100:
            raise UsageError(f"variant {self.name!r:.120}: a name is one printable line of at most 100 characters")
        if len(self.kernel_sizes) != 2 or len(self.channel_attention_kernels) != 2:
            raise UsageError(f"variant {self.name!r}: kernel_sizes and channel_attention_kernels are two numbers each")
        if max(self.depths) > 1000 or max(self.widths) > 1 << 16 or max(self.mlp_ratios) > 1000:
            raise UsageError(f"variant {self.name!r}: absurd size {self.depths}, {self.widths}, {self.mlp_ratios}")
        kernels = (
            *self.kernel_sizes,
            self.spatial_attention_kernel,
            self.channel_kernel,
            *self.channel_attention_kernels,
        )
        if not all(k >= 1 and k % 2 for k in kernels):
            raise UsageError(f"variant {self.name!r}: kernel sizes are odd, not {kernels}")
        if self.heads < 1 or self.reduction < 1 or self.token_minimum < 1 or self.spatial_attention_reduction < 1:
            raise UsageError(f"variant {self.name!r}: heads, reductions and minimum are at least 1")
        for width in self.widths:
            if width % self.heads or width < self.reduction or width < self.spatial_attention_reduction:
                raise UsageError(
                    f"variant {self.name!r}: width {width} must be divisible by {self.heads} heads "
                    f"and at least the reductions ({self.reduction}, {self.spatial_attention_reduction})"
                )

    def token_width(self, width: int) -> int | None:
        """Return the channels of the token mixer's bottleneck in a stage of `width`; None: it has none."""
        return None if self.token_factor <= 1 else max(width // self.token_factor, self.token_minimum)


@dataclasses.dataclass(frozen=True)
class Published:
    """The figures that the authors report for a variant, beside what was counted from their code.

    Attributes:
        top1: ImageNet-1K top-1 accuracy in per cent, as the authors report it.
        earlier_port_top1: what an earlier Paddle port measured with Resize(256, bilinear).
        parameters_label: as printed in the paper; its M is 2^20.
        parameters: trainable numbers of the classifier with 1,000 classes, counted.
        gmac: multiply-accumulates of convolutions and linear layers at 224 x 224, in 10^9, counted.
        url: folder with the authors' checkpoint, to be fetched by hand.
    """

    top1: float
    earlier_port_top1: float
    parameters_label: str
    parameters: int
    gmac: float
    url: str


_DRIVE = "https://drive.google.com/drive/folders/"

_TABLE: tuple[tuple[Variant, Published | None], ...] = (
    (
        Variant("fcvit_tiny", (3, 3, 5, 2), (32, 64, 160, 320), (8, 8, 4, 4)),
        Published(74.9, 74.5, "4.6M", 4_784_752, 0.900, _DRIVE + "1YSa8tkXkUQT94mgo-L7q4pv5KiHRTAaR"),
    ),
    (
        Variant("fcvit_b12", (2, 2, 6, 2), (64, 128, 320, 512), (8, 8, 4, 4)),
        Published(80.9, 80.5, "14M", 14_701_832, 2.643, _DRIVE + "1QuyalIGhJeD2pxcVxR0_gJNrk2mZ8WEb"),
    ),
    (
        Variant(
            "fcvit_b24",
            (4, 4, 12, 4),
            (64, 128, 320, 512),
            (8, 8, 4, 4),
            preprocessing=Preprocessing(crop_fraction=0.95),
        ),
        Published(82.5, 81.5, "25.7M", 26_960_232, 5.055, _DRIVE + "1II2v1rhNe9sgLJtoSR-cgSh2mpPQMt4t"),
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
    # Ours, not the paper's: small enough to ship trained on digits and to test every path with.
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
"""All named variants; those with `published(variant)` are the paper's."""


def get_variant(variant: "str | Variant") -> Variant:
    """Return the variant of that name, or the argument itself if it is one already.

    Raises:
        UsageError: no such name; the message suggests the nearest.
    """
    if isinstance(variant, Variant):
        return variant
    if variant in VARIANTS:
        return VARIANTS[variant]
    near = difflib.get_close_matches(str(variant), VARIANTS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"no variant {variant!r}{hint} (known: {', '.join(VARIANTS)})")


def published(variant: Variant) -> Published | None:
    """Return the published figures of exactly this variant; None for one of one's own, ablations included."""
    return next((row for known, row in _TABLE if known == variant), None)


def resolve_preprocessing(
    argument: Preprocessing | PreprocessingChange | None, file: Preprocessing | None, variant: Variant
) -> Preprocessing:
    """Choose the preprocessing by the one rule: the argument, else the file's, else the variant's.

    An argument that is a change replaces single fields of what would be chosen without it.
    """
    if isinstance(argument, Preprocessing):
        return argument
    return dataclasses.replace(file or variant.preprocessing, **(argument or {}))
