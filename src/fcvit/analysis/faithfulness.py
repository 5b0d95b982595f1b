"""Faithfulness of maps: deletion and insertion curves against other maps, and occlusion as another opinion.

A map that marks what the prediction rests on, marks pixels whose removal hurts it early (deletion: a low area under
the curve of the predicted class's probability) and whose return brings it back early (insertion: a high one). There are
two controls. Random maps of the same number of positions, interpolated alike, show what any map of that grain does. The
map of another image shows what is owed to a layout that all images share, such as objects in the middle. Occlusion
asks the prediction itself what it rests on, patch by patch: how far a map ranks the patches as it does is a
measure that owes nothing to the curves.

(Petsiuk, Das and Saenko, RISE, arXiv 1806.07421, for the curves; Zeiler and Fergus, arXiv 1311.2901, for occlusion.)
"""

import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.analysis.placement import place
from fcvit.analysis.similarity import Viewer, choose_heads
from fcvit.errors import BadImages, counted
from fcvit.metrics.classification import softmax
from fcvit.models.maps import Place, Similarity, SimilarityMap, short
from fcvit.models.variants import Preprocessing
from fcvit.report.progress import duration

STEPS = 11  # points of a curve, from nothing to all
RANDOM = 4  # control maps of an image
PATCHES = 8  # of occlusion, along a side
MIN_IMAGES = 10  # images: a bootstrap over fewer says nothing
OCCLUSION = "occlusion"
_RESAMPLES = 2000
Compute = Callable[[np.ndarray], np.ndarray]  # of a batch of images


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over the images, and its 95 % interval, by bootstrap over them; NaN where there is none."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it with as many digits as it takes for two that count in the interval; "" where there is none."""
        if math.isnan(self.mean):
            return ""
        spread = self.high - self.low
        digits = max(3, 1 - math.floor(math.log10(spread))) if spread > 0 else 3
        mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"


@dataclasses.dataclass(frozen=True)
class Curves:
    """One kind of map over all images.

    Attributes:
        name: of a global context, as in `SimilarityMap.name`, with the head if one was taken; or "occlusion".
        deletion, insertion: mean probability of the predicted class when 0, 10, ... 100 % of the pixels, most
            marked first, are gone or are there.
        random_deletion, random_insertion: the same of the random maps.
        other_deletion, other_insertion: the same of the map of another image.
        deletion_over_random, insertion_over_random: how much better than random, in area under the curve.
        deletion_over_other, insertion_over_other: how much better than another image's.
        occlusion: Spearman's correlation with occlusion, over the patches.
    """

    name: str
    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    random_deletion: tuple[float, ...]
    random_insertion: tuple[float, ...]
    other_deletion: tuple[float, ...]
    other_insertion: tuple[float, ...]
    deletion_over_random: Estimate
    insertion_over_random: Estimate
    deletion_over_other: Estimate
    insertion_over_other: Estimate
    occlusion: Estimate


@dataclasses.dataclass(frozen=True, repr=False)
class Faithfulness:
    """The faithfulness of all kinds of maps of a network.

    Attributes:
        network: in words.
        images: how many were measured.
        values: "signed" or "absolute".
        curves: of each kind of map; of occlusion last.
        unreadable: images that were left out, with the reason.
        folder: where it was written, or None.
    """

    network: str
    images: int
    values: str
    curves: tuple[Curves, ...]
    unreadable: tuple[str, ...] = ()
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"<Faithfulness of {self.network}: {len(self.curves)} maps, {counted(self.images, 'image')}>"

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def tables(self) -> Iterator[Any]:
        """Show how much better the maps are than others, and how like occlusion."""
        from fcvit.report.tables import table

        controls = ("random maps", "another image's")
        for what in ("deletion", "insertion"):
            title = f"{self.network}, {self.images} images, {self.values} maps: {what}, area gained over"
            result = table("map", *controls, right=controls, title=title)
            for one in self.curves:
                gains = (getattr(one, f"{what}_over_random"), getattr(one, f"{what}_over_other"))
                result.add_row(short(one.name), *map(str, gains))
            yield result
        result = table("map", "rank correlation", right=("rank correlation",), title="with occlusion, over the patches")
        for one in self.curves:
            if cell := str(one.occlusion):
                result.add_row(short(one.name), cell)
        yield result
        if self.folder is not None:
            yield f"written to {self.folder}"


