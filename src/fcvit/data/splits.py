"""Which folders are splits of a data set, and which are its classes: the one rule of all commands."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Literal

from fcvit.data.sources import Source

Role = Literal["train", "val", "test"]
# Words in the names of split folders.
_NAMES: dict[Role, str] = {
    "train": "train training trn 训练 训练集",
    "val": "val valid validation validate dev eval evaluation holdout 验证 验证集",
    "test": "test testing tst 测试 测试集",
}
_WORDS: dict[str, Role] = {word: split for split, words in _NAMES.items() for word in words.split()}
# Words beside them that say nothing of the data.
_FILLER = "data|datasets?|dir|folders?|images?|imgs?|photos?|pics?|pictures|sets?|split"
_WORD = re.compile(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])")
_GLUED = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})({_FILLER})")


def role(name: str) -> tuple[Role, tuple[str, ...]] | None:
    """Return the split that a folder's name speaks of, and the other words in the name; None: it names no split.

    Case, numbers and words such as "set" and "images" do not matter: Training, seg_train, TrainSet, train2017.
    """
    words: list[str] = []
    for word in _WORD.findall(name):
        glued = _GLUED.fullmatch(word.lower())
        words += glued.groups() if glued else [word.lower()]
    roles = [_WORDS[word] for word in words if word in _WORDS]
    if len(roles) != 1:
        return None
    return roles[0], tuple(word for word in words if word not in _WORDS and not re.fullmatch(_FILLER, word))


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the folders of a data set are.

    Attributes:
        source: the data set, below folders that only wrap it.
        splits: name -> the split, below a folder that repeats it; training first, then validation, then test. Empty:
            the folders of `source` are its classes.
        others: folders beside the splits.
        doubt: the only folder that is named like a split, where it may be a split or a class; else "".
        notes: what was taken for what, for people.
    """

    source: Source
    splits: Mapping[str, Source]
    others: tuple[str, ...]
    doubt: str
    notes: tuple[str, ...]

    def named(self, wanted: Role) -> list[str]:
        """Return the names of the splits of a role."""
        return [name for name in self.splits if (named := role(name)) and named[0] == wanted]


def find_layout(source: Source, classes: Collection[str] = ()) -> Layout:
    """Find the splits of a data set, or that it has none.

    Folders are splits where at least two are named as different ones (train and val), their names agree but for
    that or they hold the same folders, and at least one of them holds folders instead of images. Folders that are
    all named as known classes are classes.

    Args:
        classes: ids and names of the classes that are known.

    Raises:
        UnreadableFile: a folder cannot be read.
    """
    inner = _unwrap(source, classes)
    wrapped = (f"{source.path} holds its images in {inner.path}: taken for the data set",)
    layout = Layout(inner, {}, (), "", wrapped if inner != source else ())
    children = {name: inner.child(name) for name in inner.folders()}
    if set(children) <= set(classes):
        return layout
    roles = {name: named for name in children if (named := role(name))}
    among_images = bool(roles) and any(name not in roles and child.has_images() for name, child in children.items())
    below = {name: set(children[name].folders()) for name in roles}
    deep = [name for name in roles if below[name] and not (among_images and children[name].has_images())]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, (split, rest) in roles.items():
        # Folders with the same classes are splits of one data set, also where they are train and val_small.
        same = (
            key
            for key, names in groups.items()
            if all(split != roles[other][0] and _alike(below[name], below[other]) for other in names)
        )
        groups.setdefault(rest if rest in groups else next(same, rest), []).append(name)
    sets = [
        names
        for names in groups.values()
        if len({roles[name][0] for name in names}) > 1
        and (any(name in deep for name in names) or len(names) == len(children))
        # A folder of images named train is a class, of railways, also where a class test is beside it.
        and (not deep or all(name in deep or roles[name][0] != "train" for name in names))
    ]
    if sets:
        # Beside train and test, train_masks and test_masks are something else.
        chosen = max(sets, key=lambda names: (not roles[names[0]][1], len(names)))
        chosen = sorted(chosen, key=lambda name: (list(_NAMES).index(roles[name][0]), name))
    elif len(deep) == 1:
        (name,) = chosen = deep
        holding = [child for other, child in children.items() if other != name and child.has_images_below()]
        if (
            len(holding) > 1
            and not any(child.has_images() for child in (children[name], *holding))
            and not any(_alike(below[name], set(child.folders())) for child in holding)
        ):
            return layout  # classes of which each has folders
        if holding:
            return dataclasses.replace(layout, doubt=name)
    else:
        return dataclasses.replace(layout, notes=layout.notes + _shared_folders(inner, children))
    splits = {name: _repeated(children[name]) for name in chosen}
    return dataclasses.replace(layout, splits=splits, others=tuple(name for name in children if name not in splits))


def _alike(some: set[str], others: set[str]) -> bool:
    """Report whether two sets of folders are most likely the same classes."""
    return len(some & others) >= max(2, min(len(some), len(others)) / 2)


def _shared_folders(source: Source, children: Mapping[str, Source]) -> tuple[str, ...]:
    """Note it where all folders hold the same folders: these may be the classes."""
    shared: set[str] | None = None
    for child in children.values():
        shared = set(child.folders()) if shared is None else shared.intersection(child.folders())
        if len(shared) < 2 or child.has_images():
            return ()
    if not shared or len(children) < 2:
        return ()
    return (
        f"each folder in {source.path} holds the folders {', '.join(sorted(shared)[:3])}, ...: if these are the "
        f"classes, name one of {', '.join([*children][:3])}, ... instead, which are taken for classes",
    )


def _unwrap(source: Source, classes: Collection[str]) -> Source:
    """Go into a folder that is alone and holds folders, as unpacked archives have it."""
    while folders := source.folders():
        alone = [
            name
            for name in folders
            if len(folders) == 1
            or (
                _says_nothing(name)
                and not any(source.child(other).has_images_below() for other in folders if other != name)
            )
        ]
        if len(alone) != 1 or alone[0] in classes:
            break
        child = source.child(alone[0])
        inside = child.folders()
        if child.has_images() or not inside:
            break
        if role(alone[0]) and len(inside) > 1 and sum(role(name) is not None for name in inside) < 2:
            break  # a split without others, not the whole
        source = child
    return source


def _repeated(split: Source) -> Source:
    """Go into a folder that repeats its split's name, or names the same split (seg_train/seg_train, train/images)."""
    while len(folders := split.folders()) == 1 and not split.has_images():
        child = split.child(folders[0])
        repeats = folders[0].lower() == split.path.name.lower() or _says_nothing(folders[0])
        if not repeats or not child.folders():
            break
        split = child
    return split


def _says_nothing(name: str) -> bool:
    """Report whether a folder's name has only words such as "images" and "data"."""
    words = _WORD.findall(name)
    return bool(words) and all(re.fullmatch(_FILLER, word.lower()) for word in words)
