"""The evaluation of detectors: options, data, and the records of single images.

The preprocessing is that of mmdetection 2.19 with the authors' configuration. Each image is computed alone, so that its
detections do not depend on the padding of a batch.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from fcvit.data.class_colors import classes_of, read_class_list
from fcvit.data.coco import CocoImages, Instances, find_coco, read_coco
from fcvit.data.transforms.detection import check_size, pad_batch, preprocess
from fcvit.data.transforms.segmentation import decode
from fcvit.errors import DoesNotFit, counted
from fcvit.inference.engines import Engine
from fcvit.metrics.detection import Detections, encode_masks
from fcvit.models.mask_rcnn.masks import paste_mask
from fcvit.models.variants import Preprocessing
from fcvit.tasks.base import Evaluated
from fcvit.tasks.dense import SplitOptions
from fcvit.tasks.detection.figures import DetectionReport
from fcvit.tasks.detection.published import validation_of
from fcvit.tasks.detection.results import RECORD, record
from fcvit.weights.reading import Weights

_SHARED = ("masks", "max_detections", "long_side", "short_side")
"""Options of the network that weights of one evaluation have in common."""


@dataclasses.dataclass(frozen=True)
class Options(SplitOptions):
    """Options of `fcvit eval` for detectors, in addition to `fcvit.evaluation.settings.Settings`."""


class Placement(NamedTuple):
    """The size of an image, (height, width), and the scale factors of the network's input (see `preprocess`)."""

    size: tuple[int, int]
    factors: np.ndarray


@dataclasses.dataclass(frozen=True)
class ResizedPixels:
    """The transform of an evaluation or prediction: the pixels of the network's input, and their placement.

    The pixels have no padding. A prediction has no targets.

    Args:
        scale: Largest length of the longer and of the shorter side in pixels.
    """

    scale: tuple[int, int]

    decode: ClassVar = staticmethod(decode)

    def __call__(self, image: Image.Image, target: Instances | None, index: int, /) -> tuple[np.ndarray, Placement]:
        pixels = np.asarray(image)
        if target is not None:
            check_size(pixels, target)
        resized, factors = preprocess(pixels, self.scale)
        return resized, Placement((image.height, image.width), factors)


class DetectionEvaluator:
    """The evaluator of detectors (see `fcvit.tasks.base.Evaluator`).

    Args:
        loaded: Weights of detectors with the same classes.
        data: Path of a data set in COCO's format (see `fcvit.data.coco.find_coco`), or images with annotated objects.
        options: Options of this evaluation.

    Raises:
        UnreadableFile, DoesNotFit, UsageError: Data, options and weights do not match.
    """

    dtype, outputs, at_once, fixed_preprocessing = RECORD, 0, 1, True

    def __init__(self, loaded: Sequence[Weights], data: Path | CocoImages, options: Options):
        first = loaded[0]
        for weights in loaded:
            if _shared(weights) != _shared(first):
                raise DoesNotFit(
                    f"{weights.source.path} and {first.source.path} differ in their classes, masks, number of "
                    "detections or size of their input; evaluate them separately"
                )
        self.options, self.network = options, first.spec.options
        if isinstance(data, CocoImages):
            images = data
        else:
            layout = find_coco(data)
            if layout is None:
                raise DoesNotFit(
                    f"{data}: no annotations in COCO's format; expected a folder with the folders of images and "
                    "annotations/instances_*.json, or the JSON file"
                )
            images = read_coco(layout, options.chosen(layout))
        listed = read_class_list(Path(options.classes)) if options.classes else None
        if listed is None and first.classes is None:
            if len(images.classes) != first.spec.num_classes:
                raise DoesNotFit(
                    f"{images.file}: {len(images.classes)} categories, but {first.source.path} has "
                    f"{counted(first.spec.num_classes, 'class')} without names; pass the class list with --classes FILE"
                )
            known = classes_of(first, None)._replace(classes=images.classes)
        else:
            known = classes_of(first, listed)
            images = images.with_classes(known.classes)
        self.classes, self.palette = known.classes, np.array(known.palette, np.uint8)
        self.dataset = images
        annotated = any(mask is not None for target in images.targets for mask in target.masks)
        self.with_masks = self.network.masks and annotated
        notes = list(images.notes)
        if self.network.masks and not annotated:
            notes.append(f"{images.file}: no annotation has a mask, so only boxes are evaluated")
        self.notes = tuple(notes)
        self.rule = "categories have the names of the classes"
        self.validation = validation_of(images)
        self.about: Mapping[str, Any] = {"annotations": str(images.file), "with_masks": self.with_masks}

    def identity(self) -> dict[str, Any]:
        network = dataclasses.asdict(self.network)
        return {"classes": [c.id for c in self.classes], "with_masks": self.with_masks, "network": network}

    def transform(self, preprocessing: Preprocessing) -> ResizedPixels:
        return ResizedPixels((self.network.long_side, self.network.short_side))

    def compute(self, engine: Engine, images: Sequence[np.ndarray], targets: Sequence[Placement]) -> list[Detections]:
        """Return the detections in each image, in pixels of the original image."""
        batch, sizes = pad_batch(images)
        detections = engine.detect(batch, np.array(sizes), np.stack([target.factors for target in targets]))
        results = []
        for one, target in zip(detections, targets, strict=True):
            masks = None
            if self.with_masks and one.mask_logits is not None:
                pairs = zip(one.mask_logits, one.boxes, strict=True)
                # One at a time, because the masks of a large image need much memory.
                masks = [encode_masks(paste_mask(*pair, target.size)[None])[0] for pair in pairs]
            results.append(Detections(one.boxes, one.scores, one.labels, masks))
        return results

    def record(
        self, outputs: Sequence[Detections], targets: Sequence[Placement], reference: Sequence[Detections] | None
    ) -> tuple[np.ndarray, Sequence[bytes]]:
        """Record the detections of an image."""
        row, content = record(outputs[0], None if reference is None else reference[0])
        return row[None], [content]

    def report(self, evaluated: Evaluated) -> DetectionReport:
        return DetectionReport(self, evaluated)

    def picture(self, index: int) -> Image.Image:
        """Return an image of the data set, for the pictures of the report.

        Raises:
            OSError, BadImages: The image can no longer be read.
        """
        name, location = self.dataset.names[index], self.dataset.locations[index]
        return decode(io.BytesIO(location.read()), name)


def _shared(weights: Weights) -> list[object]:
    """Return what weights of one evaluation must have in common."""
    return [weights.spec.num_classes, *(getattr(weights.spec.options, name) for name in _SHARED)]
