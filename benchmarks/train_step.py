"""Measure the milliseconds of a training step (forward, loss, backward, AdamW) on this CPU, for Paddle and PyTorch.

Run:  .venv/bin/python benchmarks/train_step.py [--task TASK] [--variants NAME ...] [--contenders NAME ...]
          [--size N [N]] [--batch N] [--classes N] [--widths N N] [--rounds N] [--one-thread] [--json FILE]

The contenders are plain Paddle (`fcvit.models`), plain Paddle with an allocator that keeps freed memory, the native
operators (`accelerate`) with their AdamW, and the PyTorch reference in its default memory format and in channels_last.
They begin with the same weights. Their losses in the first three steps must be equal, with drop path and dropout
switched off.

The contenders run alternately (`fcvit.inference.interleave`). Times are medians, and ratios are medians over steps that
are adjacent in time. On a shared machine, waiting for descheduled threads dominates the time. `--one-thread` then
measures the processor time of a single thread.

Segmentation is measured as in the recipe camvid-small. The authors' b12 on ADE20K:
          --task segmentation --variants fcvit_b12 --size 512 --batch 4 --classes 150 --widths 256 128
"""

import argparse
import dataclasses
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

from fcvit.commands.bench import synthetic_weights
from fcvit.data.class_colors import IGNORED
from fcvit.errors import FcvitError
from fcvit.inference.interleave import interleave, median_ratio
from fcvit.machine import processor_name
from fcvit.models.spec import ModelSpec, SemanticFPNOptions
from fcvit.models.variants import VARIANTS
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_tensors

CONTENDERS = ("paddle", "paddle + allocator", "native", "torch", "torch channels_last")


DEFAULTS = {
    "classification": {"variants": ["fcvit_tiny", "fcvit_b12"], "size": [32], "batch": 32, "classes": 1000},
    "segmentation": {"variants": ["fcvit_tiny"], "size": [96, 128], "batch": 8, "classes": 11},
}
RANDOM = ("Block", "DropPath", "Dropout", "Dropout2D", "Dropout2d")
TOLERANCE = 1e-3  # relative difference of the losses of two contenders, in float32


