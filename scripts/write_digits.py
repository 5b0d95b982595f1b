"""Write the handwritten digits of the package as class folders in `train` and `val`, for training.

The images come from scikit-learn (UCI, CC BY 4.0), 8 x 8 pixels in gray. `val` contains the 360 held-out images that
`fcvit quickstart` evaluates.

Run: .venv/bin/python scripts/write_digits.py FOLDER [--even-odd]
"""

import argparse
import importlib.resources
from pathlib import Path

import numpy as np

from fcvit.commands.quickstart import write_images

SPLITS = {"train": "digits_train.npz", "val": "digits_held_out.npz"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--even-odd", action="store_true", help="two classes (even, odd) instead of ten")
    args = parser.parse_args()
    for split, name in SPLITS.items():
        asset = importlib.resources.files("fcvit") / "assets" / name
        with asset.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
        class_names = np.array(["even", "odd"])[labels % 2] if args.even_odd else labels
        write_images(images, class_names, args.folder / split)
        print(f"wrote {len(images)} images to {args.folder / split}")


if __name__ == "__main__":
    main()
