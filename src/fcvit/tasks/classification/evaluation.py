"""Evaluation of classifiers: the labeled images, and the record of each image and configuration."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from fcvit.data.class_folders import LabeledImages, read_dataset, read_real
from fcvit.data.class_indices import assign_classes
from fcvit.data.classes import Classes, ClassName, imagenet, read_classes, resolve_classes
from fcvit.data.transforms.preprocess import CenterCrop
from fcvit.errors import DoesNotFit, UsageError
from fcvit.evaluation.published import Validation
from fcvit.evaluation.settings import MOVABLE, absolute
from fcvit.inference.engines import Engine
from fcvit.metrics import classification as metrics
from fcvit.models.variants import VALIDATION_IMAGES, Preprocessing
from fcvit.tasks.base import Evaluated
from fcvit.tasks.classification.figures import ClassificationReport
from fcvit.tasks.classification.results import file_and_hash
from fcvit.weights.reading import Weights

PRESENT = "present"  # value of --class-subset for the classes of the data


@dataclasses.dataclass(frozen=True)
class Options:
    """The evaluation options of classifiers, in addition to the settings of all tasks.

    Args:
        list_file: File with one image path and class index per line.
        classes: Class list of the model: CSV with id and name, or one class per line (default: from the weights file).
        subset: Evaluate only this many images, a random sample with the class proportions of the data.
        seed: Random seed of --subset (default: 0).
        real: real.json of ImageNet-ReaL, to also report the accuracy with its labels.
        class_subset: Restrict predictions to these classes: a class list, or present for the classes of the data.
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
    """The evaluator of classifiers (see `fcvit.tasks.base.Evaluator`).

    Args:
        loaded: Weights of models with the same classes.
        data: Path of class folders, of the images in a list, or of a tar. Alternatively, labeled images.
        options: Options of this evaluation.

    Attributes:
        classes: All classes of the model.
        columns: Indices of the candidate classes, to which predictions are restricted.
        candidates: Candidate classes.
        labels: Index of each image's true class among the candidate classes.
        k: 5, or the number of candidate classes if it is smaller.
        real: ImageNet-ReaL labels of each image, or None if they were not given.

    Raises:
        UnreadableFile, DoesNotFit, UsageError: Data, lists, options and weights do not match.
    """

    at_once, fixed_preprocessing = None, False

    def __init__(self, loaded: Sequence[Weights], data: Path | LabeledImages, options: Options):
        if options.seed is not None and options.subset is None:
            raise UsageError("eval: --seed is only used with --subset; add --subset or omit --seed")
        self.options = options
        given = read_classes(Path(options.classes)) if options.classes else None
        first = loaded[0]
        count = first.spec.num_classes
        for weights in loaded:
            if weights.spec.num_classes != count:
                raise DoesNotFit(
                    f"{weights.source.path} has {weights.spec.num_classes} classes and {first.source.path} has "
                    f"{count}; evaluate them separately"
                )
        known = given or first.classes
        list_file = Path(options.list_file) if options.list_file else None
        images = data if isinstance(data, LabeledImages) else read_dataset(data, list_file, known, count)
        # If the weights contain no class names, the folder names are used.
        named = resolve_classes(given, first.classes, count)
        self.classes = tuple(ClassName(label, label) for label in images.mapping) if images.counted else named
        for weights in loaded[1:]:
            if resolve_classes(given, weights.classes, count) != named:
                raise DoesNotFit(
                    f"{weights.source.path} and {first.source.path} have different class names; evaluate them "
                    "separately, or pass the class list with --classes FILE"
                )
        self.dataset = images if options.subset is None else images.subset(options.subset, options.seed or 0)
        self.rule = images.rule
        self.notes = (*images.notes, f"{images.rule}: {_mapping(images.mapping)}")
        self.validation = _validation(self.dataset)
        self.columns = self._columns(set(np.unique(np.asarray(images.labels)).tolist()), known)
        self.labels = np.searchsorted(self.columns, np.asarray(self.dataset.labels, np.int64))
        self.candidates: Classes = tuple(self.classes[column] for column in self.columns)
        self.outputs, self.k = count, min(5, len(self.columns))
        self.real = read_real(Path(options.real), self.dataset) if options.real else None
        if self.real is not None and [c.id for c in self.classes] != [c.id for c in imagenet()]:
            raise DoesNotFit(
                "--real: the labels need ImageNet's 1,000 classes in their usual order, but the model's class ids "
                "differ; pass the correct class list with --classes FILE"
            )
        fields = [("rank", "<i4"), ("loss", "<f8"), ("top", "<i4", (self.k,)), ("probability", "<f8", (self.k,))]
        # The maximum and the sum of the absolute differences from the logits of the reference configuration.
        self.dtype = np.dtype([*fields, ("largest", "<f8"), ("total", "<f8")])

    def _columns(self, present: set[int], known: Classes | None) -> np.ndarray:
        """Return the indices of the candidate classes. `present` are the classes of the data without --subset."""
        class_subset, count = self.options.class_subset, len(self.classes)
        if class_subset is None:
            return np.arange(count)
        if class_subset == PRESENT:
            chosen = present
        else:
            ids = sorted(c.id for c in read_classes(Path(class_subset)))
            if all(label.isdecimal() for label in ids) and known is None:
                raise DoesNotFit(f"{class_subset}: this list contains only numbers; expected class ids, one per line")
            source = f"classes of {Path(class_subset).name}"
            chosen = set(assign_classes(ids, self.classes, count, source).mapping.values())
        if outside := present - chosen:
            raise DoesNotFit(
                f"{class_subset}: the data has images of {len(outside)} classes that are not in the list, for example "
                f"{self.classes[min(outside)].id}; add these classes or remove their images"
            )
        if len(chosen) < 2:
            raise DoesNotFit("--class-subset: only one class; expected at least 2")
        return np.array(sorted(chosen))

    def identity(self) -> dict[str, Any]:
        real = self.real and [sorted(classes) for classes in self.real]
        return {"classes": _sha256([c.id for c in self.candidates]), "real_labels": _sha256(real)}

    @property
    def about(self) -> dict[str, Any]:
        options = self.options
        return {
            "list": file_and_hash(options.list_file),
            "mapping": dict(self.dataset.mapping),
            "subset": options.subset and {"images": options.subset, "seed": options.seed or 0},
            "model_classes": len(self.classes),
            "class_list": file_and_hash(options.classes),
            "class_subset": file_and_hash(options.class_subset),
            "real_labels": file_and_hash(options.real),
        }

    def transform(self, preprocessing: Preprocessing) -> CenterCrop:
        return CenterCrop(preprocessing)

    def compute(self, engine: Engine, images: Sequence[np.ndarray], targets: Sequence[Any]) -> np.ndarray:
        return engine(np.asarray(images))

    def record(
        self, outputs: np.ndarray, targets: Sequence[int], reference: np.ndarray | None
    ) -> tuple[np.ndarray, Sequence[bytes]]:
        """Record for each image the rank of its true class, the loss, and the top classes with their probabilities."""
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
    """Return labels with their indices as text: all, or only the first and last three of more than ten."""
    pairs = [f"{label} = {index}" for label, index in sorted(mapping.items(), key=lambda pair: pair[1])]
    return ", ".join(pairs if len(pairs) <= 10 else [*pairs[:3], "...", *pairs[-3:]])


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _validation(images: LabeledImages) -> Validation:
    """Return whether the images are all or part of ImageNet's validation images, judged by their names."""
    numbers = images.validation_numbers()
    if numbers is None or len(set(numbers)) < len(numbers):
        return "other"
    return "all" if len(numbers) == VALIDATION_IMAGES else "part"
