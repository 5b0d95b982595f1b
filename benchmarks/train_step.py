"""Measure the milliseconds of a training step (forward, backward, AdamW) on this CPU, for Paddle and PyTorch.

Run:  .venv/bin/python benchmarks/train_step.py [--variants NAME ...] [--size N] [--batch N] [--rounds N]
          [--classes N] [--one-thread] [--json FILE]

The contenders are plain Paddle (`fcvit.models`), plain Paddle with an allocator that keeps freed memory, the native
operators (`accelerate`), and the PyTorch reference in its default memory format and in channels_last. They run
alternately (`fcvit.inference.interleave`). Times are medians, and ratios are medians over steps that are adjacent in
time. On a shared machine, waiting for descheduled threads dominates the time. `--one-thread` then measures the
processor time of a single thread.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fcvit.errors import FcvitError
from fcvit.inference.interleave import interleave, median_ratio
from fcvit.machine import processor_name
from fcvit.models.variants import VARIANTS

CONTENDERS = ("paddle", "paddle + allocator", "native", "torch", "torch channels_last")


def clock() -> float:
    return time.thread_time() if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["fcvit_tiny", "fcvit_b12"], choices=list(VARIANTS))
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--size", type=int, default=32, help="image size in pixels (default 32)")
    parser.add_argument("--batch", type=int, default=32, help="images per step (default 32)")
    parser.add_argument("--rounds", type=int, default=7, help="number of measurement rounds (default 7)")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes (default 1000)")
    parser.add_argument("--one-thread", action="store_true", help="measure the processor time of a single thread")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    if arguments.one_thread:
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the worker processes
    results = {}
    for variant in arguments.variants:
        setting = (variant, arguments.size, arguments.batch, arguments.classes)
        results[variant] = measure(arguments.contenders, setting, arguments.rounds)
    machine = f"{processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    ratios = {variant: compare(times) for variant, times in results.items()}
    if arguments.json:
        setting = {"size": arguments.size, "batch": arguments.batch, "classes": arguments.classes}
        setting["one_thread"] = arguments.one_thread
        content = {"machine": machine, **setting, "seconds": results, "ratios": ratios}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(machine)
    print(f"{arguments.size} x {arguments.size}, batch size {arguments.batch}, median of {arguments.rounds} rounds")
    print("processor time of one thread:" if arguments.one_thread else "wall-clock time with all threads:")
    print("| variant | contender | ms per step | forward | backward | optimizer | images/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant, times in results.items():
        for contender, steps in times.items():
            phases = [1e3 * statistics.median(phase) for phase in zip(*steps, strict=True)]
            total = statistics.median(map(sum, steps))
            columns = (f"{number:.1f}" for number in (1e3 * total, *phases, arguments.batch / total))
            print(f"| {variant} | {contender} | {' | '.join(columns)} |")
    for variant, ratios_of_variant in ratios.items():
        for what, ratio in ratios_of_variant.items():
            print(f"{variant}: {what}: {ratio:.2f}")


def measure(contenders: list[str], setting: tuple, rounds: int) -> dict[str, list[list[float]]]:
    """Return the seconds of forward, backward and optimizer of each contender, per round."""
    load = functools.partial(load_step, setting=setting)
    timings = interleave(load, contenders, rounds, calls=1, seconds=0, pause=0.25)
    for timing in timings.values():
        if isinstance(timing, FcvitError):
            raise timing
    return {contender: [step for (step,) in timing.rounds] for contender, timing in timings.items()}


def load_step(contender: str, setting: tuple) -> tuple[Callable[[], list[float]], None]:
    step = torch_step(contender, *setting) if contender.startswith("torch") else paddle_step(contender, *setting)
    step()

    def phases() -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(step())]

    return phases, None


def data(size: int, batch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(batch, 3, size, size)).astype(np.float32), generator.integers(0, classes, batch)


def paddle_step(contender: str, name: str, size: int, batch: int, classes: int):
    import paddle

    from fcvit.inference.engines import accelerate
    from fcvit.models.classifier import FCViT
    from fcvit.native.allocator import keep_memory

    if contender == "paddle + allocator":
        keep_memory()
    model = FCViT(VARIANTS[name], classes, drop_path_rate=0.1)
    if contender == "native":
        accelerate(model)
    model.train()
    images, labels = map(paddle.to_tensor, data(size, batch, classes))
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters(), weight_decay=0.05)

    def step() -> list[float]:
        timestamps = [clock()]
        loss = paddle.nn.functional.cross_entropy(model(images), labels)
        timestamps.append(clock())
        loss.backward()
        timestamps.append(clock())
        optimizer.step()
        optimizer.clear_grad()
        return [*timestamps, clock()]

    return step


def torch_step(contender: str, name: str, size: int, batch: int, classes: int):
    import torch

    from fcvit.reference.classifier import FCViT

    memory_format = torch.channels_last if "channels_last" in contender else torch.contiguous_format
    model = FCViT(VARIANTS[name], classes, drop_path_rate=0.1).to(memory_format=memory_format).train()
    images, labels = map(torch.from_numpy, data(size, batch, classes))
    images = images.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)

    def step() -> list[float]:
        timestamps = [clock()]
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        timestamps.append(clock())
        loss.backward()
        timestamps.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        return [*timestamps, clock()]

    return step


def compare(times: dict[str, list[list[float]]]) -> dict[str, float]:
    """Return the speed of each Paddle contender relative to PyTorch in each memory format."""
    totals = {contender: [sum(step) for step in steps] for contender, steps in times.items()}
    return {
        f"{paddle} over {torch}": median_ratio(totals[torch], totals[paddle])
        for paddle in totals
        for torch in totals
        if torch.startswith("torch") and not paddle.startswith("torch")
    }


if __name__ == "__main__":
    main()
