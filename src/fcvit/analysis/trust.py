"""Can a map be trusted? Deletion and insertion curves against other maps, and occlusion as another opinion.

A map that marks what the prediction rests on, marks pixels whose removal hurts it early (deletion: a low area under
the curve of the predicted class's probability) and whose return brings it back early (insertion: a high one). There are
two controls. Random maps of the same number of positions, interpolated alike, show what any map of that grain does. The
map of another image shows what is owed to a layout that all images share, such as objects in the middle. Occlusion
asks the prediction itself what it rests on, patch by patch: how far a map ranks the patches as it does is a
measure that owes nothing to the curves.

(Petsiuk, Das and Saenko, RISE, arXiv 1806.07421, for the curves; Zeiler and Fergus, arXiv 1311.2901, for occlusion.)
"""

import contextlib
import dataclasses
import logging
import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fcvit import run_folder as runs
from fcvit.analysis.map_charts import trust_chart
from fcvit.analysis.placement import place
from fcvit.analysis.similarity import Viewer, check_heads, choose_heads, each_readable
from fcvit.errors import BadImages, DoesNotFit, MissingExtra, UsageError, counted
from fcvit.inference.engines import AUTO, create_engine
from fcvit.metrics.classification import softmax
from fcvit.models.maps import Place, SimilarityMap, places
from fcvit.models.variants import Preprocessing
from fcvit.report.progress import duration, progress
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")

