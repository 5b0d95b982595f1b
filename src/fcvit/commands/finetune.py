"""Fine-tune weights on one's own folder of images: a recipe that need not be written."""

import dataclasses
import logging
import os
from collections.abc import Mapping

from fcvit.data.class_indices import composed
from fcvit.data.training_splits import find_splits
from fcvit.errors import counted
from fcvit.models.variants import VARIANTS, Variant
from fcvit.processes import join
from fcvit.training.recipe import Recipe, build_recipe, shipped_fields
from fcvit.training.run import Training, train
from fcvit.weights.reading import read_weights

logger = logging.getLogger("fcvit")

RECIPE = "finetune"  # the shipped recipe with the defaults


def finetune_recipe(
    weights: str | os.PathLike[str], data: str | os.PathLike[str], overrides: Mapping[str, object] | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe of a fine-tuning, and what a person should know of the choices in it.

    The head is new unless the folders are the classes that the weights name. A batch is at most a quarter of
    the training images, so that an epoch has some steps; the warm-up at most a fifth of the epochs.

    Args:
        weights: a checkpoint of any format.
        data: class folders, or `train` and `val` with class folders in them; also a tar.
        overrides: fields of the recipe, as in `fcvit.training.recipe.read_recipe`.

    Raises:
        As `read_recipe`, `read_weights` and `find_splits`.
    """
    given = {key.replace("-", "_"): value for key, value in (overrides or {}).items()}
    loaded = read_weights(weights, _truth(given.get("ema")))
    variant, options = _expressed(loaded.spec.variant)
    start = {**shipped_fields(RECIPE), "variant": variant, "options": options}
    start |= {"weights": str(weights), "data": str(data)}
    source = "fcvit finetune"
    recipe = build_recipe({**start, "new_head": True}, given, source)
    splits = find_splits(recipe, loaded)
    notes = []
    if "new_head" not in given:
        # In whatever order: the head keeps that of the weights.
        sets = [{composed(c.id) for c in classes} for classes in (loaded.classes or (), splits.classes)]
        keep = sets[0] == sets[1]
        if keep:
            notes.append(
                "the folders are the classes of the weights: the head goes on from theirs (--new-head true: anew)"
            )
        start["new_head"] = not keep
        recipe = build_recipe(start, given, source)
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


def finetune(
    weights: str | os.PathLike[str],
    data: str | os.PathLike[str],
    overrides: Mapping[str, object] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    workers: int = 0,
) -> Training:
    """Train weights on one's own images; see `finetune_recipe` for the choices, `train` for the rest.

    Raises:
        As both of them.
    """
    recipe, notes = finetune_recipe(weights, data, overrides)
    for note in notes:
        logger.info(note)
    return train(recipe, folder=folder, device=device, workers=workers)


def _truth(value: object) -> bool | None:
    return {"true": True, "false": False}.get(value) if isinstance(value, str) else value  # pyrefly: ignore


def _expressed(variant: Variant) -> tuple[str, dict[str, object]]:
    """A named variant, and the options that make this one of it."""
    base = VARIANTS.get(variant.name, VARIANTS["fcvit_tiny"])
    options: dict[str, object] = {}
    for field in dataclasses.fields(Variant):
        value = getattr(variant, field.name)
        if field.name not in ("name", "preprocessing") and value != getattr(base, field.name):
            options[field.name] = "none" if value is None else list(value) if isinstance(value, tuple) else value
    return base.name, options
