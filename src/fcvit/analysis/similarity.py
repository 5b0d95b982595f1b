"""Show what the network finds similar to the whole image: its token-global similarity, head by head, block by block."""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from fcvit.analysis.map_figures import LONGEST, Panel, Row, Scene, maps_figure, maps_overview, own_range
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

SHOWN = 480  # pixels: pictures are drawn on the image at most this large; the arrays are those of the network
_SMALL = 200  # where there are many images
FIRST = 1  # context of a block: what docs/similarity.md measured to mark more than the second
Which = Literal["standardised", "rescaled"]
Scale = Literal["picture", "head"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image as the network saw it.

    Attributes:
        image: the original, RGB.
        predictions: best first; empty without a head. Names that several classes have come with the id.
        similarity: output (classes,) and the maps of every global context, (heads, H, W), float32.
    """

    image: Image.Image
    predictions: tuple[Prediction, ...]
    similarity: Similarity[np.ndarray]


class Viewer:
    """A network that shows its maps.

    Args:
        weights: with a weighted global context.
        classes: other names than the weights'.
        preprocessing: another one than the weights'.
        device: auto, cpu, gpu or gpu:N.

    Raises:
        UsageError: the variant has no maps.
        DoesNotFit: a dense backbone, or other classes than outputs.
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
            raise DoesNotFit(f"{weights.source.path} is {spec}; maps come from a classifier")
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
        """Compute logits and maps of uint8 (B, 3, S, S), as NumPy arrays; with what each context is taken of, if asked.

        Raises:
            NumbersDisagree: some are no finite numbers.
        """
        with on_paddle_device(self.device), self.paddle.no_grad():
            tensors = self.model.similarity(self.paddle.to_tensor(normalize(batch, self.preprocessing)), tokens)
            maps = [one.map(lambda tensor: tensor.numpy()) for one in tensors]
            output = tensors.output.numpy()
        for name, values in (("output", output), *((one.name, one.rescaled) for one in maps)):
            if not np.isfinite(values).all():
                raise NumbersDisagree(f"{self.name}: {name} is not finite; the weights are damaged, or no trained ones")
        return Similarity(output, maps)

    def see(self, image: Image.Image, top_k: int = 5) -> Seen:
        """Compute the maps and the best classes of one image, RGB, of any size.

        Raises:
            BadImages: so long and thin that it cannot be resized.
            NumbersDisagree: as `similarity`.
        """
        similarity = self.similarity(crop(image, self.preprocessing)[None])
        best = rank(similarity.output, self.classes, top_k)[0] if self.classes else []
        predictions = tuple(dataclasses.replace(one, name=self._labels[one.index]) for one in best)
        maps = [one.map(lambda array: array[0]) for one in similarity]
        return Seen(image, predictions, Similarity(similarity.output[0], maps))

    @property
    def stage(self) -> int:
        """Return the last stage whose maps have more than one position, without which they are none."""
        strides = enumerate((4, 8, 16, 32), 1)
        return max((stage for stage, stride in strides if self.preprocessing.input_size > stride), default=4)

    def scene(self, image: Image.Image, side: int = SHOWN) -> Scene:
        """Return the image as it is shown: at most `side` pixels long, without the far ends of a long and thin one."""
        shown = image.crop(self._window(image))
        shown.thumbnail((side, side))
        factor = 256 // max(shown.size)
        if factor > 1:  # a small one is enlarged, its pixels stay pixels
            shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
        return Scene(np.asarray(shown), seen_in(image.size, self.preprocessing, shown.size, self._window(image)))

    def placed(self, maps: np.ndarray, image: Image.Image, scene: Scene) -> np.ndarray:
        """Resample maps onto the image as it is shown, (n, h, w) -> (n, H, W); NaN where there is no map."""
        if maps[0].size == 1:
            return np.full((len(maps), *scene.seen.shape), np.nan)
        height, width = scene.seen.shape
        return place(maps, image.size, self.preprocessing, (width, height), self._window(image))

    def _window(self, image: Image.Image) -> tuple[int, int, int, int]:
        return surroundings(image.size, self.preprocessing, LONGEST)


def each_readable(
    images: Sequence[Path], preprocessing: Preprocessing, bad: list[BadImages], advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """Yield the pixels of each image, uint8 (3, S, S); those that cannot be read go to `bad`.

    Raises:
        BadImages: not one can.
    """
    for path in images:
        try:
            yield preprocess(path, preprocessing)
        except BadImages as error:
            bad.append(with_path(error, path))
        advance(1)
    if len(bad) == len(images):
        raise BadImages(f"none of {len(bad)} images can be read, first: {bad[0]}")


def choose_heads(maps: np.ndarray, heads: str) -> tuple[np.ndarray, list[str]]:
    """Return the maps that are to be shown of (heads, h, w), with their names.

    Raises:
        UsageError: not "each", "mean" or the number of a head.
    """
    if heads == "each":
        return maps, [f"head {number}" for number in range(1, len(maps) + 1)]
    if heads == "mean":
        return maps.mean(0, keepdims=True), ["mean over heads"]
    if not heads.isdecimal() or not 1 <= int(heads) <= len(maps):
        raise UsageError(f"--heads {heads}: expected each, mean, or a number from 1 to {len(maps)}")
    return maps[int(heads) - 1 : int(heads)], [f"head {heads}"]


def check_heads(variant: Variant, heads: str) -> None:
    """Raise the UsageError of `choose_heads` before there are maps."""
    choose_heads(np.zeros((variant.heads, 1, 1)), heads)


def caption(predictions: Sequence[Prediction]) -> str:
    """Return the classes with their probabilities."""
    return ", ".join(f"{cut(row.name)}: {100 * row.probability:.1f} %" for row in predictions)


def cut(name: str, longest: int = 40) -> str:
    """Shorten a name, so that what follows it has room."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


@dataclasses.dataclass(frozen=True)
class MapChoice:
    """What pictures of maps show.

    Attributes:
        heads: "each", "mean", or the number of one.
        which: "standardised", or "rescaled", as it multiplies the context.
        scale: of the colors: one for a "picture", or one for each "head", whose name then has its range.
    """

    heads: str = "each"
    which: Which = "standardised"
    scale: Scale = "picture"

    @property
    def one(self) -> "MapChoice":
        """Return what stands for all heads where there is room for one map."""
        return dataclasses.replace(self, heads="mean") if self.heads == "each" else self

    def of(self, one: SimilarityMap[np.ndarray]) -> tuple[np.ndarray, list[str]]:
        """Return the chosen maps of a context with their names."""
        return choose_heads(getattr(one, self.which), self.heads)


def picture(viewer: Viewer, seen: Seen, name: str, where: Place, choice: MapChoice) -> bytes:
    """Draw the maps of one global context on the image: a PNG file."""
    one = seen.similarity.at(*where)
    title = f"{cut(name)}: stage {one.stage}, block {one.block}, context {one.context}"
    return _drawn(viewer, seen, {"": one}, title, choice)


def depth_picture(viewer: Viewer, seen: Seen, name: str, context: int, choice: MapChoice) -> bytes:
    """Draw that context of the last block of each stage, one below the other: a PNG file."""
    rows = {f"stage {one.stage}\nblock {one.block}\ncontext {one.context}": one for one in _by_stage(seen, context)}
    return _drawn(viewer, seen, rows, f"{cut(name)}: from stage to stage", choice)


def _drawn(
    viewer: Viewer, seen: Seen, contexts: Mapping[str, SimilarityMap[np.ndarray]], title: str, choice: MapChoice
) -> bytes:
    scene = viewer.scene(seen.image)
    rows = []
    for beside, one in contexts.items():
        maps, names = choice.of(one)
        row = Row(beside, names, viewer.placed(maps, seen.image, scene))
        rows.append(row if choice.scale == "picture" else own_range(row))
    label = f"{choice.which} similarity"
    label += ", from the lowest to the highest of each head" if choice.scale == "head" else ""
    subtitle = f"{cut(viewer.name)}: {caption(seen.predictions)}" if seen.predictions else viewer.name
    return maps_figure(scene, rows, title, subtitle, label)


def _by_stage(seen: Seen, context: int) -> list[SimilarityMap[np.ndarray]]:
    return [seen.similarity.at(stage, -1, context) for stage in sorted({one.stage for one in seen.similarity})]


def panel(viewer: Viewer, seen: Seen, title: str, context: int = FIRST, choice: MapChoice = MapChoice("mean")) -> Panel:
    """Return the image, small, with one map of each stage: the mean over heads, or one head, of the last block."""
    scene = viewer.scene(seen.image, _SMALL)
    maps = [choice.one.of(one)[0] for one in _by_stage(seen, context)]
    return Panel(title, scene, np.concatenate([viewer.placed(one, seen.image, scene) for one in maps]))


def overview(
    panels: Sequence[Panel], title: str, variant: Variant, context: int = FIRST, choice: MapChoice = MapChoice("mean")
) -> bytes:
    """Draw several images, each with its maps from stage to stage: a PNG file; what is shown as for `panel`."""
    chosen = [choose(places(variant), stage, -1, context) for stage in range(1, 1 + len(panels[0].maps))]
    names = [f"stage {stage}, block {block}" for stage, block, _ in chosen]
    heads = choice.one.heads
    shown = "mean over heads" if heads == "mean" else f"head {heads}"
    return maps_overview(panels, names, title, f"{choice.which} similarity, context {chosen[0][2]}, {shown}")


def map_arrays(seen: Seen) -> bytes:
    """Return all maps of an image as an .npz file: `NAME.standardised` and `NAME.rescaled`, (heads, H, W)."""
    file = io.BytesIO()
    arrays = {f"{one.name}.{which}": getattr(one, which) for one in seen.similarity for which in get_args(Which)}
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def with_path(error: BadImages, path: Path) -> BadImages:
    """Return the error with the path, which what fails after decoding does not know."""
    return error if str(error).startswith(str(path)) else BadImages(f"{path}: {error}")
