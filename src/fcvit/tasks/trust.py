"""Can a map be trusted? Deletion and insertion curves against random maps, and occlusion as another opinion.

A map that marks what the prediction rests on, marks pixels whose removal hurts it early (deletion: a low area under
the curve of the predicted class's probability) and whose return brings it back early (insertion: a high one). Both
depend on the shape of the marked regions, so the control is not chance pixels but random maps of the same number of
positions, drawn and interpolated alike. Occlusion asks the prediction itself what it rests on, patch by patch: how far
a map ranks the patches as it does is a measure that owes nothing to the curves.

(Petsiuk, Das and Saenko, RISE, arXiv 1806.07421, for the curves; Zeiler and Fergus, arXiv 1311.2901, for occlusion.)
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fcvit import runs
from fcvit.deploy.engines import AUTO, create_engine
from fcvit.errors import DoesNotFit, MissingExtra, UsageError
from fcvit.images.placement import place
from fcvit.images.preprocess import preprocess
from fcvit.maps import SimilarityMap
from fcvit.metrics import softmax
from fcvit.report.map_charts import trust_chart
from fcvit.report.progress import progress
from fcvit.tasks.similarity import Viewer, choose_heads
from fcvit.variants import Preprocessing
from fcvit.weights.reading import Weights, read_weights

STEPS = 11  # points of a curve, from nothing to all
RANDOM = 4  # control maps of an image
PATCHES = 8  # of occlusion, along a side
_RESAMPLES = 2000
_OCCLUSION = "occlusion"
Spread = Callable[[np.ndarray, int], np.ndarray]  # values (h, w) -> the crop's pixels (side, side)


@dataclasses.dataclass(frozen=True)
class Curves:
    """One kind of map over all images.

    Attributes:
        name: of a global context, as in `SimilarityMap.name`, with the heads that were taken; or "occlusion".
        deletion, insertion: mean probability of the predicted class when 0, 10, ... 100 % of the pixels, most
            marked first, are gone or are there.
        random_deletion, random_insertion: the same of the random maps.
        deletion_gain, insertion_gain: how much better than random, in area under the curve; positive is better.
        occlusion: Spearman's correlation of the map with occlusion, over the patches; NaN of occlusion itself.
        deletion_interval, insertion_interval, occlusion_interval: 95 %, by bootstrap over the images.
    """

    name: str
    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    random_deletion: tuple[float, ...]
    random_insertion: tuple[float, ...]
    deletion_gain: float
    insertion_gain: float
    occlusion: float
    deletion_interval: tuple[float, float]
    insertion_interval: tuple[float, float]
    occlusion_interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Trust:
    """All kinds of maps over so many images; `folder`: where it was written, or None."""

    network: str
    images: int
    values: str
    curves: tuple[Curves, ...]
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
    announce: Callable[[str], None] = lambda _: None,
) -> Trust:
    """Measure maps, and occlusion.

    Args:
        weights: a file of any format, or weights in memory; with a head.
        images: files; at least two.
        folder: a new one for trust.json and trust.png; None: nothing is written.
        absolute: what is unlike the context counts as marked too.
        every: the maps of all global contexts; else those of the first and the last of each stage.
        heads: "mean" over them, "each", or the number of one.
        seed: of the random maps and of the bootstrap.
        engine: what computes the probabilities.

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: before the first image.
        BadImages: an image cannot be read.
    """
    if len(images) < 2:
        raise UsageError("expected at least two images, for an interval")
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    if not read.form.num_classes:
        raise DoesNotFit(f"{read.source.path} is {read.form}: it predicts nothing that a map could explain")
    viewer = Viewer(read, device=device)
    choose_heads(np.zeros((viewer.variant.heads, 1, 1)), heads)  # refuses a wrong one before the work begins
    compute = create_engine(engine, read, viewer.preprocessing, device, announce=announce)
    kinds: dict[str, list[Marks]] = {}
    with progress("removing and returning pixels", len(images)) as advance:
        for number, path in enumerate(images):
            pixels = preprocess(path, viewer.preprocessing)
            found = viewer.similarity(pixels[None])
            stages = sorted({one.stage for one in found})
            chosen = found.maps if every else [one for s in stages for one in (found.at(s, 1, 1), found.at(s))]
            maps = _named(chosen, heads, absolute)
            generator = np.random.default_rng([seed, number])
            for name, marks in _measure(pixels, maps, compute, int(found.output[0].argmax()), generator).items():
                kinds.setdefault(name, []).append(marks)
            advance(1)
    generator = np.random.default_rng(seed)
    curves = tuple(summary(name, marks, generator) for name, marks in kinds.items())
    found = Trust(str(read.form), len(images), "absolute" if absolute else "signed", curves, None)
    if folder is None:
        return found
    with runs.run_folder(Path(folder), "trust") as target:
        found = dataclasses.replace(found, folder=target)
        runs.write_json(target / "trust.json", dataclasses.asdict(found))
        try:
            picture = trust_chart(found.curves, f"{found.network}: are the maps right?", found.images)
            runs.write_bytes(target / "trust.png", picture)
        except MissingExtra as error:
            announce(f"no picture: {error}")
    return found


@dataclasses.dataclass(frozen=True)
class Marks:
    """What one map of one image came to.

    Attributes:
        own, random: deletion and insertion curve, (2, STEPS); of the random maps the mean.
        occlusion: rank correlation with occlusion, NaN where there is none.
    """

    own: np.ndarray
    random: np.ndarray
    occlusion: float


def _named(chosen: Sequence[SimilarityMap[np.ndarray]], heads: str, absolute: bool) -> dict[str, np.ndarray]:
    """Standardised maps of one image, (h, w), by the names of context and heads; a single position is no map."""
    found = {}
    for one in chosen:
        maps, names = choose_heads(one.standardised[0], heads)
        for values, name in zip(maps, names, strict=True):
            if values.size > 1:
                whole = one.name if heads == "mean" else f"{one.name}, {name}"
                found[whole] = np.abs(values) if absolute else values
    return found


def _measure(
    pixels: np.ndarray,
    maps: dict[str, np.ndarray],
    compute: Callable[[np.ndarray], np.ndarray],
    predicted: int,
    generator: np.random.Generator,
) -> dict[str, Marks]:
    """One image, uint8 (3, S, S): its maps, and occlusion."""
    side = pixels.shape[1]

    def probability(batch: np.ndarray) -> np.ndarray:
        return softmax(compute(batch))[:, predicted]

    def control(spread: Spread, shape: tuple[int, ...]) -> np.ndarray:
        return np.mean(
            [removal(pixels, spread(generator.random(shape), side), probability) for _ in range(RANDOM)], axis=0
        )

    reference = occlusion(pixels, probability)
    found = {}
    random: dict[tuple[int, ...], np.ndarray] = {}  # one control for all maps of a shape
    for name, values in maps.items():
        marked = on_crop(values, side)
        if values.shape not in random:
            random[values.shape] = control(on_crop, values.shape)
        agreed = rank_correlation(over_blocks(marked, PATCHES), reference)
        found[name] = Marks(removal(pixels, marked, probability), random[values.shape], agreed)
    own = removal(pixels, in_blocks(reference, side), probability)
    found[_OCCLUSION] = Marks(own, control(in_blocks, reference.shape), float("nan"))
    return found


def on_crop(values: np.ndarray, side: int) -> np.ndarray:
    """A map of the network over the crop's pixels: (h, w) -> (side, side)."""
    return place(values, (side, side), Preprocessing(side, 1.0))


