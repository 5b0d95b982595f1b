"""Measure the milliseconds of a training step of a detector (data, losses, backward, AdamW) on this CPU.

Run:  .venv/bin/python benchmarks/detection_step.py --data nuclei.tar [--recipe NAME] [--weights FILE] [--rounds N]
          [--one-thread]

The contenders are the native operators (`accelerate`) as in `fcvit train`, and the PyTorch reference in its default
memory format and in channels_last, with the same images, the same samples and the same losses. Weights of a trained
detector give realistic numbers of positive samples. The contenders run alternately (`fcvit.inference.interleave`).
Times are medians, and ratios are medians over steps that are adjacent in time. `--one-thread` measures the processor
time of a single thread.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fcvit.errors import FcvitError
from fcvit.inference.interleave import interleave, median_ratio
from fcvit.machine import processor_name

CONTENDERS = ("native", "torch", "torch channels_last")


def clock() -> float:
    return time.thread_time() if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="images with annotations in COCO's format")
    parser.add_argument("--recipe", default="nuclei-instances", help="name or path of a recipe for detection")
    parser.add_argument("--weights", help="detector trained with the recipe (default: new weights)")
    parser.add_argument("--rounds", type=int, default=7, help="number of measurement rounds (default 7)")
    parser.add_argument("--one-thread", action="store_true", help="measure the processor time of a single thread")
    arguments = parser.parse_args()
    if arguments.one_thread:
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the worker processes
    load = functools.partial(load_step, setting=(arguments.recipe, arguments.data, arguments.weights))
    timings = interleave(load, CONTENDERS, arguments.rounds, calls=3, seconds=0)
    for timing in timings.values():
        if isinstance(timing, FcvitError):
            raise timing
    print(f"{processor_name()}, {os.cpu_count()} cores, {arguments.recipe}, median of {arguments.rounds} rounds")
    print("processor time of one thread:" if arguments.one_thread else "wall-clock time with all threads:")
    seconds = {name: [statistics.median(calls) for calls in timing.rounds] for name, timing in timings.items()}
    for name, values in seconds.items():
        print(f"| {name} | {1e3 * statistics.median(values):.0f} ms per step |")
    for name in CONTENDERS[1:]:
        print(f"native over {name}: {median_ratio(seconds[name], seconds['native']):.2f}")


def load_step(contender: str, setting: tuple) -> tuple[Callable[[], float], None]:
    from fcvit.tasks.detection.training import DetectionTraining
    from fcvit.training.recipe import read_recipe
    from fcvit.weights.reading import read_weights

    name, data, path = setting
    recipe: Any = read_recipe(name, {"data": data})
    task = DetectionTraining(recipe, read_weights(path) if path else None)
    model = task.network()
    batches = endless_batches(task, recipe)
    step = (native_step if contender == "native" else torch_step)(contender, task, model, recipe, batches)
    step()

    def measured() -> float:
        began = clock()
        step()
        return clock() - began

    return measured, None


def endless_batches(task: Any, recipe: Any) -> Iterator[tuple[np.ndarray, Any]]:
    from fcvit.training.batches import MicroBatches, epoch_batches

    micro_batches = MicroBatches(recipe.batch_size)
    epoch = 0
    while True:
        for batch in epoch_batches(task.train, 0, epoch, task.transform(epoch), micro_batches, 0, None, task.groups):
            images, targets = task.inputs(batch, epoch)
            yield images.normalized(), targets
        epoch += 1


def native_step(contender: str, task: Any, model: Any, recipe: Any, batches: Any) -> Callable[[], None]:
    from fcvit.inference.engines import accelerate
    from fcvit.training.batches import MicroBatches
    from fcvit.training.step import Trainer

    accelerate(model)
    trainer = Trainer(model, recipe, MicroBatches(recipe.batch_size), task.loss)
    trainer.train_mode()
    return lambda: trainer.run(batches, 0.0)  # the same weights in all steps


def torch_step(contender: str, task: Any, model: Any, recipe: Any, batches: Any) -> Callable[[], None]:
    import torch

    from fcvit.reference.build import build_reference
    from fcvit.reference.mask_rcnn_training import training_losses
    from fcvit.tasks.detection.targets import drawn_from

    weights, sampling = task.weights(model), recipe.sampling()
    memory_format = torch.channels_last if "channels_last" in contender else torch.contiguous_format
    network: Any = build_reference(weights.spec, weights.tensors).to(memory_format=memory_format).train()
    optimizer = torch.optim.AdamW(network.parameters(), 0.0, weight_decay=recipe.weight_decay)

    def step() -> None:
        images, (targets, generators) = next(batches)
        images = torch.from_numpy(images).to(memory_format=memory_format)
        draws = [drawn_from(generator) for generator in generators]
        losses = training_losses(
            network, images, targets, draws, sampling.anchors, sampling.rois, sampling.proposals_before_nms
        )
        sum(losses.values()).backward()
        if recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
