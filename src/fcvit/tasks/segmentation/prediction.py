"""Predict a label map for each image with a segmentation network."""

import dataclasses
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from cyclopts import Parameter
from PIL import Image

from fcvit import run_folder as runs
from fcvit.data import painting
from fcvit.data.class_colors import class_list, classes_of
from fcvit.data.classes import Classes, Palette
from fcvit.data.transforms.segmentation import decode, preprocess, resize_image, rgb_pixels
from fcvit.errors import BadImages, DoesNotFit, UsageError
from fcvit.inference.engines import Engine
from fcvit.inference.images import ImageLike, collect, read_ahead, require_finite, with_unique_names
from fcvit.models.spec import SemanticFPNOptions
from fcvit.models.variants import ADE20K_CLASSES, Preprocessing
from fcvit.report.image_grid import jpeg, png
from fcvit.tasks.predictor import Predictor
from fcvit.tasks.segmentation.logits import View, average_label_map, sliding_logits
from fcvit.weights.reading import Weights

logger = logging.getLogger("fcvit")

LABELS, OVERLAYS = "labels", "overlays"  # folders that `Segmenter.draw` writes
_LABEL_VALUES = 256
_LARGEST_SCALE = 16
_SMALLEST_WINDOW = 32
_SHOWN = 10  # classes of an image in the table


@dataclasses.dataclass(frozen=True)
class PredictionOptions:
    """Options of `fcvit predict` for segmentation.

    Args:
        flip: Segmentation: average the probabilities with those of the mirrored image.
        scales: Segmentation: factors of the size of the network's input, separated by commas. Their probabilities are
            averaged.
        window: Segmentation: side of a sliding window in the network's input, in pixels. The logits of all windows are
            averaged.
        stride: Segmentation: step of the sliding window in pixels (default: two thirds of the window).
        no_resize: Segmentation: use images at their own size, not at the size of the training images. Large images need
            --window.
        one_based: Segmentation: write class k as k + 1 in label maps, as ADE20K's server expects it.
    """

    flip: Annotated[bool, Parameter(negative=())] = False
    scales: Annotated[Any, Parameter()] = "1"
    window: int | None = None
    stride: int | None = None
    no_resize: Annotated[bool, Parameter(negative=())] = False
    one_based: Annotated[bool, Parameter(negative=())] = False

    def __post_init__(self) -> None:
        if not self.factors:
            raise UsageError("--scales: expected at least one number, for example 0.75,1,1.25")
        window, stride = self.window, self.stride
        if window is not None and not (isinstance(window, int) and window >= _SMALLEST_WINDOW):
            raise UsageError(f"--window {window!r:.40}: expected at least {_SMALLEST_WINDOW} pixels")
        if stride is not None and not (window and isinstance(stride, int) and 1 <= stride <= window):
            raise UsageError(f"--stride {stride!r:.40}: expected --window, and a stride from 1 to the window's side")

    @property
    def factors(self) -> tuple[float, ...]:
        """Return the scales as numbers."""
        words = self.scales.split(",") if isinstance(self.scales, str) else np.atleast_1d(self.scales)
        try:
            factors = tuple(float(word) for word in words)
        except (TypeError, ValueError):
            factors = (0.0,)
        if not all(0 < factor <= _LARGEST_SCALE for factor in factors):
            raise UsageError(f"--scales {self.scales!r:.60}: expected numbers above 0, at most {_LARGEST_SCALE}")
        return factors

    @property
    def step(self) -> int:
        """Return the stride, with its default."""
        assert self.window is not None
        return self.stride or self.window * 2 // 3


