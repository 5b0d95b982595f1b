"""Attention statistics: how much heads differ, how maps change with depth, and whether the query matters.

FCViT drops the query because the maps of different queries are alike (the paper's motivation). It keeps one map for
each head. If heads differed little, one would do; if their maps were flat, none would be needed; if a position that
asked for itself got another map than the mean of all positions gets, the query would be missed.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.analysis.similarity import Viewer, each_readable
from fcvit.errors import BadImages, counted
from fcvit.models.maps import Similarity, SimilarityMap, short
from fcvit.report.progress import progress

_BATCH = 8
Figures = dict[str, np.ndarray]  # by the fields of `LayerStats`, (B,) each


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """The maps of one global context, means over the images; NaN where there are too few positions or heads.

    Attributes:
        name: as in `SimilarityMap.name`.
        correlation: Pearson's, of the maps of two heads over the positions; mean over all pairs.
        entropy: of a head's mass, over that of a uniform one: 1 is flat. Mass: softmax over the positions.
        top_decile: share of a head's mass in the tenth of the positions that have most; 0.1 is flat. A part of a
            position counts as that part.
        noise_entropy, noise_top_decile: the same where each head's values are independent normal numbers, as many
            and as spread: with fewer positions or more spread both change by themselves.
        kept: Pearson's correlation with the map of the layer before (means over heads; across stages every
            second position, which is where the next stage's are). 1: nothing changes.
        agreement: Pearson's correlation of the map that a position gets as its own query with the one that the mean
            of all queries gets; mean over heads and positions. 1: the query does not matter.
    """

    name: str
    correlation: float
    entropy: float
    top_decile: float
    noise_entropy: float
    noise_top_decile: float
    kept: float
    agreement: float


_COLUMNS = {  # of the table
    "between heads": "correlation",
    "entropy": "entropy",
    "of noise": "noise_entropy",
    "top tenth": "top_decile",
    "of noise ": "noise_top_decile",
    "kept": "kept",
    "queries agree": "agreement",
}


@dataclasses.dataclass(frozen=True, repr=False)
class HeadStats:
    """The attention statistics of a network.

    Attributes:
        network: in words.
        images: how many were measured.
        layers: in the order of the pass.
        unreadable: images that were left out, with the reason.
        folder: where it was written, or None.
    """

    network: str
    images: int
    layers: tuple[LayerStats, ...]
    unreadable: tuple[str, ...] = ()
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"<HeadStats of {self.network}: {len(self.layers)} layers, {counted(self.images, 'image')}>"

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        network = {name: fields.pop(name) for name in ("network", "layers")}
        return {"images": fields.pop("images"), "networks": [network], **fields}

    def tables(self) -> Iterator[Any]:
        """Show the figures layer by layer."""
        from fcvit.report.tables import table

        result = table("map", *_COLUMNS, right=_COLUMNS, title=f"{self.network}, {counted(self.images, 'image')}")
        result.caption = (
            "1: two heads are one; a flat map (top tenth: 0.1); nothing changes with depth; the query does not matter"
        )
        for layer in self.layers:
            values = [getattr(layer, field) for field in _COLUMNS.values()]
            cells = ["" if math.isnan(value) else f"{value:.3f}" for value in values]
            result.add_row(short(layer.name), *(cells if any(cells) else ["one position"]))
        yield result
        if self.folder is not None:
            yield f"written to {self.folder}"


def over_images(viewer: Viewer, images: Sequence[Path], bad: list[BadImages]) -> tuple[LayerStats, ...]:
    """Return the means over the images, layer by layer; images that cannot be read are added to `bad`.

    Raises:
        BadImages: not one image can be read.
        NumbersDisagree: maps that are no finite numbers.
    """
    batches: dict[str, list[Figures]] = {}
    with progress(f"measuring {viewer.name}", len(images)) as advance:
        readable = each_readable(images, viewer.preprocessing, bad, advance)
        while batch := list(itertools.islice(readable, _BATCH)):
            for name, figures in measure(viewer.similarity(np.stack(batch), tokens=True)).items():
                batches.setdefault(name, []).append(figures)
    return tuple(
        LayerStats(
            name, **{field: float(_mean(np.concatenate([one[field] for one in parts]), 0)) for field in parts[0]}
        )
        for name, parts in batches.items()
    )


def measure(similarity: Similarity[np.ndarray]) -> dict[str, Figures]:
    """Return the figures of each global context by its name; the similarity must have its tokens."""
    figures = {}
    before: SimilarityMap[np.ndarray] | None = None
    for one in similarity:
        assert one.tokens is not None
        maps = one.standardised.reshape(*one.standardised.shape[:2], -1)  # (B, heads, positions)
        entropy, top_decile = sparseness(maps)
        noise = np.random.default_rng(0).normal(size=maps.shape) * maps.std(2, keepdims=True)
        noise_entropy, noise_top_decile = sparseness(noise)
        figures[one.name] = {
            "correlation": between_heads(maps),
            "entropy": entropy,
            "top_decile": top_decile,
            "noise_entropy": noise_entropy,
            "noise_top_decile": noise_top_decile,
            "kept": np.full(len(maps), np.nan) if before is None else _kept(before, one),
            "agreement": agreement(one.tokens, maps.shape[1]),
        }
        before = one
    return figures


def between_heads(maps: np.ndarray) -> np.ndarray:
    """Return the mean correlation of two different heads: (B, heads, positions) -> (B,)."""
    pairs = list(itertools.combinations(range(maps.shape[1]), 2))
    if not pairs:
        return np.full(len(maps), np.nan)
    return _mean(np.stack([_correlation(maps[:, i], maps[:, j]) for i, j in pairs]), 0)


def sparseness(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return entropy over the uniform one's, and share of the top tenth: (B, heads, positions) -> (B,) each."""
    positions = maps.shape[2]
    if positions < 2:
        return np.full(len(maps), np.nan), np.full(len(maps), np.nan)
    mass = np.exp(maps - maps.max(2, keepdims=True))
    mass /= mass.sum(2, keepdims=True)
    entropy = -(mass * np.log(np.maximum(mass, 1e-300))).sum(2) / math.log(positions)
    counts = np.clip(positions / 10 - np.arange(positions), 0, 1)  # of the positions, those with most mass first
    top = np.sort(mass, axis=2)[:, :, ::-1] @ counts
    return entropy.mean(1), top.mean(1)


