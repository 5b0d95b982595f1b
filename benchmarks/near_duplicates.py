"""How many changed copies of photographs `fcvit check-data` finds, and how long comparing takes.

Run:  .venv/bin/python benchmarks/near_duplicates.py PHOTOS [--compare 1281167]
PHOTOS is a folder of photographs. Every one is changed in each way and looked for among all originals and changed
ones. --compare times the comparing of so many made-up pictures, whose hashes are as uneven as CIFAR-10's.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fcvit.data.folders import images_below
from fcvit.data.near_duplicates import SIDE, Pair, fingerprint, similar_pairs
from fcvit.data.transforms.preprocess import decode


def encoded(image: Image.Image, quality: int = 70) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return decode(buffer)


def halved(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, percent: int) -> Image.Image:
    x, y = (round(length * percent / 100) for length in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 70": encoded,
    "JPEG quality 30": lambda image: encoded(image, 30),
    "half the size": halved,
    "a tenth darker": lambda image: image.point(lambda value: int(0.9 * value)),
    "1 % cut off on each side": lambda image: cropped(image, 1),
    "2 % cut off on each side": lambda image: cropped(image, 2),
    "3 % cut off on each side": lambda image: cropped(image, 3),
    "5 % cut off on each side": lambda image: cropped(image, 5),
    "half the size, 2 % cut off, JPEG quality 70": lambda image: encoded(cropped(halved(image), 2)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--compare", type=int)
    arguments = parser.parse_args()
    images = [decode(path) for path in images_below(arguments.photos)]
    for what, change in CHANGES.items():
        pairs = pairs_of([*images, *map(change, images)])
        found = sum(pair.second == pair.first + len(images) for pair in pairs)
        print(f"{what}: {found} of {len(images)} found, {len(pairs) - found} wrong pairs")
    digits = [Image.fromarray((15.9 * digit).astype(np.uint8)) for digit in load_digits().images]
    pairs = pairs_of([digit.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for digit in digits])
    print(f"{len(digits)} handwritten digits: {len(pairs)} pairs")
    if arguments.compare:
        generator = np.random.default_rng(0)
        hashes = np.concatenate([made_up(generator, 10_000) for _ in range(-(-arguments.compare // 10_000))])
        hashes = hashes[: arguments.compare]
        thumbnails = generator.integers(0, 256, (len(hashes), SIDE * SIDE * 3), np.uint8)
        began = time.perf_counter()
        similar_pairs(hashes, thumbnails)
        print(f"{len(hashes)} pictures compared in {time.perf_counter() - began:.1f} s")


def pairs_of(images: Sequence[Image.Image]) -> list[Pair]:
    marks = [fingerprint(image) for image in images]
    return similar_pairs(
        np.stack([np.frombuffer(mark.hash, np.uint8) for mark in marks]),
        np.stack([np.frombuffer(mark.thumbnail, np.uint8) for mark in marks]),
    )


def made_up(generator: np.random.Generator, count: int) -> np.ndarray:
    """Hashes of smooth noise: amplitudes fall with frequency to the power of 1.5."""
    frequency = np.hypot(np.fft.fftfreq(16)[:, None], np.fft.rfftfreq(18))
    frequency[0, 0] = 1
    noise = np.fft.rfft2(generator.standard_normal((count, 16, 18)))
    gray = np.fft.irfft2(noise / frequency**1.5, s=(16, 18))[:, :8, :9]
    return np.packbits((gray[:, :, 1:] > gray[:, :, :-1]).reshape(count, 64), axis=1)


if __name__ == "__main__":
    main()
