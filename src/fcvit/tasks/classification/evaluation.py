"""The evaluation of classifiers: labeled images, and a record of every image by every configuration."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from fcvit.data.class_folders import LabeledImages, read_dataset, read_real
from fcvit.data.class_indices import assign_classes
from fcvit.data.classes import Classes, ClassName, imagenet, read_classes, resolve_classes
from fcvit.data.transforms.preprocess import CenterCrop
from fcvit.errors import DoesNotFit, UsageError
from fcvit.evaluation.settings import MOVABLE, absolute
from fcvit.metrics import classification as metrics
from fcvit.models.variants import VALIDATION_IMAGES, Preprocessing
from fcvit.tasks.base import Evaluated
from fcvit.tasks.classification.figures import ClassificationReport
from fcvit.weights.reading import Weights

PRESENT = "present"  # in place of a class list: the classes that the data has


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of an evaluation of classifiers, besides the settings of every task.

    Args:
        list_file: File with an image's path and class index a line.
        classes: Class list of the model: CSV with id and name, or one class per line (default: the file's own).
        subset: Evaluate this many images only, drawn by the seed, every class in its share.
        seed: Draws the subset (default: 0).
        real: The file real.json of ImageNet-ReaL, for accuracy by its labels too.
        class_subset: Restrict the evaluation to these classes: a class list, or present for those of the data.
    """

    list_file: Annotated[str | None, Parameter(name="--list")] = dataclasses.field(default=None, metadata=MOVABLE)
    classes: str | None = dataclasses.field(default=None, metadata=MOVABLE)
    subset: int | None = None
    seed: int | None = None
    real: str | None = dataclasses.field(default=None, metadata=MOVABLE)
    class_subset: str | None = None

    def __post_init__(self) -> None:
        for name in ("list_file", "classes", "real", "class_subset"):
            if (value := getattr(self, name)) and value != PRESENT:
                object.__setattr__(self, name, absolute(value))


