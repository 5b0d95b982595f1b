"""Turn the logits of a segmentation network into label maps, with the arithmetic of mmsegmentation 0.19.

Logits are resized to the size of the image with PyTorch's bilinear `interpolate` (align_corners=False). Some rows are
computed at a time, because the logits of all pixels of a large image need gigabytes.

Shapes: C classes (at most 256), logits of h x w pixels, an image of H x W pixels. Sizes are (height, width).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

_PIXELS = 1 << 18  # pixels of a label map that are computed at a time
_PIXELS_OF_ALL_CLASSES = 1 << 15  # pixels whose probabilities of all classes are computed at a time


@dataclasses.dataclass(frozen=True)
class View:
    """The logits of an image that was resized, and possibly mirrored.

    Attributes:
        size: Height and width of the logits.
        bands: The logits as bands of rows, (C, rows, w), from top to bottom. They are read once, when they are needed.
        mirrored: Whether left and right are exchanged.
    """

    size: tuple[int, int]
    bands: Iterable[np.ndarray]
    mirrored: bool = False


def label_map(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize logits (C, h, w) to a size, and return the best class of each pixel, uint8 (H, W).

    The logits must be finite. Only pixels whose four neighbors have different best classes are interpolated. Elsewhere,
    the best class of the neighbors is the best class, because an interpolated logit is a weighted mean.
    """
    height, width = logits.shape[1:]
    return _label_map(View((height, width), (logits,)), size)


def _label_map(view: View, size: tuple[int, int]) -> np.ndarray:
    rows, columns = map(_neighbors, view.size, size)
    source, result = _Rows(view.bands), np.empty(size, np.uint8)
    for part in _parts(size, _PIXELS):
        logits, near = source.around(rows.take(part))
        best = _best(logits)
        upper, lower = best.take(near.first, 0), best.take(near.second, 0)
        labels = upper.take(columns.first, 1)
        mixed = labels != upper.take(columns.second, 1)
        mixed |= labels != lower.take(columns.first, 1)
        mixed |= labels != lower.take(columns.second, 1)
        y, x = np.nonzero(mixed)
        if len(y):
            labels[y, x] = _best(_interpolated(logits, near.take(y), columns.take(x)))
        result[part] = labels
    return result


def average_label_map(views: Sequence[View], size: tuple[int, int]) -> np.ndarray:
    """Average the probabilities of views, and return the most probable class of each pixel, uint8 (H, W).

    Each view is resized, converted to probabilities and mirrored back, as in mmsegmentation's `aug_test`. The logits of
    views with one band are kept in memory until the end. For one view, the result is that of `label_map`.
    """
    if len(views) == 1 and not views[0].mirrored:
        return _label_map(views[0], size)
    axes = [tuple(map(_neighbors, view.size, size)) for view in views]
    sources, result = [_Rows(view.bands) for view in views], np.empty(size, np.uint8)
    for part in _parts(size, _PIXELS_OF_ALL_CLASSES):
        total = None
        for view, source, (rows, columns) in zip(views, sources, axes, strict=True):
            logits, near = source.around(rows.take(part))
            values = probabilities(_mixed(_mixed(logits, near, 1), columns, 2))
            values = values[..., ::-1] if view.mirrored else values
            total = values if total is None else np.add(total, values, out=total)
        assert total is not None
        result[part] = _best(total)
    return result


