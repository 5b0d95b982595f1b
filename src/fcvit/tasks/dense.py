"""Recipe fields of segmentation and detection."""

import dataclasses
from typing import Annotated

from msgspec import Meta

from fcvit.errors import UsageError
from fcvit.models.build import DENSE_LAYER_SCALE
from fcvit.models.variants import Variant
from fcvit.tasks.recipe import IMAGES, NETWORK, Pixels, Recipe, Share

Size = tuple[Pixels, Pixels]
Channels = Annotated[int, Meta(ge=1, le=1 << 16)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe):
    """A recipe for a network with a feature pyramid."""

    neck_channels: Annotated[Channels, NETWORK("Channels of the feature pyramid.")] = 256
    flip: Annotated[Share, IMAGES("Probability of a horizontal flip.")] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input_size", "crop_fraction", "interpolation"):
            if getattr(self, name) is not None:
                raise UsageError(f"recipe: {name} is for classification; set scale instead")

    def network(self) -> Variant:
        """Return the variant with the options of the recipe. The layer scale starts at 1e-6, as in the authors' code.

        Raises:
            UsageError: As in `Recipe.network`.
        """
        variant = super().network()
        if "layer_scale" in self.options or variant.layer_scale is None:
            return variant
        return dataclasses.replace(variant, layer_scale=DENSE_LAYER_SCALE)