@dataclasses.dataclass(frozen=True)
class Attribution:
    """The class that the network predicts of one image, and its maps.

    Attributes:
        number: of the image, from 0.
        pixels: uint8 (3, S, S).
        predicted: its class.
        maps: (h, w) by name; with occlusion, (PATCHES, PATCHES), last.
    """

    number: int
    pixels: np.ndarray
    predicted: int
    maps: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageCurves:
    """The curves of one map of one image.

    Attributes:
        own: deletion and insertion curve, (2, STEPS).
        random: of the random maps, the mean.
        other: of the map of another image.
        occlusion: rank correlation with occlusion.
    """

    own: np.ndarray
    random: np.ndarray
    other: np.ndarray
    occlusion: float


@dataclasses.dataclass(frozen=True)
class Explainer:
    """A network with its maps and what computes its logits.

    Attributes:
        viewer: shows the maps.
        compute: the logits of a batch of images.
        chosen: whose maps are measured.
        heads: "mean", "each", or the number of one.
        absolute: whether what is unlike the context counts as marked too.
    """

    viewer: Viewer
    compute: Compute
    chosen: Sequence[Place]
    heads: str = "mean"
    absolute: bool = False

    def maps(self, similarity: Similarity[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the maps of the first image by name; a map of a single position is none."""
        contexts = [named_maps(similarity.at(*where), self.heads, self.absolute) for where in self.chosen]
        return {name: values for context in contexts for name, values in context.items()}

    def attribution(self, number: int, pixels: np.ndarray) -> Attribution:
        """Explain one image."""
        similarity = self.viewer.similarity(pixels[None])
        predicted = int(similarity.output[0].argmax())
        covered = occlusion(pixels, lambda batch: softmax(self.compute(batch))[:, predicted])
        return Attribution(number, pixels, predicted, self.maps(similarity) | {OCCLUSION: covered})

    def expected(self, pixels: Sequence[np.ndarray]) -> str:
        """Say how long the measuring will take, by the time of one batch as large as that of a curve."""
        shapes = [one.shape for one in self.maps(self.viewer.similarity(pixels[0][None])).values()]
        # A map has its own curves and those of another image's; each shape, occlusion's too, has random ones.
        curves = 2 * (len(shapes) + 1) + RANDOM * (len(set(shapes)) + 1)
        passes = curves * 2 * STEPS + PATCHES**2 + 1
        batch = np.stack([pixels[0]] * (2 * STEPS))
        self.compute(batch[:1])  # the first call may prepare something
        began = time.perf_counter()
        self.compute(batch)
        seconds = len(pixels) * passes * (time.perf_counter() - began) / len(batch)
        each = f"{counted(len(pixels), 'image')}, each {passes:,} times through the network"
        return f"{each}: about {duration(seconds)}; fewer images (--max-images) take less"


def named_maps(one: SimilarityMap[np.ndarray], heads: str, absolute: bool) -> dict[str, np.ndarray]:
    """Return the standardised maps of the first image, (h, w), by the names of context and head."""
    values = one.standardised[0]
    if values[0].size < 2:
        return {}
    maps, names = choose_heads(np.abs(values) if absolute else values, heads)
    return dict(zip([one.name if heads == "mean" else f"{one.name}, {name}" for name in names], maps, strict=True))


def measure(one: Attribution, other: Attribution, compute: Compute, seed: int) -> dict[str, ImageCurves]:
    """Measure the maps of one image, beside random ones and those of another image."""
    side = one.pixels.shape[1]

    def curves(name: str, values: np.ndarray) -> np.ndarray:
        return removal(one.pixels, spread(name, values, side), lambda x: softmax(compute(x))[:, one.predicted])

    results = {}
    random: dict[tuple[int, ...], np.ndarray] = {}  # one control for all maps of a shape
    for name, values in one.maps.items():
        kind = (int(name == OCCLUSION), *values.shape)
        if kind not in random:
            generator = np.random.default_rng([seed, one.number, *kind])
            random[kind] = np.mean([curves(name, generator.random(values.shape)) for _ in range(RANDOM)], axis=0)
        ranked = rank_correlation(over_blocks(spread(name, values, side), PATCHES), one.maps[OCCLUSION])
        rank = float("nan") if name == OCCLUSION else ranked
        results[name] = ImageCurves(curves(name, values), random[kind], curves(name, other.maps[name]), rank)
    return results


def spread(name: str, values: np.ndarray, side: int) -> np.ndarray:
    """Spread a map over the crop's pixels, (h, w) -> (side, side): as the network computed it, or in patches."""
    if name == OCCLUSION:
        block = np.arange(side) * len(values) // side
        return values[np.ix_(block, block)]
    return place(values, (side, side), Preprocessing(side, 1.0))


def over_blocks(values: np.ndarray, blocks: int) -> np.ndarray:
    """Average over each block of pixels: (side, side) -> (blocks, blocks)."""
    starts = -(-np.arange(blocks + 1) * len(values) // blocks)  # where index * blocks // side changes
    sizes = np.diff(starts)
    sums = np.add.reduceat(np.add.reduceat(values, starts[:-1], 0), starts[:-1], 1)
    return sums / np.outer(sizes, sizes)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's correlation, ties by their mean rank; NaN where one does not vary."""
    ranks = []
    for values in (one, other):
        _, place_of, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[place_of.ravel()]
        ranks.append(rank - rank.mean())
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm else float("nan")


def removal(pixels: np.ndarray, marked: np.ndarray, probability: Compute) -> np.ndarray:
    """Return the deletion and the insertion curve of one map: (2, STEPS).

    Args:
        pixels: uint8 (3, S, S).
        marked: (S, S); ties go in the order of the pixels.
        probability: of a batch of images.
    """
    order = np.argsort(-marked.ravel(), kind="stable")
    place_of = np.empty_like(order)
    place_of[order] = np.arange(len(order))
    shares = np.linspace(0, 1, STEPS)
    first = place_of.reshape(marked.shape) < (shares * len(order)).round()[:, None, None]  # (STEPS, S, S)
    nothing = np.broadcast_to(pixels.mean((1, 2), keepdims=True).round().astype(np.uint8), pixels.shape)
    deleted = np.where(first[:, None], nothing, pixels)
    inserted = np.where(first[:, None], pixels, nothing)
    return probability(np.concatenate([deleted, inserted])).reshape(2, STEPS)


def occlusion(pixels: np.ndarray, probability: Compute) -> np.ndarray:
    """Return how much the probability falls when a patch is covered: (PATCHES, PATCHES)."""
    side = pixels.shape[1]
    block = np.arange(side) * PATCHES // side
    grid = block[:, None] * PATCHES + block
    nothing = pixels.mean((1, 2), keepdims=True).round().astype(np.uint8)
    covered = np.stack([np.where(grid == patch, nothing, pixels) for patch in range(PATCHES**2)])
    probabilities = probability(np.concatenate([pixels[None], covered]))
    return (probabilities[0] - probabilities[1:]).reshape(PATCHES, PATCHES)


def summary(name: str, measured: Sequence[ImageCurves], seed: int) -> Curves:
    """Summarize the curves of one kind of map on all images, with intervals."""
    curves = np.stack([[one.own, one.random, one.other] for one in measured])  # (images, 3, 2, STEPS)
    areas = (curves[..., 1:] + curves[..., :-1]).mean(-1) / 2  # (images, 3, deletion or insertion)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])  # the same, whatever else is measured

    def over_images(values: np.ndarray) -> Estimate:
        known = values[np.isfinite(values)]
        if not len(known):
            return Estimate(float("nan"), float("nan"), float("nan"))
        drawn = generator.integers(0, len(known), (_RESAMPLES, len(known)))
        low, high = np.percentile(known[drawn].mean(1), [2.5, 97.5])
        return Estimate(float(known.mean()), float(low), float(high))

    fields: list[Any] = [tuple(map(float, curve)) for kind in curves.mean(0) for curve in kind]
    own, random, other = np.moveaxis(areas, 1, 0)
    gains = (random - own, own - random, other - own, own - other)  # better is lower in deletion, higher in insertion
    fields += [over_images(gain[:, number % 2]) for number, gain in enumerate(gains)]
    fields.append(over_images(np.array([one.occlusion for one in measured])))
    return Curves(name, *fields)
