"""Which folders are splits of a data set, and which are its classes: the one rule of all commands."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Literal

from fcvit.data.sources import Source

Role = Literal["train", "val", "test"]
# Words in the names of split folders.
_NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training", "trn", "训练", "训练集"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation", "holdout", "验证", "验证集"),
    "test": ("test", "testing", "tst", "测试", "测试集"),
}
_WORDS = {word: split for split, words in _NAMES.items() for word in words}
# Words beside them that say nothing of the data.
_FILLERS = frozenset(
    re.findall(
        r"\w+",
        """
    data dataset datasets dir folder folders image images img imgs photo photos pic pics pictures set sets split
""",
    )
)
_WORD = re.compile(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])")
_GLUED = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})({'|'.join(sorted(_FILLERS))})")


def role(name: str) -> tuple[Role, tuple[str, ...]] | None:
    """Return the split that a folder's name speaks of, and the other words in the name; None: it names no split.

    Case, numbers and words such as "set" and "images" do not matter: Training, seg_train, TrainSet, train2017.
    """
    words: list[str] = []
    for word in _WORD.findall(name):
        word = word.lower()
        glued = _GLUED.fullmatch(word)
        words += glued.groups() if glued else [word]
    roles = [_WORDS[word] for word in words if word in _WORDS]
    if len(roles) != 1:
        return None
    return roles[0], tuple(word for word in words if word not in _WORDS and word not in _FILLERS)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the folders of a data set are.

    Attributes:
        source: the data set, below folders that only wrap it.
        splits: name -> the split, below a folder that repeats it; training first, then validation, then test. Empty:
            the folders of `source` are its classes.
        roles: of the same names.
        others: folders beside the splits.
        doubt: the only folder that is named like a split, where it may be a split or a class; else "".
        notes: what was taken for what, for people.
    """

    source: Source
    splits: Mapping[str, Source]
    roles: Mapping[str, Role]
    others: tuple[str, ...]
    doubt: str
    notes: tuple[str, ...]

    def named(self, wanted: Role) -> list[str]:
        """Return the names of the splits of a role."""
        return [name for name, has in self.roles.items() if has == wanted]


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
    source, notes = _unwrap(source, classes)
    folders = source.folders()
    nothing = Layout(source, {}, {}, (), "", notes)
    if set(folders) <= set(classes):
        return nothing
    roles = {name: named for name in folders if (named := role(name))}
    if not roles:
        return _noted(nothing, folders)
    among_images = any(name not in roles and source.child(name).has_images() for name in folders)
    deep = {
        name
        for name in roles
        if source.child(name).folders() and not (among_images and source.child(name).has_images())
    }
    groups: dict[tuple[str, ...], list[str]] = {}
    below = {name: set(source.child(name).folders()) for name in roles}
    for name, (split, rest) in roles.items():
        # Folders with the same classes are splits of one data set, also where they are train and val_small.
        same = (
            key
            for key, names in groups.items()
            if all(split != roles[other][0] and _alike(below[name], below[other]) for other in names)
        )
        groups.setdefault(rest if rest in groups else next(same, rest), []).append(name)
    sets = [names for names in groups.values() if len({roles[name][0] for name in names}) > 1]
    sets = [names for names in sets if any(name in deep for name in names) or len(names) == len(folders)]
    # A folder of images named train is a class, of railways, also where a class test is beside it.
    sets = [names for names in sets if all(name in deep or roles[name][0] != "train" for name in names) or not deep]
    if not sets:
        return _of_one(
            nothing, folders, [name for name in roles if name in deep], {n: r for n, (r, _) in roles.items()}
        )
    order = list(_NAMES)
    # Beside train and test, train_masks and test_masks are something else.
    chosen = max(sets, key=lambda names: (not roles[names[0]][1], len(names)))
    names = sorted(chosen, key=lambda name: (order.index(roles[name][0]), name))
    splits = {name: _repeated(source.child(name)) for name in names}
    return dataclasses.replace(
        nothing,
        splits=splits,
        roles={name: roles[name][0] for name in names},
        others=tuple(name for name in folders if name not in splits),
    )


def _of_one(nothing: Layout, folders: list[str], deep: list[str], roles: Mapping[str, Role]) -> Layout:
    """Decide about a single folder of folders that is named as a split."""
    if len(deep) != 1:
        return _noted(nothing, folders)
    name, source = deep[0], nothing.source
    others = [other for other in folders if other != name]
    holding = [child for child in map(source.child, others) if child.has_images_below()]
    inside = set(source.child(name).folders())
    if (
        len(holding) > 1
        and not any(child.has_images() for child in (source.child(name), *holding))
        and not any(_alike(inside, set(child.folders())) for child in holding)
    ):
        return nothing  # classes of which each has folders
    if holding:
        return dataclasses.replace(nothing, doubt=name)
    return dataclasses.replace(
        nothing, splits={name: _repeated(source.child(name))}, roles={name: roles[name]}, others=tuple(others)
    )


def _alike(some: set[str], others: set[str]) -> bool:
    """Report whether two sets of folders are most likely the same classes."""
    return len(some & others) >= max(2, min(len(some), len(others)) / 2)


def _noted(layout: Layout, folders: list[str]) -> Layout:
    """Say it where all folders hold the same folders: these may be the classes."""
    shared: set[str] | None = None
    for child in map(layout.source.child, folders):
        inside = set(child.folders())
        shared = inside if shared is None else shared & inside
        if len(shared) < 2 or child.has_images():
            return layout
    if not shared or len(folders) < 2:
        return layout
    note = (
        f"each folder in {layout.source.path} holds the folders {', '.join(sorted(shared)[:3])}, ...: if these are the "
        f"classes, name one of {', '.join(folders[:3])}, ... instead, which are taken for classes"
    )
    return dataclasses.replace(layout, notes=(*layout.notes, note))


def _unwrap(source: Source, classes: Collection[str]) -> tuple[Source, tuple[str, ...]]:
    """Go into a folder that is alone and holds folders, as unpacked archives have it."""
    inner = source
    while folders := inner.folders():
        alone = [
            name
            for name in folders
            if len(folders) == 1
            or (
                _says_nothing(name)
                and not any(inner.child(other).has_images_below() for other in folders if other != name)
            )
        ]
        if len(alone) != 1 or alone[0] in classes:
            break
        child = inner.child(alone[0])
        if child.has_images() or not child.folders():
            break
        inside = child.folders()
        if role(alone[0]) and len(inside) > 1 and sum(role(name) is not None for name in inside) < 2:
            break  # a split without others, not the whole
        inner = child
    return inner, (
        f"{source.path} holds its images in {inner.path}: taken for the data set",
    ) if inner != source else ()


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
    words = {word.lower() for word in _WORD.findall(name)}
    return bool(words) and words <= _FILLERS
