"""Draw the pictures of docs/guides/segmentation.md with the network and the images of `fcvit quickstart` (CC0).

`make pictures` runs this script after it has taken the screenshot of the demo page.

Run:   .venv/bin/python scripts/draw_pictures.py [--run FOLDER]
       FOLDER is the training run of scripts/make_nuclei_checkpoint.py. Without it, the curves are not drawn.
Needs: the extras cpu, dense and report, and Chromium for the report page.
"""

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from fcvit import evaluate
from fcvit.commands.preview import draw_preview
from fcvit.commands.quickstart import NUCLEI, SEGMENTER
from fcvit.report.charts import training_curves
from fcvit.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
ASSETS, IMAGES = ROOT / "src" / "fcvit" / "assets", ROOT / "docs" / "images"
LARGEST = 250_000  # bytes of a picture with all its colors
WIDTH, HEIGHT = 1000, 6000  # pixels of the window for the report page, which is cut to its content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="training run to draw the curves of")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(ASSETS / NUCLEI) as archive:
            for member in archive:  # without the name of the split, so that the preview can read the images, too
                archive.extract(member.replace(name=member.name.replace("/val", "")), folder / "nuclei", filter="data")
        evaluation = evaluate(ASSETS / SEGMENTER, folder / "nuclei", engines="paddle", folder=folder / "eval")
        shutil.copy(folder / "eval" / evaluation.results[0].name / "worst.png", IMAGES / "segmentation.png")
        photograph(folder / "eval" / "report.html", IMAGES / "segmentation-report.png")
        (IMAGES / "segmentation-preview.png").unlink(missing_ok=True)
        recipe = read_recipe("nuclei", {"data": str(folder / "nuclei")})
        draw_preview(recipe, IMAGES / "segmentation-preview.png", images=4, versions=3)
    if arguments.run:
        rows = [json.loads(line) for line in (arguments.run / "log.jsonl").read_text().splitlines()]
        (IMAGES / "segmentation-training.png").write_bytes(training_curves(rows, "nuclei"))
    for path in IMAGES.glob("*segmentation*.png"):
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.save(path, optimize=True)
        if path.stat().st_size > LARGEST:
            image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def photograph(page: Path, picture: Path) -> None:
    """Take a screenshot of a report page, without its last picture and the empty part below its content."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        raise SystemExit("Chromium is not installed")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}")
    page.write_text(page.read_text("utf-8").replace("</style>", "figure:last-child { display: none }</style>"), "utf-8")
    subprocess.run([browser, *options, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True)
    with Image.open(picture) as image:
        shown = image.convert("RGB")
    empty = Image.new("RGB", shown.size, shown.getpixel((0, HEIGHT - 1)))
    bottom = ImageChops.difference(shown, empty).getbbox()[3]
    shown.crop((0, 0, WIDTH, min(bottom + 20, HEIGHT))).save(picture)


if __name__ == "__main__":
    main()
