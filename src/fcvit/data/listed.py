"""Keep the first items of long lists and the number of all items, so that results stay small for any data set."""

import itertools
from collections.abc import Iterable, Mapping, Sized
from typing import TypeVar

LISTED = 1000
"""The largest number of items that are kept."""
T = TypeVar("T")
V = TypeVar("V")


class Listed(tuple[T, ...]):
    """The first `LISTED` items.

    Attributes:
        total: Number of all items.
    """

    total: int

    def __new__(cls, items: Iterable[T] = (), total: int | None = None) -> "Listed[T]":
        """Keep the first items.

        Args:
            items: The items, or the first of them.
            total: Number of all items, if `items` are only the first.
        """
        items = tuple(items)
        self = super().__new__(cls, items[:LISTED])
        self.total = len(items) if total is None else total
        return self


class ListedMapping(dict[T, V]):
    """The first `LISTED` entries of a mapping.

    Attributes:
        total: Number of all entries.
    """

    def __init__(self, entries: Mapping[T, V] | Iterable[tuple[T, V]] = (), total: int | None = None):
        """Keep the first entries. `total` replaces their number, for example if an entry stands for several files."""
        entries = dict(entries)
        super().__init__(itertools.islice(entries.items(), LISTED))
        self.total = len(entries) if total is None else total


def total(items: Sized) -> int:
    """Return the number of all items of a collection of which only the first may be kept."""
    return items.total if isinstance(items, Listed | ListedMapping) else len(items)
