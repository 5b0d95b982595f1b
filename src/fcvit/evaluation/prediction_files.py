"""Write predictions to a file or folder while they are computed, with constant memory."""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fcvit.data.folders import legible
from fcvit.errors import MissingExtra
from fcvit.evaluation.journal import naming
from fcvit.text import csv_text, printable

if TYPE_CHECKING:
    from fcvit.tasks.predictor import Predictor

_ROWS_TOGETHER = 10_000  # images in a row group of a Parquet file


class Predicted(NamedTuple):
    """The prediction for an image.

    Attributes:
        name: Name of the image.
        content: Rows as JSON, or the packed prediction.
        index: Position of the image.
    """

    name: str
    content: bytes
    index: int


Batches = Iterable[list[Predicted]]


def csv_lines(name: str, rows: Iterable[dict[str, Any]]) -> str:
    """Return the lines of a CSV table for an image, one for each row, without the header."""
    return csv_text((tuple(map(_cell, (name, place, *row.values()))) for place, row in enumerate(rows, 1)), "\n")


def csv_header(predictor: "Predictor") -> str:
    """Return the header of the lines of `csv_lines`."""
    return csv_text([("path", "place", *predictor.row_columns)], "\n")


def _cell(value: Any) -> Any:
    """Format a CSV cell: numbers get six decimals. Negative numbers stay numbers, because text would be escaped."""
    if isinstance(value, float):
        return f"{value:.6f}" if value >= 0 else round(value, 6)
    return printable(value) if isinstance(value, str) else value


def _write_json_lines(batches: Batches, path: Path, predictor: "Predictor") -> None:
    def encode(one: Predicted) -> bytes:
        return b'{"path": %b, "predictions": %b}\n' % (json.dumps(one.name).encode(), one.content)

    _write(path, (b"".join(map(encode, batch)) for batch in batches))


def _write_csv(batches: Batches, path: Path, predictor: "Predictor") -> None:
    def encode(one: Predicted) -> bytes:
        return csv_lines(one.name, json.loads(one.content)).encode("utf-8", "backslashreplace")

    header = [csv_header(predictor).encode()]
    _write(path, itertools.chain(header, (b"".join(map(encode, batch)) for batch in batches)))


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file piece by piece, so that it grows while the predictions are computed."""
    with naming(path):
        file = path.open("wb", buffering=0)
    with file:
        for piece in pieces:
            left = memoryview(piece)
            with naming(path):
                while left:  # on a disk that becomes full, write() can write a part without an error
                    left = left[file.write(left) :]


def _write_parquet(batches: Batches, path: Path, predictor: "Predictor") -> None:
    """Write one row for each image: its path, and the list of its predictions."""
    arrow, parquet = require_parquet()
    types = {int: arrow.int64(), float: arrow.float64(), str: arrow.string()}
    fields = [(name, types[kind]) for name, kind in predictor.row_columns.items()]
    schema = arrow.schema([("path", arrow.string()), ("predictions", arrow.list_(arrow.struct(fields)))])
    images = itertools.chain.from_iterable(batches)
    with naming(path), parquet.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(images, _ROWS_TOGETHER)):
            rows = [{"path": legible(one.name), "predictions": json.loads(one.content)} for one in group]
            writer.write_table(arrow.Table.from_pylist(rows, schema))


def require_parquet() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet.

    Raises:
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtra("pyarrow is not installed; install it with: pip install 'fcvit[parquet]'") from error
    return pyarrow, parquet


WRITERS: dict[str, Callable[[Batches, Path, "Predictor"], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}
"""Extension of a file -> the function that writes it."""
