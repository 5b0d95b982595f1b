"""Detect objects in images with a Mask R-CNN or a Faster R-CNN."""

import collections
import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from cyclopts import Parameter
from PIL import Image

from fcvit import run_folder as runs
from fcvit.data.class_colors import class_list, classes_of
from fcvit.data.classes import Classes, Palette
from fcvit.data.transforms.detection import pad_batch, preprocess
from fcvit.data.transforms.segmentation import rgb_pixels
from fcvit.errors import BadImages, UsageError
from fcvit.inference.engines import Engine
from fcvit.inference.images import ImageLike, collect, read_ahead, with_unique_names
from fcvit.metrics.detection import Detections, encode_masks, entries
from fcvit.models.mask_rcnn.masks import paste_mask
from fcvit.models.variants import Preprocessing
from fcvit.report.image_grid import jpeg
from fcvit.report.instances import OPACITY, draw_instances, instance_colors
from fcvit.tasks.detection.evaluation import Placement, ResizedPixels
from fcvit.tasks.predictor import Predictor
from fcvit.text import some
from fcvit.weights.reading import Weights

PICTURES, RESULTS = "pictures", "detections.json"  # what `Detector.draw` writes
_PACKED = ("boxes", "scores", "labels", "size", "mask_logits")
_CORNERS = ("x1", "y1", "x2", "y2")
_SHOWN = 20  # detections of an image in the table


@dataclasses.dataclass(frozen=True)
class PredictionOptions:
    """Options of `fcvit predict` for detection.

    Args:
        score_threshold: Detection: leave out detections with a lower score, from 0 to 1.
        only: Detection: name of a class to detect. Repeat the option for several (default: all classes).
    """

    score_threshold: float = 0.3
    only: Annotated[list[str] | None, Parameter(negative=())] = None

    def __post_init__(self) -> None:
        threshold = self.score_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number) or not 0 <= threshold <= 1:
            raise UsageError(f"--score-threshold {threshold!r:.40}: expected a number from 0 to 1")
        if isinstance(self.only, str):
            object.__setattr__(self, "only", [self.only])

    def labels(self, classes: Classes) -> np.ndarray:
        """Return the labels of the classes in `only`, or of all classes.

        Raises:
            UsageError: The network does not have one of the classes.
        """
        if self.only is None:
            return np.arange(len(classes))
        known = {text for c in classes for text in (c.id, c.name)}
        if unknown := [name for name in self.only if name not in known]:
            raise UsageError(f"--only {unknown[0]!r:.60}: the network has no such class; it has {some(sorted(known))}")
        return np.array([label for label, c in enumerate(classes) if {c.id, c.name} & {*self.only}], np.int64)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class DetectedImage:
    """The objects detected in an image, the most confident one first.

    Attributes:
        boxes: x1, y1, x2, y2 of each object in pixels of the image, float32 (k, 4). An orientation tag of the image is
            applied.
        scores: Score of each object from 0 to 1, float32 (k,).
        labels: Class index of each object, int64 (k,).
        mask_logits: Mask logits of each object in its box, float32 (k, 28, 28), or None for a network without masks.
        size: Height and width of the image.
        classes: Classes, one per index.
        palette: Color of each class.
        image: The image as it was passed to `predict`. `draw` reads it again.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    mask_logits: np.ndarray | None
    size: tuple[int, int]
    classes: Classes
    palette: Palette
    image: ImageLike

    def __repr__(self) -> str:
        height, width = self.size
        counts = ", ".join(f"{count} {self.classes[label].name}" for label, count in [*self.counts.items()][:3])
        return f"<DetectedImage {width} x {height}: {counts or 'no objects'}>"

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Return the class name of each object."""
        return [self.classes[label].name for label in self.labels]

    @property
    def counts(self) -> dict[int, int]:
        """Return the number of objects by class index, the most frequent class first."""
        return dict(collections.Counter(self.labels.tolist()).most_common())

    @functools.cached_property
    def masks(self) -> np.ndarray | None:
        """Return the mask of each object, bool (k, H, W), or None for a network without masks.

        They are computed on first access. All masks of a large image need much memory; `mask` returns a single one.
        """
        if self.mask_logits is None:
            return None
        return np.array([self.mask(index) for index in range(len(self))], bool).reshape(-1, *self.size)

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of one object, bool (H, W), at the size of the image. The network must have masks."""
        assert self.mask_logits is not None
        return paste_mask(self.mask_logits[index], self.boxes[index], self.size)

    def take(self, chosen: np.ndarray) -> "DetectedImage":
        """Return the objects for which a bool array (k,) is true, for example `image.take(image.scores >= 0.5)`."""
        logits = None if self.mask_logits is None else self.mask_logits[chosen]
        return dataclasses.replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            mask_logits=logits,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the objects as a JSON file in COCO's format. A file is replaced.

        The file has `images`, `categories` and `annotations` with `bbox` (x, y, width, height), `score`, and
        `segmentation` (compressed run lengths) if there are masks. The category id of a class is its index plus 1.

        Args:
            path: File name that ends in .json.

        Raises:
            UsageError: The file name does not end in .json.
            UnreadableFile: The file cannot be written.
            MissingExtra: The objects have masks and pycocotools is not installed.
        """
        path = Path(path)
        if path.suffix.lower() != ".json":
            raise UsageError(f"{path}: detections are saved in COCO's JSON format; use a name that ends in .json")
        name = os.fspath(self.image) if isinstance(self.image, str | os.PathLike) else "image"
        _write_coco(path, [(str(name), self)], self.classes)

    def draw(self, opacity: float = OPACITY) -> Image.Image:
        """Return a picture of the image with boxes, masks, names and scores. Small images are enlarged.

        Args:
            opacity: Weight of the colors in the masks, from 0 to 1.

        Raises:
            UsageError: The opacity is out of range, or the image file has another size now.
            BadImages: The image file cannot be read any more.
        """
        pixels = rgb_pixels(self.image)
        if pixels.shape[:2] != self.size:
            raise UsageError(f"image {pixels.shape[:2]} and detections {self.size}: expected the same height and width")
        if not 0 <= opacity <= 1:
            raise UsageError(f"opacity {opacity!r}: expected a number from 0 to 1")
        masks = None if self.mask_logits is None else map(self.mask, range(len(self)))
        shown = instance_colors(self.labels, self.palette), self.names, self.scores.tolist(), masks
        return draw_instances(Image.fromarray(pixels), self.boxes, *shown, opacity)


