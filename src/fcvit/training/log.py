"""The logs of a run: `log.jsonl`, `log.csv`, curves, TensorBoard; all from the same rows, one per epoch."""

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fcvit import run_folder as runs
from fcvit.errors import MissingExtra
from fcvit.report.charts import training_curves

logger = logging.getLogger("fcvit")

JSONL, CSV, CURVES = "log.jsonl", "log.csv", "curves.png"

Row = Mapping[str, Any]


class Log:
    """The log of the run in `folder`.

    Args:
        tensorboard: write `tensorboard/` too.
        done: rows that an earlier process has put there.

    Raises:
        MissingExtra: TensorBoard's log is asked for and its writer is not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool, done: int = 0):
        self.folder = folder
        self.board = _board(folder / "tensorboard") if tensorboard else None
        self.on_board = done
        self.draws = True

    def write(self, rows: Sequence[Row]) -> None:
        """Replace the files by what `rows` says."""
        if not rows:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        runs.write_text(self.folder / JSONL, "".join(json.dumps(row) + "\n" for row in rows))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        runs.write_text(self.folder / CSV, table.getvalue())
        if self.draws:
            try:
                runs.write_bytes(self.folder / CURVES, training_curves(rows, self.folder.name))
            except MissingExtra as error:
                self.draws = False
                logger.info(f"no {CURVES}: {error}")
        if self.board is not None:
            for row in rows[self.on_board :]:
                for key, value in row.items():
                    if isinstance(value, int | float) and key not in ("epoch", "step"):
                        self.board.add_scalar(key, value, row["epoch"])
            self.on_board = len(rows)
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtra(
            "tensorboard = true: tensorboardX is not installed; install it with: pip install 'fcvit[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder))
