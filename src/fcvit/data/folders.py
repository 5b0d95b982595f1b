"""Folders of images: which files are images, and which are nobody's."""

import collections
import errno
import glob
import logging
import os
import posixpath
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import features

from fcvit.errors import UnreadableFile, UsageError, counted
from fcvit.text import some

logger = logging.getLogger("fcvit")

T = TypeVar("T")
# Formats that are decoded, by Pillow's names, and the file name endings by which they are found.
# Photographs come in these. Others that Pillow knows can start programs (EPS) or fail in odd ways.
FORMATS: dict[str, tuple[str, ...]] = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpeg", ".jpg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
if "avif" in features.modules and features.check("avif"):  # Pillow 11.3, built with libavif
    FORMATS["AVIF"] = (".avif", ".avifs")
ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
# Files and folders of operating systems, disk stations and tools, in lower case; hidden ones are left out besides.
SYSTEM = frozenset(
    re.split(
        "[,\n]+",
        """$recycle.bin,system volume information,thumbs.db,ehthumbs.db,desktop.ini,__macosx,icon\r
network trash folder,temporary items,lost+found,@eadir,@tmp,@sharebin,@recycle,@recently-snapshot,@synoresource
@synoeastream,@transcode,config.msi,lost.dir,found.000,#recycle,#snapshot,__pycache__""",
    )
)


def left_out(name: str) -> bool:
    """Report whether a file or folder of this name is hidden, or not the user's own (see `SYSTEM`)."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Report whether a file name has the ending of an image."""
    return os.path.splitext(name)[1].lower() in ENDINGS  # noqa: PTH122


def no_images(names: Iterable[str]) -> str:
    """Count in words the files that have no image's ending, by ending; return "" if there are none."""
    endings = collections.Counter(
        os.path.splitext(name)[1].lower() or "no ending"  # noqa: PTH122
        for name in names
        if not is_image(name)
    )
    shown = some([f"{count} {ending:.20}" for ending, count in endings.most_common()])
    return f"left out {counted(endings.total(), 'file')} without an image's ending: {shown}" if endings else ""


def legible(name: str) -> str:
    r"""Return a file name as text that can be written anywhere: bytes that are not UTF-8 are spelled out (\xe9)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if not name.isascii() else name


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a plain file for reading; a pipe or device is an `OSError` at once, since reading it would wait."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags), "rb")  # noqa: PTH123, SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a plain file")
    return file


def scan(folder: str | Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files directly in a folder, sorted, without what is left out.

    Raises:
        UnreadableFile: the folder cannot be read.
    """
    names: tuple[list[str], list[str]] = ([], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not left_out(entry.name):
                    names[not entry.is_dir()].append(entry.name)
    except OSError as error:
        raise UnreadableFile(f"{folder}: {error.strerror}") from error
    return sorted(names[0]), sorted(names[1])


def contents(folder: Path) -> tuple[list[str], list[str]]:
    """Return the folders and the files below a folder, relative to it, with /, in the order of their parts.

    Links are followed, but none back to a folder that it is in.

    Raises:
        UnreadableFile: a folder in it cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []

    def walk(inner: str, above: frozenset[tuple[int, int]]) -> None:
        directory = os.path.join(folder, inner) if inner else str(folder)  # noqa: PTH118
        subfolders, names = scan(directory)
        status = os.stat(directory)  # noqa: PTH116
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        files.extend(posixpath.join(inner, name) for name in names)
        for name in subfolders:
            folders.append(posixpath.join(inner, name))
            walk(folders[-1], above | {here})

    walk("", frozenset())
    return sorted(folders, key=lambda name: name.split("/")), sorted(files, key=lambda name: name.split("/"))


def images_below(folder: Path) -> list[Path]:
    """Return the image files in a folder and the folders in it, as `contents` finds them."""
    return [folder / name for name in contents(folder)[1] if is_image(name)]


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Return the images that files, folders and glob patterns name, each once, in the order given.

    A file that is named is taken whatever its ending.

    Raises:
        UnreadableFile: an argument matches nothing.
    """
    images: dict[Path, None] = {}
    for argument in arguments:
        path, matches = Path(argument), [Path(argument)]
        if path.is_dir():
            if others := no_images(contents(path)[1]):
                logger.info(f"{argument}: {others}")
        elif not path.exists():
            matches = [
                match
                for match in map(Path, sorted(glob.glob(argument, recursive=True)))
                if not any(part.lower() in SYSTEM and part not in path.parts for part in match.parts)
            ]
        matched = [image for match in matches for image in (images_below(match) if match.is_dir() else [match])]
        if not matched:
            raise UnreadableFile(f"{argument}: no such image, and no folder or pattern with images in it")
        images.update(dict.fromkeys(matched))
    return list(images)


def sample_evenly(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the items, evenly over their order.

    Raises:
        UsageError: fewer than one is asked for.
    """
    if most < 1:
        raise UsageError(f"--max-images {most}: expected at least 1")
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else list(items)
