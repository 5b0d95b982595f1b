"""Fine-tune weights on your own images without a recipe file (`fcvit finetune` and `fcvit.finetune`)."""

import dataclasses
import logging
import os
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcvit.commands.options import Device, PeerTimeout
from fcvit.commands.preview import Preview
from fcvit.commands.train import (
    PreviewFile,
    ResumeIfExists,
    RunFolder,
    Workers,
    recipe_options,
    recipe_overrides,
    train,
)
from fcvit.errors import UsageError, counted
from fcvit.models.variants import VARIANTS, Variant
from fcvit.processes import PEER_TIMEOUT, join
from fcvit.tasks.base import DEFAULT_TASK, TASKS, get_task
from fcvit.tasks.recipe import Recipe
from fcvit.training.recipe import build_recipe, shipped_text
from fcvit.training.run import Training
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")

DEFAULTS = tomllib.loads(shipped_text("finetune"))


def finetune(
    weights: Path | str,
    data: Path | str,
    *,
    folder: RunFolder = None,
    resume_if_exists: ResumeIfExists = False,
    preview: PreviewFile = None,
    device: Device = "auto",
    workers: Workers = None,
    peer_timeout: PeerTimeout = PEER_TIMEOUT,
    **fields: recipe_options("weights", "data", **DEFAULTS, new_head="automatic", task="automatic"),  # pyrefly: ignore
) -> Training | Preview:
    """Fine-tune weights on your own images, by default with a new head and low learning rates in the lower blocks.

    For label maps or annotations in COCO's format, the defaults are those of the recipes segmentation and detection.

    Args:
        weights: A checkpoint of any format.
        data: Folder with one folder of images per class, with the folders images and annotations (label maps), or with
            annotations in COCO's format. Optionally in splits, such as train and val. Also in a tar archive.
        fields: Fields of the recipe. docs/reference/recipes.md lists them.

    Raises:
        FcvitError: See `finetune_recipe` and `fcvit.training.run.train`.
    """
    join(peer_timeout)
    recipe, notes = finetune_recipe(weights, data, recipe_overrides(fields))
    for note in notes:
        logger.info(note)
    options = {"resume_if_exists": resume_if_exists, "preview": preview, "device": device, "workers": workers}
    return train(recipe, folder=folder, **options)


def finetune_recipe(
    weights: str | os.PathLike[str], data: str | os.PathLike[str], overrides: Mapping[str, object] | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """Return a recipe for fine-tuning, and notes about the values that were chosen automatically.

    The task is that of segmentation or detection weights. With other weights, it follows from the data. The head is new
    unless the classes of the data match those in the weights file. The batch size is at most a quarter of the training
    images, so that an epoch has several steps. The warm-up is at most a fifth of the epochs. Segmentation or detection
    weights also determine the widths of the network and the size of its input.

    Args:
        weights: The weights file to start from.
        data: The training data.
        overrides: Fields of the recipe, as in `read_recipe`.

    Raises:
        UsageError: The data can be read in several ways, or a field is invalid.
        UnreadableFile, DoesNotFit: The data cannot be read, or does not fit the weights.
    """
    given = {key.replace("-", "_"): value for key, value in (overrides or {}).items()}
    loaded = read_weights(weights, {"true": True, "false": False}.get(str(given.get("ema")).lower()))
    notes = []
    name = (
        str(given["task"]) if given.get("task") else (loaded.spec.task if loaded.spec.task in TASKS else DEFAULT_TASK)
    )
    if name == DEFAULT_TASK and "task" not in given:
        name, what = _task_of_data(weights, data, loaded, given)
        if what:
            notes.append(f"{data}: {what}; --task {DEFAULT_TASK} reads the folders as classes")
    task = get_task(name)
    variant, options = _named_variant(loaded.spec.variant)
    defaults: dict[str, Any] = tomllib.loads(shipped_text(task.own_images))
    defaults |= {"variant": variant, "options": options, "weights": os.fspath(weights), "data": os.fspath(data)}
    if name == loaded.spec.task:
        defaults |= task.known_fields(loaded)
    source = "fcvit finetune"
    own = task.own_data(build_recipe({**defaults, "new_head": True}, given, source), loaded)
    defaults |= own.fields
    notes += [note for field, note in own.notes.items() if field not in given]
    if "new_head" not in given and own.same_classes:
        notes.append(f"the {own.listed} the classes of the weights: their head is kept (--new-head true replaces it)")
    recipe = build_recipe({**defaults, "new_head": not own.same_classes}, given, source)
    if "batch_size" not in given:
        parts = join().count * recipe.accumulate
        size = max(2, min(recipe.batch_size, own.images // 4) // parts) * parts
        if size != recipe.batch_size:
            recipe = dataclasses.replace(recipe, batch_size=size)
            notes.append(f"batch_size {size}: a quarter of the training images")
    longest = recipe.epochs / 5 if recipe.lr_update == "step" else recipe.epochs // 5
    if "warmup_epochs" not in given and recipe.warmup_epochs > longest:
        recipe = dataclasses.replace(recipe, warmup_epochs=longest)
        notes.append(f"warmup_epochs {longest:g}: a fifth of {counted(recipe.epochs, 'epoch')}")
    return recipe, tuple(notes)


def _task_of_data(
    weights: str | os.PathLike[str], data: str | os.PathLike[str], loaded: Weights, given: Mapping[str, Any]
) -> tuple[str, str]:
    """Return the task for which data was made, and a description of the data, or "" for class folders.

    Raises:
        UsageError: Several tasks are possible.
    """
    others = {name: get_task(name).recognize(Path(data), loaded, given) for name in TASKS if name != DEFAULT_TASK}
    possible = {name: what for name, what in others.items() if what is not None}
    if not possible:
        return DEFAULT_TASK, ""
    if len(possible) == 1 and all(possible.values()):
        return next(iter(possible.items()))
    words = ["fcvit", "finetune", "--weights", os.fspath(weights), "--data", os.fspath(data), "--task"]
    commands = (f"for {name}, run: {shlex.join([*words, name])}" for name in (*possible, DEFAULT_TASK))
    raise UsageError(f"{data}: its folders can be read in several ways; {'; '.join(commands)}")


def _named_variant(variant: Variant) -> tuple[str, dict[str, Any]]:
    """Return the name of a known variant, and the options that change it into the given variant."""
    base = VARIANTS.get(variant.name, VARIANTS["fcvit_tiny"])
    options: dict[str, Any] = {}
    for field in dataclasses.fields(Variant):
        value = getattr(variant, field.name)
        if field.name not in ("name", "preprocessing") and value != getattr(base, field.name):
            options[field.name] = "none" if value is None else list(value) if isinstance(value, tuple) else value
    return base.name, options