@dataclasses.dataclass(frozen=True)
class Setting:
    """The network and the images of a training step. `widths` are those of the neck and the head of a Semantic FPN."""

    task: str
    variant: str
    size: tuple[int, int]
    batch: int
    classes: int
    widths: tuple[int, int]

    def weights(self) -> Weights:
        spec = ModelSpec(VARIANTS[self.variant], self.classes)
        if self.task == "segmentation":
            spec = ModelSpec(spec.variant, self.classes, "semantic_fpn", SemanticFPNOptions(*self.widths))
        known = synthetic_weights(spec.variant, self.task)
        return dataclasses.replace(known, spec=spec, tensors=synthetic_tensors(spec))

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Return images and labels. Of label maps, the first row is ignored, as padding is."""
        generator = np.random.default_rng(0)
        images = generator.normal(size=(self.batch, 3, *self.size)).astype(np.float32)
        labels = generator.integers(0, self.classes, (self.batch, *self.size))
        if self.task == "classification":
            return images, labels[:, 0, 0].copy()
        labels[:, 0] = IGNORED
        return images, labels


def clock() -> float:
    return time.thread_time() if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="classification", choices=tuple(DEFAULTS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--size", type=int, nargs="+", help="image size, or height and width (default 32, or 96 128)")
    parser.add_argument("--batch", type=int, help="images per step (default 32, or 8 for segmentation)")
    parser.add_argument("--classes", type=int, help="number of classes (default 1000, or 11 for segmentation)")
    parser.add_argument("--widths", type=int, nargs=2, default=[64, 64], help="segmentation: neck and head (64 64)")
    parser.add_argument("--rounds", type=int, default=7, help="number of measurement rounds (default 7)")
    parser.add_argument("--one-thread", action="store_true", help="measure the processor time of a single thread")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    if arguments.one_thread:
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the worker processes
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    chosen = argparse.Namespace(**DEFAULTS[arguments.task] | given)
    common = (tuple(chosen.size * 2)[:2], chosen.batch, chosen.classes, tuple(chosen.widths))
    results = {
        variant: measure(chosen.contenders, Setting(chosen.task, variant, *common), chosen.rounds)
        for variant in chosen.variants
    }
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    machine = f"{processor_name()}, {threads} threads, Python {platform.python_version()}"
    ratios = {variant: compare(times) for variant, times in results.items()}
    if arguments.json:
        content = {"machine": machine, "setting": vars(chosen) | {"json": None}, "seconds": results, "ratios": ratios}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(machine)
    print(
        f"{chosen.task}, {' x '.join(map(str, common[0]))}, batch size {chosen.batch}, median of {chosen.rounds} rounds"
    )
    print("processor time of one thread:" if arguments.one_thread else "wall-clock time with all threads:")
    print("| variant | contender | ms per step | forward | backward | optimizer | images/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant, times in results.items():
        for contender, steps in times.items():
            phases = [1e3 * statistics.median(phase) for phase in zip(*steps, strict=True)]
            total = statistics.median(map(sum, steps))
            columns = (f"{number:.1f}" for number in (1e3 * total, *phases, chosen.batch / total))
            print(f"| {variant} | {contender} | {' | '.join(columns)} |")
    for variant, ratios_of_variant in ratios.items():
        for what, ratio in ratios_of_variant.items():
            print(f"{variant}: {what}: {ratio:.2f}")


def measure(contenders: list[str], setting: Setting, rounds: int) -> dict[str, list[list[float]]]:
    """Return the seconds of forward and loss, backward and optimizer of each contender, per round."""
    load = functools.partial(load_step, setting=setting)
    timings = interleave(load, contenders, rounds, calls=1, seconds=0, pause=0.25)
    for timing in timings.values():
        if isinstance(timing, FcvitError):
            raise timing
    losses = {contender: timing.about for contender, timing in timings.items()}
    first = next(iter(losses.values()))
    if not all(np.allclose(other, first, rtol=TOLERANCE, atol=0) for other in losses.values()):
        raise FcvitError(f"{setting.variant}: the losses of the contenders differ: {losses}")
    return {contender: [step for (step,) in timing.rounds] for contender, timing in timings.items()}


def load_step(contender: str, setting: Setting) -> tuple[Callable[[], list[float]], list[float]]:
    """Return a function that runs a step and returns its times, and the losses of the first steps."""
    step, layers = (torch_step if contender.startswith("torch") else paddle_step)(contender, setting)
    # Dropout, and drop path, which is a layer in Paddle and part of the block in PyTorch.
    random = [layer for layer in layers if type(layer).__name__ in RANDOM]
    for layer in random:
        layer.training = False
    losses = [step()[1].item() for _ in range(3)]
    for layer in random:
        layer.training = True

    def phases() -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(step()[0])]

    return phases, losses


def paddle_step(contender: str, setting: Setting):
    """Return a function that runs a step and returns times and loss, and the layers of the network."""
    import paddle

    from fcvit.inference.engines import accelerate
    from fcvit.models.build import build_classifier, build_segmenter
    from fcvit.native.allocator import keep_memory
    from fcvit.tasks.segmentation.losses import pixel_cross_entropy

    if contender == "paddle + allocator":
        keep_memory()
    weights = setting.weights()
    if setting.task == "segmentation":
        model, _ = build_segmenter(weights.spec.variant, weights)
        loss_of = pixel_cross_entropy
    else:
        model = build_classifier(weights, drop_path_rate=0.1)
        loss_of = paddle.nn.functional.cross_entropy
    model.train()
    images, labels = map(paddle.to_tensor, setting.data())
    parameters = [p for p in model.parameters() if not p.stop_gradient]
    if contender == "native":
        from fcvit.native.optimizer import AdamW

        accelerate(model)
        names = {p.name for p in parameters}
        optimizer = AdamW(parameters, names, 1e-3, (0.9, 0.999), 1e-8, weight_decay=0.05, clip_norm=None)
    else:
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=parameters, weight_decay=0.05)

    def step():
        timestamps = [clock()]
        loss = loss_of(model(images), labels)
        timestamps.append(clock())
        loss.backward()
        timestamps.append(clock())
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)  # as in `fcvit.training.step`
        return [*timestamps, clock()], loss

    return step, model.sublayers()


def torch_step(contender: str, setting: Setting):
    """Do the same as `paddle_step` with the PyTorch reference."""
    import torch

    from fcvit.reference.build import build_reference
    from fcvit.reference.classifier import FCViT
    from fcvit.reference.semantic_fpn import SemanticFPN

    memory_format = torch.channels_last if "channels_last" in contender else torch.contiguous_format
    weights = setting.weights()
    loss_of = torch.nn.functional.cross_entropy
    if setting.task == "segmentation":
        model = SemanticFPN(weights.spec)
        loss_of = functools.partial(loss_of, ignore_index=IGNORED, reduction="none")
    else:
        model = FCViT(weights.spec.variant, setting.classes, drop_path_rate=0.1)
    model.load_state_dict(build_reference(weights.spec, weights.tensors).state_dict())
    model.to(memory_format=memory_format).train()
    images, labels = map(torch.from_numpy, setting.data())
    images = images.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)

    def step():
        timestamps = [clock()]
        loss = loss_of(model(images), labels).mean()  # over all pixels, ignored ones included
        timestamps.append(clock())
        loss.backward()
        timestamps.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        return [*timestamps, clock()], loss

    return step, model.modules()


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
