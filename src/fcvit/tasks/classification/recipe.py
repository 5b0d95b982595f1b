"""Recipe fields of image classification."""

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
    """A recipe for image classification. For augmentation, see `fcvit.data.transforms.augment` and `mixing`."""

    crop: Annotated[Crop, IMAGES("Random resized crop, padded random crop or center crop.")] = "resized"
    crop_scale: Annotated[Shares, IMAGES("Area fraction of the `resized` crop, minimum and maximum.")] = (0.08, 1.0)
    crop_ratio: Annotated[Ratios, IMAGES("Aspect ratio of the `resized` crop, minimum and maximum.")] = (3 / 4, 4 / 3)
    crop_interpolation: Annotated[RandomInterpolation, IMAGES("Interpolation of the crop.")] = "random"
    padding: Annotated[int, Meta(ge=0, le=4096), IMAGES("Pixels of reflection padding for the `padded` crop.")] = 4
    flip: Annotated[Share, IMAGES("Probability of a horizontal flip.")] = 0.5
    rand_augment: Annotated[int, Meta(ge=0, le=100), IMAGES("RandAugment operations per image. 0: off.")] = 2
    magnitude: Annotated[Level, IMAGES("Mean magnitude of the operations.")] = 9.0
    magnitude_std: Annotated[Level, IMAGES("Standard deviation of the magnitude.")] = 0.5
    operation_probability: Annotated[Share, IMAGES("Probability of applying each chosen operation.")] = 0.5
    erasing: Annotated[Share, IMAGES("Probability of random erasing (a rectangle of noise).")] = 0.25
    mixup: Annotated[Alpha, IMAGES("Mixup alpha. 0: off.")] = 0.8
    cutmix: Annotated[Alpha, IMAGES("CutMix alpha. 0: off.")] = 1.0
    mix_switch: Annotated[Share, IMAGES("Probability of CutMix if mixup and CutMix are on.")] = 0.5

    label_smoothing: Annotated[BelowOne, LOSS("Label smoothing factor.")] = 0.1
    class_weights: Annotated[Literal["none", "balanced"], LOSS("Balanced: inverse to class frequency.")] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augmentation(32)

    def augmentation(self, size: int) -> Augmentation:
        """Return the augmentation of training images for an input of `size` pixels.

        Raises:
            UsageError: The fields contradict each other.
        """
        names = [field.name for field in dataclasses.fields(Augmentation) if field.name != "size"]
        return Augmentation(size=size, **{name: getattr(self, name) for name in names})
