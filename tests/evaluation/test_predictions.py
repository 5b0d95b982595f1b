"""Tests of `fcvit predict` for many images: outputs, resumed runs, several processes, full and lost disks, memory."""

import contextlib
import csv
import dataclasses
import importlib.resources
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import DIGITS, needs_paddle, write_detector, write_pth, write_shapes
from fcvit.cli import main
from fcvit.commands import quickstart
from fcvit.data.classes import ClassName
from fcvit.data.named_images import NamedImages, _Column, _Part, find_named
from fcvit.data.sources import Location
from fcvit.evaluation import batch_run
from fcvit.evaluation.journal import Frame, Journal
from fcvit.evaluation.predictions import PredictionRun, PredictionSettings
from fcvit.evaluation.request import Request
from fcvit.inference.engines import ENGINES, PaddleEngine
from fcvit.processes import Processes
from fcvit.tasks.classification.prediction import Classifier, PredictionOptions
from fcvit.weights.reading import read_weights

WORDS = ["--weights", "digits.pth", "--engine", "paddle", "--device", "cpu", "--batch-size", "3"]
OUTPUTS = ["p.jsonl", "p.csv", "p.parquet", "pictures"]
IMAGES = 14


class Means:
    """An engine whose logits are the means of the channels, so that they depend on the image."""

    name, device, precision = "paddle", "cpu", "float32"

    def __init__(self, *_):
        pass

    def __call__(self, images):
        means = np.tile(images.mean((2, 3)), (1, 4))[:, :10]
        return (means / 99 + np.arange(10)).astype(np.float32)


@pytest.fixture(scope="module")
def work(tmp_path_factory, digits_tensors):
    """Weights, images in class folders, a tar archive of them, and an uninterrupted prediction."""
    root = tmp_path_factory.mktemp("predictions")
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        path = root / "data" / str(index % 10) / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)).save(path)
    write_pth(root / "digits.pth", digits_tensors)
    with tarfile.open(root / "data.tar", "w") as archive:
        archive.add(root / "data", ".")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setitem(ENGINES, "paddle", Means)
        assert main(["predict", "data", *WORDS, "-o", "whole.jsonl", "-q"]) == 0
    return root


