"""Compute the token-global similarity maps of a network, and draw them on images per head and per stage."""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from fcvit.analysis.map_figures import MAX_ASPECT, Panel, Row, Scene, maps_figure, maps_overview, own_range
from fcvit.analysis.placement import place, surroundings
from fcvit.analysis.placement import seen as seen_in
from fcvit.data.classes import Classes, labels, resolve_classes
from fcvit.data.transforms.preprocess import crop, normalize, preprocess
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UsageError
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place
from fcvit.models.maps import Place, Similarity, SimilarityMap, choose, places, require_maps
from fcvit.models.variants import Preprocessing, Variant, resolve_preprocessing
from fcvit.tasks.classification.prediction import Prediction, rank
from fcvit.weights.reading import Weights

SHOWN = 480  # largest side of an image in a figure, in pixels
_SMALL = 200  # largest side of an image in an overview, in pixels
FIRST = 1  # default context of a block, more faithful than the second context (docs/guides/similarity.md)
Which = Literal["standardized", "rescaled"]
Scale = Literal["picture", "head"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """An image with its predictions and similarity maps.

    Attributes:
        image: The original image, RGB.
        predictions: Predictions, best first. Empty without a head. If several classes have the same name, it includes
            the id.
        similarity: Output (classes,) and the maps (heads, H, W) of every global context, float32.
    """

    image: Image.Image
    predictions: tuple[Prediction, ...]
    similarity: Similarity[np.ndarray]


class Viewer:
    """A network that computes similarity maps.

    Args:
        weights: Weights of a classifier with a weighted global context.
        classes: Class names. The default is the class list of the weights.
        preprocessing: Preprocessing. The default is the preprocessing of the weights.
        device: auto, cpu, gpu or gpu:N.

    Raises:
        UsageError: The variant has no similarity maps.
        DoesNotFit: The weights are a dense backbone, or the number of classes does not match the outputs.
        MissingExtra: Paddle is not installed.
    """

    def __init__(
        self,
        weights: Weights,
        classes: Classes | None = None,
        preprocessing: Preprocessing | None = None,
        device: str = "auto",
    ):
        spec = weights.spec
        require_maps(spec.variant)
        if spec.head != "classifier":
            raise DoesNotFit(f"{weights.source.path} is {spec}; similarity maps need the weights of a classifier")
        self.variant = spec.variant
        self.name = weights.source.path.name
        self.preprocessing = resolve_preprocessing(preprocessing, weights.preprocessing, spec.variant)
        self.classes = resolve_classes(classes, weights.classes, spec.num_classes) if spec.num_classes else ()
        self._labels = labels(self.classes)
        self.device = paddle_place(device)
        self.paddle = import_framework("paddle")
        from fcvit.models.build import build_classifier

        with on_paddle_device(self.device):
            self.model = build_classifier(weights)

    def similarity(self, batch: np.ndarray, tokens: bool = False) -> Similarity[np.ndarray]:
        """Compute the logits and maps of a batch, uint8 (B, 3, S, S), as NumPy arrays.

        Args:
            batch: Pixels of the images.
            tokens: Also return the tokens that each map compares with their mean.

        Raises:
            NumbersDisagree: A value is not finite.
        """
        with on_paddle_device(self.device), self.paddle.no_grad():
            tensors = self.model.similarity(self.paddle.to_tensor(normalize(batch, self.preprocessing)), tokens)
            maps = [context.map(lambda tensor: tensor.numpy()) for context in tensors]
            output = tensors.output.numpy()
        for name, values in (("output", output), *((context.name, context.rescaled) for context in maps)):
            if not np.isfinite(values).all():
                raise NumbersDisagree(f"{self.name}: {name} is not finite; the weights are damaged or untrained")
        return Similarity(output, maps)

    def see(self, image: Image.Image, top_k: int = 5) -> Seen:
        """Compute the maps and the `top_k` best classes of one RGB image of any size.

        Raises:
            BadImages: The image is too long and thin to be resized.
            NumbersDisagree: A value is not finite.
        """
        similarity = self.similarity(crop(image, self.preprocessing)[None])
        best = rank(similarity.output, self.classes, top_k)[0] if self.classes else []
        predictions = tuple(dataclasses.replace(row, name=self._labels[row.index]) for row in best)
        maps = [context.map(lambda array: array[0]) for context in similarity]
        return Seen(image, predictions, Similarity(similarity.output[0], maps))

    @property
    def stage(self) -> int:
        """Return the last stage with maps of more than one position. A map of a single position shows nothing."""
        strides = enumerate((4, 8, 16, 32), 1)
        return max((stage for stage, stride in strides if self.preprocessing.input_size > stride), default=4)

    def scene(self, image: Image.Image, side: int = SHOWN) -> Scene:
        """Return the image to draw maps on, at most `side` pixels long. The ends of a thin image are cut off."""
        shown = image.crop(self._window(image))
        shown.thumbnail((side, side))
        factor = 256 // max(shown.size)
        if factor > 1:  # enlarge small images without smoothing
            shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
        return Scene(np.asarray(shown), seen_in(image.size, self.preprocessing, shown.size, self._window(image)))

    def placed(self, maps: np.ndarray, image: Image.Image, scene: Scene) -> np.ndarray:
        """Resample maps onto the image of a scene, (n, h, w) -> (n, H, W). The result is NaN outside of the crop."""
        if maps[0].size == 1:
            return np.full((len(maps), *scene.seen.shape), np.nan)
        height, width = scene.seen.shape
        return place(maps, image.size, self.preprocessing, (width, height), self._window(image))

    def _window(self, image: Image.Image) -> tuple[int, int, int, int]:
        return surroundings(image.size, self.preprocessing, MAX_ASPECT)


def each_readable(
    images: Sequence[Path], preprocessing: Preprocessing, bad: list[BadImages], advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """Yield the pixels of each readable image, uint8 (3, S, S), and add the errors of unreadable images to `bad`.

    Raises:
        BadImages: None of the images can be read.
    """
    for path in images:
        try:
            yield preprocess(path, preprocessing)
        except BadImages as error:
            bad.append(with_path(error, path))
        advance(1)
    if len(bad) == len(images):
        raise BadImages(f"none of {len(bad)} images can be read; first error: {bad[0]}")


def choose_heads(maps: np.ndarray, heads: str) -> tuple[np.ndarray, list[str]]:
    """Select maps from (heads, h, w), and return them with their names.

    Args:
        maps: Maps of all heads.
        heads: "each", "mean", or the number of a head, counted from 1.

    Raises:
        UsageError: `heads` is not valid.
    """
    if heads == "each":
        return maps, [f"head {number}" for number in range(1, len(maps) + 1)]
    if heads == "mean":
        return maps.mean(0, keepdims=True), ["mean over heads"]
    if not heads.isdecimal() or not 1 <= int(heads) <= len(maps):
        raise UsageError(f"--heads {heads}: expected each, mean, or a number from 1 to {len(maps)}")
    return maps[int(heads) - 1 : int(heads)], [f"head {heads}"]


def check_heads(variant: Variant, heads: str) -> None:
    """Check the argument `heads` of `choose_heads` before any map is computed."""
    choose_heads(np.zeros((variant.heads, 1, 1)), heads)


def caption(predictions: Sequence[Prediction]) -> str:
    """Return the predicted classes with their probabilities as text."""
    return ", ".join(f"{cut(row.name)}: {100 * row.probability:.1f}%" for row in predictions)


def cut(name: str, longest: int = 40) -> str:
    """Shorten a name to at most `longest` characters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


@dataclasses.dataclass(frozen=True)
class MapChoice:
    """The choice of maps and color scale in figures.

    Attributes:
        heads: "each", "mean", or the number of a head.
        which: "standardized", or "rescaled" for the values that multiply the context.
        scale: Color scale: "picture" for one scale, or "head" for a scale per head, with its range in the name.
    """

    heads: str = "each"
    which: Which = "standardized"
    scale: Scale = "picture"

    @property
    def single(self) -> "MapChoice":
        """Return the choice for figures with one map per context: the mean over heads in place of each head."""
        return dataclasses.replace(self, heads="mean") if self.heads == "each" else self

    def of(self, context: SimilarityMap[np.ndarray]) -> tuple[np.ndarray, list[str]]:
        """Return the chosen maps of a context with their names."""
        return choose_heads(getattr(context, self.which), self.heads)


def picture(viewer: Viewer, seen: Seen, name: str, where: Place, choice: MapChoice) -> bytes:
    """Draw the maps of one global context on the image, and return a PNG file."""
    maps = seen.similarity.at(*where)
    title = f"{cut(name)}: stage {maps.stage}, block {maps.block}, context {maps.context}"
    return _draw(viewer, seen, {"": maps}, title, choice)


def depth_picture(viewer: Viewer, seen: Seen, name: str, context: int, choice: MapChoice) -> bytes:
    """Draw the maps of a context in the last block of each stage, one row per stage, and return a PNG file."""
    rows = {
        f"stage {maps.stage}\nblock {maps.block}\ncontext {maps.context}": maps for maps in _by_stage(seen, context)
    }
    return _draw(viewer, seen, rows, f"{cut(name)}: last block of each stage", choice)


def _draw(
    viewer: Viewer, seen: Seen, contexts: Mapping[str, SimilarityMap[np.ndarray]], title: str, choice: MapChoice
) -> bytes:
    scene = viewer.scene(seen.image)
    rows = []
    for row_name, context in contexts.items():
        maps, names = choice.of(context)
        row = Row(row_name, names, viewer.placed(maps, seen.image, scene))
        rows.append(row if choice.scale == "picture" else own_range(row))
    label = f"{choice.which} similarity"
    label += ", each head scaled to its own range" if choice.scale == "head" else ""
    subtitle = f"{cut(viewer.name)}: {caption(seen.predictions)}" if seen.predictions else viewer.name
    return maps_figure(scene, rows, title, subtitle, label)


def _by_stage(seen: Seen, context: int) -> list[SimilarityMap[np.ndarray]]:
    return [seen.similarity.at(stage, -1, context) for stage in sorted({maps.stage for maps in seen.similarity})]


def panel(viewer: Viewer, seen: Seen, title: str, context: int = FIRST, choice: MapChoice = MapChoice("mean")) -> Panel:
    """Return a small image with one map per stage: the mean over heads, or one head, of the last block."""
    scene = viewer.scene(seen.image, _SMALL)
    maps = [choice.single.of(similarity_map)[0] for similarity_map in _by_stage(seen, context)]
    return Panel(title, scene, np.concatenate([viewer.placed(values, seen.image, scene) for values in maps]))


def overview(
    panels: Sequence[Panel], title: str, variant: Variant, context: int = FIRST, choice: MapChoice = MapChoice("mean")
) -> bytes:
    """Draw several images with one map per stage each, and return a PNG file. `choice` must be as for `panel`."""
    chosen = [choose(places(variant), stage, -1, context) for stage in range(1, 1 + len(panels[0].maps))]
    names = [f"stage {stage}, block {block}" for stage, block, _ in chosen]
    heads = choice.single.heads
    shown = "mean over heads" if heads == "mean" else f"head {heads}"
    return maps_overview(panels, names, title, f"{choice.which} similarity, context {chosen[0][2]}, {shown}")


def map_arrays(seen: Seen) -> bytes:
    """Return all maps (heads, H, W) of an image as an .npz file: `NAME.standardized` and `NAME.rescaled`."""
    file = io.BytesIO()
    arrays = {f"{maps.name}.{which}": getattr(maps, which) for maps in seen.similarity for which in get_args(Which)}
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def with_path(error: BadImages, path: Path) -> BadImages:
    """Return the error with the path, which errors after decoding do not contain."""
    return error if str(error).startswith(str(path)) else BadImages(f"{path}: {error}")
