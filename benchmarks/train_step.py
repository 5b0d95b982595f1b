"""Training: milliseconds of a step (forward, backward, AdamW) on this CPU, Paddle against PyTorch.

Run:  .venv/bin/python benchmarks/train_step.py [--variants NAME ...] [--size N] [--batch N] [--rounds N]
          [--classes N] [--one-thread] [--json FILE]

Paddle plain (`fcvit.models`), the same with the allocator keeping its memory, native (`accelerate`), and
the PyTorch reference in its default format and in channels_last, in turn (`fcvit.inference.interleave`). Times are
medians; ratios those of neighbors in time, then their median.
On a machine that others use as well, waiting for descheduled threads drowns everything:
`--one-thread` gives each a single one and counts its processor time instead.
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
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--one-thread", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.one_thread:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that compute
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
    print(f"{machine}; {arguments.size} x {arguments.size}, batch {arguments.batch}; medians of {arguments.rounds}")
    print("one thread each, its processor time:" if arguments.one_thread else "all threads, time on the wall:")
    print("| variant | computed by | ms a step | forward | backward | optimizer | images/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant, times in results.items():
        for contender, steps in times.items():
            parts = [1e3 * statistics.median(part) for part in zip(*steps, strict=True)]
            whole = statistics.median(map(sum, steps))
            columns = (f"{number:.1f}" for number in (1e3 * whole, *parts, arguments.batch / whole))
            print(f"| {variant} | {contender} | {' | '.join(columns)} |")
    for variant, ratios_of_variant in ratios.items():
        for what, ratio in ratios_of_variant.items():
            print(f"{variant}: {what}: {ratio:.2f}")


def measure(contenders: list[str], setting: tuple, rounds: int) -> dict[str, list[list[float]]]:
    """For each contender the seconds of forward, backward and optimizer, once a round."""
    load = functools.partial(load_step, setting=setting)
    timings = interleave(load, contenders, rounds, calls=1, seconds=0, pause=0.25)
    for timing in timings.values():
        if isinstance(timing, FcvitError):
            raise timing
    return {contender: [step for (step,) in timing.rounds] for contender, timing in timings.items()}


def load_step(contender: str, setting: tuple) -> tuple[Callable[[], list[float]], None]:
    step = torch_step(contender, *setting) if contender.startswith("torch") else paddle_step(contender, *setting)
    step()

    def parts() -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(step())]

    return parts, None


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
        marks = [clock()]
        loss = paddle.nn.functional.cross_entropy(model(images), labels)
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        optimizer.step()
        optimizer.clear_grad()
        return [*marks, clock()]

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
        marks = [clock()]
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        return [*marks, clock()]

    return step


def compare(times: dict[str, list[list[float]]]) -> dict[str, float]:
    """Speed of each way with Paddle over that of PyTorch in each format."""
    whole = {contender: [sum(step) for step in steps] for contender, steps in times.items()}
    return {
        f"{one} over {other}": median_ratio(whole[other], whole[one])
        for one in whole
        for other in whole
        if other.startswith("torch") and not one.startswith("torch")
    }


if __name__ == "__main__":
    main()
