"""Write the network's outputs to `logits.npy` of each configuration: float32 (samples of the data set, outputs)."""

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fcvit.evaluation.journal import Frame, naming
from fcvit.run_folder import TEMPORARY

logger = logging.getLogger("fcvit")


class LogitFiles:
    """The `logits.npy` files of a run, written batch by batch.

    Args:
        folders: Folder of each configuration.
        shape: Number of samples in the data set and number of outputs of the network.
        batches: Number of batches in the run.

    Raises:
        OSError: There is not enough space on the disk.
    """

    def __init__(self, folders: Sequence[Path], shape: tuple[int, int], batches: int):
        self.paths = [folder / "logits.npy" for folder in folders]
        self.arrays = [_shared_array(path, np.dtype("<f4"), shape) for path in self.paths]
        # One mark for each batch that was written: the rows cannot show it, since zeros can be valid outputs.
        self.done = folders[0].parent / ".logits.done"
        self.marks = _shared_array(self.done, np.dtype("u1"), (batches,))

    def write(self, configuration: int, indices: np.ndarray, logits: np.ndarray) -> None:
        """Write the rows of one batch and flush them, which must happen before the batch is added to the journal."""
        with naming(self.paths[configuration]):
            self.arrays[configuration][indices] = logits
            self.arrays[configuration].flush()

    def mark(self, batch: int) -> None:
        """Record that the rows of a batch were written to these files."""
        with naming(self.done):
            self.marks[batch] = 1
            self.marks.flush()

    def finish(self, frames: Sequence[Frame]) -> None:
        """Set the rows of unreadable samples to NaN, and delete files that lack rows computed on another machine."""
        lost = sum(len(frame.records) for frame in frames if not self.marks[frame.number])
        for path, array in zip(self.paths, self.arrays, strict=True):
            for frame in frames:
                array[[index for index, _ in frame.extra["bad"]]] = np.nan
            array.flush()
            if lost:
                path.unlink()
                logger.info(
                    f"{path} was not kept: the logits of {lost} images were computed on a machine that does not share "
                    "the folder"
                )


def _shared_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Open an array in a .npy file. Create it if necessary, even if several processes do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        try:
            with naming(path):
                np.lib.format.open_memmap(temporary, "w+", dtype, shape)
                with temporary.open("r+b") as file:  # report a full disk now: later it would be a signal
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, "r+")