def agreement(tokens: np.ndarray, heads: int) -> np.ndarray:
    """Return how much the map of a position's own similarity is like that of the mean's: (B, C, H, W) -> (B,).

    For each head and position q, the correlation over positions p of x_q . x_p with c . x_p, c the mean of all x. The
    second is what the network computes; it is the mean of the first over q. With S the covariance of the positions,
    the correlation is x_q S c over the root of (x_q S x_q)(c S c), so that no map of a single query is ever made.
    """
    x = tokens.reshape(len(tokens), heads, tokens.shape[1] // heads, -1).astype(float)  # (B, heads, d, positions)
    context = x.mean(3, keepdims=True)
    centered = x - context
    covariance = centered @ centered.swapaxes(2, 3)  # the number of positions cancels
    spread = covariance @ x
    own = np.maximum((x * spread).sum(2), 0)
    free = np.maximum((context * (covariance @ context)).sum(2), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.where(own * free > 0, (context * spread).sum(2) / np.sqrt(own * free), np.nan)
    return _mean(correlations, (1, 2))


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Average what is a number: a map that is the same everywhere correlates with nothing, and does not count."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=axis), np.nan)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlate rows; NaN where one does not vary."""
    one, other = (values - values.mean(1, keepdims=True) for values in (one.astype(float), other.astype(float)))
    norms = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0, (one * other).sum(1) / norms, np.nan)


def _kept(before: SimilarityMap[np.ndarray], now: SimilarityMap[np.ndarray]) -> np.ndarray:
    """Correlate the mean map before, at the positions of now, with the mean map now: (B,)."""
    mean = before.standardised.mean(1)
    if before.stage != now.stage:
        mean = mean[:, ::2, ::2]
    return _correlation(mean.reshape(len(mean), -1), now.standardised.mean(1).reshape(len(mean), -1))
