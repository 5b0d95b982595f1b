"""Show what the network finds similar to the whole image: its token-global similarity, head by head, block by block."""

import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fcvit import runs
from fcvit.classes import Classes, resolve_classes
from fcvit.errors import BadImages, DoesNotFit, UsageError
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place
from fcvit.images.folder import evenly
from fcvit.images.placement import place
from fcvit.images.preprocess import crop, decode, normalise
from fcvit.maps import Similarity, SimilarityMap, require_maps
from fcvit.report.maps_sheet import Panel, Row, maps_overview, maps_sheet
from fcvit.report.progress import progress
from fcvit.tasks.predict import Prediction, rank
from fcvit.variants import Preprocessing, resolve_preprocessing
from fcvit.weights.reading import Weights, read_weights

SHOWN = 480  # pixels: pictures are drawn on the image at most this large; the arrays are those of the network
_SMALL = 200  # where there are many images
MOST = 60  # images of an overview
OVERVIEW = "overview.png"
Which = Literal["standardised", "rescaled"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image as the network saw it.

    Attributes:
        image: the original, RGB.
        predictions: best first; empty without a head.
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
    unreadable: tuple[BadImages, ...]


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
        form = weights.form
        require_maps(form.variant)
        if form.dense:
            raise DoesNotFit(f"{weights.source.path} is {form}; maps come from a classifier")
        self.variant = form.variant
        self.name = weights.source.path.name
        self.preprocessing = resolve_preprocessing(preprocessing, weights.preprocessing, form.variant)
        self.classes = resolve_classes(classes, weights.classes, form.num_classes) if form.num_classes else ()
        self.device = paddle_place(device)
        self.paddle = import_framework("paddle")
        from fcvit.loading import build_classifier

        with on_paddle_device(self.device):
            self.model = build_classifier(weights)

    def similarity(self, batch: np.ndarray, tokens: bool = False) -> Similarity[np.ndarray]:
        """uint8 (B, 3, S, S) -> logits and maps, as NumPy arrays; with what each context is taken of, if asked."""
        with on_paddle_device(self.device), self.paddle.no_grad():
            found = self.model.similarity(self.paddle.to_tensor(normalise(batch, self.preprocessing)), tokens)
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
            return Similarity(found.output.numpy(), maps)

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """uint8 (B, 3, S, S) -> (B, classes)."""
        with on_paddle_device(self.device), self.paddle.no_grad():
            return self.model(self.paddle.to_tensor(normalise(batch, self.preprocessing))).numpy()

    def see(self, image: Image.Image, top_k: int = 5) -> Seen:
        """One image, RGB, of any size.

        Raises:
            BadImages: so long and thin that it cannot be resized.
        """
        found = self.similarity(crop(image, self.preprocessing)[None])
        predictions = rank(found.output, self.classes, top_k)[0] if self.classes else []
        maps = tuple(
            dataclasses.replace(one, standardised=one.standardised[0], rescaled=one.rescaled[0]) for one in found
        )
        return Seen(image, tuple(predictions), Similarity(found.output[0], maps))

    def rows(
        self, seen: Seen, maps: Sequence[tuple[str, np.ndarray]], heads: str = "each", side: int = SHOWN
    ) -> tuple[np.ndarray, list[Row]]:
        """The image at the size of the picture, and maps (heads, h, w) placed on it, named.

        Args:
            heads: "each", "mean", or the number of one, from 1.
            side: of the image at most, in pixels.

        Raises:
            UsageError: no such head.
        """
        shown = seen.image.copy()
        shown.thumbnail((side, side))
        if max(shown.size) < 2 * self.preprocessing.input_size < side:  # small ones are enlarged, pixels stay pixels
            factor = max(1, 256 // max(shown.size))
            shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
        rows = []
        for name, values in maps:
            chosen, names = choose_heads(values, heads)
            rows.append(Row(name, names, place(chosen, seen.image.size, self.preprocessing, shown.size)))
        return np.asarray(shown), rows


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


def caption(predictions: Sequence[Prediction]) -> str:
    """The best classes with their probabilities, in one line."""
    return ", ".join(f"{row.name} {100 * row.probability:.1f} %" for row in predictions)


def picture(viewer: Viewer, seen: Seen, name: str, where: Sequence[int], heads: str, which: Which) -> bytes:
    """The maps of one global context on the image: a PNG file."""
    one = seen.found.at(*where)
    image, rows = viewer.rows(seen, [("", getattr(one, which))], heads)
    place_of = f"stage {one.stage}, block {one.block}, context {one.context}"
    return maps_sheet(image, rows, f"{name}: {place_of}", caption(seen.predictions), f"{which} similarity")


def depth_picture(viewer: Viewer, seen: Seen, name: str, heads: str, which: Which) -> bytes:
    """The last context of each stage, one below the other: a PNG file."""
    stages = [(f"stage {stage}", getattr(seen.found.at(stage), which)) for stage in _stages(seen)]
    image, rows = viewer.rows(seen, stages, heads)
    return maps_sheet(image, rows, f"{name}: from stage to stage", caption(seen.predictions), f"{which} similarity")


def _stages(seen: Seen) -> list[int]:
    return sorted({one.stage for one in seen.found})


def panel(viewer: Viewer, seen: Seen, title: str) -> Panel:
    """The image, small, with the mean map over heads of the last context of each stage."""
    stages = [("", seen.found.at(stage).standardised) for stage in _stages(seen)]
    image, rows = viewer.rows(seen, stages, "mean", _SMALL)
    return Panel(title, image, np.concatenate([row.maps for row in rows]))


def overview(panels: Sequence[Panel], title: str) -> bytes:
    """Several images, each with its maps from stage to stage: a PNG file."""
    names = [f"stage {number}" for number in range(1, 1 + len(panels[0].maps))]
    return maps_overview(panels, names, title, "standardised similarity, mean over heads")


def similarity(
    weights: "Weights | str | os.PathLike[str]",
    images: Sequence[Path],
    folder: str | os.PathLike[str] | None = None,
    *,
    stage: int = -1,
    block: int = -1,
    context: int = -1,
    heads: str = "each",
    which: Which = "standardised",
    top_k: int = 5,
    classes: Classes | None = None,
    preprocessing: Preprocessing | None = None,
    device: str = "auto",
    ema: bool | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Written:
    """For each image two pictures (the heads of one global context; the stages one below the other) and all arrays.

    Several images have an overview besides: the mean over heads from stage to stage.

    Args:
        weights: a file of any format, or weights in memory.
        images: files.
        folder: a new one; None: `runs/similarity`, or the first free one after it.
        stage, block, context: which global context; numbers from 1, or from the end with -1.
        heads: "each", "mean", or the number of one.
        which: "standardised", or "rescaled", as it multiplies the context.
        top_k: classes in the caption.

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: before the first image.
        BadImages: not one image can be read. Single ones are listed in the result.
    """
    if which not in ("standardised", "rescaled"):
        raise UsageError(f"--values {which}: expected standardised or rescaled")
    if top_k < 1 or not images:
        raise UsageError("expected at least one image, and --top-k from 1")
    from fcvit.report.page import require_report

    require_report()
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    viewer = Viewer(read, classes, preprocessing, device)
    done: list[tuple[str, tuple[str, ...], Prediction | None]] = []
    panels: list[Panel] = []
    bad: list[BadImages] = []
    taken = {Path(OVERVIEW).stem}
    shown = set(evenly(range(len(images)), MOST))
    with runs.run_folder(None if folder is None else Path(folder), "similarity") as target:
        with progress("drawing", len(images)) as advance:
            for number, path in enumerate(images):
                try:
                    seen = viewer.see(decode(path), top_k)
                except BadImages as error:
                    bad.append(error)
                    advance(1)
                    continue
                name = _free(path.stem, taken)
                made = {
                    f"{name}.png": picture(viewer, seen, path.name, (stage, block, context), heads, which),
                    f"{name}-depth.png": depth_picture(viewer, seen, path.name, heads, which),
                    f"{name}.npz": _arrays(seen),
                }
                for file, content in made.items():
                    runs.write_bytes(target / file, content)
                done.append((str(path), tuple(made), seen.predictions[0] if seen.predictions else None))
                if number in shown:
                    best = caption(seen.predictions[:1])
                    panels.append(panel(viewer, seen, f"{path.name}: {best}" if best else path.name))
                advance(1)
        if not done:
            raise BadImages(f"none of {len(bad)} images can be read, first: {bad[0]}")
        if len(panels) > 1:
            of_how_many = f"{len(panels)} of {len(done)} images" if len(panels) < len(done) else f"{len(done)} images"
            runs.write_bytes(target / OVERVIEW, overview(panels, f"{viewer.name}: {of_how_many}"))
    return Written(target, tuple(done), tuple(bad))


def _free(stem: str, taken: set[str]) -> str:
    """Images of one name in several folders do not overwrite each other."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


def _arrays(seen: Seen) -> bytes:
    """All maps of an image, as `NAME.standardised` and `NAME.rescaled`, (heads, H, W)."""
    file = io.BytesIO()
    arrays = {
        f"{one.name}.{which}": getattr(one, which) for one in seen.found for which in ("standardised", "rescaled")
    }
    np.savez_compressed(file, **arrays)
    return file.getvalue()
