"""Check on real images that `fcvit eval` gives the same results for different inputs and settings.

Run:  .venv/bin/python scripts/check_evaluation.py [PHOTOS]

The checks use the held-out digits with the digits checkpoint, and the photographs in PHOTOS with synthetic weights of
fcvit_tiny. The file names of the photographs must begin with a WordNet id. The checks are:

- identical bytes for any number of workers, and for a run that is killed and resumed
- identical predictions for class folders, a list and a tar archive
- logits within 1e-5 and equal accuracies for other batch sizes, and for 2 and 3 processes of Paddle's launcher

Every check prints a line. The exit code is 1 if a check fails.
"""

import argparse
import importlib.resources
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from fcvit.commands.quickstart import CHECKPOINT, HELD_OUT, write_images
from fcvit.data.classes import imagenet
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.weights.synthetic import synthetic_tensors
from fcvit.weights.torch_file import write_zip

PROGRAM = Path(sys.executable).with_name("fcvit")
NAMES = ("predictions.csv", "per_class.csv", "confusion.png", "reliability.png", "worst.png")
passed = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, nargs="?", help="folder of ImageNet photographs")
    photos = parser.parse_args().photos
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        assets = importlib.resources.files("fcvit") / "assets"
        with np.load(str(assets / HELD_OUT), allow_pickle=False) as archive:
            write_images(archive["images"], archive["labels"], root / "digits" / "data")
        shutil.copyfile(str(assets / CHECKPOINT), root / "digits" / "digits.pth.tar")
        labels = {str(i): i for i in range(10)}
        check(root / "digits", "digits.pth.tar", labels, 60, (1, 7, 360))
        if photos:
            index = {c.id: i for i, c in enumerate(imagenet())}
            for path in sorted(photos.iterdir()):
                class_folder = root / "photos" / "data" / path.name[:9]
                class_folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, class_folder / path.name)
            with (root / "photos" / "tiny.pth").open("wb") as file:
                write_zip(file, synthetic_tensors(ModelSpec(VARIANTS["fcvit_tiny"], 1000)))
            check(root / "photos", "tiny.pth", index, 3, (1, 7, 40))
    sys.exit(not passed)


def check(root: Path, weights: str, labels: dict[str, int], batch: int, other_sizes: tuple[int, ...]) -> None:
    """Run all checks for one data set. `root` contains the images and receives the run folders."""
    data = root / "data"
    images = sorted(path for path in data.rglob("*") if path.is_file())
    report(f"{root.name}: {len(images)} images, {weights}, batch size {batch}", True)
    lines = [f"{path.relative_to(data)} {labels[path.parent.name]}" for path in images]
    (root / "list.txt").write_text("\n".join(lines))
    with tarfile.open(root / "data.tar", "w") as tar:
        tar.add(data, ".")
    words = ["--weights", weights, "--device", "cpu", "--save-logits"]
    folders = [*words, "--data", "data", "--batch-size", str(batch)]
    run(root, *folders, "--workers", "0", "-o", "first")
    first = root / "first"
    for workers in ("1", "3"):
        run(root, *folders, "--workers", workers, "-o", f"workers{workers}")
        report(f"{workers} workers: identical bytes", same_bytes(first, root / f"workers{workers}"))
    kill(root, *folders, "-o", "killed")
    run(root, "--resume", "killed")
    report("killed and resumed: identical bytes", same_bytes(first, root / "killed"))
    run(root, *words, "--data", "data", "--list", "list.txt", "--batch-size", str(batch), "-o", "list")
    run(root, *words, "--data", "data.tar", "--batch-size", str(batch), "-o", "tar")
    run(root, *words, "--data", "data.tar", "--list", "list.txt", "--batch-size", str(batch), "-o", "tarlist")
    for kind in ("list", "tar", "tarlist"):
        equal = read(first, "predictions.csv") == read(root / kind, "predictions.csv")
        report(f"{kind}: identical predictions", equal)
    for size in other_sizes:
        run(root, *words, "--data", "data", "--batch-size", str(size), "-o", f"batch{size}")
        report(*close(first, root / f"batch{size}", f"batch size {size}"))
    for count in (2, 3):
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(count), "--log_dir", f"log{count}"]
        words = [str(PROGRAM), "eval", *folders, "--workers", "1", "-o", f"processes{count}"]
        subprocess.run([sys.executable, *launcher, *words], cwd=root, check=True, capture_output=True)
        report(*close(first, root / f"processes{count}", f"{count} processes"))


def run(root: Path, *words: str) -> None:
    done = subprocess.run([PROGRAM, "eval", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"fcvit eval {' '.join(words)}: exit code {done.returncode}\n{done.stderr}")


def kill(root: Path, *words: str) -> None:
    """Start `fcvit eval` and kill it with SIGKILL once its journal is not empty."""
    process = subprocess.Popen([PROGRAM, "eval", *words], cwd=root, stderr=subprocess.DEVNULL)
    journal = root / "killed" / "journals" / "0-0.journal"
    while not (journal.exists() and journal.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((root / "killed").glob("*/metrics.json")), "the run ended before it was killed"


def results_folder(folder: Path) -> Path:
    (metrics,) = folder.glob("*/metrics.json")
    return metrics.parent


def read(folder: Path, name: str) -> bytes:
    return (results_folder(folder) / name).read_bytes()


def figures(folder: Path) -> dict:
    return {key: value for key, value in json.loads(read(folder, "metrics.json")).items() if key != "seconds"}


def same_bytes(one: Path, other: Path) -> bool:
    page = (one / "report.html").read_bytes() == (other / "report.html").read_bytes()
    files = all(read(one, name) == read(other, name) for name in (*NAMES, "logits.npy"))
    return page and files and figures(one) == figures(other)


def close(one: Path, other: Path, what: str) -> tuple[str, bool]:
    logits = [np.load(results_folder(folder) / "logits.npy") for folder in (one, other)]
    largest = float(np.abs(logits[0].astype(np.float64) - logits[1]).max())
    both = [figures(folder) for folder in (one, other)]
    equal = all(both[0][key] == both[1][key] for key in ("images", "top1", "top_k", "per_class", "fingerprint"))
    return (
        f"{what}: logits within {largest:.1e}, accuracies {'equal' if equal else 'DIFFER'}",
        equal and largest <= 1e-5,
    )


def report(what: str, good: bool) -> None:
    global passed
    passed = passed and good
    print(what if good else f"FAILED: {what}", flush=True)


if __name__ == "__main__":
    main()
