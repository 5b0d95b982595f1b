"""Everything that a run needs to go on, in one safetensors file that is replaced as a whole.

One file and one rename: a run that is killed has the state of its last finished epoch or of the one
before, never half of each. Random numbers are not in it: all are drawn from seed, epoch and place.
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
    """How far a run is.

    Attributes:
        epoch: epochs that are done.
        step: optimizer steps that are done.
        best: the row of the best epoch so far, with `best_weights` "raw" or "ema"; empty: none yet.
        rows: the log, one row an epoch.
        first_updates: of BatchNorm's statistics, before the first step.
        scaler: of float16 training: the scale and how long it has stood; else empty.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    first_updates: int = 0
    scaler: dict[str, float] = dataclasses.field(default_factory=dict)


def write_state(folder: Path, progress: Progress, tensors: dict[str, np.ndarray]) -> None:
    """Replace the state of the run in `folder`.

    Raises:
        UnreadableFile: it cannot be written; the one before stands.
    """
    with staged(folder / STATE, overwrite=True) as temporary:
        safetensors_file.write(temporary, tensors, {_KEY: json.dumps(dataclasses.asdict(progress))})


def read_state(folder: Path) -> tuple[Progress, dict[str, np.ndarray]]:
    """Invert `write_state`; nothing in the file is executed.

    Raises:
        UnreadableFile: there is none, or it is damaged.
    """
    path = folder / STATE
    try:
        tensors, metadata = safetensors_file.read(read_file(path))
        progress = Progress(**strict_json(metadata[_KEY]))
        if not (type(progress.epoch) is int and type(progress.step) is int and isinstance(progress.rows, list)):
            raise TypeError("no counts in it")
    except OSError as error:
        raise UnreadableFile(
            f"{path}: {error.strerror}: the run has not finished its first epoch; begin anew"
        ) from error
    except UnreadableFile as error:
        raise UnreadableFile(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnreadableFile(f"{path}: not the state of a run ({str(error)[:80]})") from error
    return progress, tensors
