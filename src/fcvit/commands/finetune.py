"""Fine-tune weights on a folder of images without a recipe file (`fcvit finetune` and `fcvit.finetune`)."""

import dataclasses
import logging
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcvit.commands.options import Device
from fcvit.commands.preview import Preview
from fcvit.commands.train import PreviewFile, RunFolder, Workers, recipe_options, recipe_overrides, train
from fcvit.data.class_indices import composed
from fcvit.data.training_splits import find_splits
from fcvit.errors import counted
from fcvit.models.variants import VARIANTS, Variant
from fcvit.processes import join
from fcvit.tasks.recipe import Recipe
from fcvit.training.recipe import build_recipe, shipped_text
from fcvit.training.run import Training
from fcvit.weights.reading import read_weights

logger = logging.getLogger("fcvit")

DEFAULTS = tomllib.loads(shipped_text("finetune"))


def finetune(
    weights: Path | str,
    data: Path | str,
    *,
    folder: RunFolder = None,
    preview: PreviewFile = None,
    device: Device = "auto",
    workers: Workers = None,
    **fields: recipe_options("weights", "data", **DEFAULTS, new_head="automatic"),  # pyrefly: ignore
) -> Training | Preview:
    """Fine-tune weights on your own images, by default with a new head and low learning rates in the lower blocks.

    Args:
        weights: A checkpoint of any format.
        data: Folder with one folder of images per class, or with such folders in train and val. Also in a tar archive.
        fields: Fields of the recipe. docs/reference/recipes.md lists them.

    Raises:
        FcvitError: See `finetune_recipe` and `fcvit.training.run.train`.
    """
    recipe, notes = finetune_recipe(weights, data, recipe_overrides(fields))
    for note in notes:
        logger.info(note)
    return train(recipe, folder=folder, preview=preview, device=device, workers=workers)


def finetune_recipe(
    weights: str | os.PathLike[str], data: str | os.PathLike[str], overrides: Mapping[str, object] | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """Return a recipe for fine-tuning, and notes about the values that were chosen automatically.

    The head is new unless the class folders match the classes in the weights file. The batch size is at most a
    quarter of the training images, so that an epoch has several steps. The warm-up is at most a fifth of the epochs.

    Args:
        weights: The weights file to start from.
        data: The training data.
        overrides: Fields of the recipe, as in `read_recipe`.
    """
    given = {key.replace("-", "_"): value for key, value in (overrides or {}).items()}
    loaded = read_weights(weights, {"true": True, "false": False}.get(str(given.get("ema")).lower()))
    variant, options = _named_variant(loaded.spec.variant)
    defaults: dict[str, Any] = {**DEFAULTS, "variant": variant, "options": options}
    defaults |= {"weights": os.fspath(weights), "data": os.fspath(data)}
    source = "fcvit finetune"
    recipe = build_recipe({**defaults, "new_head": True}, given, source)
    splits = find_splits(recipe, loaded)
    notes = []
    if "new_head" not in given:
        # The order of the classes does not matter, because the head keeps the order of the weights.
        names, folders = ({composed(name.id) for name in classes} for classes in (loaded.classes or (), splits.classes))
        if names == folders:
            notes.append(
                "the class folders match the classes of the weights: their head is kept (--new-head true replaces it)"
            )
        recipe = build_recipe({**defaults, "new_head": names != folders}, given, source)
    if "batch_size" not in given:
        parts = join().count * recipe.accumulate
        size = max(2, min(recipe.batch_size, len(splits.train) // 4) // parts) * parts
        if size != recipe.batch_size:
            recipe = dataclasses.replace(recipe, batch_size=size)
            notes.append(f"batch_size {size}: a quarter of the training images")
    longest = recipe.epochs / 5 if recipe.lr_update == "step" else recipe.epochs // 5
    if "warmup_epochs" not in given and recipe.warmup_epochs > longest:
        recipe = dataclasses.replace(recipe, warmup_epochs=longest)
        notes.append(f"warmup_epochs {longest:g}: a fifth of {counted(recipe.epochs, 'epoch')}")
    return recipe, tuple(notes)


def _named_variant(variant: Variant) -> tuple[str, dict[str, Any]]:
    """Return the name of a known variant, and the options that change it into the given variant."""
    base = VARIANTS.get(variant.name, VARIANTS["fcvit_tiny"])
    options: dict[str, Any] = {}
    for field in dataclasses.fields(Variant):
        value = getattr(variant, field.name)
        if field.name not in ("name", "preprocessing") and value != getattr(base, field.name):
            options[field.name] = "none" if value is None else list(value) if isinstance(value, tuple) else value
    return base.name, options
