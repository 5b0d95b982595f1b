"""Find the images that the arguments of a command name: files, folders, patterns and archives."""

import bisect
import dataclasses
import glob
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fcvit.data.folders import SYSTEM, count_non_images
from fcvit.data.sources import Location, open_source
from fcvit.errors import UnreadableFile

_ARCHIVES = (".tar", ".parquet")
logger = logging.getLogger("fcvit")
T = TypeVar("T")


class _Part(NamedTuple):
    """Images of one source: what precedes their names, the names, and the function that locates a name."""

    prefix: str
    names: Sequence[str]
    locate: Callable[[str], Location]


class _Column(Sequence[T]):
    """A value of each image. Values are made when they are read, because a list of ten million takes gigabytes."""

    def __init__(self, parts: Sequence[_Part], value: Callable[[_Part, str], T]):
        self._parts, self._value = parts, value
        self._ends = list(itertools.accumulate(len(part.names) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        number = bisect.bisect_right(self._ends, index)
        part = self._parts[number]
        return self._value(part, part.names[index - self._ends[number] + len(part.names)])


@dataclasses.dataclass(frozen=True)
class NamedImages:
    """Images without labels, which are not read yet (see `fcvit.data.loader.Samples`).

    Attributes:
        names: Path of each image as the arguments name it.
        locations: Location of each image.
        targets: None for each image.
    """

    names: Sequence[str]
    locations: Sequence[Location]
    targets: Sequence[None]

    def __len__(self) -> int:
        return len(self.names)

    def listing(self) -> str:
        """Return a hash of the names, which a resumed run compares."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()


def find_named(arguments: Iterable[str], folder: Path) -> NamedImages:
    """Find the images that arguments name, in the order of the arguments, without duplicates.

    Args:
        arguments: Files, folders (searched recursively), glob patterns, and archives or folders in them, as
            `fcvit.data.sources.open_source` accepts them. A file that is not an archive is an image whatever its
            extension.
        folder: Folder to which relative paths refer.

    Raises:
        UnreadableFile: An argument matches no image, or an archive cannot be read.
    """
    parts: list[_Part] = []
    for argument in arguments:
        path = Path(argument)
        if (folder / path).exists():
            matched = list(_parts([argument], folder))
        else:
            matches = [
                match
                for match in sorted(glob.glob(argument, root_dir=folder, recursive=True))
                if not any(part.lower() in SYSTEM and part not in path.parts for part in Path(match).parts)
            ]
            try:  # a folder in an archive exists only there
                matched = list(_parts(matches, folder)) if matches else [_archive(argument, folder)]
            except UnreadableFile:
                if any((folder / parent).is_file() for parent in path.parents):
                    raise
                matched = []
        if not any(part.names for part in matched):
            raise UnreadableFile(
                f"{argument}: no such image; pass an image file, a folder or an archive that contains images, or a "
                "glob pattern"
            )
        parts += matched
    parts = list(_without_repeats(parts)) if len(parts) > 1 else parts
    return NamedImages(
        _Column(parts, lambda part, name: part.prefix + name),
        _Column(parts, lambda part, name: part.locate(name)),
        _Column(parts, lambda *_: None),
    )


def _parts(paths: Iterable[str], folder: Path) -> Iterator[_Part]:
    """Yield the images of existing files, folders and archives. Consecutive image files are one part."""

    def is_file(path: str) -> bool:
        return not (folder / path).is_dir() and Path(path).suffix.lower() not in _ARCHIVES

    def locate(name: str) -> Location:
        return Location(str(folder / name))

    for files, group in itertools.groupby(paths, is_file):
        if files:
            yield _Part("", [str(Path(path)) for path in group], locate)
        else:
            yield from (_archive(path, folder) for path in group)


def _archive(path: str, folder: Path) -> _Part:
    """Return the images of a folder or an archive."""
    files = open_source(folder / path).tree().files
    if note := count_non_images(files):
        logger.info(f"{path}: {note}")
    images = files.images()
    return _Part(str(Path(path) / "x")[:-1], images.names, images.__getitem__)


def _without_repeats(parts: Iterable[_Part]) -> Iterator[_Part]:
    seen: set[str] = set()
    for part in parts:
        names = [name for name in part.names if part.prefix + name not in seen]
        seen.update(part.prefix + name for name in names)
        yield part._replace(names=list(dict.fromkeys(names)))
