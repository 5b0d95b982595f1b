"""Class lists: ordered pairs of id and name. Names are not unique (ImageNet has two pairs), ids are."""

import collections
import csv
import functools
import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.variants import IMAGENET_CLASSES


class ClassName(NamedTuple):
    """One class: a unique id (ImageNet's is the WordNet id) and a name for people."""

    id: str
    name: str


Classes = tuple[ClassName, ...]


@functools.cache
def imagenet() -> Classes:
    """The 1,000 classes of ImageNet-1K in their usual order."""
    text = (importlib.resources.files("fcvit") / "assets" / "imagenet1k_classes.csv").read_text("utf-8")
    return _from_rows(text.splitlines(), "the bundled list")


def digits() -> Classes:
    """Those of the package's own network."""
    return tuple(ClassName(str(digit), f"digit {digit}") for digit in range(10))


def resolve_classes(argument: Classes | None, file: Classes | None, num_classes: int) -> Classes:
    """The one rule by which outputs get names: the argument, else the file's, else ImageNet's for
    1,000 outputs, else their numbers.

    Raises:
        DoesNotFit: the argument has another count than the model.
    """
    if argument is not None and len(argument) != num_classes:
        raise DoesNotFit(f"{len(argument)} classes are listed, but the model has {num_classes} outputs")
    if argument or file:
        return argument or file or ()
    if num_classes == IMAGENET_CLASSES:
        return imagenet()
    return tuple(ClassName(str(i), f"class {i}") for i in range(num_classes))


def labels(classes: Classes) -> list[str]:
    """A name for each class, no two alike: with its id where names repeat."""
    times = collections.Counter(c.name for c in classes)
    return [f"{c.name} ({c.id})" if times[c.name] > 1 else c.name for c in classes]


def read_classes(path: Path) -> Classes:
    """Read a class list: CSV with the columns `id` (or `wnid`) and `name`, else one class per line.

    A column `index`, where there is one, gives the order. Blank lines are skipped; a plain line is id
    and name at once.

    Raises:
        UnreadableFile: no such file, not text, or no class in it.
        DoesNotFit: an id stands twice, or the indices do not count from 0.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(
            f"{path}: cannot read the class list: {getattr(error, 'strerror', None) or error}"
        ) from error
    return _from_rows(lines, str(path))


def as_classes(given: "Sequence[ClassName | tuple[str, str] | str] | os.PathLike[str]") -> Classes:
    """A class list as people give it: the path of a file, or (id, name) pairs, or plain names.

    Raises:
        As `read_classes`.
    """
    if isinstance(given, str):
        given = Path(given)
    if isinstance(given, os.PathLike):
        return read_classes(Path(given))
    pairs = (ClassName(c, c) if isinstance(c, str) else ClassName(*c) for c in given)
    return check_classes(tuple(pairs), "the class list")


def _from_rows(lines: Sequence[str], source: str) -> Classes:
    lines = [line.strip() for line in lines if line.strip()]
    columns = next(csv.reader(lines[:1]), [])
    id_column = next((name for name in ("id", "wnid") if name in columns), None)
    if id_column and "name" in columns:
        rows = list(csv.DictReader(lines))
        if "index" in columns:
            rows.sort(key=lambda row: int(row["index"]) if (row["index"] or "").isdecimal() else -1)
            if [row["index"] for row in rows] != [str(index) for index in range(len(rows))]:
                raise DoesNotFit(f"{source}: the column index must count from 0 to {len(rows) - 1}, each once")
        classes = tuple(ClassName((row[id_column] or "").strip(), (row["name"] or "").strip()) for row in rows)
    else:
        classes = tuple(ClassName(line, line) for line in lines)
    return check_classes(classes, source)


def check_classes(classes: Classes, source: str) -> Classes:
    """The same list, if it has classes and every id is there once.

    Raises:
        UnreadableFile: no classes, or an empty id.
        DoesNotFit: an id stands twice.
    """
    if not classes or not all(c.id for c in classes):
        raise UnreadableFile(f"{source}: expected one class per line, or CSV with the columns id and name")
    seen: set[str] = set()
    for c in classes:
        if c.id in seen:
            raise DoesNotFit(f"{source}: class id {c.id!r} stands twice; ids must be unique, names need not")
        seen.add(c.id)
    return classes
