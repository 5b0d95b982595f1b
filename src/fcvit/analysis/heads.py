"""How much do heads differ, how do maps change with depth, and does the query matter? The paper's motivation, measured.

FCViT drops the query because the maps of different queries are alike; what it keeps is one map for each head. If heads
differed little, one would do; if their maps were flat, none would be needed; if a position that asked for itself got
another map than the mean of all positions gets, the query would be missed. A plain ViT, whose queries are there,
is measured alike (`fcvit.analysis.plain_vit`).
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from fcvit import run_folder as runs
from fcvit.analysis.map_charts import Depth, Line, depth_chart
from fcvit.analysis.plain_vit import PlainViT
from fcvit.analysis.similarity import Viewer, each_readable
from fcvit.errors import BadImages, MissingExtra, UsageError
from fcvit.models.maps import Similarity, SimilarityMap, short
from fcvit.models.variants import Preprocessing
from fcvit.report.progress import progress
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")

_BATCH = 8
Figures = dict[str, np.ndarray]  # by the fields of `Measures`, (B,) each


@dataclasses.dataclass(frozen=True)
class Measures:
    """Of the maps of one layer, means over the images; NaN where they have too few positions or heads to say.

    Of a ViT, each query's attention is a map, and the figures are means over the queries.

    Attributes:
        name: of a global context, as in `SimilarityMap.name`; of a ViT's block, "block1" and so on.
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


@dataclasses.dataclass(frozen=True)
class NetworkMeasures:
    """All layers of a network, in the order of the pass."""

    network: str
    layers: tuple[Measures, ...]


@dataclasses.dataclass(frozen=True)
class Heads:
    """Over so many images: FCViT, and the ViT beside it if there is one.

    Attributes:
        unreadable: images that were left out, with the reason.
        folder: where it was written, or None.
    """

    images: int
    networks: tuple[NetworkMeasures, ...]
    unreadable: tuple[str, ...]
    folder: Path | None


def heads(
    weights: "Weights | str | os.PathLike[str]",
    images: Sequence[Path],
    folder: str | os.PathLike[str] | None = None,
    *,
    vit: str | None = None,
    vit_weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    ema: bool | None = None,
) -> Heads:
    """Measure the standardised maps of every global context over images.

    Args:
        weights: a file of any format, or weights in memory.
        images: files.
        folder: a new one for heads.json and heads.png; None: nothing is written.
        vit, vit_weights: a plain ViT to be measured too: its name in the installed timm, a file with its weights.

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: before the first image.
        BadImages: not one image can be read. Single ones are listed in the result.
        NumbersDisagree: maps that are no finite numbers.
    """
    if not images:
        raise UsageError("expected at least one image")
    if (vit is None) != (vit_weights is None):
        raise UsageError("a ViT needs both its name in timm, --vit NAME, and its weights, --vit-weights FILE")
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    viewer = Viewer(read, device=device)
    plain = PlainViT(vit, vit_weights, device) if vit is not None and vit_weights is not None else None
    with contextlib.nullcontext() if folder is None else runs.run_folder(Path(folder), "heads") as target:
        bad: list[BadImages] = []
        ours = _over_images(
            str(read.spec), images, viewer.preprocessing, bad, lambda x: measure(viewer.similarity(x, tokens=True))
        )
        networks = [ours]
        if plain is not None:  # what cannot be read is listed already
            networks.append(
                _over_images(plain.name, images, plain.preprocessing, [], lambda x: measure_queries(plain.logits(x)))
            )
        found = Heads(len(images) - len(bad), tuple(networks), tuple(map(str, bad)), target)
        if target is not None:
            runs.write_json(target / "heads.json", dataclasses.asdict(found))
            try:
                runs.write_bytes(target / "heads.png", depth_chart([_depth(one) for one in networks], found.images))
            except MissingExtra as error:
                logger.info(f"no picture: {error}")
    return found


def _over_images(
    network: str,
    images: Sequence[Path],
    preprocessing: Preprocessing,
    bad: list[BadImages],
    figures: Callable[[np.ndarray], dict[str, Figures]],
) -> NetworkMeasures:
    """The mean of the figures over the images, layer by layer.

    Args:
        bad: images that cannot be read are added to it.
        figures: of uint8 (B, 3, S, S), by the name of the layer.
    """
    found: dict[str, list[Figures]] = {}
    with progress(f"measuring {network}", len(images)) as advance:
        readable = each_readable(images, preprocessing, bad, advance)
        while batch := [pixels for _, pixels in itertools.islice(readable, _BATCH)]:
            for name, values in figures(np.stack(batch)).items():
                found.setdefault(name, []).append(values)
    layers = [
        Measures(name, **{field: float(_mean(np.concatenate([one[field] for one in parts]), 0)) for field in parts[0]})
        for name, parts in found.items()
    ]
    return NetworkMeasures(network, tuple(layers))


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Of what is a number: a map that is the same everywhere correlates with nothing, and does not count."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=axis), np.nan)


