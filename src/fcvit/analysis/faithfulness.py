"""Measure the faithfulness of maps with deletion and insertion curves, and compare the maps with occlusion.

Pixels are removed in the order of a map, highest values first (deletion), or restored in this order (insertion). If the
map highlights the pixels that the prediction depends on, the probability of the predicted class falls early in deletion
(small area under the curve) and rises early in insertion (large area). There are two controls. Random maps with the
same resolution and interpolation show the effect of any map of this resolution. The map of another image shows the
effect of a layout that all images share, such as objects in the center. Occlusion measures the importance of each patch
directly. The rank correlation with it is a measure that does not use the curves.

References: Petsiuk, Das and Saenko, RISE, arXiv 1806.07421 (curves); Zeiler and Fergus, arXiv 1311.2901 (occlusion).
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

STEPS = 11  # points of a curve, from 0 to 100% of the pixels
RANDOM = 4  # random maps per image and shape
PATCHES = 8  # occlusion patches per side of the image
MIN_IMAGES = 10  # a bootstrap over fewer images is meaningless
OCCLUSION = "occlusion"
_RESAMPLES = 2000
Compute = Callable[[np.ndarray], np.ndarray]  # logits or probabilities of a batch of images


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over images with its 95% bootstrap interval. NaN if no image has a value."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the estimate with two significant digits of its interval, or "" if it is NaN."""
        if math.isnan(self.mean):
            return ""
        spread = self.high - self.low
        digits = max(3, 1 - math.floor(math.log10(spread))) if spread > 0 else 3
        mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"


@dataclasses.dataclass(frozen=True)
class Curves:
    """The curves of one map, averaged over all images.

    Attributes:
        name: Name of the map as in `SimilarityMap.name`, with the head if only one is used, or "occlusion".
        deletion: Mean probability of the predicted class with 0, 10, ... 100% of the pixels removed, in the order of
            the map.
        insertion: Mean probability with 0, 10, ... 100% of the pixels restored, in the order of the map.
        random_deletion: Deletion curve of random maps.
        random_insertion: Insertion curve of random maps.
        other_deletion: Deletion curve of the same map of another image.
        other_insertion: Insertion curve of the same map of another image.
        deletion_over_random: Improvement over random maps in the area under the deletion curve.
        insertion_over_random: Improvement over random maps in the area under the insertion curve.
        deletion_over_other: Improvement over another image's map in the area under the deletion curve.
        insertion_over_other: Improvement over another image's map in the area under the insertion curve.
        occlusion: Spearman's rank correlation with occlusion over the patches.
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
    """The faithfulness of the maps of a network.

    Attributes:
        network: Description of the network.
        images: Number of measured images.
        values: "signed" or "absolute".
        curves: Curves of each map. The last one is occlusion.
        unreadable: Images that could not be read, with the reason.
        folder: Folder of the files, or None if nothing was written.
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
        """Show the improvement over the control maps, and the rank correlation with occlusion."""
        from fcvit.report.tables import table

        controls = ("over random maps", "over another image's map")
        for kind in ("deletion", "insertion"):
            title = f"{self.network}, {self.images} images, {self.values} maps: improvement of the {kind} area"
            result = table("map", *controls, right=controls, title=title)
            for curves in self.curves:
                gains = (getattr(curves, f"{kind}_over_random"), getattr(curves, f"{kind}_over_other"))
                result.add_row(short(curves.name), *map(str, gains))
            yield result
        column = "rank correlation"
        result = table("map", column, right=(column,), title="rank correlation with occlusion over the patches")
        for curves in self.curves:
            if cell := str(curves.occlusion):
                result.add_row(short(curves.name), cell)
        yield result
        if self.folder is not None:
            yield f"written to {self.folder}"


