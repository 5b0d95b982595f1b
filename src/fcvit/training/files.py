"""Read and write the files of a training run, and hash its images to detect changes when it is resumed."""

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
from fcvit.training.state import PREVIOUS, STATE
from fcvit.weights.reading import Weights
from fcvit.weights.writing import staged, write_weights

LAST, BEST, LAST_EMA = "last.safetensors", "best.safetensors", "last-ema.safetensors"
RECIPE = "recipe.toml"
_SAMPLE = 64  # number of image files per split that are hashed to check that a moved data set is unchanged


def replace_weights(path: Path, weights: Weights) -> None:
    """Replace a weights file atomically."""
    with staged(path, overwrite=True) as temporary:
        write_weights(temporary, weights)


def read_record(folder: Path) -> tuple[dict[str, Any], Recipe]:
    """Return the record of a run and its recipe.

    Raises:
        UnreadableFile: The record is missing or damaged.
        UsageError: The run is not a training.
    """
    record = runs.read_run(folder, "train")
    path = folder / "run.json"
    try:
        # A resumed run must use the operators that "auto" selected when the run began.
        operators = {"operators": record["identity"]["operators"]}
        recipe = build_recipe(record["recipe"], operators, str(path))
        if not (isinstance(record["identity"], dict) and isinstance(record["device"], str)):
            raise TypeError("identity or device has the wrong type")
    except (KeyError, TypeError, UsageError) as error:
        raise UnreadableFile(
            f"{path}: the recipe of the run is missing or damaged ({error}); start a new run"
        ) from error
    return record, recipe


def run_exists(folder: Path) -> bool:
    """Return whether a folder contains a run, after removing what a process left that was killed before it began.

    Such a process has claimed the folder with an empty `run.json` (see `fcvit.run_folder`).
    """
    path = folder / "run.json"
    if path.exists() and not path.stat().st_size:
        remove_temporary(folder)
        path.unlink()
        (folder / ".lock").unlink(missing_ok=True)
    return path.exists()


def has_state(folder: Path) -> bool:
    """Return whether the run in `folder` has saved a state."""
    return any((folder / name).exists() for name in (STATE, PREVIOUS))


def start_weights(folder: Path) -> Path | None:
    """Return the weights file that defines a resumed run's network, or None if the run has not finished an epoch.

    Only the network and its classes are taken from this file. The values are restored from the state later.

    Raises:
        UnreadableFile: The run has finished epochs, but its state is missing.
    """
    if has_state(folder):
        return folder / LAST if (folder / LAST).exists() else None
    if (folder / JSONL).exists():
        raise UnreadableFile(
            f"{folder / STATE} is missing, so the run cannot be resumed; start a new run from {folder / LAST}"
        )
    return None


def sample_content(splits: Sequence[Dataset | None]) -> str:
    """Return a SHA-256 of evenly sampled image files of each split. The sample keeps this fast for large data sets."""
    content = hashlib.sha256()
    for images in splits:
        locations = images.locations if images else ()
        for index in np.linspace(0, len(locations) - 1, min(len(locations), _SAMPLE)).round().astype(int):
            try:
                file = locations[index].read()
            except OSError:
                file = b""
            content.update(hashlib.sha256(file).digest())
    return content.hexdigest()


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files and folders of a killed process."""
    for path in folder.glob(f"{runs.TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity after a round trip through JSON, so that it can be compared with that in `run.json`.

    The identity contains everything besides the recipe that determines the result.
    """
    return json.loads(json.dumps(identity))
