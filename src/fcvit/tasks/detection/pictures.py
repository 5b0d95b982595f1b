"""Draw the images of a report: the most confident false positives, the most missed objects, and the best images."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.masks import decode_segmentation
from fcvit.errors import BadImages, counted
from fcvit.metrics.detection import decode_masks
from fcvit.report.image_grid import png
from fcvit.report.object_grid import ObjectRow, Objects, object_grid
from fcvit.tasks.detection.results import BEST, FALSE_POSITIVES, MISSES

if TYPE_CHECKING:
    from fcvit.tasks.detection.figures import DetectionReport

CONFIDENT = 0.3
"""Detections with a lower score are not drawn, and not counted in the captions."""
_SHOWN = 6  # images in each picture


class _Counts(NamedTuple):
    """The objects, missed objects and confident false positives of an image, and its most confident false positive."""

    objects: int
    missed: int
    wrong: int
    worst: int | None
    worst_score: float

    def __str__(self) -> str:
        found = f"{self.objects - self.missed} of {counted(self.objects, 'object')} found"
        return f"{found}, {counted(self.wrong, 'false positive')}"


def write_pictures(folder: Path, report: "DetectionReport", position: int, matched: Sequence[np.ndarray]) -> None:
    """Write the three pictures of a configuration.

    Args:
        folder: Folder of the configuration.
        report: The report.
        position: Number of the configuration.
        matched: Object of each detection of each image, or -1.
    """
    counts = [_count(report, position, row, pairs) for row, pairs in enumerate(matched)]

    def most_confident(row: int) -> str:
        index = counts[row].worst
        assert index is not None
        name = report.evaluator.classes[report.outcomes[position].found[row].labels[index]].name
        return f"{name}, score {counts[row].worst_score:.2f} (white frame)"

    ranks = range(len(counts))
    wrong = sorted((row for row in ranks if counts[row].wrong), key=lambda row: -counts[row].worst_score)
    missed = sorted((row for row in ranks if counts[row].missed), key=lambda row: -counts[row].missed)
    best = sorted((row for row in ranks if counts[row].objects), key=lambda row: _errors(counts[row]))
    for file, rows, what in (
        (FALSE_POSITIVES, wrong, "false positives, most confident first"),
        (MISSES, missed, "images with the most missed objects"),
        (BEST, best, "images with the fewest errors"),
    ):
        captions = {row: most_confident(row) if rows is wrong else str(counts[row]) for row in rows[:_SHOWN]}
        title = f"{what} ({len(captions)} of {counted(len(counts), 'image')}, scores of at least {CONFIDENT})"
        marked = [counts[row].worst if rows is wrong else None for row in captions]
        drawn = _rows(report, position, captions.items(), marked, matched)
        runs.write_bytes(folder / file, png(object_grid(drawn, title)))


def _count(report: "DetectionReport", position: int, row: int, pairs: np.ndarray) -> _Counts:
    found, target = report.outcomes[position].found[row], report.targets[row]
    sure = found.scores >= CONFIDENT
    objects = np.flatnonzero(~target.crowd)
    missed = np.setdiff1d(objects, pairs[sure])
    wrong = np.flatnonzero(sure & (pairs < 0))
    worst = int(wrong[found.scores[wrong].argmax()]) if len(wrong) else None
    score = 0.0 if worst is None else float(found.scores[worst])
    return _Counts(len(objects), len(missed), len(wrong), worst, score)


def _errors(counts: _Counts) -> tuple[float, int]:
    """Return a key by which images are sorted: errors per object, then more objects."""
    return (counts.missed + counts.wrong) / counts.objects, -counts.objects


def _rows(
    report: "DetectionReport",
    position: int,
    captions: Iterable[tuple[int, str]],
    marked: Iterable[int | None],
    matched: Sequence[np.ndarray],
) -> Iterator[ObjectRow]:
    """Yield the rows of a picture. Images that can no longer be read are left out."""
    for (row, caption), mark in zip(captions, marked, strict=True):
        try:
            image = report.evaluator.picture(int(report.evaluated.index[row]))
        except (OSError, BadImages):
            continue
        found, target = report.outcomes[position].found[row], report.targets[row]
        sure = np.flatnonzero(found.scores >= CONFIDENT)
        pairs, masks, own = matched[row][sure], None, None
        if found.masks is not None:
            masks = decode_masks([found.masks[index] for index in sure.tolist()])
            own = np.zeros((len(target.masks), *target.size), np.uint8)
            for index, mask in enumerate(target.masks):
                if mask is not None:
                    own[index] = decode_segmentation(mask, target.size)
        hit = np.isin(np.arange(len(target.labels)), pairs) | target.crowd
        framed = None if mark is None else int(np.searchsorted(sure, mark))
        truth, detected = Objects(target.corners(), hit, own), Objects(found.boxes[sure], pairs >= 0, masks, framed)
        yield ObjectRow(f"{report.names[row]}: {caption}", image, truth, detected)