@dataclasses.dataclass(frozen=True)
class ClassArea:
    """A class in a label map: class index, class id, class name, and its share of the pixels, from 0 to 1."""

    index: int
    id: str
    name: str
    share: float


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SegmentedImage:
    """The label map of an image.

    Attributes:
        labels: Class index of each pixel, uint8 (H, W), at the size of the image. An orientation tag of the image is
            applied.
        classes: Classes, one per index.
        palette: Color of each class.
        image: The image as it was passed to `predict`. `overlay` reads it again.
        one_based: Whether `save` writes class k as k + 1 by default.
    """

    labels: np.ndarray
    classes: Classes
    palette: Palette
    image: ImageLike
    one_based: bool = False

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"<SegmentedImage {width} x {height}: {', '.join(f'{a.name} {a.share:.0%}' for a in self.areas[:3])}>"

    @property
    def areas(self) -> list[ClassArea]:
        """Return the classes in the label map, the one with the largest area first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return [
            ClassArea(index, self.classes[index].id, self.classes[index].name, int(counts[index]) / self.labels.size)
            for index in order.tolist()
        ]

    def save(self, path: str | os.PathLike[str], one_based: bool | None = None) -> None:
        """Write the label map as a PNG file with a palette, whose pixels are class indices. A file is replaced.

        Args:
            path: File name that ends in .png.
            one_based: Whether to write class k as k + 1, as ADE20K's server expects it. 0 then means no class. None
                uses the option of the prediction.

        Raises:
            UsageError: The file name does not end in .png, or there is no number for the last of 256 classes.
            UnreadableFile: The file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise UsageError(f"{path}: label maps are saved as PNG; use a name that ends in .png")
        runs.write_bytes(path, self.png(one_based))

    def png(self, one_based: bool | None = None) -> bytes:
        """Return the content of the file that `save` writes.

        Raises:
            UsageError: There is no number for the last of 256 classes.
        """
        first = int(self.one_based if one_based is None else one_based)
        if first + len(self.classes) > _LABEL_VALUES:
            raise UsageError(f"8 bits cannot number {len(self.classes)} classes from 1; omit one_based")
        palette = [(0, 0, 0)] * first + list(self.palette)
        return png(painting.palette_image(self.labels + np.uint8(first), palette))

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """Return the image with the label map painted over it in the colors of the classes.

        Args:
            opacity: Weight of the colors, from 0 to 1.

        Raises:
            UsageError: The opacity is out of range, or the image file has another size now.
            BadImages: The image file cannot be read any more.
        """
        pixels = rgb_pixels(self.image)
        return Image.fromarray(painting.overlay(pixels, self.labels, self.palette, opacity))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Segmenter(Predictor):
    """A segmentation network with its preprocessing and class names.

    Attributes:
        weights: Weights of the network.
        engine: Engine that computes the logits.
        preprocessing: Mean and standard deviation of the images.
        classes: Classes, one per output.
        palette: Color of each class.
    """

    weights: Weights
    engine: Engine
    preprocessing: Preprocessing
    classes: Classes
    palette: Palette

    def __repr__(self) -> str:
        return f"<Segmenter {self.weights.source.path.name}: {self.weights.spec}, engine {self.engine.name}>"

    def predict(
        self, images: "ImageLike | Iterable[ImageLike]", *, progress: bool = False, **options: Any
    ) -> list[SegmentedImage | BadImages]:
        """Return the label map of each image, or the error if it cannot be read.

        Args:
            images: A path, a PIL image or a uint8 array (height, width, 3) in RGB, or several of these. For a single
                image, the list contains one result.
            progress: Show a progress bar on standard error.
            options: flip, scales, window, stride, no_resize and one_based, as in `fcvit predict`, for example
                `flip=True` or `scales=(0.75, 1, 1.25)`.

        Raises:
            UsageError: An image has an unsupported type, or an option is invalid.
            NumbersDisagree: A logit is not finite.
            MissingExtra: OpenCV is not installed.
        """
        return collect(images, lambda several: self.stream(several, **options), progress)

    def stream(self, images: Iterable[ImageLike], **options: Any) -> Iterator[SegmentedImage | BadImages]:
        """Yield the results of `predict` one by one. At most two images are in memory."""
        if unknown := sorted(set(options) - {field.name for field in dataclasses.fields(PredictionOptions)}):
            raise UsageError(f"predict: unknown options {', '.join(unknown)} of segmentation")
        return self._results(images, PredictionOptions(**options))

    def _results(self, images: Iterable[ImageLike], options: PredictionOptions) -> Iterator[SegmentedImage | BadImages]:
        transform = self.transform(options)
        for number, image, read in read_ahead(images, lambda image: transform.resize(rgb_pixels(image))):
            yield read if isinstance(read, BadImages) else self._segment((number, image), *read, options)

    def _segment(
        self, numbered: tuple[int, ImageLike], first: np.ndarray, rest: "ResizedImage", options: PredictionOptions
    ) -> SegmentedImage:
        def compute(pixels: np.ndarray) -> np.ndarray:
            logits = self.engine(np.ascontiguousarray(pixels[None]))
            require_finite(logits, self.weights, self.engine, [numbered])
            return logits[0]

        labels = average_label_map(list(_views((first, *rest.others), options, compute)), rest.size)
        return SegmentedImage(labels, self.classes, self.palette, numbered[1], options.one_based)

    at_once: ClassVar[int | None] = 1  # the sizes of images differ

    @property
    def row_columns(self) -> dict[str, type]:
        """Types of the columns in `rows`."""
        return {"index": int, "id": str, "name": str, "share": float}

    def transform(self, options: PredictionOptions) -> "InputPixels":
        """Return the transform that decodes images for `compute`."""
        return InputPixels(self.weights.spec.options, options)

    def compute(
        self,
        images: Sequence[ImageLike],
        pixels: Sequence[np.ndarray],
        targets: "Sequence[ResizedImage]",
        options: PredictionOptions,
    ) -> list[SegmentedImage]:
        """Return the label maps of decoded images."""
        numbered = enumerate(zip(images, pixels, targets, strict=True), 1)
        return [self._segment((number, image), first, rest, options) for number, (image, first, rest) in numbered]

    def pack(self, prediction: SegmentedImage) -> bytes:
        """Encode a prediction with everything that `draw` needs."""
        return png(Image.fromarray(prediction.labels))

    def unpack(self, content: bytes, image: ImageLike, options: PredictionOptions) -> SegmentedImage:
        """Invert `pack`."""
        with Image.open(io.BytesIO(content)) as labels:
            return SegmentedImage(np.asarray(labels), self.classes, self.palette, image, options.one_based)

    def rows(self, prediction: SegmentedImage) -> list[dict[str, Any]]:
        """Return the areas of a label map as rows for JSON and CSV, one per class."""
        return [dict(vars(area)) for area in prediction.areas]

    @property
    def batch_columns(self) -> dict[str, Any]:
        """Columns for Ray Data: the rows, and the label map."""
        return {"predictions": [self.row_columns], "label_map": bytes}

    def batch_values(self, prediction: SegmentedImage) -> dict[str, Any]:
        """Return the areas, and the label map as the content of a PNG file."""
        return {"predictions": self.rows(prediction), "label_map": prediction.png()}

    def table(self, predictions: Sequence[tuple[Path, list[dict[str, Any]]]]) -> Any:
        """Return a table of images and their rows for the terminal."""
        from fcvit.report.tables import table

        cells = []
        for path, rows in predictions:
            shown = [(f"{100 * row['share']:.1f}", row["name"], row["id"]) for row in rows[:_SHOWN]]
            if rest := rows[_SHOWN:]:
                shown.append((f"{100 * sum(row['share'] for row in rest):.1f}", f"... and {len(rest)} more", ""))
            cells += [("" if position else str(path), *cell) for position, cell in enumerate(shown)]
        return table("image", "area (%)", "class", "id", rows=cells, right=("area (%)",))

    def draw(self, predictions: Iterable[tuple[Path, ImageLike, SegmentedImage]], folder: Path) -> None:
        """Write the label map and the overlay of each image into the folders `labels` and `overlays`.

        The files have the names of the images. If a name repeats, a number is added. Existing files are kept.
        """
        for name in (LABELS, OVERLAYS):
            (folder / name).mkdir(exist_ok=True)
        for name, _, prediction in with_unique_names(predictions):
            overlay = folder / OVERLAYS / f"{name}.jpg"
            if not overlay.exists():
                prediction.save(folder / LABELS / f"{name}.png")
                runs.write_bytes(overlay, jpeg(prediction.overlay()))


