"""Show what the network finds similar to the whole image: its token-global similarity, head by head, block by block."""

import dataclasses
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from fcvit import run_folder as runs
from fcvit.analysis.maps_sheet import LONGEST, Panel, Row, Scene, maps_overview, maps_sheet, own_range
from fcvit.analysis.placement import place, surroundings
from fcvit.analysis.placement import seen as seen_in
from fcvit.data.classes import Classes, labels, order_note, resolve_classes
from fcvit.data.folders import sample_evenly
from fcvit.data.transforms.preprocess import crop, decode, normalize, preprocess
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UsageError
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place
from fcvit.models.maps import Place, Similarity, SimilarityMap, choose, places, require_maps
from fcvit.models.variants import Preprocessing, Variant, resolve_preprocessing
from fcvit.report.progress import progress
from fcvit.tasks.classification.prediction import Prediction, rank
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")

SHOWN = 480  # pixels: pictures are drawn on the image at most this large; the arrays are those of the network
_SMALL = 200  # where there are many images
MOST = 60  # images of an overview
OVERVIEW = "overview.png"
FIRST = 1  # context of a block: what docs/similarity.md measured to mark more than the second
_ENDINGS = (".png", "-depth.png", ".npz")
_STEM = 200  # bytes of a file's name
Which = Literal["standardised", "rescaled"]
Scale = Literal["picture", "head"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image as the network saw it.

    Attributes:
        image: the original, RGB.
        predictions: best first; empty without a head. Names that several classes have come with the id.
        found: output (classes,) and the maps of every global context, (heads, H, W), float32.
    """

    image: Image.Image
    predictions: tuple[Prediction, ...]
    found: Similarity[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Written:
    """What the command leaves.

    Attributes:
        folder: of the run.
        images: path of each image, the files that were written for it (under `folder`), its best class.
        unreadable: images that were left out, with the reason.
    """

    folder: Path
    images: tuple[tuple[str, tuple[str, ...], Prediction | None], ...]
    unreadable: tuple[str, ...]


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
        """uint8 (B, 3, S, S) -> logits and maps, as NumPy arrays; with what each context is taken of, if asked.

        Raises:
            NumbersDisagree: some are no finite numbers.
        """
        with on_paddle_device(self.device), self.paddle.no_grad():
            found = self.model.similarity(self.paddle.to_tensor(normalize(batch, self.preprocessing)), tokens)
            maps = [
                SimilarityMap(
                    one.stage,
                    one.block,
                    one.context,
                    one.standardised.numpy(),
                    one.rescaled.numpy(),
                    None if one.tokens is None else one.tokens.numpy(),
                )
                for one in found
            ]
            output = found.output.numpy()
        for name, values in (("output", output), *((one.name, one.rescaled) for one in maps)):
            if not np.isfinite(values).all():
                raise NumbersDisagree(f"{self.name}: {name} is not finite; the weights are damaged, or no trained ones")
        return Similarity(output, maps)

    def see(self, image: Image.Image, top_k: int = 5) -> Seen:
        """One image, RGB, of any size.

        Raises:
            BadImages: so long and thin that it cannot be resized.
            NumbersDisagree: as `similarity`.
        """
        found = self.similarity(crop(image, self.preprocessing)[None])
        best = rank(found.output, self.classes, top_k)[0] if self.classes else []
        predictions = [dataclasses.replace(one, name=self._labels[one.index]) for one in best]
        maps = tuple(
            dataclasses.replace(one, standardised=one.standardised[0], rescaled=one.rescaled[0]) for one in found
        )
        return Seen(image, tuple(predictions), Similarity(found.output[0], maps))

    @property
    def stage(self) -> int:
        """The last one whose maps have more than one position, which are no maps."""
        sides = {stage: -(-self.preprocessing.input_size // stride) for stage, stride in enumerate((4, 8, 16, 32), 1)}
        return max((stage for stage, side in sides.items() if side > 1), default=4)

    def scene(self, image: Image.Image, side: int = SHOWN) -> Scene:
        """The image as it is shown: at most `side` pixels long, without the far ends of a long and thin one."""
        shown = image.crop(self._window(image))
        shown.thumbnail((side, side))
        factor = 256 // max(shown.size)
        if factor > 1:  # a small one is enlarged, its pixels stay pixels
            shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
        return Scene(np.asarray(shown), seen_in(image.size, self.preprocessing, shown.size, self._window(image)))

    def placed(self, maps: np.ndarray, image: Image.Image, scene: Scene) -> np.ndarray:
        """Maps on the image as it is shown: (n, h, w) -> (n, H, W), NaN where nothing was seen or is no map."""
        if maps[0].size == 1:
            return np.full((len(maps), *scene.seen.shape), np.nan)
        height, width = scene.seen.shape
        return place(maps, image.size, self.preprocessing, (width, height), self._window(image))

    def _window(self, image: Image.Image) -> tuple[int, int, int, int]:
        return surroundings(image.size, self.preprocessing, LONGEST)


def each_readable(
    images: Sequence[Path], preprocessing: Preprocessing, bad: list[BadImages], advance: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and uint8 (3, S, S) of each image; those that cannot be read go to `bad`.

    Raises:
        BadImages: not one can.
    """
    for number, path in enumerate(images):
        try:
            pixels = preprocess(path, preprocessing)
        except BadImages as error:
            bad.append(_named(error, path))
        else:
            yield number, pixels
        advance(1)
    if len(bad) == len(images):
        raise BadImages(f"none of {len(bad)} images can be read, first: {bad[0]}")


def choose_heads(maps: np.ndarray, heads: str) -> tuple[np.ndarray, list[str]]:
    """(heads, h, w) -> those that are to be shown, with their names.

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
    """Nothing, where `choose_heads` will find them.

    Raises:
        UsageError: it will not.
    """
    choose_heads(np.zeros((variant.heads, 1, 1)), heads)


def caption(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """The best classes with their probabilities, as the parts of a line (`fcvit.report.charts.joined`)."""
    parts = [part for row in predictions for part in (", ", row.name, f": {100 * row.probability:.1f} %")]
    return tuple(parts[1:])


def picture(
    viewer: Viewer, seen: Seen, name: str, where: Place, heads: str, which: Which, scale: Scale = "picture"
) -> bytes:
    """The maps of one global context on the image: a PNG file; colors have one scale, or each head its own."""
    one = seen.found.at(*where)
    scene = viewer.scene(seen.image)
    maps, names = choose_heads(getattr(one, which), heads)
    title = (name, f": stage {one.stage}, block {one.block}, context {one.context}")
    rows = [Row("", names, viewer.placed(maps, seen.image, scene))]
    return maps_sheet(scene, _scaled(rows, scale), title, _subtitle(viewer, seen), _label(which, scale))


def depth_picture(
    viewer: Viewer, seen: Seen, name: str, context: int, heads: str, which: Which, scale: Scale = "picture"
) -> bytes:
    """That context of the last block of each stage, one below the other: a PNG file."""
    scene = viewer.scene(seen.image)
    rows = []
    for one in _by_stage(seen, context):
        maps, names = choose_heads(getattr(one, which), heads)
        place_of = f"stage {one.stage}\nblock {one.block}\ncontext {one.context}"
        rows.append(Row(place_of, names, viewer.placed(maps, seen.image, scene)))
    title = (name, ": from stage to stage")
    return maps_sheet(scene, _scaled(rows, scale), title, _subtitle(viewer, seen), _label(which, scale))


def _scaled(rows: list[Row], scale: Scale) -> list[Row]:
    return rows if scale == "picture" else [own_range(row) for row in rows]


def _label(which: Which, scale: Scale) -> str:
    return f"{which} similarity" + (", from the lowest to the highest of each head" if scale == "head" else "")


def _subtitle(viewer: Viewer, seen: Seen) -> tuple[str, ...]:
    """The network, and what it takes the image for."""
    return (viewer.name, *((": ", *caption(seen.predictions)) if seen.predictions else ()))


def _by_stage(seen: Seen, context: int) -> list[SimilarityMap[np.ndarray]]:
    return [seen.found.at(stage, -1, context) for stage in sorted({one.stage for one in seen.found})]


def panel(
    viewer: Viewer,
    seen: Seen,
    title: Sequence[str],
    context: int = FIRST,
    heads: str = "mean",
    which: Which = "standardised",
) -> Panel:
    """The image, small, with one map of each stage: the mean over heads, or one head, of the last block's context."""
    scene = viewer.scene(seen.image, _SMALL)
    maps = [choose_heads(getattr(one, which), _one(heads))[0] for one in _by_stage(seen, context)]
    return Panel(title, scene, np.concatenate([viewer.placed(one, seen.image, scene) for one in maps]))


def overview(
    panels: Sequence[Panel],
    title: str,
    variant: Variant,
    context: int = FIRST,
    heads: str = "mean",
    which: Which = "standardised",
) -> bytes:
    """Several images, each with its maps from stage to stage: a PNG file; what is shown as for `panel`."""
    chosen = [choose(places(variant), stage, -1, context) for stage in range(1, 1 + len(panels[0].maps))]
    names = [f"stage {stage}, block {block}" for stage, block, _ in chosen]
    of_heads = "mean over heads" if _one(heads) == "mean" else f"head {heads}"
    return maps_overview(panels, names, title, f"{which} similarity, context {chosen[0][2]}, {of_heads}")


def _one(heads: str) -> str:
    """What stands for all heads where there is room for one map."""
    return "mean" if heads == "each" else heads


def similarity(
    weights: "Weights | str | os.PathLike[str]",
    images: Sequence[Path],
    folder: str | os.PathLike[str] | None = None,
    *,
    stage: int | None = None,
    block: int = -1,
    context: int = FIRST,
    heads: str = "each",
    which: Which = "standardised",
    scale: Scale = "picture",
    top_k: int = 5,
    classes: Classes | None = None,
    preprocessing: Preprocessing | None = None,
    device: str = "auto",
    ema: bool | None = None,
) -> Written:
    """For each image two pictures (the heads of one global context; the stages one below the other) and all arrays.

    Several images have an overview besides, from stage to stage.

    Args:
        weights: a file of any format, or weights in memory.
        images: files.
        folder: a new one; None: `runs/similarity`, or the first free one after it.
        stage, block, context: which global context; numbers from 1, or from the end with -1. No stage: the last one
            whose maps have more than one position.
        heads: "each", "mean", or the number of one.
        which: "standardised", or "rescaled", as it multiplies the context.
        scale: of the colors: one for a "picture", or one for each "head", whose name then has its range. The overview
            has one.
        top_k: classes in the caption.

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: before the first image.
        BadImages: not one image can be read. Single ones are listed in the result.
        NumbersDisagree: maps that are no finite numbers.
        KeyboardInterrupt: the files of the images before are there, which a note says.
    """
    if which not in get_args(Which):
        raise UsageError(f"--values {which}: expected standardised or rescaled")
    if scale not in get_args(Scale):
        raise UsageError(f"--scale {scale}: expected picture or head")
    if not images:
        raise UsageError("expected at least one image")
    if top_k < 1:
        raise UsageError(f"--top-k {top_k}: expected at least 1")
    from fcvit.report.page import require_report

    require_report()
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    viewer = Viewer(read, classes, preprocessing, device)
    if classes and (note := order_note(classes, read.classes)):
        logger.info(note)
    where = choose(places(viewer.variant), viewer.stage if stage is None else stage, block, context)
    check_heads(viewer.variant, heads)
    done: list[tuple[str, tuple[str, ...], Prediction | None]] = []
    panels: list[Panel] = []
    bad: list[BadImages] = []
    taken = {OVERVIEW}
    shown = set(sample_evenly(range(len(images)), MOST))
    with (
        runs.run_folder(None if folder is None else Path(folder), "similarity") as target,
        progress("drawing", len(images)) as advance,
    ):
        try:
            for number, path in enumerate(images):
                advance(1)
                try:
                    seen = viewer.see(decode(path), top_k)
                except BadImages as error:
                    bad.append(_named(error, path))
                    continue
                contents = (
                    picture(viewer, seen, path.name, where, heads, which, scale),
                    depth_picture(viewer, seen, path.name, where[2], heads, which, scale),
                    _arrays(seen),
                )
                files = _free(path.stem, taken)
                for file, content in zip(files, contents, strict=True):
                    runs.write_bytes(target / file, content)
                done.append((str(path), tuple(files), seen.predictions[0] if seen.predictions else None))
                if number in shown:
                    best = (": ", *caption(seen.predictions[:1])) if seen.predictions else ()
                    panels.append(panel(viewer, seen, (path.name, *best), where[2], heads, which))
        except KeyboardInterrupt:
            logger.info(f"the files of {len(done)} of {len(images)} images are in {target}")
            raise
        if not done:
            raise BadImages(f"none of {len(bad)} images can be read, first: {bad[0]}")
        if len(panels) > 1:
            of_how_many = f"{len(panels)} of {len(done)} images" if len(panels) < len(done) else f"{len(done)} images"
            title = f"{viewer.name}: {of_how_many}"
            runs.write_bytes(target / OVERVIEW, overview(panels, title, viewer.variant, where[2], heads, which))
    return Written(target, tuple(done), tuple(map(str, bad)))


def _named(error: BadImages, path: Path) -> BadImages:
    """With the path, which what fails after decoding does not know."""
    return error if str(error).startswith(str(path)) else BadImages(f"{path}: {error}")


def _free(stem: str, taken: set[str]) -> list[str]:
    """Names for the three files of an image: no other's, also where upper and lower case are one, nor too long."""
    # 255 bytes are what file systems allow; bytes that are not UTF-8 are left out.
    stem = os.fsencode(stem)[:_STEM].decode("utf-8", "ignore") or "image"
    number = 1
    while True:
        name = stem if number == 1 else f"{stem}-{number}"
        files = [f"{name}{ending}" for ending in _ENDINGS]
        if taken.isdisjoint(file.casefold() for file in files):
            taken.update(file.casefold() for file in files)
            return files
        number += 1


def _arrays(seen: Seen) -> bytes:
    """All maps of an image, as `NAME.standardised` and `NAME.rescaled`, (heads, H, W)."""
    file = io.BytesIO()
    arrays = {f"{one.name}.{which}": getattr(one, which) for one in seen.found for which in get_args(Which)}
    np.savez_compressed(file, **arrays)
    return file.getvalue()
