"""Can a map be trusted? Deletion and insertion curves against random maps, and occlusion as another opinion.

A map that marks what the prediction rests on, marks pixels whose removal hurts it early (deletion: a low area under
the curve of the predicted class's probability) and whose return brings it back early (insertion: a high one). Both
depend on the shape of the marked regions, so the control is not chance pixels but random maps of the same number of
positions, drawn and interpolated alike. (Petsiuk, Das and Saenko, RISE, arXiv 1806.07421, for the curves; Zeiler and
Fergus, arXiv 1311.2901, for occlusion.)
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
from fcvit.metrics import softmax
from fcvit.report.map_charts import trust_chart
from fcvit.report.progress import progress
from fcvit.tasks.similarity import Viewer
from fcvit.variants import Preprocessing
from fcvit.weights.reading import Weights, read_weights

STEPS = 11  # points of a curve, from nothing to all
RANDOM = 4  # control maps of an image
PATCHES = 8  # of occlusion, along a side
_RESAMPLES = 2000
_OCCLUSION = "occlusion"


@dataclasses.dataclass(frozen=True)
class Curves:
    """One kind of map over all images.

    Attributes:
        name: stage.block.context of a map (mean over heads), or "occlusion".
        deletion, insertion: mean probability of the predicted class when 0, 10, ... 100 % of the pixels, most
            marked first, are gone or are there.
        random_deletion, random_insertion: the same of the random maps.
        deletion_gain, insertion_gain: how much better than random, in area under the curve; positive is better.
        deletion_interval, insertion_interval: 95 %, by bootstrap over the images.
    """

    name: str
    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    random_deletion: tuple[float, ...]
    random_insertion: tuple[float, ...]
    deletion_gain: float
    insertion_gain: float
    deletion_interval: tuple[float, float]
    insertion_interval: tuple[float, float]


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
    seed: int = 0,
    engine: str = AUTO,
    device: str = "auto",
    ema: bool | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Trust:
    """Measure maps, averaged over heads, and occlusion.

    Args:
        weights: a file of any format, or weights in memory; with a head.
        images: files; at least two.
        folder: a new one for trust.json and trust.png; None: nothing is written.
        absolute: what is unlike the context counts as marked too.
        every: the maps of all global contexts; else those of the first and the last of each stage.
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
    compute = create_engine(engine, read, viewer.preprocessing, device, announce=announce)
    areas: dict[str, list[np.ndarray]] = {}
    with progress("removing and returning pixels", len(images)) as advance:
        for number, path in enumerate(images):
            pixels = preprocess(path, viewer.preprocessing)
            generator = np.random.default_rng([seed, number])
            for name, curves in _one(viewer, compute, pixels, absolute, every, generator).items():
                areas.setdefault(name, []).append(curves)
            advance(1)
    generator = np.random.default_rng(seed)
    found = Trust(
        str(read.form),
        len(images),
        "absolute" if absolute else "signed",
        tuple(summary(name, np.stack(rows), generator) for name, rows in areas.items()),
        None,
    )
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


def _one(
    viewer: Viewer,
    compute: Callable[[np.ndarray], np.ndarray],
    pixels: np.ndarray,
    absolute: bool,
    every: bool,
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Curves of an image for each kind of map: (2, 2, STEPS), [deletion, insertion] of [the map, random maps]."""
    found = viewer.similarity(pixels[None])
    predicted = int(found.output[0].argmax())
    side = pixels.shape[1]

    def probability(batch: np.ndarray) -> np.ndarray:
        return softmax(compute(batch))[:, predicted]

    kinds: dict[str, tuple[np.ndarray, Callable[[np.ndarray, int], np.ndarray]]] = {}
    stages = sorted({one.stage for one in found})
    chosen = found.maps if every else [one for s in stages for one in (found.at(s, 1, 1), found.at(s))]
    for one in chosen:
        values = one.standardised[0].mean(0)
        if values.size > 1:
            name = f"{one.stage}.{one.block}.{one.context}"
            kinds[name] = np.abs(values) if absolute else values, on_crop
    kinds[_OCCLUSION] = occlusion(pixels, probability), in_blocks
    curves = {}
    for name, (values, spread) in kinds.items():
        own = removal(pixels, spread(values, side), probability)
        control = [generator.random(values.shape) for _ in range(RANDOM)]
        random = [removal(pixels, spread(one, side), probability) for one in control]
        curves[name] = np.stack([own, np.mean(random, axis=0)], axis=1)
    return curves


def on_crop(values: np.ndarray, side: int) -> np.ndarray:
    """A map of the network over the crop's pixels: (h, w) -> (side, side)."""
    return place(values, (side, side), Preprocessing(side, 1.0))


def in_blocks(values: np.ndarray, side: int) -> np.ndarray:
    """A value for each block of pixels: (n, n) -> (side, side)."""
    block = np.arange(side) * len(values) // side
    return values[np.ix_(block, block)]


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


def summary(name: str, rows: np.ndarray, generator: np.random.Generator) -> Curves:
    """From the curves of all images, (images, 2, 2, STEPS), to figures with intervals."""
    areas = (rows[..., 1:] + rows[..., :-1]).mean(-1) / 2  # (images, deletion or insertion, own or random)
    gains = (areas[:, 0, 1] - areas[:, 0, 0], areas[:, 1, 0] - areas[:, 1, 1])
    drawn = generator.integers(0, len(rows), (_RESAMPLES, len(rows)))
    bounds = [np.percentile(gain[drawn].mean(1), [2.5, 97.5]) for gain in gains]
    (deletion, random_deletion), (insertion, random_insertion) = (
        [tuple(map(float, curve)) for curve in kind] for kind in rows.mean(0)
    )
    return Curves(
        name,
        deletion,
        insertion,
        random_deletion,
        random_insertion,
        float(gains[0].mean()),
        float(gains[1].mean()),
        (float(bounds[0][0]), float(bounds[0][1])),
        (float(bounds[1][0]), float(bounds[1][1])),
    )
