"""Fine-tune weights on images or label maps without a recipe file (`fcvit finetune` and `fcvit.finetune`)."""

import dataclasses
import logging
import os
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcvit.commands.options import Device
from fcvit.commands.preview import Preview
from fcvit.commands.train import PreviewFile, RunFolder, Workers, recipe_options, recipe_overrides, train
from fcvit.data.class_indices import composed
from fcvit.data.classes import Classes
from fcvit.data.segmentation import find_maps, read_split
from fcvit.data.sources import open_source
from fcvit.data.training_splits import find_splits
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.models.variants import VARIANTS, Variant
from fcvit.processes import join
from fcvit.tasks.recipe import Recipe
from fcvit.tasks.segmentation.recipe import SegmentationRecipe
from fcvit.tasks.segmentation.splits import list_maps
from fcvit.training.recipe import build_recipe, shipped_text
from fcvit.training.run import Training
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")

SEGMENTATION = "segmentation"  # the name of the task and of its recipe for own images
DEFAULTS = tomllib.loads(shipped_text("finetune"))


def finetune(
    weights: Path | str,
    data: Path | str,
    *,
    folder: RunFolder = None,
    preview: PreviewFile = None,
    device: Device = "auto",
    workers: Workers = None,
    **fields: recipe_options("weights", "data", **DEFAULTS, new_head="automatic", task="automatic"),  # pyrefly: ignore
) -> Training | Preview:
    """Fine-tune weights on your own images, by default with a new head and low learning rates in the lower blocks.

    For label maps, the defaults are those of the recipe segmentation.

    Args:
        weights: A checkpoint of any format.
        data: Folder with one folder of images per class, or with the folders images and annotations (label maps).
            Optionally in splits, such as train and val. Also in a tar archive.
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

    The task is that of segmentation weights. With other weights, it is segmentation if the data contains label maps.
    The head is new unless the class folders or the class list match the classes in the weights file. The batch size is
    at most a quarter of the training images, so that an epoch has several steps. The warm-up is at most a fifth of the
    epochs. For label maps, the weights also determine the widths of the network and the size of its input.

    Args:
        weights: The weights file to start from.
        data: The training data.
        overrides: Fields of the recipe, as in `read_recipe`.

    Raises:
        UsageError: The data can contain label maps or class folders, or a field is invalid.
        UnreadableFile, DoesNotFit: See `find_splits` and `find_map_splits`.
    """
    given = {key.replace("-", "_"): value for key, value in (overrides or {}).items()}
    loaded = read_weights(weights, {"true": True, "false": False}.get(str(given.get("ema")).lower()))
    notes = []
    task = given.get("task") or loaded.spec.task
    if task not in (given.get("task"), SEGMENTATION) and (folders := _map_folders(weights, data, loaded, given)):
        task = SEGMENTATION
        notes.append(f"{data}: images with label maps ({folders}); --task classification reads the folders as classes")
    variant, options = _named_variant(loaded.spec.variant)
    defaults: dict[str, Any] = tomllib.loads(shipped_text(SEGMENTATION)) if task == SEGMENTATION else {**DEFAULTS}
    defaults |= {"variant": variant, "options": options, "weights": os.fspath(weights), "data": os.fspath(data)}
    if task == loaded.spec.task == SEGMENTATION:
        known = loaded.spec.options
        defaults |= {"neck_channels": known.neck, "head_channels": known.channels}
        defaults["scale"] = (known.long_side, known.short_side)
    source = "fcvit finetune"
    recipe = build_recipe({**defaults, "new_head": True}, given, source)
    if isinstance(recipe, SegmentationRecipe):
        maps, where = list_maps(recipe), "class list matches"
        images, same = len(maps.train), False
        if task == loaded.spec.task and maps.listed:
            # The order matters, because it gives the values in the label maps.
            same = _ids(maps.listed.classes) == _ids(loaded.classes)
        elif task == loaded.spec.task and "new_head" not in given:
            notes.append("no class list, so the last layer is new (--new-head false keeps the classes of the weights)")
        if "crop_size" not in given and max(recipe.crop_size) > min(recipe.scale):
            defaults["crop_size"] = (min(recipe.scale),) * 2
            notes.append(f"crop_size {min(recipe.scale)}: the shorter side of scale")
    else:
        splits, where = find_splits(recipe, loaded), "class folders match"
        # The order does not matter, because the head keeps the order of the weights.
        images, same = len(splits.train), {*_ids(splits.classes)} == {*_ids(loaded.classes)}
    if "new_head" not in given and same:
        notes.append(f"the {where} the classes of the weights: their head is kept (--new-head true replaces it)")
    recipe = build_recipe({**defaults, "new_head": not same}, given, source)
    if "batch_size" not in given:
        parts = join().count * recipe.accumulate
        size = max(2, min(recipe.batch_size, images // 4) // parts) * parts
        if size != recipe.batch_size:
            recipe = dataclasses.replace(recipe, batch_size=size)
            notes.append(f"batch_size {size}: a quarter of the training images")
    longest = recipe.epochs / 5 if recipe.lr_update == "step" else recipe.epochs // 5
    if "warmup_epochs" not in given and recipe.warmup_epochs > longest:
        recipe = dataclasses.replace(recipe, warmup_epochs=longest)
        notes.append(f"warmup_epochs {longest:g}: a fifth of {counted(recipe.epochs, 'epoch')}")
    return recipe, tuple(notes)


def _map_folders(
    weights: str | os.PathLike[str], data: str | os.PathLike[str], loaded: Weights, given: Mapping[str, Any]
) -> str:
    """Return the names of the folders of images and label maps in the data, or "" if there are only class folders.

    Folders with these names are label maps if most of them have the names of images. Class folders could also be named
    like this. Whether the files are label maps is checked before the first step.

    Raises:
        UsageError: Both are possible.
    """
    source = open_source(Path(data))
    try:
        layout = find_maps(source)
        if layout is None:
            return ""
        splits = [read_split(layout, name, given.get("label_suffix")) for name in layout.splits]
        paired = all(len(split.unused) < len(split) for split in splits)
        folders = next(iter(layout.splits.values()))
        if paired and not {*_ids(loaded.classes)} & {part for name in folders for part in Path(name).parts}:
            return f"{folders[0]} and {folders[1]}"
    except (UsageError, DoesNotFit, UnreadableFile):
        pass  # such folders are not clearly label maps; the command for label maps reports the reason
    words = ["fcvit", "finetune", "--weights", os.fspath(weights), "--data", os.fspath(data), "--task"]
    as_maps, as_classes = (shlex.join([*words, name]) for name in (SEGMENTATION, "classification"))
    raise UsageError(
        f"{data}: its folders can be images with label maps, or classes; for label maps, run: {as_maps}; for classes, "
        f"run: {as_classes}"
    )


def _ids(classes: Classes | None) -> list[str]:
    return [composed(name.id) for name in classes or ()]


def _named_variant(variant: Variant) -> tuple[str, dict[str, Any]]:
    """Return the name of a known variant, and the options that change it into the given variant."""
    base = VARIANTS.get(variant.name, VARIANTS["fcvit_tiny"])
    options: dict[str, Any] = {}
    for field in dataclasses.fields(Variant):
        value = getattr(variant, field.name)
        if field.name not in ("name", "preprocessing") and value != getattr(base, field.name):
            options[field.name] = "none" if value is None else list(value) if isinstance(value, tuple) else value
    return base.name, options
