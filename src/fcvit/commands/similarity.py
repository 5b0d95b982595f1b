"""Draw token-global similarity maps (`fcvit similarity` and `fcvit.similarity`)."""

import dataclasses
import hashlib
import io
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.analysis.similarity import (
    FIRST,
    MapChoice,
    Scale,
    Viewer,
    Which,
    caption,
    check_heads,
    cut,
    depth_picture,
    map_arrays,
    overview,
    panel,
    picture,
    with_path,
)
from fcvit.commands.options import Classes, Device, Ema, File, Output, named_images
from fcvit.data.classes import as_classes, labels, order_note
from fcvit.data.folders import sample_evenly
from fcvit.data.loader import read_file
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UsageError
from fcvit.evaluation.request import Request
from fcvit.models.maps import choose, places
from fcvit.models.variants import Preprocessing
from fcvit.report import page
from fcvit.report.progress import progress
from fcvit.tasks.base import get_task
from fcvit.tasks.classification.prediction import Prediction
from fcvit.tasks.classification.results import MAPS, SavedPredictions, read_result
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")

OVERVIEW = "overview.png"
MAX_PANELS = 60  # maximum number of images in the overview
_ENDINGS = (".png", "-depth.png", ".npz")
_STEM = 200  # maximum length of a file stem in bytes
_EACH = 2  # number of mistakes and number of correct predictions to draw for an evaluation


@dataclasses.dataclass(frozen=True, repr=False)
class DrawnMaps:
    """The files that `similarity` wrote.

    Attributes:
        folder: Folder of the files.
        images: For each image its path, the names of its files in `folder`, and its best class.
        unreadable: Error messages of the images that were skipped.
    """

    folder: Path
    images: tuple[tuple[str, tuple[str, ...], Prediction | None], ...]
    unreadable: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<DrawnMaps of {len(self.images)} images in {self.folder}>"

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def tables(self) -> Iterator[Any]:
        """Yield a table of the images and their files."""
        from fcvit.report.tables import SHOWN, table

        result = table("image", "probability (%)", "class", "picture", right=("probability (%)",))
        if any(len(files) > 1 for _, files, _ in self.images):
            result.caption = "NAME.png: maps by head, NAME-depth.png: maps by stage, NAME.npz: arrays of all maps"
        for path, files, best in self.images[:SHOWN]:
            cells = (f"{100 * best.probability:.1f}", best.name) if best else ("", "")
            result.add_row(path, *cells, files[0])
        if len(self.images) > SHOWN:
            result.add_row(f"... and {len(self.images) - SHOWN} more", "", "", "")
        yield result
        yield f"written to {self.folder}"


def similarity(
    *images: str,
    weights: Annotated[Any, Parameter()] = None,
    run: File | None = None,
    output: Annotated[File | None, Output] = None,
    stage: int | None = None,
    block: int = -1,
    context: int = FIRST,
    heads: str = "each",
    values: Which = "standardized",
    scale: Scale = "picture",
    top_k: int = 3,
    classes: Classes = None,
    preprocessing: Annotated[Preprocessing | None, Parameter(parse=False)] = None,
    device: Device = "auto",
    ema: Ema = None,
) -> DrawnMaps:
    """Draw token-global similarity maps: how similar every position of an image is to the mean of all positions.

    For each image, this writes a picture of the heads of one global context, a picture of all stages, and the arrays of
    all maps. For several images, it also writes an overview of all stages.

    Args:
        images: Files, folders (searched recursively) or quoted patterns.
        weights: A checkpoint of any format (in Python also a `Weights` object).
        run: Evaluation folder instead of images: draw maps of its most confident mistakes and correct predictions.
        output: New folder for the files (default: runs/similarity, or the first free one of runs/similarity-2, ...).
        stage: Number of the stage, from 1, or from the end with -1 (default: the last with more than one position).
        block: Number of the block in the stage, from 1, or from the end with -1 (default: the last).
        context: Number of the global context in the block, 1 or 2.
        heads: Heads to draw: each (default), mean, or the number of a head.
        values: Values to draw: standardized (default), or rescaled (the factors that multiply the context).
        scale: Color scale: picture (default, the same for all heads), or head (one per head, shown with its range).
        top_k: Number of classes in the caption.
        preprocessing: Preprocessing to use instead of that of the weights.

    Raises:
        UsageError, DoesNotFit, UnreadableFile, MissingExtra: Drawing cannot start.
        BadImages: No image can be read. Otherwise, unreadable images are listed in the result.
        NumbersDisagree: The maps are not finite.
        KeyboardInterrupt: Drawing was interrupted. The files of the images drawn so far are kept.
    """
    if values not in get_args(Which):
        raise UsageError(f"--values {values}: expected standardized or rescaled")
    if scale not in get_args(Scale):
        raise UsageError(f"--scale {scale}: expected picture or head")
    if top_k < 1:
        raise UsageError(f"--top-k {top_k}: expected at least 1")
    choice = MapChoice(heads, values, scale)
    if run is not None:
        if images or weights is not None or classes is not None or preprocessing is not None:
            raise UsageError("similarity: --run uses the images, weights and classes of the run; leave them out")
        return _of_run(Path(run), None if output is None else Path(output), context, choice, device)
    paths = named_images("similarity", images, output or Path("runs"))
    if weights is None:
        raise UsageError("similarity: --weights is missing; expected: fcvit similarity IMAGE... --weights FILE")
    page.require_report()
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    named = None if classes is None else as_classes(classes)
    viewer = Viewer(read, named, preprocessing, device)
    if named and (note := order_note(named, read.classes)):
        logger.info(note)
    where = choose(places(viewer.variant), viewer.stage if stage is None else stage, block, context)
    check_heads(viewer.variant, heads)
    done: list[tuple[str, tuple[str, ...], Prediction | None]] = []
    panels, bad, taken = [], [], {OVERVIEW}
    sampled = set(sample_evenly(range(len(paths)), MAX_PANELS))
    with (
        runs.run_folder(None if output is None else Path(output), "similarity") as folder,
        progress("drawing", len(paths)) as advance,
    ):
        try:
            for number, path in enumerate(paths):
                advance(1)
                try:
                    seen = viewer.see(decode(path), top_k)
                except BadImages as error:
                    bad.append(with_path(error, path))
                    continue
                contents = (
                    picture(viewer, seen, path.name, where, choice),
                    depth_picture(viewer, seen, path.name, where[2], choice),
                    map_arrays(seen),
                )
                files = free_names(path.stem, taken)
                for file, content in zip(files, contents, strict=True):
                    runs.write_bytes(folder / file, content)
                done.append((str(path), tuple(files), seen.predictions[0] if seen.predictions else None))
                if number in sampled:
                    best = f": {caption(seen.predictions[:1])}" if seen.predictions else ""
                    panels.append(panel(viewer, seen, f"{cut(path.name)}{best}", where[2], choice))
        except KeyboardInterrupt:
            logger.info(f"interrupted: the files of {len(done)} of {len(paths)} images are in {folder}")
            raise
        if not done:
            raise BadImages(f"none of {len(bad)} images can be read; the first error is: {bad[0]}")
        if len(panels) > 1:
            count = f"{len(panels)} of {len(done)} images" if len(panels) < len(done) else f"{len(done)} images"
            title = f"{cut(viewer.name)}: {count}"
            runs.write_bytes(folder / OVERVIEW, overview(panels, title, viewer.variant, where[2], choice))
    return DrawnMaps(folder, tuple(done), tuple(map(str, bad)))