STEPS = 11  # points of a curve, from nothing to all
RANDOM = 4  # control maps of an image
PATCHES = 8  # of occlusion, along a side
LEAST = 10  # images: a bootstrap over fewer says nothing
OCCLUSION = "occlusion"
_RESAMPLES = 2000
Compute = Callable[[np.ndarray], np.ndarray]  # of a batch of images


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over the images, and its 95 % interval, by bootstrap over them; NaN where there is none."""

    mean: float
    low: float
    high: float


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


@dataclasses.dataclass(frozen=True)
class Trust:
    """All kinds of maps over so many images.

    Attributes:
        values: "signed" or "absolute".
        unreadable: images that were left out, with the reason.
        folder: where it was written, or None.
    """

    network: str
    images: int
    values: str
    curves: tuple[Curves, ...]
    unreadable: tuple[str, ...]
    folder: Path | None


def trust(
    weights: "Weights | str | os.PathLike[str]",
    images: Sequence[Path],
    folder: str | os.PathLike[str] | None = None,
    *,
    absolute: bool = False,
    every: bool = False,
    heads: str = "mean",
    seed: int = 0,
    engine: str = AUTO,
    device: str = "auto",
    ema: bool | None = None,
) -> Trust:
    """Measure maps, and occlusion.

    Args:
        weights: a file of any format, or weights in memory; with a head.
        images: files; at least `LEAST`.
        folder: a new one for trust.json and trust.png; None: nothing is written.
        absolute: what is unlike the context counts as marked too: the absolute values, head by head.
        every: the maps of all global contexts; else those of the first and the last of each stage.
        heads: "mean" over them, "each", or the number of one.
        seed: of the random maps and of the bootstrap.
        engine: what computes the probabilities.

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: before the first image.
        BadImages: too few images can be read. Single ones are listed in the result.
        KeyboardInterrupt: what was measured until then is in the folder, if it is of `LEAST` images.
        NumbersDisagree: maps that are no finite numbers.
    """
    if len(images) < LEAST:
        raise UsageError(f"{counted(len(images), 'image')}: expected at least {LEAST}, for an interval")
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    if not read.spec.num_classes:
        raise DoesNotFit(f"{read.source.path} is {read.spec}: it predicts nothing that a map could explain")
    viewer = Viewer(read, device=device)
    check_heads(viewer.variant, heads)
    chosen = _chosen(places(viewer.variant), every)
    with contextlib.nullcontext() if folder is None else runs.run_folder(Path(folder), "trust") as target:
        compute = create_engine(engine, read, viewer.preprocessing, device)
        bad: list[BadImages] = []
        with progress("reading", len(images)) as advance:
            pixels = [one for _, one in each_readable(images, viewer.preprocessing, bad, advance)]
        if len(pixels) < LEAST:
            raise BadImages(f"{counted(len(pixels), 'image')} can be read: expected at least {LEAST}; first: {bad[0]}")
        logger.info(_expected(viewer, compute, pixels, chosen, heads, absolute))
        seen: dict[int, Looked] = {}
        marks: dict[str, list[Marks]] = {}

        def result() -> Trust:
            done = len(next(iter(marks.values())))
            curves = tuple(summary(name, found, seed) for name, found in marks.items())
            values = "absolute" if absolute else "signed"
            found = Trust(str(read.spec), done, values, curves, tuple(map(str, bad)), target)
            if target is not None:
                _write(target, found)
            return found

        try:
            with progress("removing and returning pixels", len(pixels)) as advance:
                for number in _order(len(pixels)):
                    pair = number, partner(number, len(pixels))
                    for one in pair:
                        if one not in seen:
                            seen[one] = look(viewer, compute, one, pixels[one], chosen, heads, absolute)
                    for name, found in measure(seen[pair[0]], seen[pair[1]], compute, seed).items():
                        marks.setdefault(name, []).append(found)
                    advance(1)
        except KeyboardInterrupt:
            done = len(next(iter(marks.values()), ()))
            if done >= LEAST and target is not None:
                result()
                logger.info(f"interrupted: the figures of {done} of {len(pixels)} images are in {target}")
            raise
        return result()


def _expected(
    viewer: Viewer, compute: Compute, pixels: Sequence[np.ndarray], chosen: Sequence[Place], heads: str, absolute: bool
) -> str:
    """How long the measuring will take, by the time of one batch as large as that of a curve."""
    similar = viewer.similarity(pixels[0][None])
    maps = [m for where in chosen for m in named_maps(similar.at(*where), heads, absolute).values()]
    # A map has its own curves and those of another image's; each shape, occlusion's too, has random ones.
    curves = 2 * (len(maps) + 1) + RANDOM * (len({one.shape for one in maps}) + 1)
    passes = curves * 2 * STEPS + PATCHES**2 + 1
    batch = np.stack([pixels[0]] * (2 * STEPS))
    compute(batch[:1])  # the first call may prepare something
    began = time.perf_counter()
    compute(batch)
    seconds = len(pixels) * passes * (time.perf_counter() - began) / len(batch)
    of = f"{counted(len(pixels), 'image')}, each {passes:,} times through the network"
    return f"{of}: about {duration(seconds)}; fewer images (--most) take less"


def _write(target: Path, found: Trust) -> None:
    runs.write_json(target / "trust.json", dataclasses.asdict(found))
    try:
        title = f"{found.network}: are the {found.values} maps right?"
        runs.write_bytes(target / "trust.png", trust_chart(found.curves, title, found.images))
    except MissingExtra as error:
        logger.info(f"no picture: {error}")


def _order(count: int) -> list[int]:
    """All numbers, from both halves in turn: an interruption leaves images of most classes."""
    half = (count + 1) // 2
    pairs = zip(range(half), range(half, 2 * half), strict=True)
    return [number for pair in pairs for number in pair if number < count]


def partner(number: int, count: int) -> int:
    """Whose maps an image is held against: half of all images further, of class folders mostly another class."""
    return (number + count // 2) % count


def _chosen(known: Sequence[Place], every: bool) -> list[Place]:
    """All, or of each stage the first and the last."""
    ends = [[where for where in known if where[0] == stage] for stage in sorted({where[0] for where in known})]
    return list(known) if every else [where for one in ends for where in dict.fromkeys((one[0], one[-1]))]


@dataclasses.dataclass(frozen=True)
class Looked:
    """What the network makes of one image.

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
class Marks:
    """What one map of one image came to.

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


def look(
    viewer: Viewer,
    compute: Compute,
    number: int,
    pixels: np.ndarray,
    chosen: Sequence[Place],
    heads: str,
    absolute: bool,
) -> Looked:
    """One image; a map of a single position is none."""
    found = viewer.similarity(pixels[None])
    predicted = int(found.output[0].argmax())
    maps = {}
    for where in chosen:
        maps |= named_maps(found.at(*where), heads, absolute)
    maps[OCCLUSION] = occlusion(pixels, lambda batch: softmax(compute(batch))[:, predicted])
    return Looked(number, pixels, predicted, maps)


def named_maps(one: SimilarityMap[np.ndarray], heads: str, absolute: bool) -> dict[str, np.ndarray]:
    """Standardised maps of the first image, (h, w), by the names of context and head."""
    values = one.standardised[0]
    if values[0].size < 2:
        return {}
    maps, names = choose_heads(np.abs(values) if absolute else values, heads)
    return {
        one.name if heads == "mean" else f"{one.name}, {name}": each for name, each in zip(names, maps, strict=True)
    }


def measure(one: Looked, other: Looked, compute: Compute, seed: int) -> dict[str, Marks]:
    """The maps of one image, beside random ones and those of another image."""
    side = one.pixels.shape[1]

    def curves(name: str, values: np.ndarray) -> np.ndarray:
        return removal(one.pixels, spread(name, values, side), lambda x: softmax(compute(x))[:, one.predicted])

    found = {}
    random: dict[tuple[object, ...], np.ndarray] = {}  # one control for all maps of a shape
    reference = one.maps[OCCLUSION]
    for name, values in one.maps.items():
        kind = (name == OCCLUSION, *values.shape)
        if kind not in random:
            generator = np.random.default_rng([seed, one.number, *map(int, kind)])
            random[kind] = np.mean([curves(name, generator.random(values.shape)) for _ in range(RANDOM)], axis=0)
        agreed = rank_correlation(over_blocks(spread(name, values, side), PATCHES), reference)
        found[name] = Marks(
            curves(name, values),
            random[kind],
            curves(name, other.maps[name]),
            float("nan") if name == OCCLUSION else agreed,
        )
    return found


def spread(name: str, values: np.ndarray, side: int) -> np.ndarray:
    """A map over the crop's pixels, (h, w) -> (side, side): as the network computed it, or in patches."""
    if name == OCCLUSION:
        block = np.arange(side) * len(values) // side
        return values[np.ix_(block, block)]
    return place(values, (side, side), Preprocessing(side, 1.0))


