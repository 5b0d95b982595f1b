"""Folders of images: which files are images, and which class index a class folder means."""

import collections
import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fcvit.classes import Classes, imagenet
from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.variants import IMAGENET_CLASSES

ENDINGS = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclasses.dataclass(frozen=True)
class LabelledFolder:
    """A folder of class folders, read.

    Attributes:
        root: the folder.
        paths: images, relative to the root, in sorted order.
        labels: the class index of each.
        mapping: class folder -> class index.
        rule: how the mapping was found, for people.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    mapping: dict[str, int]
    rule: str


def read_labelled_folder(root: Path, classes: Classes | None, num_classes: int) -> LabelledFolder:
    """Read a folder of class folders, for a model with `num_classes` outputs.

    Args:
        root: holds one folder a class; hidden folders are none, files beside them are ignored.
        classes: what the weights say of their classes, or None.
        num_classes: outputs of the model.

    Raises:
        UnreadableFile: no such folder, no class folders, or no images in them.
        DoesNotFit: the folders cannot be mapped to the model's classes.
    """
    if not root.is_dir():
        raise UnreadableFile(f"{root}: not a folder; --data expects a folder of class folders")
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UnreadableFile(f"{root}: {error.strerror}") from error
    if not names:
        raise UnreadableFile(f"{root}: no class folders in it; --data expects one folder of images a class")
    mapping, rule = assign_classes(names, classes, num_classes)
    paths: list[str] = []
    labels: list[int] = []
    for name in names:
        found = [str(path.relative_to(root)) for path in images_below(root / name)]
        paths += found
        labels += [mapping[name]] * len(found)
    if not paths:
        raise UnreadableFile(f"{root}: its class folders hold no images ({', '.join(sorted(ENDINGS))})")
    return LabelledFolder(root, tuple(paths), tuple(labels), mapping, rule)


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


def assign_classes(folders: Sequence[str], classes: Classes | None, num_classes: int) -> tuple[dict[str, int], str]:
    """The one rule by which folder names become class indices, and in words which part of it applied.

    1. The weights' class ids, or their names where those are unique; a subset may be there.
    2. Else, for 1,000 outputs, ImageNet's WordNet ids; a subset may be there.
    3. Else the sorted names (as torchvision counts them), if there are as many as outputs.

    Raises:
        DoesNotFit: some folders are known classes and others are not, or the count differs.
    """
    tables: list[tuple[str, dict[str, int]]] = []
    if classes:
        names = collections.Counter(c.name for c in classes)
        tables.append(("the weights' class ids", {c.id: index for index, c in enumerate(classes)}))
        unique = {c.name: index for index, c in enumerate(classes) if names[c.name] == 1}
        tables.append(("the weights' class names", unique))
    if num_classes == IMAGENET_CLASSES:
        tables.append(("ImageNet's WordNet ids", {c.id: index for index, c in enumerate(imagenet())}))
    for what, table in tables:
        unknown = [folder for folder in folders if folder not in table]
        if not unknown:
            return {folder: table[folder] for folder in folders}, f"folders are {what}"
        if len(unknown) < len(folders):
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise DoesNotFit(f"{len(unknown)} of {len(folders)} class folders are not among {what}: {shown}")
    if len(folders) != num_classes:
        remedy = (
            "rename the folders" if classes else "give the weights their class list with fcvit convert --classes FILE"
        )
        raise DoesNotFit(
            f"{len(folders)} class folders ({folders[0]}, ...) for a model with {num_classes} outputs, and their "
            f"names are not its classes; {remedy}"
        )
    why = (
        f"no folder is one of the weights' classes ({classes[0].name}, ...)"
        if classes
        else "the weights name no classes"
    )
    rule = f"{why}: the {num_classes} folders are counted in sorted order"
    return {folder: index for index, folder in enumerate(sorted(folders))}, rule


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