def _of_run(run: Path, output: Path | None, context: int, choice: MapChoice, device: str) -> DrawnMaps:
    """Draw the most confident mistakes and correct predictions of an evaluation result."""
    page.require_report()
    result = read_result(run)
    request = Request.from_json(runs.read_run(result.folder.parent, "eval"), result.folder.parent / "run.json")
    name, digest = Path(result.metrics["weights"]).name, result.metrics["weights_sha256"]
    candidates = [read_weights(path, request.settings.ema) for path in request.weights if Path(path).name == name]
    read = next((one for one in candidates if one.source.sha256 == digest), None)
    if read is None:
        raise DoesNotFit(f"{name} of {run} has changed since the evaluation; restore the evaluated file")
    evaluator: Any = get_task(request.task).evaluator([read], Path(request.data), request.options)
    stored: dict[str, Any] = dict(result.metrics["protocol"]["preprocessing"])
    stored |= {name: tuple(stored[name]) for name in ("mean", "std")}
    pixels = Preprocessing(**stored)
    viewer = Viewer(read, evaluator.classes, pixels, device)
    check_heads(viewer.variant, choice.heads)
    locations = dict(zip(evaluator.dataset.names, evaluator.dataset.locations, strict=True))
    known = evaluator.candidates
    names = dict(zip((one.id for one in known), labels(known), strict=True))
    panels, done, bad = [], [], []
    for number in _most_confident(result):
        name, digest = result.names[number], result.images[number]
        truth, predicted = result.truth[number], result.predicted[number]
        # Use the recorded prediction: with a class subset, it may differ from the best class of the network.
        best = Prediction(0, predicted, names[predicted], result.confidence[number])
        wrong = truth != predicted
        title = f"wrong: {cut(names[truth])}, predicted {caption([best])}" if wrong else f"correct: {caption([best])}"
        try:
            if name not in locations:
                raise BadImages(f"{name}: no longer exists")
            content = read_file(name, locations[name])
            if not hashlib.sha256(content).hexdigest().startswith(digest):
                raise BadImages(f"{name}: has changed since the evaluation")
            seen = viewer.see(decode(io.BytesIO(content), name))
        except (BadImages, NumbersDisagree) as error:
            bad.append(str(error))
            continue
        panels.append(panel(viewer, seen, title, context, choice))
        done.append((name, (MAPS,), best))
    if not panels:
        raise BadImages(f"{result.folder}: none of its images can be drawn; the first error is: {bad[0]}")
    title = "The most confident mistakes and correct predictions"
    content = overview(panels, title, viewer.variant, context, choice)
    if output is None:
        runs.write_bytes(result.folder / MAPS, content)
        logger.info(f"to add the picture to the report page, run fcvit resume {result.folder.parent}")
        return DrawnMaps(result.folder, tuple(done), tuple(bad))
    with runs.run_folder(output, "similarity") as folder:
        runs.write_bytes(folder / MAPS, content)
    return DrawnMaps(folder, tuple(done), tuple(bad))


def _most_confident(result: SavedPredictions) -> list[int]:
    """Return the image numbers of the most confident mistakes, followed by the most confident correct predictions."""
    order = sorted(range(len(result.images)), key=lambda number: -result.confidence[number])
    right = [result.truth[number] == result.predicted[number] for number in order]
    chosen = [[number for number, one in zip(order, right, strict=True) if one == which] for which in (False, True)]
    return [number for numbers in chosen for number in numbers[:_EACH]]


def free_names(stem: str, taken: set[str]) -> list[str]:
    """Return unused names for the three files of an image, and add them to `taken` in lower case."""
    # File systems allow names of 255 bytes. Bytes that are not UTF-8 are dropped.
    stem = os.fsencode(stem)[:_STEM].decode("utf-8", "ignore") or "image"
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        files = [f"{name}{ending}" for ending in _ENDINGS]
        if taken.isdisjoint(file.casefold() for file in files):
            break
    taken.update(file.casefold() for file in files)
    return files