@pytest.fixture
def run(work, tmp_path, monkeypatch, capsys):
    """A function that runs a command with `Means` in a new folder with the weights, the images and the archive."""
    monkeypatch.setitem(ENGINES, "paddle", Means)
    for name in ("digits.pth", "data.tar"):
        (tmp_path / name).symlink_to(work / name)
    shutil.copytree(work / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main(list(map(str, words)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@contextlib.contextmanager
def stopped(batches, error=KeyboardInterrupt):
    """Raise an error after a number of batches were appended to the journal."""
    append, done = Journal.append, []

    def failing(journal, frame):
        append(journal, frame)
        done.append(frame)
        if len(done) == batches:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", failing)
        yield


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def contents(path):
    """The files of an output by name, without the record of the run."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.name: file.read_bytes() for file in files if file.name != "run.json"}


@needs_paddle
@pytest.mark.slow
def test_the_numbers_are_those_of_load_and_of_an_evaluation(run, no_charts, monkeypatch):
    monkeypatch.setitem(ENGINES, "paddle", PaddleEngine)
    assert run("predict", "data", *WORDS, "-o", "p.jsonl")[0] == 0 and not Path("p.jsonl.run").exists()
    predicted = lines("p.jsonl")
    classifier = fcvit.load("digits.pth", engine="paddle", device="cpu")
    results = classifier.predict([one["path"] for one in predicted], batch_size=3)
    assert [one["predictions"] for one in predicted] == [classifier.rows(result) for result in results]
    assert run("eval", "--data", "data", *WORDS, "-o", "eval")[0] == 0
    with Path("eval/digits-authors/predictions.csv").open(newline="") as file:
        evaluated = list(csv.DictReader(file))
    assert [f"data/{row['path']}" for row in evaluated] == [one["path"] for one in predicted]
    probabilities = [float(row["probability_1"]) for row in evaluated]
    assert probabilities == pytest.approx([one["predictions"][0]["probability"] for one in predicted], abs=1e-6)


@pytest.mark.slow
def test_csv_parquet_and_the_screen_have_the_same_rows(run):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("p.csv", "p.parquet"):
        assert run("predict", "data", *WORDS, "-o", name)[0] == 0
    report = json.loads(run("predict", "data", *WORDS, "--json")[1])
    table = parquet.read_table("p.parquet").to_pylist()
    assert {row["path"]: row["predictions"] for row in table} == report["predictions"] and len(table) == IMAGES
    assert Path("p.csv").read_text() == run("predict", "data", *WORDS, "--csv")[1]
    assert run("predict", "data", *WORDS, "-o", "p.csv")[2].endswith("p.csv already exists; choose another -o\n")


@pytest.mark.slow
def test_tar_archives_patterns_and_workers_give_the_same_rows(run, work):
    expected = [one["predictions"] for one in lines(work / "whole.jsonl")]
    for name, images in {"tar": ["data.tar"], "glob": ["data/*/*.png"], "two": ["data.tar/0", "data.tar"]}.items():
        assert run("predict", *images, *WORDS, "-o", f"{name}.jsonl", "--workers", 1 if name == "tar" else 0)[0] == 0
        assert [one["predictions"] for one in lines(f"{name}.jsonl")] == expected
    assert lines("two.jsonl")[0]["path"] == "data.tar/0/00.png"
    for image in ("data.tar/nothing", "data/*.jpg", "none.png"):
        code, _, err = run("predict", image, *WORDS)
        assert code == 3 and image.split("/")[0] in err and err.count("\n") == 1


def test_named_images_are_found_once_in_the_order_of_the_arguments(work):
    images = find_named(["data/3", "data/0/00.png", "data/*/0[0-3].png", "data.tar/1"], work)
    names = list(images.names)
    assert names[:4] == ["data/3/03.png", "data/3/13.png", "data/0/00.png", "data/1/01.png"]
    assert names[4:] == ["data/2/02.png", "data.tar/1/01.png", "data.tar/1/11.png"] and len(images) == 7
    assert images.names[1:3] == names[1:3] and list(images.targets) == [None] * 7
    assert images.locations[6].read() == (work / "data/1/11.png").read_bytes()
    assert images.listing() != find_named(["data/3"], work).listing()


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_prediction_that_is_interrupted_twice_ends_with_the_same_bytes(run, output):
    if output.endswith("parquet"):
        pytest.importorskip("pyarrow")
    assert run("predict", "data", *WORDS, "-o", f"whole-{output}")[0] == 0
    folder = f"{output}.run" if "." in output else output
    with stopped(2):
        code, _, err = run("predict", "data", *WORDS, "-o", output)
    assert code == 130 and f"resume with: fcvit resume {folder}" in err
    if output == "p.jsonl":
        assert lines(output) == lines("whole-p.jsonl")[:3], "the file grows while the command runs"
    code, _, err = run("predict", "data", *WORDS, "-o", output)
    assert code == 2 and f"{output} is not complete; continue it with: fcvit resume {folder}" in err
    with stopped(2):
        code, _, err = run("resume", folder)
    assert code == 130 and "6 of 14 images were already done" in err
    code, out, err = run("resume", folder)
    assert code == 0 and "12 of 14 images were already done" in err and f"14 images written to {output}" in out
    assert [*contents(Path(output)).values()] == [*contents(Path(f"whole-{output}")).values()]
    if folder == output:
        code, _, err = run("resume", folder)
        assert code == 2 and "pictures: this prediction is complete" in err
    else:
        assert not Path(folder).exists()


@pytest.mark.slow
def test_a_prediction_continues_elsewhere_but_not_with_other_images(run, tmp_path):
    with stopped(2):
        run("predict", "data", *WORDS, "-o", "out/p.jsonl")
    Path("new").mkdir()
    for name in ("data", "digits.pth", "out"):
        Path(name).rename(Path("new", name))
    code, _, err = run("resume", "new/out/p.jsonl.run", "--data", "new")
    assert code == 3 and "digits.pth" in err
    moved = ("resume", "new/out/p.jsonl.run", "--data", "new", "--weights", "new/digits.pth")
    image = Path("new/data/9/09.png")
    image.rename("new/data/9/10.png")
    code, _, err = run(*moved)
    assert code == 4 and "list of images changed since the run started" in err
    Path("new/data/9/10.png").rename(image)
    (first := Path("new/data/0/00.png")).rename("kept.png")
    Image.new("RGB", (9, 9)).save(first)
    code, _, err = run(*moved)
    assert code == 4 and "data/0/00.png is not the image that was read" in err
    Path("kept.png").rename(first)
    assert run(*moved)[0] == 0 and len(lines("new/out/p.jsonl")) == IMAGES


@pytest.mark.slow
def test_unreadable_images_are_listed_at_the_end_also_after_an_interruption(run, work):
    Path("data/0/bad.png").write_bytes(b"\x89PNG")
    Path("data/9/none.png").symlink_to("missing")
    with stopped(3):
        run("predict", "data", *WORDS, "-o", "p.jsonl")
    code, _, err = run("resume", "p.jsonl.run")
    assert code == 6 and "2 images excluded" in err and "none.png: No such file" in err and "bad.png" in err
    assert [one["path"] for one in lines("p.jsonl")] == [one["path"] for one in lines(work / "whole.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "eval"])
def test_a_lost_disk_is_an_error_and_not_unreadable_images(run, command, no_charts):
    """The images disappear in the middle and come back. Images that are only missing from the start are unreadable."""
    words = ["predict", "data"] if command == "predict" else ["eval", "--data", "data"]
    output, folder = ("p.csv", "p.csv.run") if command == "predict" else ("run", "run")
    whole = f"whole-{output}"
    assert run(*words, *WORDS, "-o", whole)[0] == 0
    append = Journal.append

    def lose(journal, frame):
        append(journal, frame)
        if frame.number == 1:
            Path("data").rename("elsewhere")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", lose)
        code, _, err = run(*words, *WORDS, "-o", output, "--workers", 0)
    assert code == 3 and err.count("fcvit: ") - err.count("note:") == 1
    assert re.search(rf"\d\d.png: No such file .*read before.*resume with: fcvit resume {folder}\n", err)
    Path("elsewhere").rename("data")
    code, _, err = run("resume", folder)
    assert code == 0 and "6 of 14 images were already done" in err
    inner = "digits-authors" if command == "eval" else ""
    read, expected = (contents(Path(name) / inner) for name in (output, whole))
    for files in (read, expected):
        files.pop("metrics.json", None)  # has times
    assert [*read.values()] == [*expected.values()]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["p.jsonl", "p.parquet", "journal", "pictures"])
def test_a_full_disk_names_the_file_and_the_resume_command(run, work, what):
    if what == "p.parquet":
        pytest.importorskip("pyarrow")
    output = "p.jsonl" if what == "journal" else what
    folder = f"{output}.run" if "." in output else output
    file = {"journal": "p.jsonl.run/journals/0-0.journal", "pictures": "pictures/predictions-001.png"}.get(what, output)
    usual, replaced = Path.open, os.replace

    def opened(path, *how, **options):
        writes = how in (("wb",), ("xb",)) and path.name == Path(file).name
        return FullFile(path, "w") if writes else usual(path, *how, **options)

    def full(*_):
        raise OSError(28, "No space left on device")

    def replace(new, old):
        return full() if Path(old).name == Path(file).name else replaced(new, old)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opened)
        patch.setattr(os, "replace", replace)
        if what == "p.parquet":
            patch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
        code, _, err = run("predict", "data", *WORDS, "-o", output)
    assert code == 3 and len([line for line in err.splitlines() if "note:" not in line]) == 1
    reason = rf"{file}: (cannot be written: )?No space left on device; resume with: fcvit resume {folder}\n"
    assert re.search(reason, err)
    assert run("resume", folder)[0] == 0
    if what in ("p.jsonl", "journal"):
        assert contents(Path(output)) == {"p.jsonl": (work / "whole.jsonl").read_bytes()}


class FullFile(io.FileIO):
    """A file on a full disk."""

    def write(self, _content):
        raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_a_folder_that_is_read_only_is_reported_before_and_during_the_work(run, monkeypatch):
    """Errors are injected, because the superuser may write everywhere."""

    def read_only(*_given, **_options):
        raise OSError(30, "Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        code, _, err = run("predict", "data", *WORDS, "-o", "p.jsonl")
    assert code == 3 and "p.jsonl.run: cannot be written: Read-only file system" in err
    with pytest.MonkeyPatch.context() as patch:

        def lost(journal, frame):
            patch.setattr(Path, "unlink", read_only)
            patch.setattr(os, "replace", read_only)
            raise OSError(30, "Read-only file system", "p.jsonl.run/journals/0-0.journal")

        patch.setattr(Journal, "append", lost)
        code, _, err = run("predict", "data", *WORDS, "-o", "p.jsonl")
    assert code == 3 and err.endswith("0-0.journal: Read-only file system; resume with: fcvit resume p.jsonl.run\n")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, digits_pth):
    """The rows of an image have 20 kB, so the predictions of 300 images would need 6 MB."""
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    names = tuple(ClassName(str(i), f"{i}" * 2000) for i in range(10))
    predictor = Classifier(read_weights(digits_pth), Means(), DIGITS.variant.preprocessing, names)
    peaks = []
    for count in (150, 450):
        part = [_Part("", [f"{i}.png" for i in range(count)], lambda _: Location(str(tmp_path / "0.png")))]
        images = NamedImages(_Column(part, lambda _, name: name), _Column(part, lambda p, name: p.locate(name)), part)
        images = dataclasses.replace(images, targets=[None] * count)
        settings = PredictionSettings(("x",), "p.jsonl", batch_size=4)
        request = Request((str(digits_pth),), str(tmp_path), "classification", settings, PredictionOptions(10))
        run = PredictionRun(request, images, predictor, tmp_path / f"{count}.jsonl", Processes())
        (tmp_path / f"{count}.run").mkdir()
        tracemalloc.start()
        run.finish(tmp_path / f"{count}.run", 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert run.count == count and len(run.kept) == 100
        assert len((tmp_path / f"{count}.jsonl").read_bytes()) > 20_000 * count
    assert peaks[1] - peaks[0] < 1 << 20, peaks


class Process:
    """One of two processes of a job."""

    def __init__(self, rank):
        self.rank, self.count, self.first = rank, 2, rank == 0

    def resume_with(self, command):
        pass


@pytest.mark.parametrize("shared", [True, False])
def test_the_first_process_gets_all_frames_a_part_at_a_time(tmp_path, shared, monkeypatch):
    """Two processes run in threads. Without a shared folder, the second one sends its frames."""
    monkeypatch.setattr(batch_run, "_SENT", 100)
    sent, dtype = [], np.dtype([("index", "<i8")])
    pipes = Exchange()

    def work(rank):
        folder = tmp_path if shared else tmp_path / str(rank)
        folder.mkdir(exist_ok=True)
        run = batch_run.BatchRun(range(18), 2, dtype, {}, Process(rank), folder)
        run.processes.broadcast, run.processes.gather = pipes.broadcast(rank), pipes.gather(rank, sent)
        run.journal = Journal(dtype, run._key, folder / "journals" if shared else folder, rank)
        with contextlib.closing(run.journal):
            for number in run.batches[rank::2]:
                run.journal.append(Frame(number, np.zeros(2, dtype), {"bad": []}, (b"x" * 50,)))
            run.gather()
            return [run.journal[number].chunks for number in run.journal]

    (tmp_path / "journals").mkdir()
    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(work, range(2))
    assert first == [(b"x" * 50,)] * 9
    parts = [part for part in sent if len(part) > 1]
    assert len(parts) == (0 if shared else 4) and all(len(part) < 300 for part in parts)


class Exchange:
    """The exchange of two threads."""

    def __init__(self):
        self.down, self.up = queue.Queue(), queue.Queue()

    def broadcast(self, rank):
        def call(value):
            if rank:
                return self.down.get(timeout=20)
            self.down.put(value)
            return value

        return call

    def gather(self, rank, sent):
        def call(value):
            if rank:
                sent.append(value)
                self.up.put(value)
                return []
            return [value, self.up.get(timeout=20)]

        return call


KILLED = """
import os, signal, sys
from fcvit.cli import main
from fcvit.evaluation.journal import Journal
append, batches, sign = Journal.append, int(sys.argv[1]), int(sys.argv[2])
def stop(journal, frame):
    global batches
    append(journal, frame)
    batches -= 1
    if not batches:
        os.kill(os.getpid(), sign)
Journal.append = stop
sys.exit(main(sys.argv[3:]))
"""


def nuclei(root):
    """Return weights, images and output of a segmentation."""
    assets = importlib.resources.files("fcvit") / "assets"
    return assets / quickstart.SEGMENTER, assets / quickstart.NUCLEI, "pictures"


def shapes(root):
    """Return weights, images and output of a detection."""
    pytest.importorskip("pycocotools")
    data = write_shapes(root / "shapes", "val", [(96, 128), (128, 96)] * 8)
    return write_detector(root / "shapes.safetensors", scale=(256, 192), max_detections=20), data / "val", "pictures"


def digits(root):
    return root / "digits.pth", root / "data", "p.jsonl"


@needs_paddle
@pytest.mark.ci
@pytest.mark.parametrize("task", [digits, nuclei, shapes])
def test_killed_and_stopped_predictions_and_two_processes_give_the_same_bytes(work, tmp_path, task):
    """A prediction is killed or stopped after a seeded number of batches, again and again, until it is complete."""
    if task is not digits:
        pytest.importorskip("cv2")
    weights, data, output = task(work)
    words = ["predict", data, "--weights", weights, "--batch-size", 2, "--engine", "paddle", "--device", "cpu"]
    words += ["--workers", 0] + (["--score-threshold", 0.05] if task is shapes else [])
    words = list(map(str, words))

    def start(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        return done.returncode, done.stdout + done.stderr

    assert start("-m", "fcvit", *words, "-o", f"whole-{output}")[0] == 0
    generator, attempts = np.random.default_rng(len(task.__name__)), 0
    folder, command = (f"{output}.run" if "." in output else output), [*words, "-o", output]
    while True:
        sign = (signal.SIGKILL, signal.SIGTERM)[attempts % 2]
        code, text = start("-c", KILLED, generator.integers(1, 5), sign, *command)
        if code not in (-signal.SIGKILL, 130):
            break
        attempts, command = attempts + 1, ["resume", folder, "--workers", "0"]
    assert code == 0 and attempts > 1, text
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", 2, "--log_dir", "log"]
    _, text = start(*launcher, Path(sys.executable).with_name("fcvit"), *words, "-o", f"two-{output}")
    whole = [*contents(tmp_path / f"whole-{output}").values()]
    for name in (output, f"two-{output}"):
        assert [*contents(tmp_path / name).values()] == whole, (name, text)
    assert not list(tmp_path.glob("*.run")) and not list(tmp_path.glob("*/journals"))