class ClassificationEvaluator:
    """Evaluates classifiers (see `fcvit.tasks.base.Evaluator`).

    Args:
        loaded: weights that know the same classes.
        data: class folders, a folder of the images of a list, a tar; or images that are read already.
        options: of this evaluation.

    Attributes:
        classes: all classes of the model.
        columns: indices of the classes that are told apart.
        told_apart: these classes.
        labels: position of each image's class among them.
        k: 5, or the number of classes told apart where that is smaller.
        real: the right classes of each image by ImageNet-ReaL; None: not asked for.

    Raises:
        UnreadableFile, DoesNotFit, UsageError: data, lists, options and weights do not go together.
    """

    def __init__(self, loaded: Sequence[Weights], data: Path | LabeledImages, options: Options):
        if options.seed is not None and options.subset is None:
            raise UsageError("eval: --seed draws a --subset; there is none")
        self.options = options
        given = read_classes(Path(options.classes)) if options.classes else None
        first = loaded[0]
        count = first.spec.num_classes
        for weights in loaded:
            if weights.spec.num_classes != count:
                raise DoesNotFit(
                    f"{weights.source.path} has {weights.spec.num_classes} classes, {first.source.path} {count}; "
                    "evaluate them one by one"
                )
        known = given or first.classes
        list_file = Path(options.list_file) if options.list_file else None
        images = data if isinstance(data, LabeledImages) else read_dataset(data, list_file, known, count)
        # Where the classes are counted, the folders are all that is known of them.
        named = resolve_classes(given, first.classes, count)
        self.classes = tuple(ClassName(label, label) for label in images.mapping) if images.counted else named
        for weights in loaded[1:]:
            if resolve_classes(given, weights.classes, count) != named:
                raise DoesNotFit(
                    f"{weights.source.path} and {first.source.path} name other classes; evaluate them one by one, or "
                    "name the classes with --classes FILE"
                )
        self.dataset = images if options.subset is None else images.subset(options.subset, options.seed or 0)
        self.rule = images.rule
        self.notes = (*images.notes, f"{images.rule}: {_mapping(images.mapping)}")
        self.validation = _validation(self.dataset)
        self.columns = self._columns(set(images.labels), known)
        position = {int(column): place for place, column in enumerate(self.columns)}
        self.labels = np.array([position[label] for label in self.dataset.labels], np.int64)
        self.told_apart: Classes = tuple(self.classes[column] for column in self.columns)
        self.outputs, self.k = count, min(5, len(self.columns))
        self.real = read_real(Path(options.real), self.dataset) if options.real else None
        if self.real is not None and [c.id for c in self.classes] != [c.id for c in imagenet()]:
            raise DoesNotFit(
                "--real: its labels are ImageNet's 1,000 classes in their usual order, which the model's are not, by "
                "their ids; --classes FILE gives it others"
            )
        fields = [("rank", "<i4"), ("loss", "<f8"), ("top", "<i4", (self.k,)), ("probability", "<f8", (self.k,))]
        # The largest absolute difference from the reference's logits, and the sum of all.
        self.dtype = np.dtype([*fields, ("largest", "<f8"), ("total", "<f8")])

    def _columns(self, present: set[int], known: Classes | None) -> np.ndarray:
        """Return the classes that are told apart; `present`: in the data, also where only a part is drawn."""
        class_subset, count = self.options.class_subset, len(self.classes)
        if class_subset is None:
            return np.arange(count)
        if class_subset == PRESENT:
            chosen = present
        else:
            ids = sorted(c.id for c in read_classes(Path(class_subset)))
            if all(label.isdecimal() for label in ids) and known is None:
                raise DoesNotFit(f"{class_subset}: numbers name no classes; expected ids, one a line")
            what = f"classes of {Path(class_subset).name}"
            chosen = set(assign_classes(ids, self.classes, count, what).mapping.values())
        if outside := present - chosen:
            raise DoesNotFit(
                f"{class_subset}: images of {len(outside)} other classes are there, first "
                f"{self.classes[min(outside)].id}"
            )
        if len(chosen) < 2:
            raise DoesNotFit("--class-subset: a single class is told apart from nothing")
        return np.array(sorted(chosen))

    def identity(self) -> dict[str, Any]:
        real = self.real and [sorted(classes) for classes in self.real]
        return {"classes": _sha256([c.id for c in self.told_apart]), "real_labels": _sha256(real)}

    def transform(self, preprocessing: Preprocessing) -> CenterCrop:
        return CenterCrop(preprocessing)

    def record(
        self, outputs: np.ndarray, targets: Sequence[int], reference: np.ndarray | None
    ) -> tuple[np.ndarray, Sequence[bytes]]:
        """Keep of each image the rank of its class, its loss, the best classes and their probabilities."""
        record = np.zeros(len(outputs), self.dtype)
        labels = np.searchsorted(self.columns, targets)
        logits = outputs[:, self.columns]
        record["rank"] = metrics.rank_of_truth(logits, labels)
        record["loss"] = metrics.cross_entropy(logits, labels)
        record["top"] = best = metrics.top_classes(logits, self.k)
        record["probability"] = np.take_along_axis(metrics.softmax(logits), best, axis=1)
        if reference is not None:
            difference = np.abs(logits.astype(np.float64) - reference[:, self.columns])
            record["largest"], record["total"] = difference.max(axis=1), difference.sum(axis=1)
        return record, ()

    def report(self, evaluated: Evaluated) -> ClassificationReport:
        return ClassificationReport(self, evaluated)


def _mapping(mapping: Mapping[str, int]) -> str:
    """Return label and index of all, or of the first and the last where there are many."""
    pairs = [f"{label} {index}" for label, index in sorted(mapping.items(), key=lambda pair: pair[1])]
    return ", ".join(pairs if len(pairs) <= 10 else [*pairs[:3], "...", *pairs[-3:]])


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _validation(images: LabeledImages) -> Literal["all", "part", "other"]:
    """Tell by their names whether these are ImageNet's validation images."""
    numbers = images.validation_numbers()
    if numbers is None or len(set(numbers)) < len(numbers):
        return "other"
    return "all" if len(numbers) == VALIDATION_IMAGES else "part"
