"""Measure how well the images keep a simulated accelerator busy, and the decoding rate per core beside timm's loader.

Run:  .venv/bin/python benchmarks/input_pipeline.py [--photos FOLDER] [--kinds NAME ...] [--rates N ...]
          [--workers N] [--batch N] [--seconds N] [--rounds N] [--normalize] [--timm FOLDER] [--json FILE]

The accelerator is a network whose forward pass sleeps, so it takes its time without the processor. Everything else is
the code of a training run on a GPU: the trainer, the loop's batches, mixing, and the copy to the memory from which the
GPU reads. A GPU normalizes the images itself. `--normalize` does this with the processor, as a training on a CPU does.
Three kinds of images are measured: `small` are generated JPEG files of 64 x 64 pixels for an input of 64 pixels, so
that decoding takes little time. `medium` are the same files for 224 pixels, so that the batches are large.
`photographs` are the JPEG files in FOLDER (default: generated files of ImageNet's usual sizes) for 224 pixels.

In each round, the rate of the decoding workers alone is measured before and after each rate of the accelerator. The
result is the achieved rate divided by the lower one of accelerator and decoders, as the median over the rounds.

timm's loader decodes and augments the same photographs with the same transforms (random resized crop, flip,
RandAugment) into batches of uint8. It needs two packages that are not dependencies of this project:
          pip install --no-deps --target FOLDER timm torchvision
where the version of torchvision must match that of PyTorch.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fcvit.machine import available_threads, processor_name
from fcvit.tasks.classification.recipe import ClassificationRecipe

FILES = 1024
WARM = 6  # steps before the measurement
KINDS = {"small": ((64, 64), 64), "medium": ((64, 64), 224), "photographs": (None, 224)}  # size of the files, input
USUAL = ((500, 375), (375, 500), (500, 333), (640, 480))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: generated images)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="kinds of images (default all)")
    parser.add_argument("--rates", type=float, nargs="+", default=[200, 1000, 2500, 5000], help="images/s")
    parser.add_argument("--workers", type=int, default=available_threads(), help="default: one per core")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default 128)")
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurement rounds (default 3)")
    parser.add_argument("--normalize", action="store_true", help="normalize the images with the processor")
    parser.add_argument("--timm", type=Path, help="folder with timm and torchvision (default: timm is not measured)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            data = Path(folder) / kind
            write_images(data, arguments.photos if kind == "photographs" else None, KINDS[kind][0])
            results[kind] = measure(data, KINDS[kind][1], arguments)
    machine = f"{processor_name()}, {available_threads()} cores, Python {platform.python_version()}"
    if arguments.json:
        setting = {name: str(value) for name, value in vars(arguments).items()}
        content = {"machine": machine, "setting": setting, "images_per_second": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(machine)
    print(f"{arguments.workers} workers, batch size {arguments.batch}, median of {arguments.rounds} rounds; images/s")
    print("| images | accelerator | decoders alone | achieved | achieved over the lower one |")
    print("| --- | --- | --- | --- | --- |")
    for kind, result in results.items():
        for rate, rows in result["accelerator"].items():
            achieved, decoders, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"| {kind} | {rate:,.0f} | {decoders:,.0f} | {achieved:,.0f} | {ratio:.3f} |")
    for kind, result in results.items():
        cores = min(arguments.workers, available_threads())
        ours = statistics.median(decoders for rows in result["accelerator"].values() for _, decoders, _ in rows)
        text = f"{kind}: decoding and augmentation, images/s per core: this project {ours / cores:,.1f}"
        if arguments.timm:
            text += f", timm {statistics.median(result['timm']) / cores:,.1f}"
            text += f", ratio {statistics.median(result['over_timm']):.2f}"
        print(text)
    if not arguments.timm:
        print("timm was not measured: pass --timm FOLDER (the first lines of this file say how to install it)")


def measure(data: Path, size: int, arguments: argparse.Namespace) -> dict:
    """Return achieved rate, decoders' rate and their ratio for each rate of the accelerator, and the rates of timm."""
    from fcvit.native.allocator import keep_memory
    from fcvit.training.run import Run

    keep_memory()  # as training with the native operators does
    result: dict = {"accelerator": {rate: [] for rate in arguments.rates}, "timm": [], "over_timm": []}
    seconds, batch = arguments.seconds, arguments.batch
    steps = WARM + int(seconds * max(arguments.rates) * 2 / batch) + 1
    recipe = ClassificationRecipe(
        variant="fcvit_digits",
        data=str(data),
        input_size=size,
        batch_size=batch,
        steps_per_epoch=steps,
        epochs=10000,
        warmup_epochs=0,
    )
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(Run.prepared(recipe, "cpu", arguments.workers))
        epochs = itertools.count()
        decoders_rate(run, next(epochs), seconds / 2)  # starts the workers
        for _ in range(arguments.rounds):
            before = decoders_rate(run, next(epochs), seconds)
            for rate in arguments.rates:
                achieved = training_rate(run, next(epochs), rate, seconds, arguments.normalize)
                after = decoders_rate(run, next(epochs), seconds)
                decoders = 2 / (1 / before + 1 / after)
                result["accelerator"][rate].append((achieved, decoders, achieved / min(rate, decoders)))
                before = after
            if arguments.timm:
                # Each of timm's workers reads a whole batch, so small ones make the rate more exact.
                timm = timm_in_own_process(arguments.timm, str(data), size, 16, arguments.workers, seconds)
                after = decoders_rate(run, next(epochs), seconds)
                result["timm"].append(timm)
                result["over_timm"].append(2 / (1 / before + 1 / after) / timm)
    return result


