"""Attention statistics: differences between heads, change of maps with depth, and influence of the query.

FCViT omits the query because the maps of different queries are similar (the paper's motivation), and has one map per
head. The statistics test this design. If the heads had similar maps, a single head would suffice. If the maps were
uniform, no map would be needed. If the map of a position's own query differed from the map of the mean query, omitting
the query would lose information.
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
Figures = dict[str, np.ndarray]  # measures (B,) by field of `LayerStats`


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Statistics of the maps of one global context, as means over the images.

    A value is NaN if there are too few positions or heads. The mass of a head is the softmax of its map over positions.

    Attributes:
        name: Name of the map as in `SimilarityMap.name`.
        correlation: Pearson correlation between the maps of two heads over the positions, averaged over all pairs.
        entropy: Entropy of the mass divided by the entropy of a uniform map. 1 is a uniform map.
        top_decile: Share of the mass in the 10% of the positions with the most mass. 0.1 is a uniform map. If 10% is
            not a whole number of positions, the last position counts in part.
        noise_entropy: Entropy of independent normal noise with the same number of positions and the same standard
            deviation per head. It is the baseline of `entropy`, which depends on both.
        noise_top_decile: `top_decile` of the same noise.
        kept: Pearson correlation with the map of the previous layer, both averaged over heads. 1 means no change. A map
            of the previous stage is sampled at every second position, where the positions of the next stage are.
        agreement: Pearson correlation between the map of a position's own query and the map of the mean query, averaged
            over heads and positions. 1 means that the query has no influence.
    """

    name: str
    correlation: float
    entropy: float
    top_decile: float
    noise_entropy: float
    noise_top_decile: float
    kept: float
    agreement: float


_COLUMNS = {  # column of the table -> field of `LayerStats`
    "head corr.": "correlation",
    "entropy": "entropy",
    "noise entropy": "noise_entropy",
    "top 10%": "top_decile",
    "noise top 10%": "noise_top_decile",
    "layer corr.": "kept",
    "query corr.": "agreement",
}


@dataclasses.dataclass(frozen=True, repr=False)
class HeadStats:
    """The attention statistics of a network.

    Attributes:
        network: Description of the network.
        images: Number of measured images.
        layers: Statistics of each global context, from the first to the last layer.
        unreadable: Images that could not be read, with the reason.
        folder: Folder of the files, or None if nothing was written.
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
        """Show the statistics of each layer."""
        from fcvit.report.tables import table

        result = table("map", *_COLUMNS, right=_COLUMNS, title=f"{self.network}, {counted(self.images, 'image')}")
        result.caption = (
            "1 means: identical heads, uniform map (top 10%: 0.1), unchanged map, no influence of the query"
        )
        for layer in self.layers:
            values = [getattr(layer, field) for field in _COLUMNS.values()]
            cells = ["" if math.isnan(value) else f"{value:.3f}" for value in values]
            result.add_row(short(layer.name), *(cells if any(cells) else ["one position"]))
        yield result
        if self.folder is not None:
            yield f"written to {self.folder}"


def over_images(viewer: Viewer, images: Sequence[Path], bad: list[BadImages]) -> tuple[LayerStats, ...]:
    """Return the statistics of each layer, averaged over the images. Errors of unreadable images are added to `bad`.

    Raises:
        BadImages: None of the images can be read.
        NumbersDisagree: A map is not finite.
    """
    batches: dict[str, list[Figures]] = {}
    with progress(f"measuring {viewer.name}", len(images)) as advance:
        readable = each_readable(images, viewer.preprocessing, bad, advance)
        while batch := list(itertools.islice(readable, _BATCH)):
            for name, figures in measure(viewer.similarity(np.stack(batch), tokens=True)).items():
                batches.setdefault(name, []).append(figures)
    return tuple(
        LayerStats(
            name,
            **{
                field: float(_mean(np.concatenate([batch[field] for batch in all_figures]), 0))
                for field in all_figures[0]
            },
        )
        for name, all_figures in batches.items()
    )


def measure(similarity: Similarity[np.ndarray]) -> dict[str, Figures]:
    """Return the measures of each global context by its name. The similarity must include the tokens."""
    figures = {}
    before: SimilarityMap[np.ndarray] | None = None
    for context in similarity:
        assert context.tokens is not None
        maps = context.standardized.reshape(*context.standardized.shape[:2], -1)  # (B, heads, positions)
        entropy, top_decile = sparseness(maps)
        noise = np.random.default_rng(0).normal(size=maps.shape) * maps.std(2, keepdims=True)
        noise_entropy, noise_top_decile = sparseness(noise)
        figures[context.name] = {
            "correlation": between_heads(maps),
            "entropy": entropy,
            "top_decile": top_decile,
            "noise_entropy": noise_entropy,
            "noise_top_decile": noise_top_decile,
            "kept": np.full(len(maps), np.nan) if before is None else _kept(before, context),
            "agreement": agreement(context.tokens, maps.shape[1]),
        }
        before = context
    return figures


def between_heads(maps: np.ndarray) -> np.ndarray:
    """Return the mean correlation over all pairs of heads, (B, heads, positions) -> (B,)."""
    pairs = list(itertools.combinations(range(maps.shape[1]), 2))
    if not pairs:
        return np.full(len(maps), np.nan)
    return _mean(np.stack([_correlation(maps[:, i], maps[:, j]) for i, j in pairs]), 0)


def sparseness(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the normalized entropy and the mass in the top 10% of positions, (B, heads, positions) -> (B,) each."""
    positions = maps.shape[2]
    if positions < 2:
        return np.full(len(maps), np.nan), np.full(len(maps), np.nan)
    mass = np.exp(maps - maps.max(2, keepdims=True))
    mass /= mass.sum(2, keepdims=True)
    entropy = -(mass * np.log(np.maximum(mass, 1e-300))).sum(2) / math.log(positions)
    # Weight of each position in the top 10%, in descending order of mass.
    counts = np.clip(positions / 10 - np.arange(positions), 0, 1)
    top = np.sort(mass, axis=2)[:, :, ::-1] @ counts
    return entropy.mean(1), top.mean(1)


def agreement(tokens: np.ndarray, heads: int) -> np.ndarray:
    """Return the mean correlation between the map of each position's own query and the map of the mean query.

    The shapes are (B, C, H, W) -> (B,). For each head, x_p is the vector at position p, and c is the mean of all x_p.
    The map of query q is x_q . x_p over positions p. The network computes c . x_p, which is the mean of these maps over
    q. With the covariance S of the positions, their correlation is x_q S c / sqrt((x_q S x_q)(c S c)). This formula
    avoids computing a map per query.
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
    """Average the finite values. NaN values come from constant maps, which have no correlation."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=axis), np.nan)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each pair of rows, or NaN if one row is constant."""
    one, other = (values - values.mean(1, keepdims=True) for values in (one.astype(float), other.astype(float)))
    norms = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0, (one * other).sum(1) / norms, np.nan)


def _kept(before: SimilarityMap[np.ndarray], now: SimilarityMap[np.ndarray]) -> np.ndarray:
    """Return the correlation (B,) of two layers' maps averaged over heads, at the positions of the later layer."""
    mean = before.standardized.mean(1)
    if before.stage != now.stage:
        mean = mean[:, ::2, ::2]
    return _correlation(mean.reshape(len(mean), -1), now.standardized.mean(1).reshape(len(mean), -1))
