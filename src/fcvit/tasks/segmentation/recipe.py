"""Recipe fields of semantic segmentation."""

import dataclasses
from typing import Annotated, Literal

from msgspec import Meta

from fcvit.data.transforms.segmentation import SCALE, SegmentationAugmentation
from fcvit.models.spec import SemanticFPNOptions
from fcvit.tasks.dense import Channels, DenseRecipe, Size
from fcvit.tasks.recipe import DATA, IMAGES, LOSS, NETWORK, BelowOne, NonNegative, Positive, Share
from fcvit.tasks.segmentation.label_options import LabelOptions
from fcvit.tasks.segmentation.losses import LossMean

Values = tuple[Annotated[int, Meta(ge=0, le=65535)], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """A recipe for semantic segmentation. For augmentation, see `fcvit.data.transforms.segmentation`."""

    task: Annotated[str, DATA("Task of the network.")] = "segmentation"
    label_suffix: Annotated[str | None, DATA("End of the names of label maps (default: found from the names).")] = None
    reduce_zero_label: Annotated[bool | None, DATA("0 is ignored, and k is class k - 1 (default: for ADE20K).")] = None
    ignore_index: Annotated[Values | None, DATA("Values in label maps that are ignored (default: 255).")] = None
    label_values: Annotated[Values | None, DATA("Value of each class in label maps (default: 0, 1, 2, ...).")] = None

    head_channels: Annotated[Channels, NETWORK("Channels of the segmentation head.")] = 128
    head_dropout: Annotated[BelowOne, NETWORK("Rate at which the head drops whole channels.")] = 0.1

    scale: Annotated[Size, IMAGES("Largest longer and shorter side after the resize, before the factor.")] = SCALE
    scale_ratio: Annotated[tuple[Positive, Positive], IMAGES("Range of the resize factor.")] = (0.5, 2.0)
    crop_size: Annotated[Size, IMAGES("Height and width of the random crop.")] = (512, 512)
    max_class_share: Annotated[Share, IMAGES("Draw a crop again if one class fills this share. 1: off.")] = 0.75
    distortion: Annotated[bool, IMAGES("Change brightness, contrast, saturation and hue.")] = True

    loss_mean: Annotated[LossMean, LOSS("Average the loss over all pixels, or over the valid (labeled) pixels.")] = (
        "all"
    )
    dice_weight: Annotated[NonNegative, LOSS("Weight of the Dice loss, for small classes. 0: off.")] = 0.0
    class_weights: Annotated[Literal["none", "balanced"], LOSS("Balanced: inverse to class frequency.")] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augmentation()

    def augmentation(self) -> SegmentationAugmentation:
        """Return the augmentation of training images.

        Raises:
            UsageError: A field is out of range.
        """
        names = [field.name for field in dataclasses.fields(SegmentationAugmentation)]
        return SegmentationAugmentation(**{name: getattr(self, name) for name in names})

    def label_options(self) -> LabelOptions:
        """Return how label maps are found and read."""
        return LabelOptions(self.label_suffix, self.reduce_zero_label, self.ignore_index, self.label_values)

    def head_options(self) -> SemanticFPNOptions:
        """Return the widths of the network and the size of its input in evaluation, which is that of `scale`."""
        return SemanticFPNOptions(self.neck_channels, self.head_channels, max(self.scale), min(self.scale))
