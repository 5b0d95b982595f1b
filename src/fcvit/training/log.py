"""Write the logs of a run from one row per epoch: `log.jsonl`, `log.csv`, curves and TensorBoard."""

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
    """The log of a run.

    Args:
        folder: Folder of the run.
        tensorboard: Also write a TensorBoard log to `tensorboard/`.
        rows_on_board: Number of rows that an earlier process has already written to the TensorBoard log.

    Raises:
        MissingExtra: `tensorboard` is set and tensorboardX is not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool, rows_on_board: int = 0):
        self.folder = folder
        self.board = _board(folder / "tensorboard") if tensorboard else None
        self.rows_on_board = rows_on_board
        self.draws_curves = True

    def write(self, rows: Sequence[Row]) -> None:
        """Rewrite the log files with all rows, and add the new rows to the TensorBoard log."""
        if not rows:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        runs.write_text(self.folder / JSONL, "".join(json.dumps(row) + "\n" for row in rows))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        runs.write_text(self.folder / CSV, table.getvalue())
        if self.draws_curves:
            try:
                runs.write_bytes(self.folder / CURVES, training_curves(rows, self.folder.name))
            except MissingExtra as error:
                self.draws_curves = False
                logger.info(f"{CURVES} was not drawn: {error}")
        if self.board is not None:
            for row in rows[self.rows_on_board :]:
                for key, value in row.items():
                    if isinstance(value, int | float) and key not in ("epoch", "step"):
                        self.board.add_scalar(key, value, row["epoch"])
            self.rows_on_board = len(rows)
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