def resize(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize logits (C, h, w) to (C, H, W), in the precision of the logits."""
    rows, columns = map(_neighbors, logits.shape[1:], size)
    return _mixed(_mixed(logits, rows, 1), columns, 2)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of logits (C, ...) over the classes."""
    values = logits - logits.max(0)
    np.exp(values, out=values)
    values /= values.sum(0)
    return values


def sliding_logits(
    compute: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, window: tuple[int, int], stride: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yield the logits of an image, averaged over overlapping windows, as bands of rows from top to bottom.

    The windows are those of mmsegmentation's `slide_inference`: the last window of a row or column is moved back into
    the image, and an image that is smaller than the window is one window. Only the rows that later windows can change
    are kept in memory.

    Args:
        compute: Function that returns the logits (C, h, w) of pixels (3, h, w).
        pixels: Image, (3, H, W).
        window, stride: Height and width of a window, and its steps. A step is at most as long as the window.
    """
    height, width = pixels.shape[1:]
    (tops, high), (lefts, wide) = map(_windows, (height, width), window, stride)
    covered = [sum(start <= position < start + wide for start in lefts) for position in range(width)]
    sums: np.ndarray | None = None  # of the rows from `top`
    times = np.zeros(height, np.int64)
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        times[top : top + high] += 1
        for left in lefts:
            logits = compute(pixels[:, top : top + high, left : left + wide])
            kept = 0 if sums is None else sums.shape[1]
            if kept < high:
                missing = np.zeros((len(logits), high - kept, width), logits.dtype)
                sums = missing if sums is None else np.concatenate([sums, missing], axis=1)
            assert sums is not None
            sums[:, :, left : left + wide] += logits
        assert sums is not None
        done = following - top
        yield sums[:, :done] / (times[top:following, None] * np.array(covered)).astype(sums.dtype)
        sums = sums[:, done:]


def _windows(length: int, window: int, stride: int) -> tuple[list[int], int]:
    """Return the first positions of the windows along an axis, and their length."""
    window = min(window, length)
    return [min(start, length - window) for start in range(0, length - window + stride, stride)], window


class _Neighbors(NamedTuple):
    """The two neighbors of each output position in the input, and the weight of the second, from 0 to 1."""

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray

    def take(self, index: "slice | np.ndarray") -> "_Neighbors":
        return _Neighbors(self.first[index], self.second[index], self.weight[index])


def _neighbors(before: int, after: int) -> _Neighbors:
    position = np.maximum((np.arange(after) + 0.5) * (before / after) - 0.5, 0)
    first = np.minimum(position.astype(np.int64), before - 1)
    weight = position - first
    return _Neighbors(first, np.where(weight > 0, np.minimum(first + 1, before - 1), first), weight)


def _parts(size: tuple[int, int], pixels: int) -> Iterator[slice]:
    """Yield the slices of rows with at most this number of pixels, and at least one row."""
    step = max(1, pixels // size[1])
    return (slice(start, min(start + step, size[0])) for start in range(0, size[0], step))


class _Rows:
    """Rows of logits that arrive in bands, and are dropped when later ones are taken."""

    def __init__(self, bands: Iterable[np.ndarray]):
        self.bands, self.first = iter(bands), 0
        self.held = next(self.bands)

    def around(self, near: _Neighbors) -> tuple[np.ndarray, _Neighbors]:
        """Return the rows from the first to the last neighbor, and the positions of the neighbors in them.

        The first neighbor must not be above that of an earlier call.
        """
        start, stop = int(near.first[0]), int(near.second[-1]) + 1
        while self.first + self.held.shape[1] < stop:
            self.held = np.concatenate([self.held, next(self.bands)], axis=1)
        self.held, self.first = self.held[:, start - self.first :], start
        return self.held[:, : stop - start], _Neighbors(near.first - start, near.second - start, near.weight)


def _mixed(values: np.ndarray, near: _Neighbors, axis: int) -> np.ndarray:
    """Interpolate along an axis."""
    shape = [-1 if position == axis else 1 for position in range(values.ndim)]
    weight = near.weight.reshape(shape)
    mixed, other = values.take(near.first, axis), values.take(near.second, axis)
    mixed *= (1 - weight).astype(values.dtype)
    other *= weight.astype(values.dtype)
    mixed += other
    return mixed


def _interpolated(logits: np.ndarray, rows: _Neighbors, columns: _Neighbors) -> Iterator[np.ndarray]:
    """Yield the logits of each class at single positions, (N,).

    Rounding is monotonic in every step. A class that is best at all neighbors is therefore best, up to ties.
    """
    width = logits.shape[2]
    corners = [row * width + column for row in rows[:2] for column in columns[:2]]
    down, right = (near.weight.astype(logits.dtype) for near in (rows, columns))
    up, left = ((1 - near.weight).astype(logits.dtype) for near in (rows, columns))
    for plane in logits:
        first, second, third, fourth = (plane.ravel().take(corner, mode="clip") for corner in corners)
        yield up * (left * first + right * second) + down * (left * third + right * fourth)


def _best(planes: Iterable[np.ndarray]) -> np.ndarray:
    """Return the index of the largest value at each position, the first one if several are equal.

    Comparing one class after the other is ten times as fast as `argmax` over the first axis.
    """
    planes = iter(planes)
    largest = next(planes).copy()
    result, larger = np.zeros(largest.shape, np.uint8), np.empty(largest.shape, bool)
    for index, plane in enumerate(planes, 1):
        np.greater(plane, largest, out=larger)
        np.maximum(largest, plane, out=largest)
        np.copyto(result, np.uint8(index), where=larger)
    return result
