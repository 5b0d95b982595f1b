"""Measure attention statistics (`fcvit head-stats` and `fcvit.head_stats`)."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.analysis.head_stats import HeadStats, over_images
from fcvit.analysis.map_charts import depth_chart, save
from fcvit.analysis.similarity import Viewer
from fcvit.commands.options import Device, Ema, File, MaxImages, Output, named_images
from fcvit.data.folders import sample_evenly
from fcvit.errors import BadImages
from fcvit.weights.reading import Weights, read_weights


def head_stats(
    *images: str,
    weights: Annotated[Any, Parameter()],
    output: Annotated[File | None, Output] = None,
    max_images: MaxImages = 200,
    device: Device = "auto",
    ema: Ema = None,
) -> HeadStats:
    """Measure how the maps of heads differ, how sparse they are, and how depth and a query would change them.

    Args:
        images: Files, folders (searched recursively) or quoted patterns.
        weights: A checkpoint of any format. In Python also a `Weights` object.
        output: New folder for head-stats.json and head-stats.png (default: nothing is written).

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: The measurement cannot start.
        BadImages: No image can be read. Otherwise, unreadable images are listed in the result.
        NumbersDisagree: The maps are not finite.
    """
    paths = sample_evenly(named_images("head-stats", images, output), max_images)
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    viewer = Viewer(read, device=device)
    bad: list[BadImages] = []

    with runs.run_folder(Path(output), "head-stats") if output is not None else contextlib.nullcontext() as folder:
        layers = over_images(viewer, paths, bad)
        stats = HeadStats(str(read.spec), len(paths) - len(bad), layers, tuple(map(str, bad)), folder)
        if folder is not None:
            save(folder, "head-stats", stats, lambda: depth_chart(stats.network, layers, stats.images))
    return stats
