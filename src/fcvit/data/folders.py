"""Find image files in folders, and skip the files of operating systems and tools."""

import collections
import errno
import glob
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import features

from fcvit.errors import UnreadableFile, UsageError, counted
from fcvit.text import some

logger = logging.getLogger("fcvit")

T = TypeVar("T")
# Pillow's names of the formats that are decoded, and their file extensions. Photographs use these formats.
# Other formats of Pillow can start programs (EPS) or fail in unexpected ways.
FORMATS: dict[str, tuple[str, ...]] = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpeg", ".jpg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
if "avif" in features.modules and features.check("avif"):  # Pillow 11.3 or later, built with libavif
    FORMATS["AVIF"] = (".avif", ".avifs")
ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
# Lower-case names of files and folders that operating systems, network storage and tools create. `left_out` also
# matches hidden names.
SYSTEM = frozenset(
    re.split(
        "[,\n]+",
        """$recycle.bin,system volume information,thumbs.db,ehthumbs.db,desktop.ini,__macosx,icon\r
network trash folder,temporary items,lost+found,@eadir,@tmp,@sharebin,@recycle,@recently-snapshot,@synoresource
@synoeastream,@transcode,config.msi,lost.dir,found.000,#recycle,#snapshot,__pycache__""",
    )
)


def left_out(name: str) -> bool:
    """Return True if a file or folder name is hidden or belongs to the system (see `SYSTEM`)."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Return True if a file name has the extension of an image format in `FORMATS`."""
    return os.path.splitext(name)[1].lower() in ENDINGS  # noqa: PTH122


def count_non_images(names: Iterable[str]) -> str:
    """Return a note that counts the files without an image file extension, or "" if all files have one."""
    endings = collections.Counter(
        os.path.splitext(name)[1].lower() or "no extension"  # noqa: PTH122
        for name in names
        if not is_image(name)
    )
    shown = some([f"{count} {ending:.20}" for ending, count in endings.most_common()])
    return f"skipped {counted(endings.total(), 'file')} without an image file extension: {shown}" if endings else ""


def legible(name: str) -> str:
    r"""Return a file name as valid UTF-8 text, with escapes such as \xe9 for bytes that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if not name.isascii() else name


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: The file cannot be opened, or it is a pipe or device, on which a read can block.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags), "rb")  # noqa: PTH123, SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def scan(folder: str | Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files directly in a folder, except those of `left_out`.

    Raises:
        UnreadableFile: The folder cannot be read.
    """
    names: tuple[list[str], list[str]] = ([], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not left_out(entry.name):
                    names[not _is_folder(entry)].append(entry.name)
    except OSError as error:
        raise UnreadableFile(f"{folder}: {error.strerror}") from error
    return sorted(names[0]), sorted(names[1])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is like a broken link: a file that cannot be read
        return False


def contents(folder: Path) -> tuple[list[str], list[str]]:
    """Return the relative paths of all folders and of all files below a folder, with /, sorted by their parts.

    Symbolic links are followed, except a link to a folder that contains the link.

    Raises:
        UnreadableFile: The folder or a folder below it cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []
    for name in walk(folder):
        (folders if name.endswith("/") else files).append(name)
    return (
        sorted((name[:-1] for name in folders), key=lambda name: name.split("/")),
        sorted(files, key=lambda name: name.split("/")),
    )


def walk(folder: Path, visited: "dict[str, os.stat_result] | None" = None) -> Iterator[str]:
    """Yield the relative paths of all files and folders below a folder, sorted as text. Folders end with /.

    Only the names in the folders that contain the current one are in memory. Links are followed as in `contents`.

    Args:
        folder: Folder to read.
        visited: Filled with the status of every folder before it is read.

    Raises:
        UnreadableFile: The folder or a folder below it cannot be read.
    """
    visited = {} if visited is None else visited

    def below(inner: str, parents: frozenset[tuple[int, int]]) -> Iterator[str]:
        directory = os.path.join(folder, inner) if inner else str(folder)  # noqa: PTH118
        try:
            status = os.stat(directory)  # noqa: PTH116
        except OSError as error:
            raise UnreadableFile(f"{directory}: {error.strerror}") from error
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            return
        visited[inner] = status
        subfolders, names = scan(directory)
        # With the slash, the order is that of the complete paths: a-b/1 is before a/1.
        for name in sorted([*(f"{subfolder}/" for subfolder in subfolders), *names]):
            yield inner + name
            if name.endswith("/"):
                yield from below(inner + name, parents | {identity})

    return below("", frozenset())


def images_below(folder: Path) -> list[Path]:
    """Return the paths of all image files below a folder, in the order of `contents`."""
    return [folder / name for name in contents(folder)[1] if is_image(name)]


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Return the images that the arguments name (files, folders or glob patterns), in their order, without duplicates.

    A file that is named by an argument is returned whatever its extension.

    Raises:
        UnreadableFile: An argument matches no image.
    """
    images: dict[Path, None] = {}
    for argument in arguments:
        path, matches = Path(argument), [Path(argument)]
        if path.is_dir():
            if note := count_non_images(contents(path)[1]):
                logger.info(f"{argument}: {note}")
        elif not path.exists():
            matches = [
                match
                for match in map(Path, sorted(glob.glob(argument, recursive=True)))
                if not any(part.lower() in SYSTEM and part not in path.parts for part in match.parts)
            ]
        matched = [image for match in matches for image in (images_below(match) if match.is_dir() else [match])]
        if not matched:
            raise UnreadableFile(
                f"{argument}: no such image; pass an image file, a folder that contains images, or a glob pattern"
            )
        images.update(dict.fromkeys(matched))
    return list(images)


def sample_evenly(items: Sequence[T], limit: int) -> list[T]:
    """Return at most `limit` of the items, evenly spaced in their order.

    Raises:
        UsageError: The limit is less than 1.
    """
    if limit < 1:
        raise UsageError(f"--max-images {limit}: expected at least 1")
    return [items[index * len(items) // limit] for index in range(limit)] if len(items) > limit else list(items)
