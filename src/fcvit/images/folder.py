"""Folders of images: which files are images."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from fcvit.errors import UnreadableFile

ENDINGS = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


def images_below(folder: Path) -> list[Path]:
    """Image files in a folder and the folders in it, by their ending, sorted; hidden ones left out.

    Raises:
        UnreadableFile: a folder in it cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UnreadableFile(f"{error.filename}: {error.strerror}") from error

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()  # links are followed, but a circle of them only once
    for directory, inner, files in os.walk(folder, onerror=fail, followlinks=True):
        status = Path(directory).stat()
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [
            Path(directory, name)
            for name in sorted(files)
            if Path(name).suffix.lower() in ENDINGS and not name.startswith(".")
        ]
    return found


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