def decoders_rate(run, epoch: int, seconds: float) -> float:
    """Return the images per second that the workers decode and augment while nothing else runs."""
    from fcvit.training.batches import epoch_batches

    transform = run.task.transform(epoch)
    fixed = (run.task.train, run.recipe.seed, epoch, transform, run.micro_batches, run.workers)
    with contextlib.closing(epoch_batches(*fixed, run.recipe.steps_per_epoch)) as loaded:
        return rate_of(loaded, run.recipe.batch_size, seconds)


def training_rate(run, epoch: int, rate: float, seconds: float, normalize: bool) -> float:
    """Return the images per second of training on an accelerator with this rate."""
    import paddle
    from paddle import nn

    from fcvit.training.loop import Loop
    from fcvit.training.step import Trainer

    class Accelerator(nn.Layer):
        def __init__(self):
            super().__init__()
            self.variant = run.recipe.network()  # the optimizer asks for its depths
            self.weight = self.create_parameter([1])

        def forward(self, images):
            time.sleep(len(images) / rate)
            return self.weight

    class GPUTrainer(Trainer):
        def stage(self, images):
            return paddle.to_tensor(images.pixels)  # takes the time of the copy to pinned memory

    trainer = Trainer if normalize else GPUTrainer
    run.trainer = trainer(Accelerator(), run.recipe, run.micro_batches, lambda outputs, _: {"loss": outputs.sum()})
    loop = Loop(run)
    with contextlib.closing(loop._batches(epoch)) as batches:
        steps = (run.trainer.run(batches, 0.0) for _ in itertools.count())
        return rate_of(steps, run.recipe.batch_size, seconds)


def rate_of(batches: Iterator[object], size: int, seconds: float) -> float:
    """Return the images per second of an iterator over batches, after a warm-up."""
    for _ in range(WARM):
        next(batches)
    began = time.perf_counter()
    for count, _ in enumerate(batches, 1):
        if (elapsed := time.perf_counter() - began) >= seconds:
            return count * size / elapsed
    raise RuntimeError("the epoch is shorter than the measurement")


def timm_in_own_process(packages: Path, *setting: object) -> float:
    """Return the result of `timm_rate`. timm's loader forks, which must not happen in a process that runs Paddle."""
    code = f"from input_pipeline import timm_rate; print(timm_rate{setting!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(packages)))}
    words = [sys.executable, "-W", "ignore", "-c", code]
    return float(subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def timm_rate(folder: str, size: int, batch: int, workers: int, seconds: float) -> float:
    """Return the images per second of timm's loader with the augmentation of the authors' recipe."""
    # PyPI's torchvision cannot load its operators with the CPU build of PyTorch. The loader does not need them.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("_meta_registrations")
    import torch
    from timm.data import ImageDataset, create_loader

    loader = create_loader(
        ImageDataset(folder),
        (3, size, size),
        batch,
        is_training=True,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",
        num_workers=workers,
        device=torch.device("cpu"),
        use_multi_epochs_loader=True,
    )
    # The loader inside timm's prefetcher, which would also normalize and copy to the device.
    batches = itertools.chain.from_iterable(itertools.repeat(loader.loader))
    images, targets = next(batches)
    assert images.dtype == torch.uint8 and images.shape == (batch, 3, size, size) and len(targets) == batch
    return rate_of(batches, batch, seconds)


def write_images(folder: Path, photos: Path | None, size: tuple[int, int] | None) -> None:
    """Write JPEG files in two class folders: links to a few different ones."""
    originals = folder.with_name(f"{folder.name}-originals")
    originals.mkdir(parents=True)
    if photos:
        paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        sources = [Path(shutil.copy(path, originals)) for path in paths]
    else:
        generator = np.random.default_rng(0)
        sources = [originals / f"{index}.jpg" for index in range(40)]
        for index, path in enumerate(sources):
            sides = size or USUAL[index % 4]
            coarse = generator.integers(0, 256, (sides[1] // 6, sides[0] // 6, 3), np.uint8)
            Image.fromarray(coarse).resize(sides, Image.Resampling.BICUBIC).save(path, quality=90)
    for index, source in zip(range(FILES), itertools.cycle(sources), strict=False):
        target = folder / "ab"[index % 2] / f"{index:04d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)


if __name__ == "__main__":
    main()
