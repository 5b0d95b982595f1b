"""How much do heads differ, and how do their maps change with depth? The figures behind the paper's motivation.

FCViT drops the query because attention maps of different queries are alike; what it keeps is one map for each head.
If heads differed little, one would do; if their maps were flat, none would be needed.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fcvit import runs
from fcvit.errors import MissingExtra, UsageError
from fcvit.images.preprocess import preprocess
from fcvit.maps import Similarity, SimilarityMap
from fcvit.report.map_charts import Line, depth_chart
from fcvit.report.progress import progress
from fcvit.tasks.similarity import Viewer
from fcvit.weights.reading import Weights, read_weights

_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Measures:
    """Of one global context, means over the images; NaN where maps have too few positions to say.

    Attributes:
        stage, block, context: which one.
        correlation: Pearson's, of the maps of two heads over the positions; mean over all pairs.
        entropy: of a head's mass, over that of a uniform one: 1 is flat. Mass: softmax over the positions.
        top_decile: share of a head's mass in the tenth of the positions that have most; 0.1 is flat.
        kept: Pearson's correlation with the map of the context before (means over heads; across stages every
            second position, which is where the next stage's are). 1: nothing changes.
    """

    stage: int
    block: int
    context: int
    correlation: float
    entropy: float
    top_decile: float
    kept: float


@dataclasses.dataclass(frozen=True)
class Heads:
    """All contexts in the order of the pass, over so many images; `folder`: where it was written, or None."""

    network: str
    images: int
    measures: tuple[Measures, ...]
    folder: Path | None


def heads(
    weights: "Weights | str | os.PathLike[str]",
    images: Sequence[Path],
    folder: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    ema: bool | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Heads:
    """Measure the standardised maps of every global context over images.

    Args:
        weights: a file of any format, or weights in memory.
        images: files.
        folder: a new one for heads.json and heads.png; None: nothing is written.

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: before the first image.
        BadImages: an image cannot be read.
    """
    if not images:
        raise UsageError("expected at least one image")
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    viewer = Viewer(read, device=device)
    rows: list[np.ndarray] = []
    with progress("measuring", len(images)) as advance:
        for start in range(0, len(images), _BATCH):
            batch = np.stack([preprocess(path, viewer.preprocessing) for path in images[start : start + _BATCH]])
            rows.append(measure(viewer.similarity(batch)))
            advance(len(batch))
    # A map that is the same everywhere correlates with nothing: it does not count.
    figures = np.ma.masked_invalid(np.concatenate(rows, axis=1)).mean(axis=1).filled(np.nan)
    named = viewer.similarity(batch[:1])
    measures = tuple(
        Measures(one.stage, one.block, one.context, *map(float, values))
        for one, values in zip(named, figures, strict=True)
    )
    found = Heads(str(read.form), len(images), measures, None)
    if folder is None:
        return found
    with runs.run_folder(Path(folder), "heads") as target:
        found = dataclasses.replace(found, folder=target)
        runs.write_json(target / "heads.json", dataclasses.asdict(found))
        try:
            runs.write_bytes(target / "heads.png", depth_chart(*_lines(found)))
        except MissingExtra as error:
            announce(f"no picture: {error}")
    return found


def _lines(found: Heads) -> tuple[list[Line], list[str], str, int]:
    """What the picture shows."""
    names = [f"{one.stage}.{one.block}.{one.context}" for one in found.measures]
    lines = [
        Line("correlation of two heads (1: they are one)", [one.correlation for one in found.measures]),
        Line("entropy over that of a flat map", [one.entropy for one in found.measures]),
        Line("mass in the top tenth of positions (0.1: flat)", [one.top_decile for one in found.measures]),
        Line("correlation with the map before", [one.kept for one in found.measures]),
    ]
    return lines, names, f"{found.network}: heads over depth", found.images


def measure(found: Similarity[np.ndarray]) -> np.ndarray:
    """(contexts, B, 4): correlation, entropy, top decile, kept."""
    rows = []
    before: SimilarityMap[np.ndarray] | None = None
    for one in found:
        maps = one.standardised.reshape(*one.standardised.shape[:2], -1)  # (B, heads, positions)
        mean = one.standardised.mean(1)
        kept = _correlation(_met(before, one), mean.reshape(len(mean), -1)) if before else np.full(len(mean), np.nan)
        rows.append(np.stack([between_heads(maps), *sparseness(maps), kept], axis=1))
        before = one
    return np.stack(rows)


def between_heads(maps: np.ndarray) -> np.ndarray:
    """(B, heads, positions) -> (B,): mean correlation of two different heads."""
    pairs = np.triu_indices(maps.shape[1], 1)
    if not len(pairs[0]):
        return np.full(len(maps), np.nan)
    return np.mean([_correlation(maps[:, i], maps[:, j]) for i, j in zip(*pairs, strict=True)], axis=0)


def sparseness(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, heads, positions) -> entropy over the uniform one's, and share of the top tenth; (B,) each."""
    positions = maps.shape[2]
    if positions < 2:
        return np.full(len(maps), np.nan), np.full(len(maps), np.nan)
    mass = np.exp(maps - maps.max(2, keepdims=True))
    mass /= mass.sum(2, keepdims=True)
    entropy = -(mass * np.log(np.maximum(mass, 1e-300))).sum(2) / math.log(positions)
    top = np.sort(mass, axis=2)[:, :, -math.ceil(positions / 10) :].sum(2)
    return entropy.mean(1), top.mean(1)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of rows; NaN where one does not vary."""
    one, other = (values - values.mean(1, keepdims=True) for values in (one.astype(float), other.astype(float)))
    norms = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0, (one * other).sum(1) / norms, np.nan)


def _met(before: SimilarityMap[np.ndarray], now: SimilarityMap[np.ndarray]) -> np.ndarray:
    """The mean map before, at the positions of now: (B, positions)."""
    mean = before.standardised.mean(1)
    if before.stage != now.stage:
        mean = mean[:, ::2, ::2]
    return mean.reshape(len(mean), -1)
