"""Folders of images: which files are images."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from fcvit.errors import UnreadableFile, UsageError

T = TypeVar("T")
ENDINGS = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


def contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders below a folder, and the files; both sorted, hidden ones left out.

    Links are followed, but none back to a folder that it is in.

    Raises:
        UnreadableFile: a folder in it cannot be read.
    """
    folders: list[Path] = []
    files: list[Path] = []

    def walk(directory: Path, above: frozenset[tuple[int, int]]) -> None:
        try:
            status = directory.stat()
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            raise UnreadableFile(f"{error.filename}: {error.strerror}") from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(directory / entry.name)
                walk(directory / entry.name, above | {here})
            else:
                files.append(directory / entry.name)

    walk(folder, frozenset())
    return sorted(folders), sorted(files)


def images_below(folder: Path) -> list[Path]:
    """Image files in a folder and the folders in it, by their ending, sorted; as `contents` finds them.

    Raises:
        UnreadableFile: a folder in it cannot be read.
    """
    return [path for path in contents(folder)[1] if path.suffix.lower() in ENDINGS]


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Files, folders and glob patterns -> image paths, each once, in the order given.

    A file that is named is taken whatever its ending.

    Raises:
        UnreadableFile: an argument that matches nothing.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            images = images_below(path)
        elif path.exists():
            images = [path]
        else:
            images = []
            for match in sorted(glob.glob(argument, recursive=True)):
                images += images_below(Path(match)) if Path(match).is_dir() else [Path(match)]
        if not images:
            raise UnreadableFile(f"{argument}: no such image, and no folder or pattern with images in it")
        found.update(dict.fromkeys(images))
    return list(found)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly over their order.

    Raises:
        UsageError: fewer than one is asked for.
    """
    if most < 1:
        raise UsageError(f"--most {most}: expected at least 1")
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else list(items)
