"""Compute the metrics of object detection and instance segmentation with pycocotools.

pycocotools matches and counts. Here its input is built, and its arrays are reduced to the figures of COCO.
"""

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fcvit.frameworks import import_framework

MAX_DETECTIONS = 100
Kind = Literal["bbox", "segm"]
"""What is compared: boxes or masks."""
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # pycocotools' order of areas
_IOU50, _IOU75 = 0, 5  # positions in 0.50, 0.55, ..., 0.95


class Detections(NamedTuple):
    """The detections in an image, in pixels of the original image.

    Attributes:
        boxes: x1, y1, x2, y2, float (k, 4).
        scores: float (k).
        labels: Class index, integer (k).
        masks: Compressed run lengths of each mask from `encode_masks`, or None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: Sequence[Mapping[str, Any]] | None = None


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Encode masks, bool or uint8 (n, H, W), as compressed run lengths: `size` (height, width) and `counts`, text.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    tools = import_framework("pycocotools.mask")
    columns = np.asfortranarray(masks.transpose(1, 2, 0), np.uint8)
    return [{**one, "counts": one["counts"].decode()} for one in tools.encode(columns)]


def decode_masks(masks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Decode compressed run lengths of equal size, which this package has encoded, to uint8 (n, H, W).

    `fcvit.data.masks` reads masks from other sources.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    if not masks:
        return np.zeros((0, 0, 0), np.uint8)
    tools = import_framework("pycocotools.mask")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 has an old form of `__array__`
        return tools.decode([*masks]).transpose(2, 0, 1)


def entries(
    detections: Sequence[Detections], image_ids: Sequence[int | str], category_ids: Sequence[int], kind: Kind
) -> list[dict[str, Any]]:
    """Return detections in COCO's format for results, which `evaluate` and JSON files take.

    Boxes are x, y, width and height. With masks, `bbox` is included, as in mmdetection's files.

    Args:
        detections: Detections of each image.
        image_ids: Id of each image.
        category_ids: Category id of each label.
        kind: Whether to include the masks.
    """
    rows: list[dict[str, Any]] = []
    for image, one in zip(image_ids, detections, strict=True):
        corners = np.asarray(one.boxes, np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        for index, (box, score, label) in enumerate(zip(boxes, one.scores, one.labels, strict=True)):
            row = {"image_id": image, "bbox": box, "score": float(score), "category_id": category_ids[label]}
            if kind == "segm":
                assert one.masks is not None
                row["segmentation"] = dict(one.masks[index])
            rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The metrics of COCO in percent. NaN marks a metric without ground truth, which pycocotools marks with -1.

    Attributes:
        ap: Average precision (AP), mean over the IoU thresholds 0.50, 0.55, ..., 0.95 and the classes.
        ap50, ap75: AP at the IoU thresholds 0.50 and 0.75.
        ap_small, ap_medium, ap_large: AP of objects under 32 x 32, under 96 x 96 and of larger pixels.
        ar: Average recall (AR), mean over the IoU thresholds and the classes.
        ar_small, ar_medium, ar_large: AR by size.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar: float
    ar_small: float
    ar_medium: float
    ar_large: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures(Precision):
    """The metrics of COCO, with those of each class.

    Attributes:
        kind: Boxes or masks.
        max_detections: Number of detections of each class in an image that count, the most confident ones.
        class_ap: AP of each class, in the order of the labels, (C).
        class_ap50: The same at the IoU threshold 0.50, (C).
        precision: Interpolated precision, a fraction, at each IoU threshold and at recall 0, 0.01, ..., 1 of each
            class, (10, 101, C). 0 beyond the largest recall that is reached.
        scores: Score at which this recall is reached, (10, 101, C).
    """

    kind: Kind
    max_detections: int
    class_ap: np.ndarray
    class_ap50: np.ndarray
    precision: np.ndarray
    scores: np.ndarray

    @property
    def means(self) -> Precision:
        """Return the metrics without those of each class."""
        return Precision(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Precision)})


def evaluate(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
    kind: Kind,
    max_detections: int = MAX_DETECTIONS,
) -> Figures:
    """Compute the metrics of detections with pycocotools. It prints nothing and does not change its arguments.

    For masks, the boxes of the results are not used, so that the masks' areas decide between small, medium and large
    detections, as in mmdetection.

    Args:
        truth: Ground truth in COCO's format, from `fcvit.data.coco.CocoImages.ground_truth`, which checks it.
        results: Detections in COCO's format, from `entries`. All images must be in the ground truth.
        category_ids: Category id of each label. Other categories do not count.
        kind: Boxes or masks.
        max_detections: Number of detections of each class in an image that count.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    coco = import_framework("pycocotools.coco").COCO
    cocoeval = import_framework("pycocotools.cocoeval").COCOeval
    omitted = ("bbox",) if kind == "segm" else ("segmentation",)
    rows = [{key: value for key, value in row.items() if key not in omitted} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        expected = coco()
        copies = [dict(annotation) for annotation in truth["annotations"]]
        expected.dataset = {"info": {}, **truth, "annotations": copies}  # pycocotools 2.0.10 needs `info`
        expected.createIndex()
        if rows:
            detected = expected.loadRes(rows)
        else:  # `loadRes` fails without rows
            detected = coco()
            detected.dataset = {**truth, "annotations": []}
            detected.createIndex()
        evaluation = cocoeval(expected, detected, kind)
        evaluation.params.catIds = [*category_ids]
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    # thresholds, recalls (for precision and scores), sorted categories, areas
    precision, recall, scores = (evaluation.eval[name][..., 0] for name in ("precision", "recall", "scores"))
    labels = np.searchsorted(evaluation.params.catIds, category_ids)
    curves, scores = precision[:, :, labels, _ALL], scores[:, :, labels, _ALL]
    return Figures(
        kind=kind,
        max_detections=max_detections,
        ap=_percent(precision[..., _ALL]),
        ap50=_percent(precision[_IOU50, ..., _ALL]),
        ap75=_percent(precision[_IOU75, ..., _ALL]),
        ap_small=_percent(precision[..., _SMALL]),
        ap_medium=_percent(precision[..., _MEDIUM]),
        ap_large=_percent(precision[..., _LARGE]),
        ar=_percent(recall[..., _ALL]),
        ar_small=_percent(recall[..., _SMALL]),
        ar_medium=_percent(recall[..., _MEDIUM]),
        ar_large=_percent(recall[..., _LARGE]),
        class_ap=np.array([_percent(curves[..., label]) for label in range(len(labels))]),
        class_ap50=np.array([_percent(curves[_IOU50, :, label]) for label in range(len(labels))]),
        precision=np.where(curves < 0, np.nan, curves),
        scores=np.where(curves < 0, np.nan, scores),
    )


def _percent(values: np.ndarray) -> float:
    """Return the mean in percent of the values that pycocotools did not mark with -1, in its order of summation."""
    known = values[values > -1]
    return 100 * float(np.mean(known)) if len(known) else np.nan


def matches(
    detections: Detections, boxes: np.ndarray, labels: np.ndarray, iou: float = 0.5, crowd: np.ndarray | None = None
) -> np.ndarray:
    """Match detections with objects of the same class by their boxes, the most confident detection first.

    This is the rule of COCO at one IoU threshold, for pictures and counts. `evaluate` computes the metrics.

    Args:
        detections: Detections in an image.
        boxes, labels: x1, y1, x2, y2 and class of each object, (m, 4) and (m).
        iou: Smallest IoU of a match.
        crowd: Which objects are crowds, bool (m). A crowd matches any number of detections, if `iou` of their area is
            inside of it.

    Returns:
        Index of the object of each detection, or -1, integer (k).
    """
    tools = import_framework("pycocotools.mask")
    crowd = np.zeros(len(boxes), bool) if crowd is None else crowd
    result = np.full(len(detections.scores), -1)
    if not len(boxes) or not len(result):
        return result

    def sides(corners: np.ndarray) -> np.ndarray:
        corners = np.asarray(corners, np.float64)
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)

    overlaps = np.array(tools.iou(sides(detections.boxes), sides(boxes), crowd.astype(np.uint8)))
    overlaps[detections.labels[:, None] != labels] = -1
    free = np.ones(len(boxes), bool)
    for index in np.argsort(-detections.scores, kind="stable"):
        # An object is preferred to a crowd.
        for group in (~crowd, crowd):
            candidates = np.where(free & group, overlaps[index], -1)
            best = int(candidates.argmax())
            if candidates[best] >= iou:
                result[index], free[best] = best, crowd[best]
                break
    return result