def _write_coco(path: Path, images: Iterable[tuple[str, DetectedImage]], classes: Classes) -> None:
    """Write the objects of images, which are read one by one, as a COCO file."""
    numbers = range(1, len(classes) + 1)
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, one) in enumerate(images, 1):
        listed.append({"id": number, "file_name": name, "height": one.size[0], "width": one.size[1]})
        masks = None
        areas = (one.boxes[:, 2:] - one.boxes[:, :2]).prod(1).tolist()
        if one.mask_logits is not None:
            masks = []
            for index in range(len(one)):
                mask = one.mask(index)
                areas[index] = int(mask.sum())
                masks += encode_masks(mask[None])
        detections = Detections(one.boxes, one.scores, one.labels, masks)
        kind = "bbox" if masks is None else "segm"
        for row, area in zip(entries([detections], [number], numbers, kind), areas, strict=True):
            annotations.append({"id": len(annotations) + 1, **row, "area": area, "iscrowd": 0})
    categories = [{"id": number, "name": c.name} for number, c in zip(numbers, classes, strict=True)]
    runs.write_text(path, json.dumps({"images": listed, "categories": categories, "annotations": annotations}) + "\n")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Detector(Predictor):
    """A detector with its preprocessing and class names.

    Attributes:
        weights: Weights of the network.
        engine: Engine that computes the detections.
        preprocessing: Mean and standard deviation of the images.
        classes: Classes, one per label.
        palette: Color of each class.
    """

    weights: Weights
    engine: Engine
    preprocessing: Preprocessing
    classes: Classes
    palette: Palette

    def __repr__(self) -> str:
        return f"<Detector {self.weights.source.path.name}: {self.weights.spec}, engine {self.engine.name}>"

    def predict(
        self, images: "ImageLike | Iterable[ImageLike]", *, progress: bool = False, **options: Any
    ) -> list[DetectedImage | BadImages]:
        """Return the objects in each image, or the error if it cannot be read.

        Args:
            images: A path, a PIL image or a uint8 array (height, width, 3) in RGB, or several of these. For a single
                image, the list contains one result.
            progress: Show a progress bar on standard error.
            options: score_threshold (default 0.3) and only, as in `fcvit predict`, for example `only=["person"]`. The
                network itself has a threshold too, 0.05 for the authors' networks.

        Raises:
            UsageError: An image has an unsupported type, or an option is invalid.
            NumbersDisagree: An output of the network is not finite.
            MissingExtra: OpenCV is not installed.
        """
        return collect(images, lambda several: self.stream(several, **options), progress)

    def stream(self, images: Iterable[ImageLike], **options: Any) -> Iterator[DetectedImage | BadImages]:
        """Yield the results of `predict` one by one. At most two images are in memory."""
        if unknown := sorted(set(options) - {field.name for field in dataclasses.fields(PredictionOptions)}):
            raise UsageError(f"predict: unknown options {', '.join(unknown)} of detection")
        chosen = PredictionOptions(**options)
        return self._results(images, chosen, self.transform(chosen))

    def _results(
        self, images: Iterable[ImageLike], options: PredictionOptions, transform: ResizedPixels
    ) -> Iterator[DetectedImage | BadImages]:
        for _, image, pixels in read_ahead(images, rgb_pixels):
            if isinstance(pixels, BadImages):
                yield pixels
            else:
                resized, factors = preprocess(pixels, transform.scale)
                placement = Placement((pixels.shape[0], pixels.shape[1]), factors)
                yield self.compute([image], [resized], [placement], options)[0]

    at_once: ClassVar[int | None] = 1  # the sizes of images differ

    @property
    def row_columns(self) -> dict[str, type]:
        """Types of the columns in `rows`."""
        corners = dict.fromkeys(_CORNERS, float)
        area = {"area": int} if self.weights.spec.options.masks else {}
        return {"index": int, "id": str, "name": str, "score": float, **corners, **area}

    def transform(self, options: PredictionOptions) -> ResizedPixels:
        """Return the transform that decodes images for `compute`.

        Raises:
            UsageError: The network does not have one of the classes in the options.
        """
        options.labels(self.classes)
        network = self.weights.spec.options
        return ResizedPixels((network.long_side, network.short_side))

    def compute(
        self,
        images: Sequence[ImageLike],
        pixels: Sequence[np.ndarray],
        targets: Sequence[Placement],
        options: PredictionOptions,
    ) -> list[DetectedImage]:
        """Return the objects in decoded images."""
        padded, sizes = pad_batch(pixels)
        detections = self.engine.detect(padded, sizes, [placement.factors for placement in targets])
        labels, results = options.labels(self.classes), []
        for image, placement, one in zip(images, targets, detections, strict=True):
            parts = one.boxes, one.scores, one.labels, one.mask_logits
            result = DetectedImage(*parts, placement.size, self.classes, self.palette, image)
            results.append(result.take((result.scores >= options.score_threshold) & np.isin(result.labels, labels)))
        return results

    def pack(self, prediction: DetectedImage) -> bytes:
        """Encode a prediction with everything that `draw` needs."""
        arrays: dict[str, Any] = {name: value for name in _PACKED if (value := getattr(prediction, name)) is not None}
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def unpack(self, content: bytes, image: ImageLike, options: PredictionOptions) -> DetectedImage:
        """Invert `pack`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            boxes, scores, labels, size, mask_logits = (arrays.get(name) for name in _PACKED)
        height, width = size.tolist()
        return DetectedImage(boxes, scores, labels, mask_logits, (height, width), self.classes, self.palette, image)

    def rows(self, prediction: DetectedImage) -> list[dict[str, Any]]:
        """Return the objects as rows for JSON and CSV: class, score, box, and the area of the mask in pixels."""
        rows = []
        for index, (box, label) in enumerate(zip(prediction.boxes.tolist(), prediction.labels.tolist(), strict=True)):
            row = {"index": label, "id": self.classes[label].id, "name": self.classes[label].name}
            row |= {"score": float(prediction.scores[index]), **dict(zip(_CORNERS, box, strict=True))}
            if prediction.mask_logits is not None:
                row["area"] = int(prediction.mask(index).sum())
            rows.append(row)
        return rows

    @property
    def batch_columns(self) -> dict[str, Any]:
        """Columns for Ray Data: the rows with their masks, and the size of the image."""
        mask = {"mask": str} if self.weights.spec.options.masks else {}
        return {"predictions": [self.row_columns | mask], "height": int, "width": int}

    def batch_values(self, prediction: DetectedImage) -> dict[str, Any]:
        """Return the objects with their masks as COCO's compressed run lengths, and the size of the image."""
        rows = self.rows(prediction)
        if prediction.mask_logits is not None:
            for index, row in enumerate(rows):
                row["mask"] = encode_masks(prediction.mask(index)[None])[0]["counts"]
        return {"predictions": rows, "height": prediction.size[0], "width": prediction.size[1]}

    def table(self, predictions: Sequence[tuple[Path, list[dict[str, Any]]]]) -> Any:
        """Return a table of images and their objects, and the number of objects of each class, for the terminal."""
        from rich.console import Group

        from fcvit.report.tables import table

        cells: list[tuple[str, ...]] = []
        for path, rows in predictions:
            shown = [(f"{row['score']:.2f}", row["name"], _box(row), str(row.get("area", ""))) for row in rows[:_SHOWN]]
            if len(rows) > _SHOWN:
                shown.append(("", f"... and {len(rows) - _SHOWN} more", "", ""))
            shown = shown or [("", "no objects", "", "")]
            cells += [("" if position else str(path), *cell) for position, cell in enumerate(shown)]
        right = ("score", "area (pixels)")
        listed = table("image", "score", "class", ", ".join(_CORNERS), "area (pixels)", rows=cells, right=right)
        counts = collections.Counter(row["name"] for _, rows in predictions for row in rows)
        images = collections.Counter(name for _, rows in predictions for name in {row["name"] for row in rows})
        counted = [(name, str(count), str(images[name])) for name, count in counts.most_common()]
        return Group(listed, table("class", "objects", "images", rows=counted, right=("objects", "images")))

    def draw(self, predictions: Iterable[tuple[Path, ImageLike, DetectedImage]], folder: Path) -> None:
        """Write a picture of each image into the folder `pictures`, and the objects of all into `detections.json`.

        The pictures have the names of the images. If a name repeats, a number is added. Existing pictures are kept.
        """
        (folder / PICTURES).mkdir(exist_ok=True)

        def drawn() -> Iterator[tuple[str, DetectedImage]]:
            for name, path, prediction in with_unique_names(predictions):
                picture = folder / PICTURES / f"{name}.jpg"
                if not picture.exists():
                    runs.write_bytes(picture, jpeg(prediction.draw()))
                yield str(path), prediction

        _write_coco(folder / RESULTS, drawn(), self.classes)


def _box(row: dict[str, Any]) -> str:
    return ", ".join(f"{row[name]:.0f}" for name in _CORNERS)


def detector(weights: Weights, preprocessing: Preprocessing, classes: Any, create: Callable[[], Engine]) -> Detector:
    """Return the predictor of a detector. See `fcvit.tasks.base.Task.predictor`.

    Raises:
        DoesNotFit: The class list has another length.
    """
    listed = classes_of(weights, None if classes is None else class_list(classes))
    assert listed.palette is not None
    return Detector(weights, create(), preprocessing, listed.classes, listed.palette)
