"""Find a batch size that fits in memory by trying increasing sizes."""

import time
from collections.abc import Sequence

import numpy as np

from fcvit.inference.engines import Engine
from fcvit.machine import available_memory, peak_memory

_FIRST, _LAST = 8, 512
_GAIN = 1.05  # minimum speedup of a doubling that justifies its memory
_SHARE = 0.5  # share of the free memory that may be used
_ROUNDS = 2  # the fastest round counts, because other processes may use the machine


def fitting_batch_size(jobs: Sequence[tuple[Engine, int]]) -> tuple[int, str]:
    """Double the batch size while it fits in memory and gets faster. Return the size and an explanation.

    Args:
        jobs: Engines that process every batch, each with its input size in pixels.
    """
    generator = np.random.default_rng(0)
    best = _FIRST
    rate = grown = 0.0
    size = _FIRST
    reason = f"{_LAST} is the largest size that is tried"
    while size <= _LAST:
        peak = peak_memory()
        try:
            _run(jobs, size, generator)  # warm-up: the first call is slower
            seconds = min(_run(jobs, size, generator) for _ in range(_ROUNDS))
        except (MemoryError, RuntimeError) as error:
            if size == _FIRST or not (isinstance(error, MemoryError) or "memory" in str(error).lower()):
                raise
            reason = f"{size} does not fit in device memory"
            break
        speed = size / seconds
        grown = max(grown, peak_memory() - peak)
        if size > _FIRST and speed < _GAIN * rate:
            reason = f"{size} is not faster ({speed:.1f} images/s)"
            break
        best, rate = size, speed
        if 2 * grown > _SHARE * available_memory():
            reason = f"{2 * size} would need more than half of the free memory"
            break
        size *= 2
    return best, f"{best} ({rate:.1f} images/s); {reason}"


def _run(jobs: Sequence[tuple[Engine, int]], size: int, generator: np.random.Generator) -> float:
    """Run one batch through all engines and return the time in seconds."""
    batches = [generator.integers(0, 256, (size, 3, pixels, pixels), np.uint8) for _, pixels in jobs]
    began = time.perf_counter()
    for (engine, _), batch in zip(jobs, batches, strict=True):
        engine(batch)
    return time.perf_counter() - began
