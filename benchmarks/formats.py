"""Measure how fast images are read in random order from a folder, a tar archive, WebDataset shards and Parquet files.

Run:  .venv/bin/python benchmarks/formats.py [--images 2000] [--repeat 3] [--json FILE]

All formats contain the same JPEG images of 500 x 375 pixels, about 110 kB each, like ImageNet. The Parquet file has the
settings of Hugging Face's ImageNet: Snappy, a dictionary, 100 rows in a row group. One process reads the images in one
random order, with and without decoding and cropping them. "row groups" reads every image with pyarrow alone, which
reads its whole row group. The rates are in processor time, and the files are in the cache of the system.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fcvit.data.columns import Location
from fcvit.data.parquet import ParquetLocation
from fcvit.data.sources import open_source
from fcvit.data.transforms.preprocess import CenterCrop, decode
from fcvit.models.variants import Preprocessing

CLASSES = 10


def photographs(count: int) -> Iterator[tuple[str, int, bytes]]:
    """Yield names, classes and JPEG files of noise that is as large as ImageNet's photographs."""
    for number in range(count):
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 256, (125, 167, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield f"{number:06d}.jpg", number % CLASSES, file.getvalue()


def write(folder: Path, images: list[tuple[str, int, bytes]]) -> dict[str, Path]:
    """Write the images in each format and return the paths."""
    import pyarrow
    import pyarrow.parquet as pq

    for name, label, content in images:
        (folder / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / "folder" / str(label) / name).write_bytes(content)
    with tarfile.open(folder / "x.tar", "w") as tar:
        tar.add(folder / "folder", ".")
    (folder / "shards").mkdir()
    for start in range(0, len(images), 1000):
        with tarfile.open(folder / "shards" / f"train-{start // 1000:04d}.tar", "w") as tar:
            for name, label, content in images[start : start + 1000]:
                for file, data in ((name, content), (name.replace(".jpg", ".cls"), str(label).encode())):
                    member = tarfile.TarInfo(file)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    rows = [{"bytes": content, "path": name} for name, _, content in images]
    table = pyarrow.table({"image": rows, "label": [label for _, label, _ in images]})
    pq.write_table(table, folder / "x.parquet", row_group_size=100)
    return {"folder": folder / "folder", "tar": folder / "x.tar", "shards": folder / "shards"} | {
        "Parquet": folder / "x.parquet"
    }


def rate(locations: list[Location], crop: CenterCrop | None) -> float:
    """Return images per second of processor time."""
    began = time.process_time()
    for location in locations:
        content = location.read()
        if crop is not None:
            crop(decode(io.BytesIO(content), "x"), 0, 0)
    return len(locations) / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = list(photographs(arguments.images))
        paths = write(Path(folder), images)
        order = np.random.default_rng(0).permutation(len(images))
        formats = {
            name: list(open_source(path).tree().files.images().locations.take(order)) for name, path in paths.items()
        }
        few = order[: max(1, len(images) // 10)]
        formats["row groups"] = [
            ParquetLocation(str(paths["Parquet"]), -1 - int(row) // 100, int(row) % 100) for row in few
        ]
        crop = CenterCrop(Preprocessing())
        rows = []
        for name, locations in formats.items():
            read, cropped = (
                statistics.median(rate(locations, chosen) for _ in range(arguments.repeat)) for chosen in (None, crop)
            )
            rows.append({"format": name, "read": read, "decoded": cropped})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    size = sum(len(content) for *_, content in images) / len(images) / 1000
    print(f"{len(images)} images of {size:.0f} kB on average")
    print("| format | read (images/s) | read and decoded (images/s) |")
    print("| --- | --- | --- |")
    for row in rows:
        print(f"| {row['format']} | {row['read']:.0f} | {row['decoded']:.0f} |")


if __name__ == "__main__":
    main()
