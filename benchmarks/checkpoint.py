"""Measure what it costs to save the state of a training within an epoch.

Steps are blocked while the state is copied, and may be slower while the copy is written in the background. In each
round, some steps are timed, then a state is saved during further steps. The cost of a save is the seconds of the copy,
plus the seconds that the steps until the end of the write take longer than the same number of steps before it.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.inference.engines import accelerate
from fcvit.machine import processor_name
from fcvit.models.build import create_model
from fcvit.training.batches import MicroBatches
from fcvit.training.recipe import read_recipe
from fcvit.training.state import STATE, BackgroundWrite, Progress, encode_state, write_state
from fcvit.training.step import STATISTICS, Trainer, check_finite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fcvit_b48", help="name of a shipped recipe (default fcvit_b48)")
    parser.add_argument("--size", type=int, default=32, help="image size (default 32)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default 8)")
    parser.add_argument("--steps", type=int, default=5, help="steps per round before the save (default 5)")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurement rounds (default 5)")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 1], help="intervals (default 5 and 1)")
    parser.add_argument("--folder", type=Path, help="folder in which the state is written (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    step, trainer = training_step(arguments)
    for _ in range(3):
        step()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        rounds = [measure(step, trainer, folder, arguments.steps) for _ in range(arguments.rounds)]
        size = (folder / STATE).stat().st_size
    median = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    cost = statistics.median(row["copy"] + row["slowdown"] for row in rounds)
    shares = {f"{minutes:g}": cost / (60 * minutes) for minutes in arguments.minutes}
    machine = f"{processor_name()}, Python {platform.python_version()}"
    if arguments.json:
        content = {"machine": machine, "bytes": size, "rounds": rounds, "seconds": cost, "shares": shares}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(machine)
    print(f"{arguments.recipe}, {arguments.size} x {arguments.size}, batch size {arguments.batch}, {size / 1e6:.0f} MB")
    print(f"median of {arguments.rounds} rounds, in seconds: {', '.join(f'{k} {v:.2f}' for k, v in median.items())}")
    print(f"one save costs {cost:.2f} s")
    for minutes, share in shares.items():
        print(f"every {minutes} minutes: {share:.2%} of the time")


def training_step(arguments):
    """Return a function that runs a step and waits for it, and the trainer."""
    paddle = import_framework("paddle")
    overrides = {"precision": "float32", "batch_size": arguments.batch, "ema_decay": 0.9999, "warmup_lr": 0.0}
    recipe = read_recipe(arguments.recipe, overrides | {"lr": 1e-6, "min_lr": 0.0})
    model = create_model(recipe.network(), None, 1000)
    if paddle.get_device() == "cpu":
        accelerate(model)
    cross_entropy = paddle.nn.functional.cross_entropy

    def loss(outputs, targets):
        return {"loss": cross_entropy(outputs, paddle.to_tensor(targets))}

    trainer = Trainer(model, recipe, MicroBatches(arguments.batch), loss)
    trainer.train_mode()
    generator = np.random.default_rng(0)
    images = generator.normal(size=(arguments.batch, 3, arguments.size, arguments.size)).astype(np.float32)
    labels = generator.integers(0, 1000, arguments.batch)
    return lambda: float(trainer.run(iter([(images, labels)]), 1e-6)["loss"]), trainer


def measure(step, trainer, folder: Path, steps: int) -> dict[str, float]:
    """Return the seconds of a step, a copy, the background write, and the slowdown of the steps during the write."""
    times = [time.perf_counter()]
    for _ in range(steps):
        step()
        times.append(time.perf_counter())
    one_step = (times[-1] - times[0]) / steps
    began = time.perf_counter()
    tensors, metadata = encode_state(Progress(step=trainer.step), trainer.tensors())
    tensors[STATISTICS] = trainer.statistics.values()
    copied = time.perf_counter()
    ended = []

    def work() -> None:
        check_finite(tensors, trainer.step)
        write_state(folder, tensors, metadata)
        ended.append(time.perf_counter())

    write = BackgroundWrite()
    write.start(work)
    count = 0
    while write.running:
        step()
        count += 1
    slowdown = time.perf_counter() - copied - count * one_step
    write.finish()
    return {"step": one_step, "copy": copied - began, "write": ended[0] - copied, "slowdown": slowdown}


if __name__ == "__main__":
    main()
