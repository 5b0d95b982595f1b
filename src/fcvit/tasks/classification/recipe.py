"""The fields of a recipe that only image classification has."""

import dataclasses
from typing import Annotated, Literal

from msgspec import Meta

from fcvit.data.transforms.augment import Augmentation, Crop, RandomInterpolation
from fcvit.tasks.recipe import IMAGES, LOSS, BelowOne, PositiveShare, Recipe, Share

Level = Annotated[float, Meta(ge=0, le=10)]
Alpha = Annotated[float, Meta(ge=0, le=1000)]
Ratio = Annotated[float, Meta(gt=0, le=100)]
Shares = tuple[PositiveShare, PositiveShare]
Ratios = tuple[Ratio, Ratio]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """A recipe of image classification; see `fcvit.data.transforms.augment` and `mixing` for the images."""

    crop: Annotated[Crop, IMAGES("A random rectangle, a crop from a reflected border, or the center.")] = "resized"
    crop_scale: Annotated[Shares, IMAGES("Share of the area that a rectangle takes, lowest and highest.")] = (0.08, 1.0)
    crop_ratio: Annotated[Ratios, IMAGES("Width over height of the rectangle, lowest and highest.")] = (3 / 4, 4 / 3)
    crop_interpolation: Annotated[RandomInterpolation, IMAGES("Interpolation of the crop.")] = "random"
    padding: Annotated[int, Meta(ge=0, le=4096), IMAGES("Pixels of the reflected border of the crop `padded`.")] = 4
    flip: Annotated[Share, IMAGES("Probability of a horizontal flip.")] = 0.5
    rand_augment: Annotated[int, Meta(ge=0, le=100), IMAGES("RandAugment operations per image; 0: none.")] = 2
    magnitude: Annotated[Level, IMAGES("Mean level of the operations.")] = 9.0
    magnitude_std: Annotated[Level, IMAGES("Standard deviation of the level.")] = 0.5
    operation_probability: Annotated[Share, IMAGES("Probability that a drawn operation is applied.")] = 0.5
    erasing: Annotated[Share, IMAGES("Probability that a rectangle is replaced by noise.")] = 0.25
    mixup: Annotated[Alpha, IMAGES("Alpha of mixup; 0: off.")] = 0.8
    cutmix: Annotated[Alpha, IMAGES("Alpha of CutMix; 0: off.")] = 1.0
    mix_switch: Annotated[Share, IMAGES("Probability of CutMix where both are on.")] = 0.5

    label_smoothing: Annotated[BelowOne, LOSS("Shared evenly by all classes.")] = 0.1
    class_weights: Annotated[Literal["none", "balanced"], LOSS("With `balanced`, all classes count alike.")] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augmentation(32)

    def augmentation(self, size: int) -> Augmentation:
        """Return what happens to training images, for an input of `size` pixels.

        Raises:
            UsageError: the fields contradict each other.
        """
        names = [field.name for field in dataclasses.fields(Augmentation) if field.name != "size"]
        return Augmentation(size=size, **{name: getattr(self, name) for name in names})
