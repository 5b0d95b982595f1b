"""Draw the pictures of the tasks, of docs/guides/segmentation.md and of docs/guides/detection.md.

The networks and images are those of `fcvit quickstart`, and a detector that was trained with the recipe
`nuclei-instances`. `make pictures` runs this script after it has taken the screenshot of the demo page.

Run:   .venv/bin/python scripts/draw_pictures.py [--run FOLDER] [--detector FILE --instances DATA]
       FOLDER is the training run of scripts/make_nuclei_checkpoint.py. Without it, its curves are not drawn.
       FILE is the weights in a run of `fcvit train nuclei-instances --data DATA`. Without it, the pictures of the tasks
       and of detection are not drawn.
Needs: the extras cpu, dense and report, and Chromium for the report pages.
"""

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from fcvit import evaluate, load
from fcvit.commands.preview import draw_preview
from fcvit.commands.quickstart import CHECKPOINT, HELD_OUT, NUCLEI, SEGMENTER
from fcvit.data.classes import digits
from fcvit.data.coco import find_coco, read_coco
from fcvit.data.transforms.segmentation import decode
from fcvit.report.charts import training_curves
from fcvit.report.image_grid import GAP, INK, PAPER, Tile, image_grid
from fcvit.report.instances import draw_instances, instance_colors
from fcvit.tasks.detection.prediction import DetectedImage, Detector
from fcvit.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
ASSETS, IMAGES = ROOT / "src" / "fcvit" / "assets", ROOT / "docs" / "images"
LARGEST = 250_000  # bytes of a picture
WIDTH, HEIGHT = 1000, 6000  # pixels of the window for a report page, which is cut to its content
PANEL = 512  # pixels: side of a picture of one task
DIGITS = (0, 1, 2, 10)  # held-out digits in the picture of the tasks: four different classes
DETECTED = ("0acd2c223d300ea5.png", "e81c758e1ca177b0.png")  # validation images with few and with many objects
MOST_VISIBLE = "573a657d5e5fcb95.png"  # validation image with large objects, in the picture of the tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="training run of the segmentation network to draw the curves of")
    parser.add_argument("--detector", type=Path, help="weights in the training run of a detector")
    parser.add_argument("--instances", type=Path, help="data of the detector in COCO's format")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        drawn = draw_segmentation(Path(name), arguments.run)
        if arguments.detector:
            drawn += draw_detection(Path(name), arguments.detector, arguments.instances)
    for path in drawn:
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.save(path, optimize=True)
        if path.stat().st_size > LARGEST:
            image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def draw_segmentation(folder: Path, run: Path | None) -> list[Path]:
    """Draw the pictures of docs/guides/segmentation.md, and leave the images in `folder / "nuclei"`."""
    with tarfile.open(ASSETS / NUCLEI) as archive:
        for member in archive:  # without the name of the split, so that the preview can read the images, too
            archive.extract(member.replace(name=member.name.replace("/val", "")), folder / "nuclei", filter="data")
    names = [IMAGES / f"segmentation{end}.png" for end in ("", "-report", "-preview", "-training")]
    worst, report, preview, training = names
    evaluation = evaluate(ASSETS / SEGMENTER, folder / "nuclei", engines="paddle", folder=folder / "segmentation")
    shutil.copy(folder / "segmentation" / evaluation.results[0].name / "worst.png", worst)
    photograph(folder / "segmentation" / "report.html", report, hidden="figure:last-child")
    preview.unlink(missing_ok=True)
    draw_preview(read_recipe("nuclei", {"data": str(folder / "nuclei")}), preview, images=4, versions=3)
    if run:
        draw_curves(run, "nuclei", training)
    return names if run else names[:-1]


