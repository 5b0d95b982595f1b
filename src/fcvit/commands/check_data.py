"""Check a data set before training: find unreadable images and label maps, duplicates and unusual images."""

import collections
import dataclasses
import logging
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit.commands.check_coco import CocoCheck, check_coco
from fcvit.commands.check_maps import MapsCheck, check_maps
from fcvit.commands.image_checks import Check, Finding, Images, examine_images
from fcvit.commands.options import File, decoding_processes
from fcvit.data.class_colors import read_class_list
from fcvit.data.coco import find_coco
from fcvit.data.folders import is_image
from fcvit.data.listed import Listed, ListedMapping, total
from fcvit.data.segmentation import find_maps
from fcvit.data.sources import Source, Tree, open_source
from fcvit.data.splits import find_layout
from fcvit.errors import UnreadableFile, UsageError, counted
from fcvit.tasks.segmentation.label_options import LabelOptions
from fcvit.text import some

logger = logging.getLogger("fcvit")


@dataclasses.dataclass(frozen=True)
class Split:
    """The counts of one split.

    Attributes:
        name: Name of the split, for example train or val.
        path: The folder or tar archive.
        classes: Class folder -> number of files with an image extension, including unreadable images. Sorted by name.
        empty: Class folders without images.
        few: Class folders with at least one image, but fewer than the limit.
        imbalance: Size of the largest class divided by the size of the smallest class that has images. None if no
            class has images.
        other_files: Extension (lower case, "" for none) -> number of files in class folders that are not images.
        outside: Images outside of class folders. They are checked, but not used for training.
    """

    name: str
    path: Path
    classes: Mapping[str, int]
    empty: tuple[str, ...]
    few: tuple[str, ...]
    imbalance: float | None
    other_files: Mapping[str, int]
    outside: tuple[str, ...]

    @property
    def images(self) -> int:
        return sum(self.classes.values()) + total(self.outside)


@dataclasses.dataclass(frozen=True, repr=False)
class DataCheck(Check):
    """The findings of `check_data` for class folders.

    Images are named class/file if there is one split, and split/class/file if there are several.

    Attributes:
        missing: Class -> splits that have class folders, but not for this class.
    """

    splits: tuple[Split, ...]
    missing: Mapping[str, tuple[str, ...]]

    def tables(self) -> Iterator[Any]:
        """Yield tables of the counts of each split, the findings with examples, and the duplicates."""
        from fcvit.report import tables

        columns = ("images", "classes", "smallest", "largest", "imbalance")
        counts = tables.table("split", *columns, title=counted(self.images, "image"), right=columns)
        for split in self.splits:
            sizes = [count for count in split.classes.values() if count]
            cells = [str(min(sizes)), str(max(sizes)), f"{split.imbalance:.1f}"] if sizes else []
            counts.add_row(split.name, str(split.images), str(len(split.classes)), *cells)
        yield from self.finding_tables(counts)

    def findings(self) -> Iterator[Finding]:
        several = len(self.splits) > 1
        yield "unreadable", Listed([bad.image for bad in self.unreadable], total(self.unreadable))
        missing = [f"{label} not in {', '.join(names)}" for label, names in self.missing.items()]
        yield "classes not in every split", Listed(missing, total(self.missing))
        for split in self.splits:
            of = f", {split.name}" if several else ""
            yield f"empty class folders{of}", split.empty
            few = [f"{label} ({split.classes[label]})" for label in split.few]
            yield f"classes with fewer than {self.few} images{of}", Listed(few, total(split.few))
            yield f"images outside of class folders{of}", split.outside
        yield from super().findings()
        for split in self.splits:
            yield f"files that are not images{f', {split.name}' if several else ''}", split.other_files


