"""Recipe fields of semantic segmentation."""

import dataclasses
from typing import Annotated, Literal

from msgspec import Meta

from fcvit.data.transforms.segmentation import SCALE, SegmentationAugmentation
from fcvit.errors import UsageError
from fcvit.models.build import DENSE_LAYER_SCALE
from fcvit.models.spec import SemanticFPNOptions
from fcvit.models.variants import Variant
from fcvit.tasks.recipe import DATA, IMAGES, LOSS, NETWORK, BelowOne, NonNegative, Pixels, Positive, Recipe, Share
from fcvit.tasks.segmentation.losses import LossMean

Values = tuple[Annotated[int, Meta(ge=0, le=65535)], ...]
Size = tuple[Pixels, Pixels]
Channels = Annotated[int, Meta(ge=1, le=1 << 16)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """A recipe for semantic segmentation. For augmentation, see `fcvit.data.transforms.segmentation`."""

    task: Annotated[str, DATA("Task of the network.")] = "segmentation"
    label_suffix: Annotated[str | None, DATA("End of the names of label maps (default: found from the names).")] = None
    reduce_zero_label: Annotated[bool | None, DATA("0 is ignored, and k is class k - 1 (default: for ADE20K).")] = None
    ignore_index: Annotated[Values | None, DATA("Values in label maps that are ignored (default: 255).")] = None
    label_values: Annotated[Values | None, DATA("Value of each class in label maps (default: 0, 1, 2, ...).")] = None

    neck_channels: Annotated[Channels, NETWORK("Channels of the feature pyramid.")] = 256
    head_channels: Annotated[Channels, NETWORK("Channels of the segmentation head.")] = 128
    head_dropout: Annotated[BelowOne, NETWORK("Rate at which the head drops whole channels.")] = 0.1

    scale: Annotated[Size, IMAGES("Largest longer and shorter side after the resize, before the factor.")] = SCALE
    scale_ratio: Annotated[tuple[Positive, Positive], IMAGES("Range of the resize factor.")] = (0.5, 2.0)
    crop_size: Annotated[Size, IMAGES("Height and width of the random crop.")] = (512, 512)
    max_class_share: Annotated[Share, IMAGES("Draw a crop again if one class fills this share. 1: off.")] = 0.75
    flip: Annotated[Share, IMAGES("Probability of a horizontal flip.")] = 0.5
    distortion: Annotated[bool, IMAGES("Change brightness, contrast, saturation and hue.")] = True

    loss_mean: Annotated[LossMean, LOSS("Average the loss over all pixels, or over the valid (labeled) pixels.")] = (
        "all"
    )
    dice_weight: Annotated[NonNegative, LOSS("Weight of the Dice loss, for small classes. 0: off.")] = 0.0
    class_weights: Annotated[Literal["none", "balanced"], LOSS("Balanced: inverse to class frequency.")] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input_size", "crop_fraction", "interpolation"):
            if getattr(self, name) is not None:
                raise UsageError(f"recipe: {name} is for classification; set scale and crop_size instead")
        self.augmentation()

    def augmentation(self) -> SegmentationAugmentation:
        """Return the augmentation of training images.

        Raises:
            UsageError: A field is out of range.
        """
        names = [field.name for field in dataclasses.fields(SegmentationAugmentation)]
        return SegmentationAugmentation(**{name: getattr(self, name) for name in names})

    def head_options(self) -> SemanticFPNOptions:
        """Return the widths of the network and the size of its input in evaluation, which is that of `scale`."""
        return SemanticFPNOptions(self.neck_channels, self.head_channels, max(self.scale), min(self.scale))

    def network(self) -> Variant:
        """Return the variant with the options of the recipe. The layer scale starts at 1e-6, as in the authors' code.

        Raises:
            UsageError: As in `Recipe.network`.
        """
        variant = super().network()
        if "layer_scale" in self.options or variant.layer_scale is None:
            return variant
        return dataclasses.replace(variant, layer_scale=DENSE_LAYER_SCALE)