def _depth(found: NetworkMeasures) -> Depth:
    """A column of the picture: network, names of the layers, and measures."""
    names = [short(one.name) for one in found.layers]
    lines = [
        Line("correlation of two heads (1: they are one)", [one.correlation for one in found.layers]),
        Line(
            "entropy over that of a flat map",
            [one.entropy for one in found.layers],
            [one.noise_entropy for one in found.layers],
        ),
        Line(
            "mass in the top tenth of positions (0.1: flat)",
            [one.top_decile for one in found.layers],
            [one.noise_top_decile for one in found.layers],
        ),
        Line("correlation with the map before", [one.kept for one in found.layers]),
        Line("agreement of queries (1: the query does not matter)", [one.agreement for one in found.layers]),
    ]
    places = [name.split(".") for name in names]
    if len(places[0]) == 1:  # blocks of a ViT
        return Depth(found.network, names, lines)
    groups = ["first contexts" if place[2] == "1" else "second contexts" for place in places]
    ends = [number for number in range(1, len(places)) if places[number][0] != places[number - 1][0]]
    return Depth(found.network, names, lines, groups, ends)


def measure(found: Similarity[np.ndarray]) -> dict[str, Figures]:
    """Of each global context, by its name; `found` has its tokens."""
    figures = {}
    before: SimilarityMap[np.ndarray] | None = None
    for one in found:
        assert one.tokens is not None
        maps = one.standardised.reshape(*one.standardised.shape[:2], -1)
        figures[one.name] = {
            **_figures(maps, None if before is None else _met(before, one)),
            "agreement": agreement(one.tokens, maps.shape[1]),
        }
        before = one
    return figures


def measure_queries(blocks: Iterable[np.ndarray]) -> dict[str, Figures]:
    """The same of attention logits, (B, heads, queries, keys) each: a query's keys are the positions of its map."""
    figures = {}
    before = None
    for number, logits in enumerate(blocks, 1):
        batch, heads, queries, keys = logits.shape
        maps = np.moveaxis(logits, 2, 1).reshape(batch * queries, heads, keys)
        free = np.broadcast_to(logits.mean(2, keepdims=True), logits.shape)  # what the mean of the queries gets
        agreed = _correlation(logits.reshape(-1, keys), free.reshape(-1, keys))
        figures[f"block{number}"] = {
            **{name: _mean(one.reshape(batch, queries), 1) for name, one in _figures(maps, before).items()},
            "agreement": _mean(agreed.reshape(batch, -1), 1),
        }
        before = maps.mean(1)
    return figures


def _figures(maps: np.ndarray, before: np.ndarray | None) -> Figures:
    """(rows, heads, positions), (rows, positions) -> all of `Measures` but the agreement of queries."""
    entropy, top_decile = sparseness(maps)
    noise_entropy, noise_top_decile = sparseness(
        np.random.default_rng(0).normal(size=maps.shape) * maps.std(2, keepdims=True)
    )
    return {
        "correlation": between_heads(maps),
        "entropy": entropy,
        "top_decile": top_decile,
        "noise_entropy": noise_entropy,
        "noise_top_decile": noise_top_decile,
        "kept": np.full(len(maps), np.nan) if before is None else _correlation(before, maps.mean(1)),
    }


def between_heads(maps: np.ndarray) -> np.ndarray:
    """(rows, heads, positions) -> (rows,): mean correlation of two different heads."""
    pairs = np.triu_indices(maps.shape[1], 1)
    if not len(pairs[0]):
        return np.full(len(maps), np.nan)
    return _mean(np.stack([_correlation(maps[:, i], maps[:, j]) for i, j in zip(*pairs, strict=True)]), 0)


def sparseness(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, heads, positions) -> entropy over the uniform one's, and share of the top tenth; (rows,) each."""
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
    """How much the map of a position's own similarity is like that of the mean's: (B, C, H, W) -> (B,).

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
        found = np.where(own * free > 0, (context * spread).sum(2) / np.sqrt(own * free), np.nan)
    return _mean(found, (1, 2))


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
