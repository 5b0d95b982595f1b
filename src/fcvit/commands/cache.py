"""Manage the cache of exported networks, compiled operators and indexes of data sets (`fcvit cache`)."""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fcvit.commands.options import Flag
from fcvit.errors import UsageError
from fcvit.run_folder import cache_root

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Cache:
    """The entries of the cache.

    Attributes:
        folder: Folder of the cache.
        entries: (name, size in bytes, time of the last change in seconds since the epoch), the oldest first.
        removed: Names of the removed entries.
    """

    folder: Path
    entries: tuple[tuple[str, int, float], ...]
    removed: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.entries)

    def tables(self) -> Iterator[Any]:
        """Yield a table of the entries with their sizes."""
        from fcvit.report.tables import table

        rows = [(name, f"{size / 2**20:.1f}") for name, size, _ in self.entries]
        title = f"{self.folder}: {self.bytes / 2**20:.1f} MiB"
        yield table("entry", "MiB", rows=rows, right=("MiB",), title=title)
        if self.removed:
            yield f"removed: {len(self.removed)}"


def cache(*, limit: str | None = None, clear: Flag = False) -> Cache:
    """Show, limit or empty the cache of exports, compiled operators and indexes of data sets.

    Args:
        limit: Remove the oldest entries until the cache has at most this size, for example 500M or 2G.
        clear: Remove all entries.

    Raises:
        UsageError: The limit is not a size.
    """
    max_bytes = 0 if clear else _size(limit) if limit is not None else None
    before = read_cache()
    remaining, removed, total = [], [], before.bytes
    for name, size, changed in before.entries:
        if max_bytes is not None and total > max_bytes:
            shutil.rmtree(before.folder / name, ignore_errors=True)
            removed.append(name)
            total -= size
        else:
            remaining.append((name, size, changed))
    return Cache(before.folder, tuple(remaining), tuple(removed))


def read_cache() -> Cache:
    """Return the entries of the cache."""
    folder = cache_root()
    entries = []
    for entry in folder.glob("*/*"):
        if entry.is_dir():
            sizes = [path.stat().st_size for path in entry.rglob("*") if path.is_file()]
            entries.append((str(entry.relative_to(folder)), sum(sizes), entry.stat().st_mtime))
    return Cache(folder, tuple(sorted(entries, key=lambda entry: (entry[2], entry[0]))))


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"--limit {text:.40}: expected a size, for example 500M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])
