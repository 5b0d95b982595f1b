"""The network's outputs on disk: `logits.npy` of each configuration, float32 (samples of the data set, outputs)."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fcvit.evaluation.journal import Journal
from fcvit.run_folder import TEMPORARY

logger = logging.getLogger("fcvit")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the system, which knows only its number."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


class LogitFiles:
    """The files of a run, filled as batches come.

    Args:
        folders: of the configurations.
        shape: samples of the data set, outputs of the network.
        batches: of the run.

    Raises:
        OSError: the disk has no room for them.
    """

    def __init__(self, folders: Sequence[Path], shape: tuple[int, int], batches: int):
        self.paths = [folder / "logits.npy" for folder in folders]
        self.arrays = [_shared_array(path, np.dtype("<f4"), shape) for path in self.paths]
        # A mark for each batch whose rows are in the files: a row of zeros may be a result.
        self.done = folders[0].parent / ".logits.done"
        self.marks = _shared_array(self.done, np.dtype("u1"), (batches,))

    def write(self, configuration: int, indices: np.ndarray, logits: np.ndarray) -> None:
        """Write the rows of one batch; they are on the disk before the journal says so."""
        with naming(self.paths[configuration]):
            self.arrays[configuration][indices] = logits
            self.arrays[configuration].flush()

    def mark(self, batch: int) -> None:
        """Remember that the rows of a batch are in these files."""
        with naming(self.done):
            self.marks[batch] = 1
            self.marks.flush()

    def finish(self, journal: Journal) -> None:
        """Mark samples that were left out with NaN; keep no file that lacks the rows of another machine."""
        lost = sum(len(frame.records) for frame in journal.frames.values() if not self.marks[frame.number])
        for path, array in zip(self.paths, self.arrays, strict=True):
            for frame in journal.frames.values():
                array[[index for index, _ in frame.extra["bad"]]] = np.nan
            array.flush()
            if lost:
                path.unlink()
                logger.info(f"no {path}: the logits of {lost} images went to a machine that does not share the folder")


def _shared_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Open an array in a .npy file; several processes may make the same one at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        try:
            with naming(path):
                np.lib.format.open_memmap(temporary, "w+", dtype, shape)
                with temporary.open("r+b") as file:  # a full disk is an error now, not a signal later
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, "r+")
