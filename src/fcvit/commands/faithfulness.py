"""Measure the faithfulness of similarity maps (`fcvit faithfulness` and `fcvit.faithfulness`)."""

import contextlib
import functools
import logging
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.analysis import faithfulness as measuring
from fcvit.analysis.faithfulness import MIN_IMAGES, Faithfulness, ImageCurves
from fcvit.analysis.map_charts import faithfulness_chart, save
from fcvit.analysis.similarity import Viewer, check_heads, each_readable
from fcvit.commands.options import Device, Ema, File, Flag, MaxImages, Output, named_images
from fcvit.data.folders import sample_evenly
from fcvit.errors import BadImages, DoesNotFit, UsageError, counted
from fcvit.inference.engines import create_engine
from fcvit.models.maps import places
from fcvit.report.progress import progress
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")


def faithfulness(
    *images: str,
    weights: Annotated[Any, Parameter()],
    output: Annotated[File | None, Output] = None,
    max_images: MaxImages = 50,
    absolute: Flag = False,
    every: Flag = False,
    heads: str = "mean",
    seed: int = 0,
    engine: str = "auto",
    device: Device = "auto",
    ema: Ema = None,
) -> Faithfulness:
    """Measure by deletion, insertion and occlusion whether the maps mark the pixels that predictions depend on.

    Args:
        images: Files, folders (searched recursively) or quoted patterns. At least 10 images.
        weights: A checkpoint of any format (in Python also a `Weights` object).
        output: New folder for faithfulness.json and faithfulness.png (default: nothing is written).
        absolute: Use absolute values per head, so that positions unlike the context also count as marked.
        every: Measure all global contexts, instead of only the first and last of each stage.
        heads: Heads to measure: mean (default), each, or the number of a head.
        seed: Seed of the random maps and the bootstrap.
        engine: Engine that computes the probabilities (see fcvit predict --help).

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: The measurement cannot start.
        BadImages: Too few images can be read. Otherwise, unreadable images are listed in the result.
        KeyboardInterrupt: The measurement was interrupted. If at least `MIN_IMAGES` images were measured, their
            results are in the folder.
        NumbersDisagree: The maps are not finite.
    """
    paths = sample_evenly(named_images("faithfulness", images, output), max_images)
    if len(paths) < MIN_IMAGES:
        raise UsageError(f"{counted(len(paths), 'image')}: expected at least {MIN_IMAGES} for a confidence interval")
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    if not read.spec.num_classes:
        raise DoesNotFit(f"{read.source.path} is {read.spec}: it has no classes, so there is no prediction to explain")
    viewer = Viewer(read, device=device)
    check_heads(viewer.variant, heads)
    chosen = places(viewer.variant)
    if not every:  # the first and the last of each stage
        stages = [[where for where in chosen if where[0] == stage] for stage in range(1, chosen[-1][0] + 1)]
        chosen = [where for stage in stages for where in dict.fromkeys((stage[0], stage[-1]))]
    with runs.run_folder(Path(output), "faithfulness") if output is not None else contextlib.nullcontext() as folder:
        compute = create_engine(engine, read, viewer.preprocessing, device)
        bad: list[BadImages] = []
        with progress("reading", len(paths)) as advance:
            pixels = list(each_readable(paths, viewer.preprocessing, bad, advance))
        count = len(pixels)
        if count < MIN_IMAGES:
            readable = f"{counted(count, 'image')} can be read"
            raise BadImages(f"{readable}: expected at least {MIN_IMAGES}; the first error is: {bad[0]}")
        explainer = measuring.Explainer(viewer, compute, chosen, heads, absolute)
        logger.info(explainer.expected(pixels))
        attribution = functools.cache(lambda number: explainer.attribution(number, pixels[number]))
        curves: dict[str, list[ImageCurves]] = {}

        def result() -> Faithfulness:
            summaries = tuple(measuring.summary(name, one, seed) for name, one in curves.items())
            values, done = "absolute" if absolute else "signed", len(next(iter(curves.values())))
            outcome = Faithfulness(str(read.spec), done, values, summaries, tuple(map(str, bad)), folder)
            if folder is not None:
                title = f"{outcome.network}: faithfulness of the {values} maps"
                save(folder, "faithfulness", outcome, lambda: faithfulness_chart(summaries, title, done))
            return outcome

        try:
            with progress("deleting and inserting pixels", count) as advance:
                for number in image_order(count):
                    pair = attribution(number), attribution(partner(number, count))
                    for name, one in measuring.measure(*pair, compute, seed).items():
                        curves.setdefault(name, []).append(one)
                    advance(1)
        except KeyboardInterrupt:
            done = len(next(iter(curves.values()), ()))
            if done >= MIN_IMAGES and folder is not None:
                result()
                logger.info(f"interrupted: the results for {done} of {count} images are in {folder}")
            raise
        return result()


def image_order(count: int) -> list[int]:
    """Return all image numbers, alternating between both halves, so that an interrupted run covers most classes."""
    half = (count + 1) // 2
    return [
        number for pair in zip(range(half), range(half, 2 * half), strict=True) for number in pair if number < count
    ]


def partner(number: int, count: int) -> int:
    """Return the number of the image with which an image is compared: half of all images away, to get another class."""
    return (number + count // 2) % count