def draw_detection(folder: Path, weights: Path, data: Path) -> list[Path]:
    """Draw the picture of the tasks and the pictures of docs/guides/detection.md."""
    names = [IMAGES / f"{name}.png" for name in ("tasks", "detection", *map("detection-{}".format, PARTS))]
    tasks, detection, report, preview, training = names
    evaluate(weights, data, folder=folder / "detection")
    photograph(folder / "detection" / "report.html", report, hidden="figure:nth-last-child(-n+2)", height=2000)
    preview.unlink(missing_ok=True)
    draw_preview(read_recipe("nuclei-instances", {"data": str(data)}), preview, images=4, versions=3)
    draw_curves(weights.parent, "nuclei-instances", training)
    *detected, visible = detect(load(weights), data, (*DETECTED, MOST_VISIBLE))
    side_by_side([one.draw() for one in detected]).save(detection)
    draw_tasks(folder / "nuclei" / "images", visible).save(tasks)
    return names


PARTS = ("report", "preview", "training")


def draw_curves(run: Path, title: str, picture: Path) -> None:
    """Draw the curves of a training run."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    picture.write_bytes(training_curves(rows, title))


def detect(detector: Detector, data: Path, chosen: tuple[str, ...]) -> list[DetectedImage]:
    """Return the detections in validation images of a data set."""
    images = read_coco(find_coco(data), "val")
    locations = {Path(name).name: location for name, location in zip(images.names, images.locations, strict=True)}
    return list(detector.stream(decode(io.BytesIO(locations[name].read())) for name in chosen))


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Return pictures in one row, centered."""
    width, height = sum(one.width + GAP for one in pictures) - GAP, max(one.height for one in pictures)
    row, x = Image.new("RGB", (width, height), PAPER), 0
    for picture in pictures:
        row.paste(picture, (x, (height - picture.height) // 2))
        x += picture.width + GAP
    return row


def draw_tasks(nuclei: Path, detected: DetectedImage) -> Image.Image:
    """Draw one picture for each task: classes of digits, classes of pixels, and objects with boxes and masks."""
    with np.load(ASSETS / HELD_OUT, allow_pickle=False) as archive:
        pictures = [Image.fromarray(archive["images"][index]).convert("RGB") for index in DIGITS]
    classified = load(ASSETS / CHECKPOINT, classes=digits()).predict(pictures, top_k=1)
    tiles = [Tile(image, one[0].name, one[0].probability) for image, one in zip(pictures, classified, strict=True)]
    segmented = load(ASSETS / SEGMENTER).predict(sorted(nuclei.iterdir())[0])[0].overlay()
    colors = instance_colors(detected.labels, detected.palette)
    objects = draw_instances(detected.image, detected.boxes, colors, masks=map(detected.mask, range(len(detected))))
    grid = image_grid(tiles, "", columns=2)
    panels = [
        ("Classification", grid.crop(content(grid))),
        ("Semantic segmentation", segmented),
        ("Detection and instance segmentation", objects),
    ]
    return side_by_side([panel(title, picture) for title, picture in panels])


def panel(title: str, picture: Image.Image) -> Image.Image:
    """Return a picture below its title, scaled to the height of a panel."""
    font = ImageFont.load_default(28)
    width = round(PANEL * picture.width / picture.height)
    drawn = Image.new("RGB", (width, PANEL + 44), PAPER)
    ImageDraw.Draw(drawn).text((0, 0), title, INK, font)
    resampling = Image.Resampling.NEAREST if PANEL % picture.height == 0 else Image.Resampling.LANCZOS
    scaled = picture.resize((width, PANEL), resampling)
    drawn.paste(scaled.quantize(144, dither=Image.Dither.NONE).convert("RGB"), (0, 44))  # for a smaller file
    return drawn


def photograph(page: Path, picture: Path, hidden: str, height: int = HEIGHT) -> None:
    """Take a screenshot of a report page, without the pictures of a CSS selector and the empty part at its end."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        raise SystemExit("Chromium is not installed")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}")
    page.write_text(page.read_text("utf-8").replace("</style>", f"{hidden} {{ display: none }}</style>"), "utf-8")
    subprocess.run([browser, *options, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True)
    with Image.open(picture) as image:
        shown = image.convert("RGB")
    bottom = content(shown)[3]
    shown.crop((0, 0, WIDTH, min(bottom + 20, height))).save(picture)


def content(picture: Image.Image) -> tuple[int, int, int, int]:
    """Return the box of a picture around all pixels that differ from its lower left corner."""
    empty = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
    return ImageChops.difference(picture, empty).getbbox()


if __name__ == "__main__":
    main()
