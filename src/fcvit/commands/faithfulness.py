"""The command `fcvit faithfulness`, and `fcvit.faithfulness`."""

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
    """Measure whether the maps mark what predictions rest on: deletion and insertion against other maps, occlusion.

    Args:
        images: Files, folders (searched through) or quoted patterns; ten at least.
        weights: A checkpoint of any format (in Python also weights in memory).
        output: New folder for trust.json and trust.png (default: nothing is written).
        absolute: Count what is unlike the context as marked too: absolute values, head by head.
        every: Measure all global contexts, not only the first and the last of each stage.
        heads: mean (default), each, or the number of a head.
        seed: Seed of the random maps and the bootstrap.
        engine: Engine that computes the probabilities; as in predict.

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: before the first image.
        BadImages: too few images can be read. Single ones are listed in the result.
        KeyboardInterrupt: what was measured until then is in the folder, if it is of `MIN_IMAGES` images.
        NumbersDisagree: maps that are no finite numbers.
    """
    paths = sample_evenly(named_images("faithfulness", images, output), max_images)
    if len(paths) < MIN_IMAGES:
        raise UsageError(f"{counted(len(paths), 'image')}: expected at least {MIN_IMAGES}, for an interval")
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    if not read.spec.num_classes:
        raise DoesNotFit(f"{read.source.path} is {read.spec}: it predicts nothing that a map could explain")
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
            raise BadImages(f"{counted(count, 'image')} can be read: expected at least {MIN_IMAGES}; first: {bad[0]}")
        explainer = measuring.Explainer(viewer, compute, chosen, heads, absolute)
        logger.info(explainer.expected(pixels))
        attribution = functools.cache(lambda number: explainer.attribution(number, pixels[number]))
        curves: dict[str, list[ImageCurves]] = {}

        def result() -> Faithfulness:
            summaries = tuple(measuring.summary(name, one, seed) for name, one in curves.items())
            values, done = "absolute" if absolute else "signed", len(next(iter(curves.values())))
            outcome = Faithfulness(str(read.spec), done, values, summaries, tuple(map(str, bad)), folder)
            if folder is not None:
                title = f"{outcome.network}: are the {values} maps right?"
                save(folder, "trust", outcome, lambda: faithfulness_chart(summaries, title, done))
            return outcome

        try:
            with progress("removing and returning pixels", count) as advance:
                for number in image_order(count):
                    pair = attribution(number), attribution(partner(number, count))
                    for name, one in measuring.measure(*pair, compute, seed).items():
                        curves.setdefault(name, []).append(one)
                    advance(1)
        except KeyboardInterrupt:
            done = len(next(iter(curves.values()), ()))
            if done >= MIN_IMAGES and folder is not None:
                result()
                logger.info(f"interrupted: the figures of {done} of {count} images are in {folder}")
            raise
        return result()


def image_order(count: int) -> list[int]:
    """Return all numbers, from both halves in turn: an interruption leaves images of most classes."""
    half = (count + 1) // 2
    return [
        number for pair in zip(range(half), range(half, 2 * half), strict=True) for number in pair if number < count
    ]


def partner(number: int, count: int) -> int:
    """Return whose maps an image is compared with: half of all images further, mostly of another class."""
    return (number + count // 2) % count
