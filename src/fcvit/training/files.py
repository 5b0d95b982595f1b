"""The files of a training run: weights, state, and what tells whether a run can be continued."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.loader import Dataset
from fcvit.errors import UnreadableFile, UsageError
from fcvit.tasks.recipe import Recipe
from fcvit.training.log import JSONL
from fcvit.training.recipe import build_recipe
from fcvit.training.state import STATE
from fcvit.weights.reading import Weights
from fcvit.weights.writing import staged, write_weights

LAST, BEST, LAST_EMA = "last.safetensors", "best.safetensors", "last-ema.safetensors"
RECIPE = "recipe.toml"
_SAMPLE = 64  # image files of a split whose content tells whether images that are elsewhere now are the same


def replace_weights(path: Path, weights: Weights) -> None:
    """Replace a file of weights as a whole."""
    with staged(path, overwrite=True) as temporary:
        write_weights(temporary, weights)


def read_record(folder: Path) -> tuple[dict[str, Any], Recipe]:
    """Return the record of a run and its recipe.

    Raises:
        UnreadableFile, UsageError: there is none, or it is damaged.
    """
    record = runs.read_run(folder, "train")
    path = folder / "run.json"
    try:
        # "auto" was decided when the run began, and goes on as it was decided.
        operators = {"operators": record["identity"]["operators"]}
        recipe = build_recipe(record["recipe"], operators, str(path))
        if not (isinstance(record["identity"], dict) and isinstance(record["device"], str)):
            raise TypeError("no identity")
    except (KeyError, TypeError, UsageError) as error:
        raise UnreadableFile(f"{path}: without the recipe of the run ({error}); begin a new one") from error
    return record, recipe


def start_weights(folder: Path) -> Path | None:
    """Return the weights that tell a run's network, where its state has their numbers; None: it has no state yet.

    Raises:
        UnreadableFile: the state is gone.
    """
    if (folder / STATE).exists():
        return folder / LAST
    if (folder / JSONL).exists():
        raise UnreadableFile(
            f"{folder / STATE} is gone, which the run went on from; begin a new one from {folder / LAST}"
        )
    return None


def sample_content(splits: Sequence[Dataset | None]) -> str:
    """Return the SHA-256 of some image files of the splits, evenly sampled: a large data set costs no time."""
    content = hashlib.sha256()
    for images in splits:
        places = images.locations if images else ()
        for index in np.linspace(0, len(places) - 1, min(len(places), _SAMPLE)).round().astype(int):
            try:
                read = places[index].read()
            except OSError:
                read = b""
            content.update(hashlib.sha256(read).digest())
    return content.hexdigest()


def remove_temporary(folder: Path) -> None:
    """Remove what a process that was killed was writing."""
    for path in folder.glob(f"{runs.TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `run.json` will give back of it."""
    return json.loads(json.dumps(identity))
