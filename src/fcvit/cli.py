"""The command line: thin, every task imported when it is called.

Tables and JSON go to the standard output; progress, notes and errors to the standard error. Exit
codes stand in `fcvit.errors` and docs/cli.md.
"""

import contextlib
import io
import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError

from fcvit import __version__, interrupts
from fcvit.errors import (
    INTERRUPTED,
    BadImages,
    FcvitError,
    FreshWeights,
    UnreadableFile,
    UsageError,
)
from fcvit.text import csv_text, printable

if TYPE_CHECKING:
    from fcvit.commands.verify import Verification
    from fcvit.models.variants import PreprocessingChange
    from fcvit.training.recipe import Recipe
    from fcvit.training.run import Training

app = App(
    name="fcvit",
    help="FCViT for PaddlePaddle: convert, verify, evaluate, predict, train. Add --debug for a traceback.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)

Output = Parameter(name=["--output", "-o"])
Classes = Annotated[Path | None, Parameter(name="--classes")]
Channels = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
Json = Annotated[bool, Parameter(name="--json", negative=())]
Device = Annotated[str, Parameter(name="--device")]


@app.command
def models(*, as_json: Json = False) -> None:
    """List the variants, their published figures, and where the authors' checkpoints are.

    Args:
        as_json: Print JSON.
    """
    from fcvit.models.variants import VARIANTS, published

    if as_json:
        import dataclasses

        _print_json(
            {
                name: dataclasses.asdict(variant)
                | {"published": (row := published(variant)) and dataclasses.asdict(row)}
                for name, variant in VARIANTS.items()
            }
        )
        return
    from fcvit.report import tables

    _show(tables.variants())
    _say("The authors' checkpoints, to be fetched by hand (Apache-2.0, github.com/ma-xu/FCViT):")
    for name, variant in VARIANTS.items():
        if row := published(variant):
            _say(f"  {name:<11} {row.url}")


@app.command
def convert(
    source: Path,
    /,
    *,
    output: Annotated[Path, Output],
    layout: Literal["paddle", "torch"] | None = None,
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None,
    ema: bool | None = None,
    key: str | None = None,
    variant: str | None = None,
    classes: Classes = None,
    new_head: int | None = None,
    input_size: int | None = None,
    crop_fraction: float | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    mean: Channels = None,
    std: Channels = None,
    verify: bool | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint between PyTorch and Paddle, checked and, with both installed, verified.

    Args:
        source: PyTorch (.pth, .pth.tar, older format), safetensors or .pdparams; told by content.
        output: The file to write: .safetensors, .pdparams or .pth.
        layout: Names and layout of a .safetensors file (default: paddle).
        dtype: Type to store (default: as in the source).
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of a file with both.
        key: Take this one of several sets of weights in the source, such as teacher or model.state_dict.
        variant: What the file must be (default: recognized from its tensors).
        classes: Class list: CSV with id and name, or one class per line.
        new_head: Replace the head by a fresh one for this many classes.
        input_size: Store another input size in pixels than the variant's.
        crop_fraction: Store another crop fraction.
        interpolation: Store another interpolation.
        mean: Store another mean, of images from 0 to 1: one number, or three for red, green and blue.
        std: Store another standard deviation, in the same way.
        verify: Compare the numbers with the source (default: if both frameworks are installed).
        overwrite: Replace the output if it is there.
        as_json: Print JSON.
    """
    from fcvit.commands.convert import convert as run
    from fcvit.report import tables

    done = run(
        source,
        output,
        layout=layout,
        dtype=dtype,
        ema=ema,
        key=key,
        variant=variant,
        classes=classes,
        preprocessing=_changes(input_size, crop_fraction, interpolation, mean, std),
        new_head=new_head,
        verify=verify,
        overwrite=overwrite,
    )
    if as_json:
        import dataclasses

        proof = done.verification
        _print_json(dataclasses.asdict(done) | {"verification": proof and _proof(proof)})
        return
    _show(tables.conversion(done))
    if done.verification:
        _show(*tables.verification(done.verification))


@app.command
def verify(
    converted: Path,
    /,
    *,
    against: Path,
    ema: bool | None = None,
    variant: str | None = None,
    blocks: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> None:
    """Prove that two weights files are one network: tensors, gates A and B, drift by stage.

    Args:
        converted: The file to check.
        against: The file it was made from.
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of a source with both.
        variant: What both must be (default: what the converted file says).
        blocks: Show the drift after every block, not only by stage.
        as_json: Print JSON.
    """
    from fcvit.commands.verify import require, verify_files
    from fcvit.report import tables

    proof = verify_files(converted, against, ema, variant)
    if as_json:
        _print_json(_proof(proof))
    else:
        _show(*tables.verification(proof, blocks))
    require(proof)


@app.command
def inspect(
    file: Path,
    /,
    *,
    ema: bool | None = None,
    key: str | None = None,
    tensors: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> int:
    """Say what a weights file is; needs neither framework and executes nothing.

    Args:
        file: Any format; told by content.
        ema: Describe the averaged (--ema) or the raw (--no-ema) weights of a file with both.
        key: Describe this one of several sets of weights, such as teacher or model.state_dict.
        tensors: List every tensor.
        as_json: Print JSON.
    """
    from fcvit.commands.inspect import inspect as run

    found = run(file, ema, tensors, key)
    code = 4 if found["problems"] else 0
    if as_json:
        _print_json(found)
        return code
    from fcvit.report import tables

    _show(*tables.inspection(found))
    return code


@app.command
def export(
    weights: Path,
    /,
    *,
    output: Annotated[Path, Output],
    form: Annotated[Literal["onnx", "paddle", "openvino"] | None, Parameter(name="--format")] = None,
    size: str | None = None,
    dynamic: Annotated[bool, Parameter(negative=())] = False,
    uint8: Annotated[bool, Parameter(negative=())] = False,
    probabilities: Annotated[bool, Parameter(negative=())] = False,
    precision: Literal["float32", "int8"] = "float32",
    calibrate: Path | None = None,
    images: list[str] | None = None,
    ema: bool | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> None:
    """Export a network for ONNX Runtime, Paddle Inference or OpenVINO, run there and checked before it is kept.

    Args:
        weights: A checkpoint of any format.
        output: The file for the runtime: .onnx, .json (paddle, with .pdiparams beside) or .xml (openvino, with .bin).
        form: onnx, paddle or openvino (default: by the output's ending).
        size: Image size, as in 224 or 240x320 (height x width; default: the weights' own).
        dynamic: Take images of any size (onnx, openvino).
        uint8: Take uint8 RGB images and normalize them inside.
        probabilities: Give probabilities instead of logits.
        precision: float32 (default), or int8 with --calibrate (onnx).
        calibrate: Folder of images that int8 takes its scales from, such as training images.
        images: Image, folder or pattern to check with; may stand several times (default: digits of the package).
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of a file with both.
        overwrite: Replace the output if it is there.
        as_json: Print JSON.
    """
    from fcvit.commands.export import export as run
    from fcvit.data.folders import find_images
    from fcvit.report import tables

    done = run(
        weights,
        output,
        form,
        size=_size(size),
        dynamic=dynamic,
        uint8=uint8,
        probabilities=probabilities,
        precision=precision,
        calibration=calibrate,
        images=find_images(images) if images else (),
        ema=ema,
        overwrite=overwrite,
    )
    if as_json:
        import dataclasses

        _print_json(dataclasses.asdict(done))
        return
    _show(tables.exported(done))


def _size(text: str | None) -> tuple[int, int] | None:
    """224 or 240x320 -> height and width."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 1 <= int(side) <= 4096 for side in sides):
        raise UsageError(f"--size {text}: expected pixels from 1 to 4096, as in 224 or 240x320 (height x width)")
    return int(sides[0]), int(sides[-1])


@app.command
def bench(
    *,
    weights: Path | None = None,
    variant: str | None = None,
    engine: str = "",
    batch_size: str = "1,8",
    threads: str = "",
    precision: str = "float32",
    size: int | None = None,
    rounds: int = 7,
    reference: str | None = None,
    ema: bool | None = None,
    output: Annotated[Path | None, Output] = None,
    csv: Annotated[Path | None, Parameter(name="--csv")] = None,
    as_json: Json = False,
) -> int:
    """Measure how fast the engines are on this machine, in turn, beside PyTorch.

    Args:
        weights: A checkpoint of any format (default: weights by rule, which are as fast).
        variant: The network of weights by rule (default: fcvit_tiny).
        engine: Separated by commas (default: all that are installed, and torch, torch-channels-last, torch-compile).
        batch_size: Images at a time, separated by commas.
        threads: Separated by commas (default: one for each core).
        precision: Separated by commas: float32, bfloat16.
        size: Of the images, in pixels (default: the weights' own).
        rounds: How often everybody has a turn.
        reference: What ratios refer to (default: torch-channels-last where it is installed).
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of a file with both.
        output: New folder for bench.json, bench.csv and bench.png.
        csv: Write the table into this file.
        as_json: Print JSON.
    """
    from fcvit.commands.bench import bench as run

    found = run(
        weights,
        variant=variant,
        engines=[name for name in engine.split(",") if name],
        batch_sizes=_numbers("--batch-size", batch_size),
        threads=_numbers("--threads", threads),
        precisions=precision.split(","),
        size=size,
        rounds=rounds,
        reference=reference,
        ema=ema,
        folder=output,
        csv=csv,
    )
    if as_json:
        _print_json(found.to_json())
    else:
        _show(*found.tables())
    return found.exit_code


def _numbers(option: str, text: str) -> list[int]:
    words = [word for word in text.split(",") if word]
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"{option} {text}: expected whole numbers separated by commas")
    return [int(word) for word in words]


@app.command
def similarity(
    *images: str,
    weights: Path,
    output: Annotated[Path | None, Output] = None,
    stage: int | None = None,
    block: int = -1,
    context: int = 1,
    heads: str = "each",
    values: Literal["standardised", "rescaled"] = "standardised",
    scale: Literal["picture", "head"] = "picture",
    top_k: int = 3,
    classes: Classes = None,
    device: Device = "auto",
    ema: bool | None = None,
    as_json: Json = False,
) -> int:
    """Draw what the network finds similar to the whole image: its token-global similarity on the image, by head.

    Args:
        images: Files, folders (searched through) or quoted patterns.
        weights: A checkpoint of any format.
        output: New folder for the pictures and arrays (default: runs/similarity, or the first free one after it).
        stage: Which stage, from 1, or from the end with -1 (default: the last with more than one position).
        block: Which block of it, in the same way (default: the last).
        context: The first or second global context of the block.
        heads: each (default), mean, or the number of a head.
        values: standardised (default), or rescaled as they multiply the context.
        scale: Of the colors: one for a picture (default), or one for each head, which then has its range in its name.
        top_k: Classes in the caption.
        classes: Class list: CSV with id and name, or one class per line (default: the file's own).
        device: auto, cpu, gpu or gpu:N.
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of a file with both.
        as_json: Print JSON.
    """
    from fcvit.analysis.similarity import similarity as run
    from fcvit.data.classes import read_classes
    from fcvit.report import tables

    found = run(
        weights,
        _found_images("similarity", images, output or Path("runs")),
        output,
        stage=stage,
        block=block,
        context=context,
        heads=heads,
        which=values,
        scale=scale,
        top_k=top_k,
        classes=read_classes(classes) if classes else None,
        device=device,
        ema=ema,
    )
    return _print_result(found, tables.maps_written, as_json)


@app.command
def heads(
    *images: str,
    weights: Path,
    output: Annotated[Path | None, Output] = None,
    most: int = 200,
    vit: str | None = None,
    vit_weights: Path | None = None,
    device: Device = "auto",
    ema: bool | None = None,
    as_json: Json = False,
) -> int:
    """Measure how the heads' similarity maps differ, how sparse they are, how they change with depth, and whether
    queries would.

    Args:
        images: Files, folders (searched through) or quoted patterns.
        weights: A checkpoint of any format.
        output: New folder for heads.json and heads.png.
        most: Take at most so many images, evenly over their names.
        vit: Measure the attention of this plain ViT of the installed timm beside it, such as vit_small_patch16_224.
        vit_weights: File with the weights of that ViT, under timm's names.
        device: auto, cpu, gpu or gpu:N.
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of a file with both.
        as_json: Print JSON.
    """
    from fcvit.analysis.heads import heads as run
    from fcvit.data.folders import sample_evenly
    from fcvit.report import tables

    options: dict[str, Any] = {"vit": vit, "vit_weights": vit_weights, "device": device, "ema": ema}
    found = run(weights, sample_evenly(_found_images("heads", images, output), most), output, **options)
    return _print_result(found, tables.heads, as_json)


@app.command
def trust(
    *images: str,
    weights: Path,
    output: Annotated[Path | None, Output] = None,
    most: int = 50,
    absolute: Annotated[bool, Parameter(negative=())] = False,
    every: Annotated[bool, Parameter(negative=())] = False,
    heads: str = "mean",
    seed: int = 0,
    engine: str = "auto",
    device: Device = "auto",
    ema: bool | None = None,
    as_json: Json = False,
) -> int:
    """Measure whether the maps mark what predictions rest on: deletion and insertion against other maps, occlusion.

    Args:
        images: Files, folders (searched through) or quoted patterns; ten at least.
        weights: A checkpoint of any format.
        output: New folder for trust.json and trust.png.
        most: Take at most so many images, evenly over their names.
        absolute: Count what is unlike the context as marked too.
        every: Measure all global contexts, not only the first and the last of each stage.
        heads: mean (default), each, or the number of a head.
        seed: Of the random maps and the bootstrap.
        engine: What computes the probabilities; as in predict.
        device: auto, cpu, gpu or gpu:N.
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of a file with both.
        as_json: Print JSON.
    """
    from fcvit.analysis.trust import trust as run
    from fcvit.data.folders import sample_evenly
    from fcvit.report import tables

    options: dict[str, Any] = {
        "absolute": absolute,
        "every": every,
        "heads": heads,
        "seed": seed,
        "engine": engine,
        "device": device,
        "ema": ema,
    }
    found = run(weights, sample_evenly(_found_images("trust", images, output), most), output, **options)
    return _print_result(found, tables.trust, as_json)


def _found_images(command: str, arguments: tuple[str, ...], output: Path | None) -> list[Path]:
    """Those that the arguments name; the folder that is written, if one is, must not be among them."""
    from fcvit import run_folder as runs
    from fcvit.data.folders import find_images

    if not arguments:
        raise UsageError(f"{command}: name at least one image, folder or pattern")
    if output is not None:
        for argument in arguments:
            runs.refuse_inside(output, Path(argument), argument)
    return find_images(arguments)


def _print_result(found: Any, as_tables: Any, as_json: bool) -> int:
    """As JSON or as tables; the exit code, which tells of images that could not be read."""
    import dataclasses

    from fcvit.report import tables

    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        _show(*as_tables(found))
        if found.folder:
            _say(f"written to {found.folder}")
    if found.unreadable:
        _show(tables.unreadable(found.unreadable), error=True)
        return BadImages.exit_code
    return 0


@app.command
def demo(
    *,
    weights: list[Path] | None = None,
    port: int | None = None,
    device: Device = "auto",
    ema: bool | None = None,
    open_browser: Annotated[bool, Parameter(name="--open", negative=())] = False,
) -> None:
    """Serve a local page: drop an image, see its classes and similarity maps, slide through blocks and heads.

    Args:
        weights: A checkpoint of any format, or two, each with its own --weights (default: the package's digits).
        port: Of the page, on this machine only (default: the first free one from 7860).
        device: auto, cpu, gpu or gpu:N.
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of files with both.
        open_browser: Show the page at once.
    """
    from fcvit.commands.demo import demo as run

    run(weights or (), port=port, device=device, ema=ema, open_browser=open_browser)


@app.command(name="check-data")
def check_data(
    data: Path | None = None,
    /,
    *,
    split: list[str] | None = None,
    few: int = 10,
    workers: int | None = None,
    as_json: Json = False,
) -> int:
    """Look over class folders before training: what cannot be read, what is there twice, odd images.

    Args:
        data: Class folders, or the folders train and val (and test) of them; also a tar, or a folder in one.
        split: A split that lies elsewhere, as NAME=PATH; may be given several times.
        few: List classes with fewer images than this.
        workers: Processes that decode images (default: one for each core, at most 8); 0: none.
        as_json: Print JSON, with all that the tables shorten.
    """
    from fcvit.commands.check_data import check_data as run

    check = run(data, split=split or (), few=few, workers=workers)
    if as_json:
        import dataclasses

        _print_json(dataclasses.asdict(check))
    else:
        _show(*check.tables())
    return check.exit_code


app.command("fcvit.commands.evaluate:command", name="eval", help="Measure accuracy on labeled images.")


@app.command
def train(
    recipe: str | None = None,
    /,
    *,
    output: Annotated[Path | None, Output] = None,
    resume: Path | None = None,
    extend: Path | None = None,
    preview: Path | None = None,
    option: list[str] | None = None,
    device: Device = "auto",
    workers: int | None = None,
    as_json: Json = False,
    **overrides: str,
) -> object:
    """Train a network by a recipe; every field of the recipe is an option too, as in --lr 5e-4.

    Args:
        recipe: A TOML file, or the name of a recipe that comes with the package: digits, fcvit_tiny, ...
        output: Folder of the run (default: runs/train, or the first free one after it).
        resume: Go on with the run in this folder after its last epoch; takes no recipe. What it reads may be
            elsewhere now: --data, --val, --classes, --weights say where.
        extend: Train longer than the run in this folder was meant to, with --epochs N, in a new folder.
        preview: Draw what the network would see of some training images into this .png, and do not train.
        option: An option of the architecture, as in --option competition=false; may stand several times.
        device: auto, cpu, gpu or gpu:N.
        workers: Processes that decode and augment (default: on a GPU one for each core, at most 8; else none).
        as_json: Print JSON.
        overrides: Fields of the recipe (docs/training.md lists them), such as --data FOLDER, --epochs 10.
    """
    from fcvit.training import run as task

    for word in option or ():
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--option {word}: expected NAME=VALUE, as in --option competition=false")
        overrides[f"options.{name}"] = value
    processes = _train_workers(workers, device)
    if sum(given is not None for given in (recipe, resume, extend)) != 1:
        raise UsageError("train: expected a recipe, or --resume RUN, or --extend RUN --epochs N")
    moved = {name: place for name, place in overrides.items() if name in task.PLACES}
    others = {name: value for name, value in overrides.items() if name not in task.PLACES}
    places = f"where they are elsewhere now, --{', --'.join(task.PLACES)}"
    if resume is not None:
        if output or others or preview or device != "auto":
            raise UsageError(f"train: --resume goes on as the run began; it takes {places}, and no other field")
        return _trained(task.resume(resume, moved=moved, workers=processes), as_json)
    if extend is not None:
        if set(others) != {"epochs"} or not others["epochs"].isdecimal() or preview or device != "auto":
            raise UsageError(f"train: --extend RUN takes --epochs N, of the longer schedule, and {places}")
        options = {
            "folder": output,
            "moved": moved,
            "workers": processes,
        }
        return _trained(task.extend(extend, int(others["epochs"]), **options), as_json)
    from fcvit.training.recipe import read_recipe

    assert recipe is not None
    resolved = read_recipe(recipe, overrides)
    if preview is not None:
        return _previewed(resolved, preview, output, as_json)
    done = task.train(resolved, folder=output, device=device, workers=processes)
    return _trained(done, as_json)


@app.command
def finetune(
    *,
    weights: Path,
    data: Path,
    output: Annotated[Path | None, Output] = None,
    preview: Path | None = None,
    device: Device = "auto",
    workers: int | None = None,
    as_json: Json = False,
    **overrides: str,
) -> object:
    """Train weights on one's own folder of images: a new head, and the rest gently.

    Args:
        weights: A checkpoint of any format.
        data: One folder of images a class, or folders train and val with such folders in them; also a tar.
        output: Folder of the run (default: runs/train, or the first free one after it).
        preview: Draw what the network would see of some training images into this .png, and do not train.
        device: auto, cpu, gpu or gpu:N.
        workers: Processes that decode and augment (default: on a GPU one for each core, at most 8; else none).
        as_json: Print JSON.
        overrides: Fields of the recipe (docs/training.md lists them), such as --epochs 10, --freeze true.
    """
    from fcvit.commands import finetune as task
    from fcvit.training.run import train as run

    resolved, notes = task.finetune_recipe(weights, data, overrides)
    for note in notes:
        _note(note)
    if preview is not None:
        return _previewed(resolved, preview, output, as_json)
    done = run(resolved, folder=output, device=device, workers=_train_workers(workers, device))
    return _trained(done, as_json)


def _train_workers(workers: int | None, device: str) -> int:
    """On a CPU the network needs the cores, and decoding takes a few per cent of the time."""
    if workers is not None:
        return workers
    from fcvit.frameworks import paddle_place

    if paddle_place(device.partition(":")[0]) == "cpu":
        return 0
    sharing = int(os.environ.get("PADDLE_LOCAL_SIZE") or 1)
    return max(1, min(8, (os.cpu_count() or 1) // sharing))


def _previewed(recipe: "Recipe", path: Path, output: Path | None, as_json: bool) -> int:
    if output is not None or as_json:
        raise UsageError("--preview draws a picture and trains nothing; leave --output and --json out")
    from fcvit.commands.preview import draw_preview

    _say(f"written to {draw_preview(recipe, path).path}")
    return 0


def _trained(done: "Training", as_json: bool) -> object:
    if as_json:
        if (content := done.to_json()) is not None:
            _print_json(content)
        return done.exit_code
    return done


app.command("fcvit.commands.compare:compare", name="compare", help="Compare two results of eval over the same images.")


@app.command
def predict(
    *images: str,
    weights: Path,
    top_k: int = 5,
    engine: str = "auto",
    classes: Classes = None,
    device: Device = "auto",
    batch_size: int = 32,
    threads: int | None = None,
    ema: bool | None = None,
    as_json: Json = False,
    csv: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Name what is in images: files, folders or glob patterns.

    Args:
        images: Files, folders (searched through) or quoted patterns.
        weights: A checkpoint of any format.
        top_k: How many classes to give.
        engine: auto (the fastest that is right), onnxruntime, openvino, paddle, paddle-inference, native, torch.
        classes: Class list: CSV with id and name, or one class per line (default: the file's own).
        device: auto, cpu, gpu or gpu:N.
        batch_size: Images at a time.
        threads: Threads that compute on a CPU (default: one for each core).
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of a file with both.
        as_json: Print JSON.
        csv: Print CSV.
    """
    from fcvit.data.classes import read_classes
    from fcvit.data.folders import find_images
    from fcvit.inference.predict import check_counts, load
    from fcvit.report import tables
    from fcvit.report.progress import progress

    if not images:
        raise UsageError("predict: name at least one image, folder or pattern")
    if as_json and csv:
        raise UsageError("predict: --json and --csv are two answers; choose one")
    check_counts(top_k, batch_size)
    paths = find_images(images)
    named = read_classes(classes) if classes else None
    options: dict[str, Any] = {"ema": ema, "classes": named, "device": device, "engine": engine, "threads": threads}
    classifier = load(weights, **options)
    results = zip(paths, classifier.stream(paths, top_k, batch_size=batch_size), strict=True)
    if csv:
        print("path,place,index,id,name,probability")
    good, bad = [], []
    with progress("predicting", len(paths)) as advance:
        for path, found in results:
            if isinstance(found, BadImages):
                bad.append(found)
            elif not csv:
                good.append((path, found))
            else:
                for place, row in enumerate(found, 1):
                    names = printable(str(path)), place, row.index, printable(row.id), printable(row.name)
                    print(csv_text([(*names, f"{row.probability:.6f}")], "\n"), end="")
            advance(1)
    if as_json:
        import dataclasses

        _print_json(
            {
                "predictions": {str(path): [dataclasses.asdict(row) for row in ranked] for path, ranked in good},
                "unreadable": [str(error) for error in bad],
            }
        )
    elif good:
        _show(tables.predictions(good))
    if bad:
        _show(tables.unreadable(bad), error=True)
        return BadImages.exit_code
    return 0


@app.command
def quickstart(*, output: Annotated[Path | None, Output] = None) -> None:
    """Run the whole path on a small shipped checkpoint and real images; no network needed.

    Args:
        output: Folder of the run (default: runs/quickstart, or the first free one after it).
    """
    from fcvit.commands.quickstart import quickstart as run
    from fcvit.report import tables

    done = run(output)
    _show(tables.conversion(done.conversion))
    if done.conversion.verification:
        _show(tables.verification(done.conversion.verification)[0])
    _show(tables.quickstart(done), tables.predictions(done.predictions[:3]))
    _say("This is a small network of ours on handwritten digits, not ImageNet: it shows that the path works.")
    _say(f"Picture: {done.sheet}")
    _say(f"All of it: {done.folder}   ({done.seconds:.0f} s)")


@app.command
def doctor(*, as_json: Json = False) -> None:
    """Print versions, devices, and what is missing with the command that installs it.

    Args:
        as_json: Print JSON.
    """
    from fcvit.commands.doctor import doctor as run

    found = run()
    if as_json:
        _print_json(found)
        return
    from fcvit.report import tables

    _show(tables.diagnosis(found))


def _workers() -> int:
    """How many processes decode images where nobody said so."""
    sharing = int(os.environ.get("PADDLE_LOCAL_SIZE") or 1)  # Paddle's launcher says how many share this machine
    return max(1, min(8, (os.cpu_count() or 1) // sharing))


def _changes(
    input_size: int | None,
    crop_fraction: float | None,
    interpolation: str | None,
    mean: list[str] | None,
    std: list[str] | None,
) -> "PreprocessingChange | None":
    """The fields of the preprocessing that were asked for; None: none."""
    from fcvit.models.variants import three_channels

    options = {"input_size": input_size, "crop_fraction": crop_fraction, "interpolation": interpolation}
    changes: Any = {name: value for name, value in options.items() if value is not None}
    for name, words in (("mean", mean), ("std", std)):
        if words is not None:
            try:
                changes[name] = three_channels(" ".join(words))
            except ValueError as error:
                raise UsageError(f"--{name} {' '.join(words)}: {error}") from None
    return changes or None


def _proof(proof: "Verification") -> dict:
    import dataclasses

    return dataclasses.asdict(proof) | {"passed": proof.passed, "failure": None if proof.passed else proof.failure()}


def _print_json(content: object) -> None:
    from fcvit.run_folder import to_json

    print(to_json(content), end="")


def _show(*parts: object, error: bool = False) -> None:
    from fcvit.report.tables import console

    where = console(error)
    try:
        for part in parts:
            where.print(part)
    except SystemExit as end:  # what rich makes of a pipe that was closed
        raise BrokenPipeError from end


def _say(text: str, error: bool = False) -> None:
    """Print a line, with what a terminal would obey in names from files as its escape."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _note(str(message))


class _Notes(logging.Handler):
    """Show what the package logs as notes on the standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        _note(record.getMessage())


def _note(text: str) -> None:
    _say(f"fcvit: note: {text}", error=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    as_json = "--json" in words and words[0] in ("eval", "compare")
    if as_json:
        words.remove("--json")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        with _interruptions(keep=arguments is None), warnings.catch_warnings(), _notes_shown():
            warnings.showwarning = _show_warning
            if not debug:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", FreshWeights)
            result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
        if hasattr(result, "tables"):
            _print_outcome(result, as_json)
            return getattr(result, "exit_code", 0)
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        return _fail(_usage(error, words), UsageError, debug)
    except FcvitError as error:
        if hasattr(error, "result"):
            _print_outcome(error.result, as_json)
        code = _fail(error, type(error), debug)
        problems = getattr(error, "problems", ())
        if len(problems) > 1:
            from fcvit.report.tables import problems as listing

            _show(listing(problems), error=True)
        return code
    except KeyboardInterrupt:
        print("fcvit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that went away
        return _fail(
            f"{error.filename or 'reading or writing failed'}: {error.strerror or error}", UnreadableFile, debug
        )
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {error}"[:300]
        return _fail(f"{text} (please report it; --debug shows where)", FcvitError, debug)


def _print_outcome(result: Any, as_json: bool) -> None:
    if as_json and (content := result.to_json()) is not None:
        _print_json(content)
    elif not as_json:
        for part in result.tables():
            _say(part) if isinstance(part, str) else _show(part)


@contextlib.contextmanager
def _notes_shown() -> Iterator[None]:
    logger, handler = logging.getLogger("fcvit"), _Notes()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _interruptions(keep: bool) -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: in order, and saying how to go on.

    Signals within a second are one: Paddle's launcher passes on what the terminal has sent already.

    Args:
        keep: leave the handlers to the process, which ends.
    """
    came = -math.inf

    def interrupt(*_: object) -> None:
        nonlocal came
        now, before = time.monotonic(), came
        if now - before > 1:
            came = now
            raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                # A shell lets processes in the background ignore Ctrl-C.
                if before is not None and (number == signal.SIGTERM or before is signal.default_int_handler):
                    signal.signal(number, interrupt)
                    if not keep:
                        stack.callback(signal.signal, number, before)
        stack.enter_context(interrupts.kept())
        yield


# What a command line needs: arguments by their place, then options; FILE of --weights is told by its ending.
_FORMS = {
    "convert": ("SOURCE", "-o FILE"),
    "verify": ("FILE", "--against FILE"),
    "inspect": ("FILE",),
    "export": ("FILE", "-o FILE.onnx"),
    "bench": ("--weights FILE",),
    "similarity": ("IMAGE...", "--weights FILE"),
    "heads": ("IMAGE...", "--weights FILE"),
    "trust": ("IMAGE...", "--weights FILE"),
    "demo": ("--weights FILE",),
    "check-data": ("FOLDER",),
    "eval": ("--weights FILE", "--data FOLDER"),
    "train": ("RECIPE",),
    "finetune": ("--weights FILE", "--data FOLDER"),
    "compare": ("FIRST", "SECOND"),
    "predict": ("IMAGE...", "--weights FILE"),
}
_LONGEST = 1500  # characters of an error
_WEIGHTS = (".pth", ".tar", ".pt", ".safetensors", ".pdparams", ".bin", ".ckpt")


def _usage(error: CycloptsError, words: list[str]) -> str:
    """What is wrong with a command line, and how it is meant to be."""
    text = str(error)
    command = words[0] if words else ""
    if command.startswith("-"):
        later = next((place for place, word in enumerate(words) if word in _FORMS), None)
        if later is not None:
            return f"the command comes first: {_line([words[later], *words[:later], *words[later + 1 :]])}"
    form = _FORMS.get(command)
    missing = error.argument if type(error) is MissingArgumentError else None
    if missing or isinstance(error, UnusedCliTokensError):
        if missing:
            # A field of a recipe has no parameter of its own; only the text names it.
            field = re.search(r"parameter (--[\w.-]+) requires an argument", text)
            name = field[1] if field and missing.name.startswith("--[") else missing.name
            given = any(word.partition("=")[0] in (name, *missing.names) for word in words[1:])
            text = f"{command}: {name} has no value" if given else f"{command}: {name} is missing"
        else:
            extra = error.unused_tokens or []
            text = f"{command}: {' '.join(map(shlex.quote, extra)):.80} stands where no argument is expected"
        if form:
            return f"{text}; as in: {_example(command, form, words[1:])} (fcvit {command} --help has all options)"
    where = f"fcvit {command} --help lists its options" if form else "fcvit --help lists the commands"
    return f"{text} ({where})"


def _example(command: str, form: tuple[str, ...], words: list[str]) -> str:
    """The form of a command, filled with the words that were given."""
    loose = [word for before, word in zip(["", *words], words, strict=False) if word[:1] != "-" and before[:1] != "-"]
    options = {word.partition("=")[0] for word in words if word[:1] == "-"}
    kept = [word for word in words if word not in loose]
    files = [word for word in loose if word.lower().endswith(_WEIGHTS) and not Path(word).is_dir()]
    if "--weights FILE" in form and "--weights" not in options:
        if not files and "IMAGE..." not in form:
            files = [word for word in loose if not Path(word).is_dir()]
        weights = files[0] if files else "FILE"
        loose = [word for word in loose if word != weights]
    else:
        weights = ""
    filled: list[str] = []
    for slot in form:
        option, _, placeholder = slot.partition(" ")
        if slot == "IMAGE...":
            filled += loose or [slot]
        elif not placeholder:
            filled.append(loose.pop(0) if loose else slot)
        elif option == "--weights":
            filled += [option, weights] if weights else []
        elif not options & ({"-o", "--output"} if option == "-o" else {option}):
            filled += [option, loose.pop(0) if loose else placeholder]
    if kept and kept[-1][:1] == "-" and "=" not in kept[-1]:  # the one without its value
        value = next((slot.partition(" ")[2] for slot in form if slot.startswith(f"{kept[-1]} ")), "VALUE")
        kept.append(value)
    return _line([command, *filled, *kept])


def _line(words: list[str]) -> str:
    line = shlex.join(["fcvit", *words]).replace("'IMAGE...'", "IMAGE...")
    return line if len(line) <= 300 else f"{line[:300]}..."


def _fail(message: object, kind: type[FcvitError], debug: bool) -> int:
    """One line for a person, with --debug the traceback before it; the exit code."""
    if debug:
        print(printable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
    text = " ".join(str(message).split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    _say(f"fcvit: {text}", error=True)
    return kind.exit_code
