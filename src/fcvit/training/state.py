"""The state that a run is resumed from, in one safetensors file that is replaced atomically.

The state is one file so that a killed run has the complete state of its last finished epoch or of the one before.
It contains no random number generators, because all random draws follow from seed, epoch and position.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.text import strict_json
from fcvit.weights import safetensors_file
from fcvit.weights.checkpoint import read_file
from fcvit.weights.writing import staged

STATE = "state.safetensors"
_KEY = "fcvit_training"


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
        epoch: Number of finished epochs.
        step: Number of finished optimizer steps.
        best: Log row of the best epoch so far, with `best_weights` "raw" or "ema". Empty before the first validation.
        rows: The log, one row per epoch.
        first_updates: Number of updates of BatchNorm's running statistics before the first step.
        scaler: State of the loss scaling in float16 training: the scale and its step counters. Otherwise empty.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    first_updates: int = 0
    scaler: dict[str, float] = dataclasses.field(default_factory=dict)


def write_state(folder: Path, progress: Progress, tensors: dict[str, np.ndarray]) -> None:
    """Replace the state of the run in `folder` atomically.

    Raises:
        UnreadableFile: The state cannot be written. The previous state is kept.
    """
    with staged(folder / STATE, overwrite=True) as temporary:
        safetensors_file.write(temporary, tensors, {_KEY: json.dumps(dataclasses.asdict(progress))})


def read_state(folder: Path) -> tuple[Progress, dict[str, np.ndarray]]:
    """Invert `write_state` without executing code from the file.

    Raises:
        UnreadableFile: The state is missing or damaged.
    """
    path = folder / STATE
    try:
        tensors, metadata = safetensors_file.read(read_file(path))
        progress = Progress(**strict_json(metadata[_KEY]))
        if not (type(progress.epoch) is int and type(progress.step) is int and isinstance(progress.rows, list)):
            raise TypeError("its counters are missing")
    except OSError as error:
        raise UnreadableFile(
            f"{path}: {error.strerror} (the run has not finished its first epoch); start a new run"
        ) from error
    except UnreadableFile as error:
        raise UnreadableFile(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnreadableFile(f"{path}: not the state of a training run ({str(error)[:80]})") from error
    return progress, tensors
