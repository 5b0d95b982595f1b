"""Folders of images: which files are images."""

import collections
import errno
import glob
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import features

from fcvit.errors import UnreadableFile, UsageError, counted

logger = logging.getLogger("fcvit")

T = TypeVar("T")
_SHOWN = 5  # endings that a note names
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
    (
        "$recycle.bin",
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "__macosx",
        "icon\r",
        "network trash folder",
        "temporary items",
        "lost+found",
        "@eadir",
        "@tmp",
        "@sharebin",
        "@recycle",
        "@recently-snapshot",
        "@synoresource",
        "@synoeastream",
        "@transcode",
        "config.msi",
        "lost.dir",
        "found.000",
        "#recycle",
        "#snapshot",
        "__pycache__",
    )
)


def left_out(name: str) -> bool:
    """Report whether a file or folder of this name is hidden, or not the user's own (see `SYSTEM`)."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Report whether a file name has the ending of an image."""
    return os.path.splitext(name)[1].lower() in ENDINGS  # noqa: PTH122


def no_images(names: Iterable[str]) -> str:
    """Say how many of the files are left out since their endings are not those of images; nothing if there are none."""
    others = (os.path.splitext(name)[1].lower() or "no ending" for name in names if not is_image(name))  # noqa: PTH122
    endings = collections.Counter(others)
    parts = [f"{count} {ending:.20}" for ending, count in endings.most_common(_SHOWN)]
    shown = ", ".join([*parts, "..."] if len(endings) > _SHOWN else parts)
    return f"left out {counted(endings.total(), 'file')} without an image's ending: {shown}" if parts else ""


def legible(name: str) -> str:
    r"""Return a file name as text that can be written anywhere: bytes that are not UTF-8 are spelled out (\xe9)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if not name.isascii() else name


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a plain file for reading. A pipe or device is an error at once: reading it would wait.

    Raises:
        OSError: it is no plain file, or cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags), "rb")  # noqa: PTH123, SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a plain file")
    return file


def contents(folder: Path) -> tuple[list[str], list[str]]:
    """Return the folders and the files below a folder, relative to it, with /, in the order of their parts.

    Hidden ones and those of the system are left out. Links are followed, but none back to a folder that it is in.

    Raises:
        UnreadableFile: a folder in it cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []

    def walk(directory: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            status = os.stat(directory)  # noqa: PTH116
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            raise UnreadableFile(f"{error.filename}: {error.strerror}") from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        for entry in entries:
            if left_out(entry.name):
                continue
            name = prefix + entry.name
            if entry.is_dir():
                folders.append(name)
                walk(entry.path, f"{name}/", above | {here})
            else:
                files.append(name)

    walk(str(folder), "", frozenset())
    return folders, files


def images_below(folder: Path) -> list[Path]:
    """Return the image files in a folder and the folders in it, by their ending; as `contents` finds them.

    Raises:
        UnreadableFile: a folder in it cannot be read.
    """
    return [folder / name for name in contents(folder)[1] if is_image(name)]


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Files, folders and glob patterns -> image paths, each once, in the order given.

    A file that is named is taken whatever its ending.

    Args:
        arguments: of a command line.

    Raises:
        UnreadableFile: an argument that matches nothing.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = contents(path)[1]
            images = [path / name for name in files if is_image(name)]
            if others := no_images(files):
                logger.info(f"{argument}: {others}")
        elif path.exists():
            images = [path]
        else:
            images = []
            for match in sorted(glob.glob(argument, recursive=True)):
                if any(part.lower() in SYSTEM for part in Path(match).parts if part not in path.parts):
                    continue
                images += images_below(Path(match)) if Path(match).is_dir() else [Path(match)]
        if not images:
            raise UnreadableFile(f"{argument}: no such image, and no folder or pattern with images in it")
        found.update(dict.fromkeys(images))
    return list(found)


def sample_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly over their order.

    Raises:
        UsageError: fewer than one is asked for.
    """
    if most < 1:
        raise UsageError(f"--most {most}: expected at least 1")
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else list(items)
