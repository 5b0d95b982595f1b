"""The rule by which class folders, or the labels of a list, become the indices of a model's classes."""

import collections
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fcvit.data.classes import Classes, imagenet
from fcvit.errors import DoesNotFit
from fcvit.models.variants import IMAGENET_CLASSES
from fcvit.text import some

_LENGTH = 60  # characters of a label in a message
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_REMEDY = "name the model's classes, in its order, with --classes FILE"


class Assignment(NamedTuple):
    """Label -> class index; in words, by which rule; whether labels were only counted."""

    mapping: dict[str, int]
    rule: str
    counted: bool = False


def assign_labels(labels: Sequence[str], classes: Classes | None, num_classes: int, source: Path) -> Assignment:
    """Map the labels of a list to class indices, and say in words by which rule.

    Numbers, also 3.0 or 003, are indices that count from 0. Where they cannot be, or where both give the same
    classes, they may be ids (or unique names) of known classes. Other labels go by `assign_classes`.

    Args:
        labels: sorted.
        source: the list, for messages.

    Raises:
        DoesNotFit: the labels fit neither reading, or two that contradict each other.
    """
    numbers = {label: number for label in labels if (number := _number(label)) is not None}
    if len(numbers) < len(labels):
        return assign_classes(labels, classes, num_classes, "labels of the list")
    indices = {label: int(n) for label, n in numbers.items() if n.is_integer() and 0 <= n < num_classes}
    outside = sorted((label for label in labels if label not in indices), key=numbers.__getitem__)
    for what, mapping in ((what, _look_up(labels, table, _value)) for what, table in _tables(classes)):
        if not outside and (contested := [label for label, index in mapping.items() if index != indices[label]]):
            label = min(contested, key=numbers.__getitem__)
            raise DoesNotFit(
                f"{source}: is {label[:_LENGTH]} the index of a class, or the {what} of class {mapping[label]}? if "
                "indices are meant, give the classes ids that are no numbers with --classes FILE; if not, write "
                "into the list what is no number"
            )
        if outside and len(mapping) == len(labels):
            return Assignment(mapping, f"the numbers in {source.name} are the model's class {what}s")
    if not outside:
        return Assignment(indices, f"the numbers in {source.name} are class indices")
    hint = ""
    if not all(n.is_integer() for n in numbers.values()):
        hint = "; an index is a whole number"
    elif min(numbers.values()) < 0:
        hint = "; leave out images without a class"
    elif min(numbers.values()) == 1 and max(numbers.values()) == num_classes:
        hint = "; they count from 1: subtract 1 from each"
        if num_classes == IMAGENET_CLASSES:
            hint += ", but ImageNet's devkit has another order: write WordNet ids in place of its numbers"
    elif classes:
        hint = f", and no ids of its classes ({_some([c.id for c in classes])})"
    raise DoesNotFit(
        f"{source}: class {_some(outside)} for a model with {num_classes} outputs; expected 0 to {num_classes - 1}"
        + hint
    )


def assign_classes(labels: Sequence[str], classes: Classes | None, num_classes: int, what: str) -> Assignment:
    """Map names of classes to indices, and say in words by which rule.

    1. Where classes are known (the weights', or those of `--classes`): their ids, or their names where those are
       unique; a subset may be there.
    2. Else, for 1,000 outputs, ImageNet's WordNet ids; a subset may be there.
    3. Else, where no classes are known, the sorted names (as torchvision counts them), if there are as many as
       outputs, and unless numbers among them sort otherwise as text.

    Composed and decomposed letters (Unicode's NFC and NFD) are the same.

    Args:
        labels: sorted.
        what: they are, for messages.

    Raises:
        DoesNotFit: none of this applies, or some labels are known classes and others are not.
    """
    tables = [(f"the model's class {name}s", table) for name, table in _tables(classes)]
    if num_classes == IMAGENET_CLASSES:
        tables.append(("ImageNet's WordNet ids", {c.id: index for index, c in enumerate(imagenet())}))
    for table_name, table in tables:
        mapping = _look_up(labels, table, composed)
        unknown = [label for label in labels if label not in mapping]
        if not unknown:
            return Assignment(mapping, f"{what} are {table_name}")
        if len(unknown) < len(labels):
            raise DoesNotFit(f"{len(unknown)} of {len(labels)} {what} are not among {table_name}: {_some(unknown)}")
    if classes:
        raise DoesNotFit(
            f"no {what} ({_some(labels)}) are classes of the model ({_some([c.id for c in classes])}); "
            f"rename them, or {_REMEDY}"
        )
    if len(labels) != num_classes:
        raise DoesNotFit(f"{len(labels)} {what} ({_some(labels)}) for a model with {num_classes} outputs; {_REMEDY}")
    numbers = [number for label in labels if (number := _number(label)) is not None]
    if numbers != sorted(numbers):
        raise DoesNotFit(
            f"{what} are numbers, and sorted as text (0, 1, 10, 2) they are other classes than counted; {_REMEDY}"
        )
    rule = f"the weights name no classes: the {num_classes} {what} are counted in sorted order"
    by_value = sorted(labels, key=lambda label: re.sub(r"\d+", lambda number: number[0].zfill(20), label))
    if moved := [label for label, other in zip(labels, by_value, strict=True) if label != other]:
        rule += f", as text: {moved[0][:_LENGTH]} before {by_value[labels.index(moved[0])][:_LENGTH]}"
    return Assignment({label: index for index, label in enumerate(labels)}, rule, counted=True)


def composed(text: str) -> str:
    """Return the text in the one form in which equal letters are equal (NFC); macOS decomposes file names."""
    return unicodedata.normalize("NFC", text)


def _tables(classes: Classes | None) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the ids, then the unique names, each with its class."""
    if classes:
        yield "id", {c.id: index for index, c in enumerate(classes)}
        names = collections.Counter(c.name for c in classes)
        yield "name", {c.name: index for index, c in enumerate(classes) if names[c.name] == 1}


def _look_up(labels: Sequence[str], table: Mapping[str, int], form: Callable[[str], str]) -> dict[str, int]:
    """Find labels as they stand, else in a common form, where only one entry has it."""
    times = collections.Counter(map(form, table))
    forms = {form(key): index for key, index in table.items() if times[form(key)] == 1}
    indices = {label: table.get(label, forms.get(form(label))) for label in labels}
    return {label: index for label, index in indices.items() if index is not None}


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text := text.strip()) else None


def _value(text: str) -> str:
    """Return a form in which equal numbers are equal."""
    number = _number(text)
    return composed(text) if number is None else repr(number + 0.0)


def _some(values: Sequence[str]) -> str:
    return some(values, length=_LENGTH)
