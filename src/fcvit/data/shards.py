"""Read WebDataset shards: tar archives in which an image and its label are files with one name and different endings.

The samples of all shards look like one folder with a folder of images for each label: `label/key.jpg`. A split in the
names of the files (`imagenet-train-0000.tar`) becomes a folder around them.
"""

import collections
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fcvit.data.archives import Archive, Builder, label_folder
from fcvit.data.columns import Files, Location
from fcvit.data.folders import ENDINGS, open_file
from fcvit.data.splits import split_folders
from fcvit.data.tars import read_tar
from fcvit.errors import UnreadableFile, counted

_LABELS = ("cls", "json")  # endings of the label, the first preferred
_FIELDS = ("label", "cls")  # keys of the label in JSON
_LARGEST_LABEL = 1 << 20  # bytes


def is_shard(files: Files) -> bool:
    """Return True if more than half of the images have a file with the same name and the ending .cls or .json."""
    images = labeled = 0
    for endings in _samples(files):
        count = sum(f".{ending}" in ENDINGS for ending in endings)
        images += count
        labeled += bool(count) and any(ending in endings for ending in _LABELS)
    return labeled * 2 > images


def has_class_folders(files: Files) -> bool:
    """Return True if the images are in several folders, which can then be the classes."""
    folders = (name.partition("/")[0] if "/" in name else "" for name in files.images())
    first = next(folders, "")
    return any(folder != first for folder in folders)


def _samples(files: Files) -> Iterator[dict[str, tuple[str, Location]]]:
    """Yield for each key its files by their endings, which begin at the first dot of the file name."""

    def key(file: tuple[str, Location]) -> str:
        dot = file[0].find(".", file[0].rfind("/") + 1)
        return file[0] if dot < 0 else file[0][:dot]

    for start, named in itertools.groupby(files.items(), key):
        yield {file[0][len(start) + 1 :].lower(): file for file in named}


def read_shards(root: Path, shards: Sequence[Path]) -> Archive:
    """Return the samples of shards as one archive.

    Args:
        root: Path of the data, for messages.
        shards: Path of each shard.

    Raises:
        UnreadableFile: A sample has several images or a damaged label, or the names of the files mix splits and others.
    """
    splits = split_folders(root, [path.stem for path in shards])
    for with_shard in (False, True):
        every, counts = Builder(), collections.Counter[str]()
        for path, split in zip(shards, splits, strict=True):
            prefix = f"{split}/" if split else ""
            for label, name, location in _labeled(path, counts):
                folder = prefix if label is None else f"{prefix}{label}/"
                every.add(f"{folder}{path.stem}/{name}" if with_shard else folder + name, location)
        notes = [f"read as {counted(len(shards), 'WebDataset shard')} with {counted(counts['images'], 'image')}"]
        if counts["unlabeled"]:
            notes.append(f"{counted(counts['unlabeled'], 'image')} without a label")
        if counts["skipped"]:
            notes.append(f"skipped {counted(counts['skipped'], 'sample')} without an image")
        if with_shard:
            notes.append("names occur in several shards, so each image's name contains that of its shard")
        named = tuple(dict.fromkeys(filter(None, splits)))
        archive = every.build(labeled=True, splits=named, notes=tuple(f"{root}: {note}" for note in notes))
        if len(archive.files) == counts["images"]:
            break
    return archive


def _labeled(path: Path, counts: "collections.Counter[str]") -> Iterator[tuple[str | None, str, Location]]:
    """Yield the label, the name and the location of each image of a shard, and count them."""
    shown = read_tar(path).tree.files
    with open_file(path) as file:
        for endings in _samples(shown):
            images = [ending for ending in endings if f".{ending}" in ENDINGS]
            if len(images) > 1:
                first, second, *_ = (endings[ending][0] for ending in images)
                raise UnreadableFile(
                    f"{path}: {first} and {second} are images of one sample; expected one image for each key"
                )
            if not images:
                counts["skipped"] += 1
                continue
            labeled = next((endings[ending] for ending in _LABELS if ending in endings), None)
            label = None if labeled is None else _label(file, f"{path}/{labeled[0]}", labeled[1])
            counts["images"] += 1
            counts["unlabeled"] += label is None
            yield label, *endings[images[0]]


def _label(file: Any, shown: str, location: Location) -> str | None:
    """Return the label in a .cls or .json file, as the name of a folder, or None if JSON contains none."""
    if location.size > _LARGEST_LABEL or location.size < 0:
        raise UnreadableFile(f"{shown}: expected a label, which has at most {_LARGEST_LABEL >> 20} MiB")
    file.seek(location.offset)
    try:
        text = file.read(location.size).decode()
        if shown.endswith(".json"):
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError("not an object")
            value = next((content[field] for field in _FIELDS if field in content), None)
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise ValueError(f"label {value!r:.60}")
            text = str(value)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{shown}: not a readable label: {str(error)[:80]}") from error
    return label_folder(text.strip(), shown)
