"""The states that a run is resumed from. Each is one safetensors file that is replaced atomically.

A run keeps its last two states. An older one is removed only after the new one is complete. A state contains no random
number generators, because all random draws follow from seed, epoch and position.
"""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.run_folder import staged_files
from fcvit.text import strict_json
from fcvit.weights import safetensors_file
from fcvit.weights.checkpoint import read_file

STATE, PREVIOUS = "state.safetensors", "state-previous.safetensors"
_KEY = "fcvit_training"
# Tensors with the fields of `Progress` that may be long. The metadata of a file must be short.
_LOSSES, _UNREADABLE = "losses/", "unreadable"


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
        epoch_step: Number of finished steps of the current epoch. After all of them, only the validation is missing.
        epoch_seconds: Seconds of training in the current epoch so far.
        phases: Seconds in each phase of a step in the current epoch so far (see `fcvit.training.step.PHASES`).
        losses: Each loss of the finished steps of the current epoch.
        unreadable: Images that could not be read so far, with the reason.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    first_updates: int = 0
    scaler: dict[str, float] = dataclasses.field(default_factory=dict)
    epoch_step: int = 0
    epoch_seconds: float = 0.0
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    unreadable: list[str] = dataclasses.field(default_factory=list)

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Start the next epoch, and add the log row of the finished one."""
        self.epoch += 1
        self.rows.append(row)
        self.epoch_step, self.epoch_seconds, self.phases, self.losses = 0, 0.0, {}, {}

    def describe(self, steps: int) -> str:
        """Return a readable position, such as "epoch 3" or "step 120 of 500 of epoch 4", or "" at the start of a run.

        Args:
            steps: Steps per epoch.
        """
        if self.epoch_step:
            return f"step {self.epoch_step} of {steps} of epoch {self.epoch + 1}"
        return f"epoch {self.epoch}" if self.epoch else ""


def encode_state(progress: Progress, tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Return the tensors and the metadata of a state. Later changes of the progress do not affect them."""
    fields = dict(vars(progress))
    losses = {f"{_LOSSES}{name}": np.array(values, np.float64) for name, values in progress.losses.items()}
    fields["losses"] = list(progress.losses)  # in their order, which a file does not keep
    unreadable = np.frombuffer(json.dumps(fields.pop("unreadable")).encode(), np.uint8)
    return {**tensors, **losses, _UNREADABLE: unreadable}, json.dumps(fields)


def write_state(folder: Path, tensors: dict[str, np.ndarray], metadata: str) -> None:
    """Replace the state of the run in `folder` atomically, and keep the replaced one as the previous state.

    Args:
        folder: Folder of the run.
        tensors, metadata: Result of `encode_state`.

    Raises:
        UnreadableFile: The state cannot be written. The existing states are kept.
    """
    check_folder(folder)
    with staged_files([folder / STATE], overwrite=True, previous=folder / PREVIOUS) as temporary:
        safetensors_file.write(temporary / STATE, tensors, {_KEY: metadata})


def check_folder(folder: Path) -> None:
    """Check that the folder of a run still exists, because writing to it would create a new one.

    Raises:
        UnreadableFile: The folder does not exist.
    """
    if not folder.is_dir():
        raise UnreadableFile(f"{folder}: the folder of the run no longer exists; restore it or mount it again")


def read_state(folder: Path, name: str = STATE) -> tuple[Progress, dict[str, np.ndarray]]:
    """Read a state without executing code from the file.

    Args:
        folder: Folder of the run.
        name: `STATE` or `PREVIOUS`.

    Returns:
        The arguments of `encode_state`.

    Raises:
        UnreadableFile: The state is missing or damaged.
    """
    path = folder / name
    try:
        tensors, metadata = safetensors_file.read(read_file(path))
        fields = strict_json(metadata[_KEY])
        # Runs of earlier versions have neither of these.
        unreadable = tensors.pop(_UNREADABLE, np.frombuffer(b"[]", np.uint8))
        fields["unreadable"] = strict_json(unreadable.tobytes().decode())
        losses = {name: tensors.pop(f"{_LOSSES}{name}") for name in fields.get("losses", ())}
        fields["losses"] = {name: values.tolist() for name, values in losses.items()}
        progress = Progress(**fields)
        counters = (progress.epoch, progress.step, progress.epoch_step)
        lists = (progress.rows, progress.unreadable)
        if not (all(type(counter) is int for counter in counters) and all(isinstance(each, list) for each in lists)):
            raise TypeError("its counters are missing")
        if any(values.shape != (progress.epoch_step,) for values in losses.values()):
            raise ValueError("the number of losses differs from the number of steps")
    except OSError as error:
        raise UnreadableFile(
            f"{path}: {error.strerror} (the run has not saved a state yet); start a new run"
        ) from error
    except UnreadableFile as error:
        raise UnreadableFile(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnreadableFile(f"{path}: not the state of a training run ({str(error)[:80]})") from error
    return progress, tensors


class BackgroundWrite:
    """Write files in a thread while training continues. At most one write runs at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, write: Callable[[], None]) -> None:
        """Start to write, after the previous write has ended. The function must not use data that changes."""
        self.finish()

        def work() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="write state", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that has failed."""
        if not self.running:
            self.finish()

    def finish(self) -> None:
        """Wait for the end of the write, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
