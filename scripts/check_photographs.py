"""Compare the preprocessing of real photographs with reference hashes. The photographs are not part of this project.

Run:  .venv/bin/python scripts/check_photographs.py PHOTOS GOLDEN

PHOTOS is the folder of images. GOLDEN is a JSON file with, for each file name and crop fraction (bicubic), the SHA-256
of the decoded RGB array and of the 224 x 224 x 3 crop, and values of the normalized tensor. The exit code is 5 if a
check fails.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from fcvit.data.transforms.preprocess import crop, decode, normalize
from fcvit.models.variants import Preprocessing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="folder of images")
    parser.add_argument("golden", type=Path, help="JSON file of the expected hashes and values")
    arguments = parser.parse_args()
    checked, wrong = 0, []

    def check(what: str, right: bool) -> None:
        nonlocal checked
        checked += 1
        if not right:
            wrong.append(what)

    for name, expected in json.loads(arguments.golden.read_text("utf-8"))["images"].items():
        image = decode(arguments.photos / name)
        check(f"{name}: decoded pixels", _sha256(np.asarray(image)) == expected["decoded_sha256"])
        for fraction in (key for key in expected if key.startswith("0.")):
            preprocessing = Preprocessing(crop_fraction=float(fraction))
            pixels = crop(image, preprocessing)
            golden = expected[fraction]
            what = f"{name} at {fraction}"
            check(f"{what}: crop", _sha256(pixels.transpose(1, 2, 0)) == golden["uint8_crop_sha256"])
            tensor = normalize(pixels[None], preprocessing)[0]
            for key, values in (("tensor_first", tensor[:, 0, 0]), ("tensor_last", tensor[:, -1, -1])):
                check(f"{what}: {key}", bool(np.abs(values - np.float32(golden[key])).max() <= 1e-6))
            mean, std = tensor.mean(dtype=np.float64), tensor.std(dtype=np.float64)
            check(f"{what}: mean", abs(mean - golden["tensor_mean"]) <= 1e-5)
            # With 150,528 values, dividing by n or by n - 1 makes no visible difference.
            check(f"{what}: std", abs(std - golden["tensor_std"]) <= 1e-5)
    print("\n".join(wrong))
    print(f"{checked - len(wrong)} of {checked} checks passed")
    return 5 if wrong else 0


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
