"""Recipe fields, evaluation options and data splits of segmentation and detection."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Protocol

import numpy as np
from msgspec import Meta

from fcvit.data.sources import Source
from fcvit.data.splits import Role
from fcvit.errors import UsageError
from fcvit.evaluation.settings import MOVABLE, absolute
from fcvit.models.build import DENSE_LAYER_SCALE
from fcvit.models.variants import Variant
from fcvit.tasks.recipe import IMAGES, NETWORK, Pixels, Recipe, Share
from fcvit.text import some

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


@dataclasses.dataclass(frozen=True)
class SplitOptions:
    """Options of `fcvit eval` for data sets in splits.

    Args:
        classes: Class list of the model: CSV with id and name, or one class per line (default: from the weights file).
        split: Name of the split, for example val (default: the validation split).
    """

    classes: str | None = dataclasses.field(default=None, metadata=MOVABLE)
    split: str | None = None

    def __post_init__(self) -> None:
        if self.classes:
            object.__setattr__(self, "classes", absolute(self.classes))

    def chosen(self, layout: "Layout") -> str:
        """Return the name of the split to evaluate: the given one, the validation split, or the only one.

        Raises:
            UsageError: The given split does not exist, or several are possible.
        """
        names = list(layout.splits)
        if self.split is not None:
            if self.split not in names:
                raise UsageError(f"--split {self.split}: expected one of {', '.join(names)}")
            return self.split
        names = layout.named("val") or names
        if len(names) != 1:
            path = layout.source.path
            raise UsageError(f"{path}: contains the splits {', '.join(names)}; select one with --split")
        return names[0]


class Layout(Protocol):
    """The files of a data set: its source, and its splits by name."""

    @property
    def source(self) -> Source: ...

    @property
    def splits(self) -> Iterable[str]: ...

    def named(self, wanted: Role, /) -> list[str]:
        """Return the names of the training, validation or test splits."""
        ...


def find_splits(
    recipe: Recipe, layout: Any, find: Callable[[str], Any], read: Callable[[Any, str], Any]
) -> tuple[Any, Any, list[str]]:
    """Return the training and validation images of a recipe, and notes on them. Without validation the second is None.

    Args:
        recipe: Fields that select the images.
        layout: Layout of `recipe.data`.
        find: Function that returns the layout of another path.
        read: Function that returns the images of a split, given a layout and the name of the split.

    Raises:
        UsageError: The choice of the splits is ambiguous, or there are too few images.
        UnreadableFile: The images cannot be read.
    """
    train = read(layout, _only(layout, "train", "--data"))
    notes = [*train.notes]
    if recipe.val:
        other = find(recipe.val)
        val = read(other, _only(other, "val", "--val"))
    elif layout.named("val"):
        val = read(layout, _only(layout, "val", "--val"))
    elif recipe.held_out:
        count = round(recipe.held_out * len(train))
        if not 1 <= count < len(train):
            raise UsageError(f"held_out = {recipe.held_out} of {len(train)} images: too few images for both splits")
        drawn = set(np.random.default_rng(recipe.seed).permutation(len(train))[:count].tolist())
        notes.append(f"held out for validation: {count} of {len(train)} images (seed {recipe.seed})")
        val = train.take(sorted(drawn))
        return train.take([index for index in range(len(train)) if index not in drawn]), val, notes
    else:
        notes.append("no validation images, because neither val nor held_out is set")
        return train, None, notes
    if train.root == val.root and (same := set(train.names) & set(val.names)):
        raise UsageError(f"--val {recipe.val}: its images are also training images ({some(sorted(same))})")
    return train, val, [*notes, *val.notes]


def _only(layout: Layout, wanted: Role, option: str) -> str:
    """Return the name of the only split with this role, or of the split without a role."""
    names = layout.named(wanted) or [name for name in layout.splits if name == "all"]
    if len(names) != 1:
        existing = f"several ({', '.join(names)})" if names else f"only {', '.join(layout.splits)}"
        kind = {"train": "training", "val": "validation", "test": "test"}[wanted]
        raise UsageError(
            f"{layout.source.path}: expected one {kind} split, found {existing}; pass a data set with one with {option}"
        )
    return names[0]