def in_blocks(values: np.ndarray, side: int) -> np.ndarray:
    """A value for each block of pixels: (n, n) -> (side, side)."""
    block = np.arange(side) * len(values) // side
    return values[np.ix_(block, block)]


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
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[place.ravel()]
        ranks.append(rank - rank.mean())
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm else float("nan")


def removal(pixels: np.ndarray, marked: np.ndarray, probability: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
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


def occlusion(pixels: np.ndarray, probability: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """How much the probability falls when a patch is covered: (PATCHES, PATCHES)."""
    side = pixels.shape[1]
    block = np.arange(side) * PATCHES // side
    grid = block[:, None] * PATCHES + block
    nothing = pixels.mean((1, 2), keepdims=True).round().astype(np.uint8)
    covered = np.stack([np.where(grid == patch, nothing, pixels) for patch in range(PATCHES**2)])
    found = probability(np.concatenate([pixels[None], covered]))
    return (found[0] - found[1:]).reshape(PATCHES, PATCHES)


def summary(name: str, marks: Sequence[Marks], generator: np.random.Generator) -> Curves:
    """From what one kind of map came to on all images, to figures with intervals."""
    curves = np.stack([[one.own, one.random] for one in marks])  # (images, own or random, deletion or insertion, STEPS)
    areas = (curves[..., 1:] + curves[..., :-1]).mean(-1) / 2
    occlusions = np.array([one.occlusion for one in marks])

    def over_images(values: np.ndarray) -> tuple[float, tuple[float, float]]:
        known = values[np.isfinite(values)]
        if not len(known):
            return float("nan"), (float("nan"), float("nan"))
        drawn = generator.integers(0, len(known), (_RESAMPLES, len(known)))
        low, high = np.percentile(known[drawn].mean(1), [2.5, 97.5])
        return float(known.mean()), (float(low), float(high))

    deletion_gain, deletion_interval = over_images(areas[:, 1, 0] - areas[:, 0, 0])
    insertion_gain, insertion_interval = over_images(areas[:, 0, 1] - areas[:, 1, 1])
    occlusion, occlusion_interval = over_images(occlusions)
    (deletion, insertion), (random_deletion, random_insertion) = (
        [tuple(map(float, curve)) for curve in kind] for kind in curves.mean(0)
    )
    return Curves(
        name=name,
        deletion=deletion,
        insertion=insertion,
        random_deletion=random_deletion,
        random_insertion=random_insertion,
        deletion_gain=deletion_gain,
        insertion_gain=insertion_gain,
        occlusion=occlusion,
        deletion_interval=deletion_interval,
        insertion_interval=insertion_interval,
        occlusion_interval=occlusion_interval,
    )