def over_blocks(values: np.ndarray, blocks: int) -> np.ndarray:
    """The mean over each block of pixels: (side, side) -> (blocks, blocks)."""
    side = len(values)
    averaging = np.zeros((blocks, side))
    averaging[np.arange(side) * blocks // side, np.arange(side)] = 1
    averaging /= averaging.sum(1, keepdims=True)
    return averaging @ values @ averaging.T


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, ties by their mean rank; NaN where one does not vary."""
    ranks = []
    for values in (one, other):
        _, place_of, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[place_of.ravel()]
        ranks.append(rank - rank.mean())
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm else float("nan")


def removal(pixels: np.ndarray, marked: np.ndarray, probability: Compute) -> np.ndarray:
    """Deletion and insertion curve of one map: (2, STEPS).

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
    """How much the probability falls when a patch is covered: (PATCHES, PATCHES)."""
    side = pixels.shape[1]
    block = np.arange(side) * PATCHES // side
    grid = block[:, None] * PATCHES + block
    nothing = pixels.mean((1, 2), keepdims=True).round().astype(np.uint8)
    covered = np.stack([np.where(grid == patch, nothing, pixels) for patch in range(PATCHES**2)])
    found = probability(np.concatenate([pixels[None], covered]))
    return (found[0] - found[1:]).reshape(PATCHES, PATCHES)


def summary(name: str, marks: Sequence[Marks], seed: int) -> Curves:
    """From what one kind of map came to on all images, to figures with intervals."""
    curves = np.stack([[one.own, one.random, one.other] for one in marks])  # (images, 3, deletion or insertion, STEPS)
    own, random, other = np.moveaxis((curves[..., 1:] + curves[..., :-1]).mean(-1) / 2, 1, 0)  # areas, (images, 2) each
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])  # the same, whatever else is measured

    def over_images(values: np.ndarray) -> Estimate:
        known = values[np.isfinite(values)]
        if not len(known):
            return Estimate(float("nan"), float("nan"), float("nan"))
        drawn = generator.integers(0, len(known), (_RESAMPLES, len(known)))
        low, high = np.percentile(known[drawn].mean(1), [2.5, 97.5])
        return Estimate(float(known.mean()), float(low), float(high))

    means = [[tuple(map(float, curve)) for curve in kind] for kind in curves.mean(0)]
    return Curves(
        name=name,
        deletion=means[0][0],
        insertion=means[0][1],
        random_deletion=means[1][0],
        random_insertion=means[1][1],
        other_deletion=means[2][0],
        other_insertion=means[2][1],
        deletion_over_random=over_images(random[:, 0] - own[:, 0]),
        insertion_over_random=over_images(own[:, 1] - random[:, 1]),
        deletion_over_other=over_images(other[:, 0] - own[:, 0]),
        insertion_over_other=over_images(own[:, 1] - other[:, 1]),
        occlusion=over_images(np.array([one.occlusion for one in marks])),
    )
