"""Find the batch size that fits by trying."""

import time
from collections.abc import Sequence

import numpy as np

from fcvit.inference.engines import Engine
from fcvit.machine import available_memory, peak_memory

_FIRST, _LAST = 8, 512
_GAIN = 1.05  # a doubling that is not at least this much faster is not worth its memory
_SHARE = 0.5  # of the memory that is free
_ROUNDS = 2  # the faster one counts: something else may use the machine


def fitting_batch_size(jobs: Sequence[tuple[Engine, int]]) -> tuple[int, str]:
    """Double the batch size while it fits and is worth it; return it, and the reason in words.

    Args:
        jobs: engines that every batch goes through, each with its input size in pixels.
    """
    generator = np.random.default_rng(0)
    best = _FIRST
    rate = grown = 0.0
    size = _FIRST
    reason = f"the largest that is tried is {_LAST}"
    while size <= _LAST:
        peak = peak_memory()
        try:
            _run(jobs, size, generator)  # the first call is slower than all others
            seconds = min(_run(jobs, size, generator) for _ in range(_ROUNDS))
        except (MemoryError, RuntimeError) as error:
            if size == _FIRST or not (isinstance(error, MemoryError) or "memory" in str(error).lower()):
                raise
            reason = f"{size} does not fit in the memory of the device"
            break
        speed = size / seconds
        grown = max(grown, peak_memory() - peak)
        if size > _FIRST and speed < _GAIN * rate:
            reason = f"{size} is no faster ({speed:.1f} images/s against {rate:.1f})"
            break
        best, rate = size, speed
        if 2 * grown > _SHARE * available_memory():
            reason = f"{2 * size} would take more than half of the free memory"
            break
        size *= 2
    return best, f"{best} images at a time, {rate:.1f} images/s; {reason}"


def _run(jobs: Sequence[tuple[Engine, int]], size: int, generator: np.random.Generator) -> float:
    """Return the seconds for one batch through all engines."""
    batches = [generator.integers(0, 256, (size, 3, pixels, pixels), np.uint8) for _, pixels in jobs]
    began = time.perf_counter()
    for (engine, _), batch in zip(jobs, batches, strict=True):
        engine(batch)
    return time.perf_counter() - began