@dataclasses.dataclass(frozen=True)
class Attribution:
    """One image with its predicted class and its maps.

    Attributes:
        number: Number of the image, counted from 0.
        pixels: Pixels, uint8 (3, S, S).
        predicted: Index of the predicted class.
        maps: Maps (h, w) by name. The last one is occlusion, (PATCHES, PATCHES).
    """

    number: int
    pixels: np.ndarray
    predicted: int
    maps: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageCurves:
    """The deletion and insertion curves of one map of one image.

    Attributes:
        own: Curves of the map, (2, STEPS).
        random: Mean curves of the random maps, (2, STEPS).
        other: Curves of the same map of another image, (2, STEPS).
        occlusion: Rank correlation with occlusion.
    """

    own: np.ndarray
    random: np.ndarray
    other: np.ndarray
    occlusion: float


@dataclasses.dataclass(frozen=True)
class Explainer:
    """A network with the engine that computes its logits and the choice of maps to measure.

    Attributes:
        viewer: The network that computes the maps.
        compute: Function that returns the logits of a batch of images.
        chosen: Stage, block and context of each map to measure.
        heads: "mean", "each", or the number of a head.
        absolute: Measure absolute values, so that dissimilar positions also count as important.
    """

    viewer: Viewer
    compute: Compute
    chosen: Sequence[Place]
    heads: str = "mean"
    absolute: bool = False

    def maps(self, similarity: Similarity[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the maps of the first image by name, without maps of a single position."""
        contexts = [named_maps(similarity.at(*where), self.heads, self.absolute) for where in self.chosen]
        return {name: values for context in contexts for name, values in context.items()}

    def attribution(self, number: int, pixels: np.ndarray) -> Attribution:
        """Compute the predicted class and the maps of one image."""
        similarity = self.viewer.similarity(pixels[None])
        predicted = int(similarity.output[0].argmax())
        covered = occlusion(pixels, lambda batch: softmax(self.compute(batch))[:, predicted])
        return Attribution(number, pixels, predicted, self.maps(similarity) | {OCCLUSION: covered})

    def expected(self, pixels: Sequence[np.ndarray]) -> str:
        """Return a note with the expected duration, measured with one batch of the size used for a curve."""
        shapes = [values.shape for values in self.maps(self.viewer.similarity(pixels[0][None])).values()]
        # Each map has its own curves and the curves of another image's map. Each shape has RANDOM random maps.
        # Occlusion counts as one more map and one more shape.
        curves = 2 * (len(shapes) + 1) + RANDOM * (len(set(shapes)) + 1)
        passes = curves * 2 * STEPS + PATCHES**2 + 1
        batch = np.stack([pixels[0]] * (2 * STEPS))
        self.compute(batch[:1])  # the first call may compile or allocate
        began = time.perf_counter()
        self.compute(batch)
        seconds = len(pixels) * passes * (time.perf_counter() - began) / len(batch)
        images = f"{counted(len(pixels), 'image')} with {passes:,} forward passes each"
        return f"{images}: about {duration(seconds)}; use --max-images to measure fewer images"


def named_maps(context: SimilarityMap[np.ndarray], heads: str, absolute: bool) -> dict[str, np.ndarray]:
    """Return the standardized maps (h, w) of the first image by the names of their context and head."""
    values = context.standardized[0]
    if values[0].size < 2:
        return {}
    maps, names = choose_heads(np.abs(values) if absolute else values, heads)
    names = [context.name if heads == "mean" else f"{context.name}, {name}" for name in names]
    return dict(zip(names, maps, strict=True))


def measure(one: Attribution, other: Attribution, compute: Compute, seed: int) -> dict[str, ImageCurves]:
    """Measure the maps of one image, with random maps and the maps of another image as controls."""
    side = one.pixels.shape[1]

    def curves(name: str, values: np.ndarray) -> np.ndarray:
        return removal(one.pixels, spread(name, values, side), lambda x: softmax(compute(x))[:, one.predicted])

    results = {}
    random: dict[tuple[int, ...], np.ndarray] = {}  # by shape, because maps of the same shape share them
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
    """Resize a map to the pixels of the crop, (h, w) -> (side, side): bilinearly, or as blocks for occlusion."""
    if name == OCCLUSION:
        block = np.arange(side) * len(values) // side
        return values[np.ix_(block, block)]
    return place(values, (side, side), Preprocessing(side, 1.0))


def over_blocks(values: np.ndarray, blocks: int) -> np.ndarray:
    """Average a map over blocks of pixels, (side, side) -> (blocks, blocks)."""
    starts = -(-np.arange(blocks + 1) * len(values) // blocks)  # first indices of the blocks, as in `spread`
    sizes = np.diff(starts)
    sums = np.add.reduceat(np.add.reduceat(values, starts[:-1], 0), starts[:-1], 1)
    return sums / np.outer(sizes, sizes)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's rank correlation, with mean ranks for ties, or NaN if one input is constant."""
    ranks = []
    for values in (one, other):
        _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[inverse.ravel()]
        ranks.append(rank - rank.mean())
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm else float("nan")


def removal(pixels: np.ndarray, importance: np.ndarray, probability: Compute) -> np.ndarray:
    """Return the deletion curve and the insertion curve of one map, (2, STEPS).

    Args:
        pixels: The image, uint8 (3, S, S).
        importance: The map, (S, S). Ties are removed in pixel order.
        probability: Function that returns the probability of the predicted class for a batch of images.
    """
    order = np.argsort(-importance.ravel(), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    shares = np.linspace(0, 1, STEPS)
    first = rank.reshape(importance.shape) < (shares * len(order)).round()[:, None, None]  # (STEPS, S, S)
    mean_color = np.broadcast_to(pixels.mean((1, 2), keepdims=True).round().astype(np.uint8), pixels.shape)
    deleted = np.where(first[:, None], mean_color, pixels)
    inserted = np.where(first[:, None], pixels, mean_color)
    return probability(np.concatenate([deleted, inserted])).reshape(2, STEPS)


def occlusion(pixels: np.ndarray, probability: Compute) -> np.ndarray:
    """Return the decrease of the probability when each patch is covered, (PATCHES, PATCHES)."""
    side = pixels.shape[1]
    block = np.arange(side) * PATCHES // side
    grid = block[:, None] * PATCHES + block
    mean_color = pixels.mean((1, 2), keepdims=True).round().astype(np.uint8)
    covered = np.stack([np.where(grid == patch, mean_color, pixels) for patch in range(PATCHES**2)])
    probabilities = probability(np.concatenate([pixels[None], covered]))
    return (probabilities[0] - probabilities[1:]).reshape(PATCHES, PATCHES)


def summary(name: str, measured: Sequence[ImageCurves], seed: int) -> Curves:
    """Average the curves of one map over all images, with bootstrap intervals for the improvements."""
    curves = np.stack([[image.own, image.random, image.other] for image in measured])  # (images, 3, 2, STEPS)
    areas = (curves[..., 1:] + curves[..., :-1]).mean(-1) / 2  # (images, 3, deletion or insertion)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])  # independent of the other maps

    def over_images(values: np.ndarray) -> Estimate:
        known = values[np.isfinite(values)]
        if not len(known):
            return Estimate(float("nan"), float("nan"), float("nan"))
        drawn = generator.integers(0, len(known), (_RESAMPLES, len(known)))
        low, high = np.percentile(known[drawn].mean(1), [2.5, 97.5])
        return Estimate(float(known.mean()), float(low), float(high))

    fields: list[Any] = [tuple(map(float, curve)) for kind in curves.mean(0) for curve in kind]
    own, random, other = np.moveaxis(areas, 1, 0)
    # A better map has a smaller deletion area and a larger insertion area.
    gains = (random - own, own - random, other - own, own - other)
    fields += [over_images(gain[:, number % 2]) for number, gain in enumerate(gains)]
    fields.append(over_images(np.array([image.occlusion for image in measured])))
    return Curves(name, *fields)