class ResizedImage(NamedTuple):
    """An image without the first of its scaled copies.

    Attributes:
        size: Height and width of the image.
        others: The network's input at the other scales, uint8 (3, h, w).
    """

    size: tuple[int, int]
    others: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class InputPixels:
    """The transform of a prediction: the pixels of the network's input at each scale.

    Args:
        network: Options of the network, with the size of its input.
        options: Options of the prediction.
    """

    network: SemanticFPNOptions
    options: PredictionOptions

    decode: ClassVar = staticmethod(decode)

    def __call__(self, image: Image.Image, target: None, index: int, /) -> tuple[np.ndarray, ResizedImage]:
        return self.resize(np.asarray(image))

    def resize(self, image: np.ndarray) -> tuple[np.ndarray, ResizedImage]:
        """Return the network's input at the first scale, and the rest of an image, uint8 (H, W, 3)."""
        height, width = image.shape[:2]
        first, *others = [self._scaled(image, factor) for factor in self.options.factors]
        return first, ResizedImage((height, width), tuple(others))

    def _scaled(self, image: np.ndarray, factor: float) -> np.ndarray:
        if self.options.no_resize:
            height, width = (max(1, int(length * factor + 0.5)) for length in image.shape[:2])
            return resize_image(image, (height, width)).transpose(2, 0, 1)
        scale = int(self.network.long_side * factor), int(self.network.short_side * factor)
        return preprocess(image, scale, self.network.divisor)


def segmenter(weights: Weights, preprocessing: Preprocessing, classes: Any, create: Callable[[], Engine]) -> Segmenter:
    """Return the predictor of a segmentation network. See `fcvit.tasks.base.Task.predictor`.

    Raises:
        DoesNotFit: The class list has another length, or the network has more classes than a label map can have.
    """
    count = weights.spec.num_classes
    if count > _LABEL_VALUES:
        raise DoesNotFit(f"{weights.source.path}: {count} classes; label maps with 8 bits have at most {_LABEL_VALUES}")
    listed = classes_of(weights, None if classes is None else class_list(classes))
    engine = create()
    if classes is None and weights.classes is None and count == ADE20K_CLASSES:
        logger.info("the weights have no class names: ADE20K's are used; pass others with --classes FILE")
    assert listed.palette is not None
    return Segmenter(weights, engine, preprocessing, listed.classes, listed.palette)


def _views(
    scaled: Iterable[np.ndarray], options: PredictionOptions, compute: Callable[[np.ndarray], np.ndarray]
) -> Iterator[View]:
    """Yield the views of an image at several scales, uint8 (3, h, w), whose logits are computed when they are read."""
    for pixels in scaled:
        for mirrored in (False, True)[: 1 + options.flip]:
            view = pixels[:, :, ::-1] if mirrored else pixels
            if options.window is None:
                bands: Iterable[np.ndarray] = map(compute, (view,))
            else:
                side, step = options.window, options.step
                bands = sliding_logits(compute, view, (side, side), (step, step))
            yield View(pixels.shape[1:], bands, mirrored)