def check_data(
    data: File | None = None,
    *,
    split: Annotated[Sequence[str] | None, Parameter(negative=())] = None,
    few: int = 10,
    workers: int | None = None,
    classes: File | None = None,
    labels: Annotated[LabelOptions | None, Parameter(name="*")] = None,
    near: Annotated[float | None, Parameter(show=False)] = None,
) -> DataCheck | MapsCheck | CocoCheck:
    """Check a data set before training: find unreadable images, labels and annotations, duplicates and unusual images.

    Args:
        data: Folder of class folders, or of train, val and test folders with class folders; or folders images and
            annotations with label maps, such as ADE20K; or images with a JSON file in COCO's format, or that file. All
            but the last also in a tar archive.
        split: A split in a different location, as NAME=PATH. Repeat the option for more splits.
        few: List classes with fewer images (or label maps, or annotations) than this. 0 disables the check.
        workers: Processes that decode images (default: one per core, at most 32). 0 uses the main process.
        classes: Class list of label maps, with the columns red, green and blue if they contain colors (default:
            classes.csv in the data set, or ADE20K's classes).
        labels: How label maps are read.
        near: Accepted for compatibility, but ignored.

    Raises:
        UsageError: An option is invalid, no data is given, two splits have the same name, or label maps contain only 0
            and 255.
        UnreadableFile: A folder or tar archive does not exist or has no images, or a JSON file is not in COCO's format.
            Unreadable images are in the result.
        DoesNotFit: The label maps do not fit the class list, or categories in a JSON file repeat.
    """
    if near:
        logger.info("--near has no effect: near duplicates are not searched; the next version will not accept it")
    workers = decoding_processes(workers)
    for option, value in (("few", few), ("workers", workers)):
        if value < 0:
            raise UsageError(f"--{option} {value}: expected at least 0")
    labels = labels or LabelOptions()
    options = [*(("--classes", str(classes)) if classes is not None else ()), *labels.words()]
    path = Path(data) if data is not None and not split else None
    if path is not None and path.suffix.lower() != ".json" and (layout := find_maps(open_source(path))):
        listed = read_class_list(Path(classes)) if classes is not None else None
        return check_maps(layout, listed, labels, few, workers, ["fcvit", "check-data", str(data), *options])
    if path is not None and not options and (coco := find_coco(path)):
        return check_coco(coco, few, workers)
    if options:
        raise UsageError(
            f"{options[0]} is for images with label maps, but {data or 'a split'} has no folders images and "
            "annotations that contain image files"
        )
    sources = {name: (source, source.tree()) for name, source in _split_sources(data, split or ()).items()}
    images: list[Images] = []
    for name, (_, tree) in sources.items():
        files = tree.files.images()
        prefix = f"{name}/" if len(sources) > 1 else ""
        images.append(Images(name, files.names, files.locations, prefix, in_classes=True))
    if not any(part.names for part in images):
        raise UnreadableFile(f"{', '.join(str(source.path) for source, _ in sources.values())}: no images found")
    examined = examine_images(images, workers)
    splits = tuple(_count(name, source, tree, few) for name, (source, tree) in sources.items())
    common = examined.common()
    return DataCheck(splits=splits, few=few, unreadable=examined.unreadable, missing=_missing(splits), **common)


def _split_sources(data: File | None, extra_splits: Iterable[str]) -> dict[str, Source]:
    """Return the source of each split by name, in display order."""
    splits: dict[str, Source] = {}
    if data is not None:
        layout = find_layout(open_source(Path(data)))
        source = layout.source
        for note in layout.notes:
            logger.info(note)
        if layout.splits:
            splits = dict(layout.splits)
            others = [*layout.others, *filter(is_image, source.files())]
            ignored = f"; ignored: {some(others)}" if others else ""
            logger.info(f"{source.path} has the folders {', '.join(splits)}: each is a split{ignored}")
        else:
            splits = {source.path.resolve().name: source}
            logger.info(f"{source.path} has no folders train and val: its folders are the classes of one split")
    for text in extra_splits:
        name, _, path = text.partition("=")
        if not name or not path or "/" in name:
            raise UsageError(f"--split {text}: expected NAME=PATH with unique names that contain no /")
        if name in splits:
            raise UsageError(f"--split {text}: {splits[name].path} is already the split {name}; choose another name")
        splits[name] = open_source(Path(path))
    if not splits:
        raise UsageError("check-data: expected a folder or tar archive of class folders, or --split NAME=PATH")
    return splits


def _count(name: str, source: Source, tree: Tree, few: int) -> Split:
    images: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    outside: list[str] = []
    for file in tree.files:
        label, separator, _ = file.partition("/")
        if is_image(file):
            if separator:
                images[label] += 1
            else:
                outside.append(file)
        elif separator:
            others[posixpath.splitext(file)[1].lower()] += 1
    classes = {label: images[label] for label in source.folders()}
    sizes = [count for count in classes.values() if count]
    return Split(
        name,
        source.path,
        classes,
        Listed(label for label, count in classes.items() if not count),
        Listed(label for label, count in classes.items() if 0 < count < few),
        max(sizes) / min(sizes) if sizes else None,
        ListedMapping(sorted(others.items()), others.total()),
        Listed(outside),
    )


def _missing(splits: Sequence[Split]) -> dict[str, tuple[str, ...]]:
    labeled = [split for split in splits if split.classes]  # a test set may be unlabeled
    lacking = {
        label: tuple(split.name for split in labeled if label not in split.classes)
        for label in sorted({label for split in labeled for label in split.classes})
    }
    return ListedMapping((label, names) for label, names in lacking.items() if names)
