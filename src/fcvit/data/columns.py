"""Keep the names, locations and labels of millions of files in a few arrays instead of Python objects.

A column is a sequence whose items are created when they are read. `take` selects items with one integer array and
shares everything else, so a shuffled or partial data set costs 4 bytes per item and column.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar, overload

import numpy as np

from fcvit.data.folders import open_file

LARGEST = 1 << 29  # largest image file, in bytes
_BLOCK = 4096  # items that are created at once
T = TypeVar("T")


class Location(NamedTuple):
    """The location of an image's bytes: a file or a part of a file.

    Attributes:
        path: Path of the file.
        offset: Position of the first byte in the file.
        size: Number of bytes, or -1 for the rest of the file.
    """

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Return the bytes of the image.

        Raises:
            OSError: The file cannot be read, is not a regular file or is too large.
        """
        with open_file(self.path) as file:
            if (self.size if self.size >= 0 else os.fstat(file.fileno()).st_size) > LARGEST:
                raise OSError(errno.EFBIG, f"larger than {LARGEST >> 20} MiB")
            file.seek(self.offset)
            return file.read(self.size)


class Column(Sequence[T], Generic[T]):
    """A sequence over shared arrays. It equals any sequence with equal items.

    Attributes:
        order: Row of the arrays of each item.
    """

    order: "range | np.ndarray"

    def values(self, rows: "range | np.ndarray") -> list[T]:
        """Return the items of these rows."""
        raise NotImplementedError

    def ordered(self, order: "range | np.ndarray") -> Self:
        """Return the same column with other rows."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, order=order)
        return other

    def take(self, order: Any) -> Self:
        """Return the items at these positions, in this order."""
        return self.ordered(select(self.order, order))

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, key: int) -> T: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[T, ...]: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return tuple(self.values(self.order[key]))
        row = int(self.order[key])
        return self.values(range(row, row + 1))[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self.order), _BLOCK):
            yield from self.values(self.order[start : start + _BLOCK])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 3 else ""
        return f"<{len(self)} items: {', '.join(map(repr, self[:3]))}{more}>"


def select(rows: "range | np.ndarray", order: Any) -> "range | np.ndarray":
    """Return the rows at these positions. Consecutive rows remain a range, which needs no memory."""
    if isinstance(order, range):
        return rows[order.start : order.stop] if order.step == 1 else select(rows, np.asarray(order))
    positions = np.asarray(order)
    chosen = positions + rows.start if isinstance(rows, range) else rows[positions]
    if len(chosen) and chosen[-1] - chosen[0] == len(chosen) - 1 and (np.diff(chosen) == 1).all():
        return range(int(chosen[0]), int(chosen[-1]) + 1)
    return chosen.astype(np.int32, copy=False)


def taken(values: Any, order: Any) -> Any:
    """Return the items of a column or of another sequence at these positions, in this order."""
    return values.take(order) if isinstance(values, Column) else tuple(values[i] for i in order)


def encoded(name: str) -> bytes:
    """Return a name as UTF-8, in which the order of bytes is the order of strings. Surrogates are kept."""
    return name.encode("utf-8", "surrogatepass")


class Integers(Column[int]):
    """A column of integers. `numpy.asarray` returns them as an array."""

    def __init__(self, content: Any):
        self.content = np.asarray(content, np.int32)
        self.order = range(len(self.content))

    def values(self, rows: "range | np.ndarray") -> list[int]:
        return (
            self.content[rows.start : rows.stop : rows.step if len(rows) else 1].tolist()
            if isinstance(rows, range)
            else self.content[rows].tolist()
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows = self.order
        return self.content[rows.start : rows.stop] if isinstance(rows, range) else self.content[rows]


class Names(Column[str]):
    """A column of names.

    Attributes:
        text: All names as UTF-8, each followed by a zero byte.
        starts: Position of the first byte of each name, and the length of the text, int64.
        prefix: Text at the start of all selected names that is left out.
    """

    def __init__(self, text: bytes, starts: Any):
        self.text, self.starts, self.prefix = text, memoryview(starts).cast("B").cast("q"), ""
        self.order = range(len(self.starts) - 1)

    def values(self, rows: "range | np.ndarray") -> list[str]:
        skipped = len(self.prefix)
        if isinstance(rows, range) and rows.step == 1 and len(rows):
            block = self.text[self.starts[rows.start] : self.starts[rows.stop] - 1]
            names = block.decode("utf-8", "surrogatepass").split("\0")
        else:
            names = [self._raw(int(row)).decode("utf-8", "surrogatepass") for row in rows]
        return [name[skipped:] for name in names] if skipped else names

    def _raw(self, row: int) -> bytes:
        return self.text[self.starts[row] : self.starts[row + 1] - 1]

    def position(self, name: bytes) -> int:
        """Return the position of the first of the sorted names, with its prefix, that is not before this one."""
        low, high, order = 0, len(self.order), self.order
        while low < high:
            middle = (low + high) // 2
            if self._raw(order[middle]) < name:
                low = middle + 1
            else:
                high = middle
        return low

    def under(self, prefix: str) -> range:
        """Return the positions of the sorted names that begin with this text."""
        start = encoded(self.prefix + prefix)
        # 0xFF is not a byte of UTF-8, so that this is after all names with the prefix.
        return range(self.position(start), self.position(start + b"\xff"))


class FolderLocations(Column[Location]):
    """The locations of files in a folder of the file system, which follow from their names."""

    def __init__(self, root: str, names: Names):
        self.root, self.names, self.order = root, names, names.order

    def values(self, rows: "range | np.ndarray") -> list[Location]:
        return [Location(f"{self.root}/{name}") for name in self.names.values(rows)]


class PartLocations(Column[Any]):
    """The locations of files that are parts of other files.

    Attributes:
        paths: Paths of the files that contain them.
        files, offsets, sizes: Index in `paths`, position and size of each part, int32, int64 and int64.
        kind: Function that returns the location for path, position and size.
    """

    def __init__(self, paths: Sequence[str], files: Any, offsets: Any, sizes: Any, kind: Any = Location):
        self.paths, self.kind = tuple(paths), kind
        self.files, self.offsets, self.sizes = (
            np.asarray(column, dtype) for column, dtype in ((files, np.int32), (offsets, np.int64), (sizes, np.int64))
        )
        self.order = range(len(self.files))

    def values(self, rows: "range | np.ndarray") -> list[Any]:
        key = slice(rows.start, rows.stop) if isinstance(rows, range) and rows.step == 1 else np.asarray(rows, np.int64)
        columns = (column[key].tolist() for column in (self.files, self.offsets, self.sizes))
        return [self.kind(self.paths[file], offset, size) for file, offset, size in zip(*columns, strict=True)]


class Files(Mapping[str, Any]):
    """The sorted names of files and their locations.

    Attributes:
        names, locations: Name and location of each file.
        image: 1 for each row whose name has an image file extension, else 0, uint8.
    """

    def __init__(self, names: Names, locations: Column[Any], image: np.ndarray):
        self.names, self.locations, self.image = names, locations, image

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Any:
        position = self.names.position(encoded(self.names.prefix + name))
        if position == len(self.names) or self.names[position] != name:
            raise KeyError(name)
        return self.locations[position]

    def items(self) -> Any:
        """Return an iterator of names and locations."""
        return zip(self.names, self.locations, strict=True)

    def take(self, order: Any) -> "Files":
        """Return the files at these positions, in this order, which must be increasing."""
        return Files(self.names.take(order), self.locations.take(order), self.image)

    def below(self, folder: str) -> "Files":
        """Return the files in a folder at any depth, with names relative to it."""
        files = self.take(self.names.under(folder and f"{folder}/"))
        if folder:
            files.names.prefix += f"{folder}/"
        return files

    def is_image(self) -> np.ndarray:
        """Return for each file whether it is an image, bool (files,)."""
        order = self.names.order
        rows = self.image[order.start : order.stop] if isinstance(order, range) else self.image[order]
        return rows.astype(bool)

    def images(self) -> "Files":
        """Return only the image files."""
        return self.take(np.flatnonzero(self.is_image()))

    def directly(self, folder: str) -> Iterator[str]:
        """Yield the names of the files directly in a folder. Files in its subfolders are skipped without reading."""
        inside = self.below(folder)
        names, position = inside.names, 0
        while position < len(names):
            for name in names[position : position + 64]:
                if "/" in name:
                    position = names.under(name.partition("/")[0] + "/").stop
                    break
                yield name
                position += 1
