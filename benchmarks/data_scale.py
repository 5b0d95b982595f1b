"""Measure seconds and peak memory of the commands on a data set with as many images as ImageNet.

Run:  .venv/bin/python benchmarks/data_scale.py FOLDER [--images N] [--formats NAME ...] [--commands NAME ...]
          [--variant NAME] [--json FILE]

FOLDER receives small photographs in 1,000 classes, once in each format: class folders, one tar archive, WebDataset
shards and Parquet files like those of Hugging Face. They are written once, with about 2.5 kB per image and format, and
are kept for the next run. One image in 1,000 is a copy of another image, and one in 10,000 is cut off.

check-data runs to its end. Other commands are interrupted after their first batch, so that their time is that of the
start. Each command runs twice in new processes, because the first run can store an index that the second run reads.
The row "few" is a folder with one image of each class, to subtract what does not depend on the number of images. Peak
memory is that of the main process and of the main process with its workers, and needs Linux.
"""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import platform
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcvit.commands.bench import synthetic_weights
from fcvit.machine import processor_name
from fcvit.models.variants import VARIANTS
from fcvit.report.progress import progress
from fcvit.weights.writing import write_weights

CLASSES, SHARD = 1000, 1000  # classes, and images per shard
COPIED, CUT = 1000, 10_000  # one image in so many is a copy, or cut off
FORMATS = ("few", "folder", "tar", "shards", "parquet")
COMMANDS = {
    "check-data": "{data} --json",
    "train": "fcvit_tiny --variant {variant} --data {data} --precision float32 --input-size 32 --batch-size 16 "
    "--epochs 1 --warmup-epochs 0",
    "eval": "--weights {weights} --data {data} --engine paddle --batch-size 16",
    "predict": "{data} --weights {weights} --engine paddle --batch-size 16",
}
WHOLE = ("check-data",)  # commands that run to their end
FIRST_BATCH = re.compile(rb"(?<![\w/])[1-9]\d*/\d{3,}(?![\w/])")  # of a progress bar with the number of images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for the data sets")
    parser.add_argument("--images", type=int, default=1_280_000, help="number of images (default 1280000)")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--variant", default="fcvit_tiny", choices=VARIANTS, help="default fcvit_tiny")
    parser.add_argument("--repeat", type=int, default=2, help="number of runs of each command (default 2)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    root = arguments.folder.resolve() / str(arguments.images)
    root.mkdir(parents=True, exist_ok=True)
    weights = root / f"{arguments.variant}.safetensors"
    if not weights.exists():
        write_weights(weights, synthetic_weights(VARIANTS[arguments.variant]))
    data = {kind: write(root, kind, arguments.images) for kind in arguments.formats}
    machine = f"{processor_name()}, {os.cpu_count()} threads, Python {platform.python_version()}"
    print(f"{machine}\n{arguments.images:,} images\n")
    print("| command | format | run | seconds | main process | with workers |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = []
    for command in arguments.commands:
        for kind, path in data.items():
            for number in range(1, arguments.repeat + 1):
                names = {"data": path, "weights": weights, "variant": arguments.variant}
                words = [command, *(word.format(**names) for word in COMMANDS[command].split())]
                result = measure(words, root / "output", command in WHOLE)
                results.append({"command": command, "format": kind, "run": number} | result)
                shown = result.get("error") or "{seconds:.1f} | {main:.0f} MB | {tree:.0f} MB".format(**result)
                print(f"| {command} | {kind} | {number} | {shown} |", flush=True)
                if "error" in result:
                    break
    if arguments.json:
        content = {"machine": machine, "images": arguments.images, "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def measure(words: list[str], output: Path, whole: bool) -> dict[str, object]:
    """Run a command and return seconds and peak memory in MB, or its error.

    Args:
        words: Command and options of `fcvit`.
        output: Folder for its output, which is emptied before.
        whole: Whether the command runs to its end. Otherwise it is interrupted when its progress bar has advanced.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    terminal, its_end = pty.openpty()  # a progress bar is only shown on a terminal
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    with (output / "stdout").open("wb") as stdout:
        call = [sys.executable, "-m", "fcvit", *words]
        process = subprocess.Popen(call, stdout=stdout, stderr=its_end, cwd=output, env=environment)
    os.close(its_end)
    os.set_blocking(terminal, False)
    text, main, tree, first = b"", 0.0, 0.0, 0.0
    while process.poll() is None:
        time.sleep(0.02)
        with contextlib.suppress(OSError):
            text += os.read(terminal, 1 << 16)
        peaks = [memory for pid in (process.pid, *children(process.pid)) if (memory := peak_memory(pid))]
        main, tree = max([main, *peaks[:1]]), max(tree, sum(peaks))
        if not whole and not first and FIRST_BATCH.search(text):
            first = time.perf_counter() - began
            process.send_signal(signal.SIGINT)
        text = text if not first else b""
    seconds = first or time.perf_counter() - began
    with contextlib.suppress(OSError):
        text += os.read(terminal, 1 << 16)
    os.close(terminal)
    if not first and (not whole or process.returncode not in (0, 6)):
        lines = re.findall("^fcvit: (?!note)(.*?)\r?$", text.decode(errors="replace"), re.M)
        return {"error": f"exit code {process.returncode}: {lines[-1] if lines else 'no image could be read'}"}
    return {"seconds": seconds, "main": main, "tree": tree, "output": (output / "stdout").stat().st_size}


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def peak_memory(pid: int) -> float:
    """Return the peak memory of a process in MB, or 0 if it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) / 1024 if found else 0


def write(root: Path, kind: str, images: int) -> Path:
    """Write the images in one format unless they exist, and return the path to pass to a command."""
    path = root / {"tar": "images.tar", "shards": "shards"}.get(kind, kind)
    if not path.exists():
        unfinished = root / f"unfinished-{path.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)
        WRITERS[kind](unfinished, images)
        unfinished.rename(path)
    return path


def photograph(index: int) -> bytes:
    """Return a JPEG file. Some are equal to the one before, and some are cut off."""
    copied = index % COPIED == COPIED - 1
    generator = np.random.default_rng(index - copied)
    coarse = generator.integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((64, 48), Image.Resampling.BILINEAR).save(file, "JPEG", quality=75)
    content = file.getvalue()
    return content[: len(content) // 2] if index % CUT == CUT - 2 else content


def name(index: int, images: int) -> str:
    """Return the path of an image in the class folders. Consecutive images are in one class."""
    return f"n{index * CLASSES // images:08d}/image_{index:08d}.jpg"


def write_few(path: Path, images: int) -> None:
    for label in range(CLASSES):
        folder = path / f"n{label:08d}"
        folder.mkdir(parents=True)
        (folder / "image.jpg").write_bytes(photograph(label * COPIED))


def write_folder(path: Path, images: int) -> None:
    for label in range(CLASSES):
        (path / f"n{label:08d}").mkdir(parents=True)
    collections.deque(in_parallel("folder", functools.partial(write_files, path, images), images), maxlen=0)


def write_files(path: Path, images: int, indices: range) -> None:
    for index in indices:
        (path / name(index, images)).write_bytes(photograph(index))


def write_tar(path: Path, images: int) -> None:
    numbers = itertools.count()
    with tarfile.open(path, "w") as tar:
        for contents in in_parallel("tar", photographs, images):
            for content, index in zip(contents, numbers, strict=False):
                add(tar, name(index, images), content)


def photographs(indices: range) -> list[bytes]:
    return [photograph(index) for index in indices]


def write_shards(path: Path, images: int) -> None:
    path.mkdir()
    collections.deque(in_parallel("shards", functools.partial(write_shard, path, images), images), maxlen=0)


def write_shard(path: Path, images: int, indices: range) -> None:
    """Write a WebDataset shard, in which the classes are shuffled."""
    with tarfile.open(path / f"imagenet-train-{indices.start // SHARD:04d}.tar", "w") as tar:
        for index in indices:
            number = shuffled(index, images)
            add(tar, f"{number:08d}.jpg", photograph(number))
            add(tar, f"{number:08d}.cls", str(number * CLASSES // images).encode())


def write_parquet(path: Path, images: int) -> None:
    path.mkdir()
    collections.deque(in_parallel("parquet", functools.partial(write_table, path, images), images), maxlen=0)


def write_table(path: Path, images: int, indices: range) -> None:
    """Write a Parquet file as the library datasets of Hugging Face does."""
    import pyarrow
    from pyarrow import parquet

    numbers = [shuffled(index, images) for index in indices]
    labels = {"names": [f"n{label:08d}" for label in range(CLASSES)], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": labels}
    schema = pyarrow.schema(
        {
            "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
            "label": pyarrow.int64(),
        },
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = {
        "image": [{"bytes": photograph(number), "path": f"{number:08d}.jpg"} for number in numbers],
        "label": [number * CLASSES // images for number in numbers],
    }
    count = -(-images // SHARD)
    file = path / f"train-{indices.start // SHARD:05d}-of-{count:05d}.parquet"
    parquet.write_table(pyarrow.table(columns, schema), file, row_group_size=100)


def shuffled(index: int, images: int) -> int:
    """Return the image at a position of the shuffled images. The prime factor is larger than any number of images."""
    return index * 15_485_863 % images


def add(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    member = tarfile.TarInfo(path)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def in_parallel(kind: str, work: Callable[[range], Any], images: int) -> Iterator[Any]:
    """Yield the results of a function for the numbers of `SHARD` images at a time, in order."""
    pieces = [range(start, min(start + SHARD, images)) for start in range(0, images, SHARD)]
    with progress(f"writing {kind}", images) as advance, multiprocessing.get_context("spawn").Pool() as pool:
        for piece, result in zip(pieces, pool.imap(work, pieces), strict=True):
            yield result
            advance(len(piece))


WRITERS = {"few": write_few, "folder": write_folder, "tar": write_tar, "shards": write_shards, "parquet": write_parquet}

if __name__ == "__main__":
    main()
