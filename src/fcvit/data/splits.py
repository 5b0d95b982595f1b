"""Distinguish the folders of splits from the folders of classes. All commands use this rule."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fcvit.errors import UnreadableFile

if TYPE_CHECKING:
    from fcvit.data.sources import Source

Role = Literal["train", "val", "test"]
# Words that name a split.
_NAMES: dict[Role, str] = {
    "train": "train training trn 训练 训练集",
    "val": "val valid validation validate dev eval evaluation holdout 验证 验证集",
    "test": "test testing tst 测试 测试集",
}
_WORDS: dict[str, Role] = {word: split for split, words in _NAMES.items() for word in words.split()}
# Generic words that are ignored in the names of folders.
_FILLER = "data|datasets?|dir|folders?|images?|imgs?|photos?|pics?|pictures|sets?|split"
_WORD = re.compile(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])")
_PART = re.compile(r"[-_.]?(part[-_.]?)?\d+([-_]of[-_]\d+)?([-_.][0-9a-f]{8,})*$")  # the number of a file, and a hash
_GLUED = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})({_FILLER})")


def role(name: str) -> tuple[Role, tuple[str, ...]] | None:
    """Return the split that a folder's name contains and the other words in the name, or None without a split.

    Case, numbers and words such as "set" and "images" are ignored: Training, seg_train, TrainSet, train2017.
    """
    words: list[str] = []
    for word in _WORD.findall(name):
        glued = _GLUED.fullmatch(word.lower())
        words += glued.groups() if glued else [word.lower()]
    roles = [_WORDS[word] for word in words if word in _WORDS]
    if len(roles) != 1:
        return None
    return roles[0], tuple(word for word in words if word not in _WORDS and not re.fullmatch(_FILLER, word))


def with_role(names: Iterable[str], wanted: Role) -> list[str]:
    """Return the names that name a training, validation or test split."""
    return [name for name in names if (named := role(name)) and named[0] == wanted]


def by_role(names: Iterable[str]) -> list[str]:
    """Return the names of splits: training, validation and test splits, and the others, each sorted by name."""
    order = [*_NAMES]
    return sorted(names, key=lambda name: (order.index(named[0]) if (named := role(name)) else len(order), name))


def split_folders(root: Path, stems: Sequence[str]) -> list[str]:
    """Return the split that each file of a data set belongs to: its name without the number, or "" for a single split.

    Args:
        root: Path of the data set, for messages.
        stems: Names of the files without the ending, such as train-00000-of-00294 or imagenet-val-0012.

    Raises:
        UnreadableFile: Only some of the files are named after a split.
    """
    names = [_PART.sub("", stem) for stem in stems]
    named = {name: role(name) is not None for name in names}
    if len(named) == 1 or not any(named.values()):
        return [""] * len(names)
    if others := [name for name, is_split in named.items() if not is_split]:
        raise UnreadableFile(
            f"{root}: contains files of splits and others ({others[0][:60]}); pass the files of one split with a "
            "quoted pattern"
        )
    return names


@dataclasses.dataclass(frozen=True)
class Layout:
    """The splits or class folders of a data set.

    Attributes:
        source: The data set, inside its wrapper folders.
        splits: Name -> split, inside a folder that repeats its name. Training splits come first, then validation, then
            test. If empty, the folders in `source` are the classes.
        others: Folders next to the splits.
        doubt: Name of a single folder that can be a split or a class, or else "".
        notes: Readable notes on how the folders were interpreted.
    """

    source: "Source"
    splits: "Mapping[str, Source]"
    others: tuple[str, ...]
    doubt: str
    notes: tuple[str, ...]

    def named(self, wanted: Role) -> list[str]:
        """Return the names of the training, validation or test splits."""
        return with_role(self.splits, wanted)


def find_layout(source: "Source", classes: Collection[str] = ()) -> Layout:
    """Find the splits of a data set, if it has any.

    Folders are splits if all of these conditions are true:

    - At least two are named after different splits (train and val).
    - The rest of their names is equal, or they contain the same folders.
    - At least one of them contains folders instead of images.

    If all folders are named after known classes, they are classes.

    Args:
        source: Data set.
        classes: Ids and names of the known classes.

    Raises:
        UnreadableFile: A folder cannot be read.
    """
    if source.content.labeled:  # the data itself tells its splits and classes
        names = by_role(source.content.splits) if not source.inner else []
        return Layout(source, {name: source.child(name) for name in names}, (), "", ())
    inner = _unwrap(source, classes)
    wrapped = (f"{source.path}: the images are in {inner.path}, which is used as the data set",)
    layout = Layout(inner, {}, (), "", wrapped if inner != source else ())
    children = {name: inner.child(name) for name in inner.folders()}
    if set(children) <= set(classes):
        return layout
    roles = {name: named for name in children if (named := role(name))}
    among_images = bool(roles) and any(name not in roles and child.has_images() for name, child in children.items())
    subfolders = {name: set(children[name].folders()) for name in roles}
    deep = [name for name in roles if subfolders[name] and not (among_images and children[name].has_images())]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, (split, rest) in roles.items():
        # Folders with the same classes are splits of one data set even if they are named train and val_small.
        same = (
            key
            for key, names in groups.items()
            if all(split != roles[other][0] and _similar(subfolders[name], subfolders[other]) for other in names)
        )
        groups.setdefault(rest if rest in groups else next(same, rest), []).append(name)
    sets = [
        names
        for names in groups.values()
        if len({roles[name][0] for name in names}) > 1
        and (any(name in deep for name in names) or len(names) == len(children))
        # A folder of images named train is a class (railway trains), even next to a folder named test.
        and (not deep or all(name in deep or roles[name][0] != "train" for name in names))
    ]
    if sets:
        # Prefer train and test over train_masks and test_masks.
        chosen = max(sets, key=lambda names: (not roles[names[0]][1], len(names)))
        chosen = sorted(chosen, key=lambda name: (list(_NAMES).index(roles[name][0]), name))
    elif len(deep) == 1:
        (name,) = chosen = deep
        with_images = [child for other, child in children.items() if other != name and child.has_images_below()]
        if (
            len(with_images) > 1
            and not any(child.has_images() for child in (children[name], *with_images))
            and not any(_similar(subfolders[name], set(child.folders())) for child in with_images)
        ):
            return layout  # each class has its own subfolders
        if with_images:
            return dataclasses.replace(layout, doubt=name)
    else:
        return dataclasses.replace(layout, notes=layout.notes + _shared_folders(inner, children))
    splits = {name: _unwrap_split(children[name]) for name in chosen}
    return dataclasses.replace(layout, splits=splits, others=tuple(name for name in children if name not in splits))


def _similar(first: set[str], second: set[str]) -> bool:
    """Return True if two sets of folders are probably the same classes: at least two and half of them are equal."""
    return len(first & second) >= max(2, min(len(first), len(second)) / 2)


def _shared_folders(source: "Source", children: "Mapping[str, Source]") -> tuple[str, ...]:
    """Return a note if all folders contain the same subfolders, which can then be the classes."""
    shared: set[str] | None = None
    for child in children.values():
        shared = set(child.folders()) if shared is None else shared.intersection(child.folders())
        if len(shared) < 2 or child.has_images():
            return ()
    if not shared or len(children) < 2:
        return ()
    return (
        f"{source.path}: the folders {', '.join([*children][:3])}, ... are used as classes, but each contains the "
        f"folders {', '.join(sorted(shared)[:3])}, ...; if these are the classes, pass one of the outer folders",
    )


def _unwrap(source: "Source", classes: Collection[str]) -> "Source":
    """Return the data set inside its wrapper folders, such as the top folder of an unpacked archive."""
    while folders := source.folders():
        wrappers = [
            name
            for name in folders
            if len(folders) == 1
            or (
                _is_generic(name)
                and not any(source.child(other).has_images_below() for other in folders if other != name)
            )
        ]
        if len(wrappers) != 1 or wrappers[0] in classes:
            break
        child = source.child(wrappers[0])
        inner = child.folders()
        if child.has_images() or not inner:
            break
        if role(wrappers[0]) and len(inner) > 1 and sum(role(name) is not None for name in inner) < 2:
            break  # a single split, not the data set
        source = child
    return source


def _unwrap_split(split: "Source") -> "Source":
    """Return the split inside folders that repeat its name or are generic (seg_train/seg_train, train/images)."""
    while len(folders := split.folders()) == 1 and not split.has_images():
        child = split.child(folders[0])
        repeats = folders[0].lower() == split.path.name.lower() or _is_generic(folders[0])
        if not repeats or not child.folders():
            break
        split = child
    return split


def _is_generic(name: str) -> bool:
    """Return True if a folder's name consists only of words such as "images" and "data"."""
    words = _WORD.findall(name)
    return bool(words) and all(re.fullmatch(_FILLER, word.lower()) for word in words)
