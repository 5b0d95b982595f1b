"""Pictures that are nearly the same: found by a hash of 64 bits, confirmed by small thumbnails.

A bit of the hash says whether a picture becomes brighter from one cell of an 8 x 9 grid to the next on its right
(a "difference hash"). Pairs are looked up by parts of the hash, so that nothing is compared with everything.
What the limits were measured on stands in docs/data.md.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 16  # pixels, of a thumbnail; smaller pictures say too little
FLAT = 4  # of 255, the standard deviation of a thumbnail: below, noise decides the hash
MAX_DISTANCE = 10  # differing bits of 64
MAX_DIFFERENCE = 0.45  # of two thumbnails, in standard deviations

_SAME_PARTS = 2  # of the 8 bytes of two hashes: always so up to 6 differing bits, mostly up to 10
_CROWD = 256  # neighbors that a picture is compared with where many share two bytes
_PIECE = 256  # pairs of thumbnails at a time: what fits into a cache
_BITS = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)


class Fingerprint(NamedTuple):
    """What is kept of a picture.

    Attributes:
        hash: 8 bytes.
        thumbnail: uint8 RGB, `SIDE` x `SIDE` x 3 bytes.
        contrast: the standard deviation of the thumbnail, of 255.
    """

    hash: bytes
    thumbnail: bytes
    contrast: float


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of an RGB image."""
    gray = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"))
    thumbnail = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
    brighter = gray[:, 1:] > gray[:, :-1]
    return Fingerprint(np.packbits(brighter).tobytes(), thumbnail.tobytes(), float(thumbnail.std()))


class Pair(NamedTuple):
    """Positions of two pictures, the first below the second, and the difference of their thumbnails."""

    first: int
    second: int
    difference: float


def similar_pairs(
    hashes: np.ndarray,
    thumbnails: np.ndarray,
    limit: float = MAX_DIFFERENCE,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Pair]:
    """Pairs of pictures that are nearly the same, sorted.

    Args:
        hashes: uint8 (N, 8).
        thumbnails: uint8 (N, SIDE * SIDE * 3); of some contrast.
        limit: the difference of two thumbnails up to which they are nearly the same, 0 to 2.
        advance: is told of every one of the `PASSES` when it is done.
    """
    count = len(hashes)
    candidates = np.empty(0, np.int64)  # first * count + second, each once: most meet in many passes
    for same in itertools.combinations(range(8), _SAME_PARTS):
        rest = [part for part in range(8) if part not in same]
        # Sorted by the rest too: in a crowd, those most alike stand side by side.
        keys = np.ascontiguousarray(hashes[:, [*same, *rest]]).view(">u8").ravel().astype(np.uint64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        crowds = keys >> np.uint64(8 * (8 - _SAME_PARTS))
        here = np.arange(count)
        met = [candidates]
        for step in range(1, _CROWD + 1):
            here = here[: np.searchsorted(here, count - step)]
            here = here[crowds[here] == crowds[here + step]]
            if not len(here):
                break
            close = here[_bits(keys[here] ^ keys[here + step]) <= MAX_DISTANCE]
            one, other = order[close], order[close + step]
            met.append(np.minimum(one, other) * count + np.maximum(one, other))
        candidates = np.unique(np.concatenate(met))
        advance(1)
    found = []
    for start in range(0, len(candidates), _PIECE):
        first, second = np.divmod(candidates[start : start + _PIECE], count)
        differences = _difference(thumbnails[first], thumbnails[second])
        kept = differences <= limit
        found += map(Pair, first[kept].tolist(), second[kept].tolist(), differences[kept].tolist())
    return found


PASSES = len([*itertools.combinations(range(8), _SAME_PARTS)])


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Root mean square difference of thumbnails of mean 0 and standard deviation 1: 0 to 2; about 1.4: unrelated."""
    one, other = (t - t.mean(1, keepdims=True, dtype=np.float32) for t in (first, second))
    products = [np.einsum("ij,ij->i", left, right) for left, right in ((one, other), (one, one), (other, other))]
    correlation = products[0] / np.sqrt(products[1] * products[2])
    return np.sqrt(np.maximum(2 - 2 * correlation, 0))


def _bits(values: np.ndarray) -> np.ndarray:
    """How many bits of each are set."""
    return _BITS[values.view(np.uint16).reshape(-1, 4)].sum(1, dtype=np.uint8)
