"""Evaluation's promises on real images: the same numbers however they are computed.

Run:  .venv/bin/python scripts/check_evaluation.py [PHOTOS]

On the held-out digits with the shipped checkpoint, and on the photographs in PHOTOS (files whose names begin
with a WordNet id) with fcvit_tiny's synthetic weights:

- the same bytes for any number of workers, and for a run that is killed and continued;
- the same predictions for class folders, a list and a tar;
- logits within 1e-5 and equal accuracies for other batch sizes, and for 2 and 3 processes of Paddle's launcher.

Every line says what was found; the exit code is 1 if one is not as promised.
"""

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
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        assets = importlib.resources.files("fcvit") / "assets"
        with np.load(str(assets / HELD_OUT), allow_pickle=False) as archive:
            write_images(archive["images"], archive["labels"], root / "digits" / "data")
        shutil.copyfile(str(assets / CHECKPOINT), root / "digits" / "digits.pth.tar")
        labels = {str(i): i for i in range(10)}
        check(root / "digits", "digits.pth.tar", labels, 60, (1, 7, 360))
        if len(sys.argv) > 1:
            index = {c.id: i for i, c in enumerate(imagenet())}
            for path in sorted(Path(sys.argv[1]).iterdir()):
                place = root / "photos" / "data" / path.name[:9]
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place / path.name)
            with (root / "photos" / "tiny.pth").open("wb") as file:
                write_zip(file, synthetic_tensors(ModelSpec(VARIANTS["fcvit_tiny"], 1000)))
            check(root / "photos", "tiny.pth", index, 3, (1, 7, 40))
    sys.exit(not passed)


def check(root: Path, weights: str, labels: dict[str, int], batch: int, others: tuple[int, ...]) -> None:
    """All promises for one data set; runs go to folders of `root`."""
    data = root / "data"
    images = sorted(path for path in data.rglob("*") if path.is_file())
    say(f"{root.name}: {len(images)} images, {weights}, batches of {batch}", True)
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
        say(f"{workers} workers: the same bytes", same_bytes(first, root / f"workers{workers}"))
    kill(root, *folders, "-o", "killed")
    run(root, "--resume", "killed")
    say("killed and continued: the same bytes", same_bytes(first, root / "killed"))
    run(root, *words, "--data", "data", "--list", "list.txt", "--batch-size", str(batch), "-o", "list")
    run(root, *words, "--data", "data.tar", "--batch-size", str(batch), "-o", "tar")
    run(root, *words, "--data", "data.tar", "--list", "list.txt", "--batch-size", str(batch), "-o", "tarlist")
    for kind in ("list", "tar", "tarlist"):
        equal = read(first, "predictions.csv") == read(root / kind, "predictions.csv")
        say(f"{kind}: the same predictions", equal)
    for size in others:
        run(root, *words, "--data", "data", "--batch-size", str(size), "-o", f"batch{size}")
        say(*close(first, root / f"batch{size}", f"batches of {size}"))
    for count in (2, 3):
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(count), "--log_dir", f"log{count}"]
        words = [str(PROGRAM), "eval", *folders, "--workers", "1", "-o", f"processes{count}"]
        subprocess.run([sys.executable, *launcher, *words], cwd=root, check=True, capture_output=True)
        say(*close(first, root / f"processes{count}", f"{count} processes"))


def run(root: Path, *words: str) -> None:
    done = subprocess.run([PROGRAM, "eval", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"fcvit eval {' '.join(words)}: exit code {done.returncode}\n{done.stderr}")


def kill(root: Path, *words: str) -> None:
    """kill -9 once the journal has something."""
    process = subprocess.Popen([PROGRAM, "eval", *words], cwd=root, stderr=subprocess.DEVNULL)
    journal = root / "killed" / "journals" / "0-0.journal"
    while not (journal.exists() and journal.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((root / "killed").glob("*/metrics.json")), "too late"


def lane(folder: Path) -> Path:
    (found,) = folder.glob("*/metrics.json")
    return found.parent


def read(folder: Path, name: str) -> bytes:
    return (lane(folder) / name).read_bytes()


def figures(folder: Path) -> dict:
    return {key: value for key, value in json.loads(read(folder, "metrics.json")).items() if key != "seconds"}


def same_bytes(one: Path, other: Path) -> bool:
    page = (one / "report.html").read_bytes() == (other / "report.html").read_bytes()
    files = all(read(one, name) == read(other, name) for name in (*NAMES, "logits.npy"))
    return page and files and figures(one) == figures(other)


def close(one: Path, other: Path, what: str) -> tuple[str, bool]:
    logits = [np.load(lane(folder) / "logits.npy") for folder in (one, other)]
    largest = float(np.abs(logits[0].astype(np.float64) - logits[1]).max())
    both = [figures(folder) for folder in (one, other)]
    equal = all(both[0][key] == both[1][key] for key in ("images", "top1", "top_k", "per_class", "fingerprint"))
    return (
        f"{what}: logits within {largest:.1e}, accuracies {'equal' if equal else 'DIFFER'}",
        equal and largest <= 1e-5,
    )


def say(what: str, good: bool) -> None:
    global passed
    passed = passed and good
    print(what if good else f"NOT SO: {what}", flush=True)


if __name__ == "__main__":
    main()
