"""Tests of evaluation: reproducible results, resumed runs, result files, and errors."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import DIGITS, needs_paddle, needs_torch, write_pth
from fcvit import frameworks
from fcvit.cli import main
from fcvit.commands.compare import compare
from fcvit.commands.evaluate import evaluate as evaluate_with_any_engine
from fcvit.data.classes import ClassName
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UnreadableFile, UsageError
from fcvit.evaluation.batch_run import agreed_identity
from fcvit.evaluation.logits import LogitFiles
from fcvit.evaluation.results import NotWritten
from fcvit.evaluation.runner import resume
from fcvit.inference.engines import PaddleEngine, TorchEngine
from fcvit.metrics.classification import calibration, wilson
from fcvit.models.spec import ModelSpec
from fcvit.tasks.classification import page, results
from fcvit.weights.synthetic import synthetic_tensors

# The Paddle engine, so that the tests do not depend on the fastest installed engine. tests/deploy tests the others.
evaluate = functools.partial(evaluate_with_any_engine, engines=("paddle",))


@pytest.fixture
def folder(tmp_path):
    """23 images of noise in ten class folders. 23 is not divisible by any batch size."""
    generator = np.random.default_rng(0)
    for index in range(23):
        path = tmp_path / "data" / str(index % 10) / f"{index:02d} with space.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def few(folder):
    """One image per class, since networks at 224 pixels are slow."""
    for path in sorted(folder.glob("*/*.png"))[::-1]:
        if len(list(path.parent.iterdir())) > 1:
            path.unlink()
    return folder


@pytest.fixture(autouse=True)
def charts(request):
    """Disable charts except in marked tests."""
    if request.node.get_closest_marker("charts") is None:
        request.getfixturevalue("no_charts")


def files(run, configuration="digits-authors"):
    """Return all content of a result that must not depend on how it was computed."""
    contents = {path.name: path.read_bytes() for path in (run / configuration).iterdir()}
    metrics = json.loads(contents.pop("metrics.json"))
    assert metrics.pop("seconds") > 0
    report = run / "report.html"
    return contents | {"metrics": metrics} | ({report.name: report.read_bytes()} if report.exists() else {})


def rows(run, configuration="digits-authors"):
    with (run / configuration / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Reproducible results


@pytest.mark.slow
@needs_paddle
@pytest.mark.charts
def test_workers_and_interruptions_do_not_change_the_files(folder, digits_pth, tmp_path, monkeypatch):
    """With one batch size, predictions, images, page and metrics are byte-identical."""
    (folder / "5" / "broken.png").touch()
    options = {"batch_size": 4, "device": "cpu"}
    evaluate(digits_pth, folder, **options, workers=0, folder=tmp_path / "alone")
    evaluate(digits_pth, folder, **options, workers=2, folder=tmp_path / "two")
    expected = files(tmp_path / "alone")
    assert len(expected) == 7 and files(tmp_path / "two") == expected
    run = tmp_path / "again"
    for patience in (2, 1, None):  # interrupted after two batches, after one more, then not interrupted
        with monkeypatch.context() as patch:
            calls = count_calls(patch, patience)
            try:
                resume(run) if run.exists() else evaluate(digits_pth, folder, **options, folder=run)
                assert patience is None
            except KeyboardInterrupt:
                assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert len(calls) == 3  # three of the six batches were computed before the interruptions
    assert files(run) == expected
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert len(json.loads((run / "run.json").read_text())["continued"]) == 2


def count_calls(patch, patience):
    """Interrupt the Paddle engine after `patience` batches. Return the list of batch sizes that it computed."""
    calls = []
    compute = PaddleEngine.__call__

    def watched(self, images):
        if len(calls) == patience:
            raise KeyboardInterrupt
        calls.append(len(images))
        return compute(self, images)

    patch.setattr(PaddleEngine, "__call__", watched)
    return calls


@needs_paddle
@pytest.mark.slow
def test_different_batch_sizes_give_the_same_metrics(folder, digits_pth, tmp_path):
    """Float32 sums depend on the batch size: logits agree to 1e-5, metrics are equal."""
    runs = [tmp_path / f"run{size}" for size in (23, 4, 50)]
    for run, size in zip(runs, (23, 4, 50), strict=True):
        evaluate(digits_pth, folder, batch_size=size, device="cpu", folder=run, save_logits=True)
    logits = [np.load(run / "digits-authors" / "logits.npy") for run in runs]
    first = json.loads((runs[0] / "digits-authors" / "metrics.json").read_text())
    assert logits[0].shape == (23, 10) and first["images"] == 23
    for run, other in zip(runs[1:], logits[1:], strict=True):
        assert np.abs(other - logits[0]).max() <= 1e-5
        metrics = json.loads((run / "digits-authors" / "metrics.json").read_text())
        for key in ("images", "top1", "top_k", "per_class", "top1_interval", "fingerprint"):
            assert metrics[key] == first[key]
        assert metrics["loss"] == pytest.approx(first["loss"], abs=1e-6)


@pytest.mark.slow
@needs_paddle
def test_saved_logits_match_the_predictions(folder, digits_pth, tmp_path):
    (folder / "5" / "broken.png").touch()  # its row must be NaN
    evaluate(digits_pth, folder, batch_size=5, device="cpu", folder=tmp_path / "run", save_logits=True)
    logits = np.load(tmp_path / "run" / "digits-authors" / "logits.npy")
    left_out = np.isnan(logits).all(axis=1)
    assert logits.dtype == np.float32 and left_out.sum() == 1 and np.isfinite(logits[~left_out]).all()
    assert [row["class_1"] for row in rows(tmp_path / "run")] == [str(i) for i in logits[~left_out].argmax(1)]


@pytest.mark.slow
@needs_paddle
@pytest.mark.parametrize("shared", [True, False])
def test_zero_logits_are_kept_and_missing_logits_detected(folder, digits_tensors, tmp_path, monkeypatch, shared, notes):
    """Zeros can be valid outputs. Rows written on another machine must still be detected as missing."""
    zero = {name: np.zeros_like(t) if name.startswith("head.") else t for name, t in digits_tensors.items()}
    path = write_pth(tmp_path / "zero.pth", zero)
    if not shared:
        for method in ("write", "mark"):
            monkeypatch.setattr(LogitFiles, method, lambda *_: None)
    options = {"batch_size": 12, "device": "cpu", "folder": tmp_path / "run", "save_logits": True}
    evaluate(path, folder, **options)
    logits = tmp_path / "run" / "zero-authors" / "logits.npy"
    assert logits.exists() == shared and any("does not share the folder" in text for text in notes) != shared
    if shared:
        assert np.load(logits).shape == (23, 10) and not np.load(logits).any()
        resume(tmp_path / "run")
        assert logits.exists()


@pytest.mark.slow
@needs_paddle
def test_a_full_disk_at_the_end_loses_no_results(folder, digits_pth, tmp_path, monkeypatch, capsys):
    """The error contains the results, the file and the resume command. Resuming computes nothing again."""
    usual, run = results.write_result, tmp_path / "a run"

    def full(configuration, *_rest):
        raise UnreadableFile(f"{configuration}/predictions.csv: cannot be written: No space left on device")

    monkeypatch.setattr(results, "write_result", full)
    again = f"fcvit resume '{run}'"
    with pytest.raises(NotWritten, match=f"predictions.csv: .*No space left.*{again}") as error:
        evaluate(digits_pth, folder, batch_size=12, device="cpu", folder=run)
    expected = error.value.result.results
    assert json.loads((run / "run.json").read_text())["status"] == "failed" and expected[0].images == 23

    assert main(["eval", "--resume", str(run), "--workers", "0"]) == 3
    out, err = capsys.readouterr()
    assert f"{expected[0].top1:.2f}" in out and "written to" not in out
    assert err.splitlines()[-1].startswith(f"fcvit: {run}/digits-authors/predictions.csv: ") and again in err
    monkeypatch.setattr(results, "write_result", usual)
    calls = count_calls(monkeypatch, None)
    assert [r.top1 for r in resume(run).results] == [r.top1 for r in expected] and not calls


@pytest.mark.slow
@needs_paddle
@pytest.mark.parametrize("what", ["journal", "logits", "page"])
def test_a_full_disk_error_names_the_file_and_the_resume_command(folder, digits_pth, tmp_path, monkeypatch, what):
    def full(*_rest):
        raise OSError(28, "No space left on device")

    match what:
        case "journal":
            usual = Path.open

            def opened(path, *how, **options):
                return FullFile(path, "w") if path.suffix == ".journal" else usual(path, *how, **options)

            monkeypatch.setattr(Path, "open", opened)
            expected = r"0-0.journal: No space left on device.*fcvit resume"
        case "logits":
            monkeypatch.setattr(os, "posix_fallocate", full)
            expected = r"logits.npy: No space left on device.*fcvit resume"
        case "page":
            monkeypatch.setattr(page, "write_page", full)
            expected = r"run: No space left on device.* complete.*fcvit resume"
    with pytest.raises(UnreadableFile, match=expected):
        evaluate(digits_pth, folder, batch_size=12, device="cpu", folder=tmp_path / "run", save_logits=True)


class FullFile(io.FileIO):
    """A file on a full disk."""

    def write(self, _content):
        raise OSError(28, "No space left on device")


@pytest.mark.slow
@needs_paddle
def test_resuming_a_finished_run_only_writes_its_files_again(folder, digits_pth, tmp_path, monkeypatch):
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    expected = files(tmp_path / "run")
    for name in ("predictions.csv", "worst.png"):
        (tmp_path / "run" / "digits-authors" / name).unlink()
    calls = count_calls(monkeypatch, None)
    resume(tmp_path / "run")
    assert not calls and files(tmp_path / "run") == expected


@needs_paddle
@pytest.mark.slow
def test_a_run_can_be_resumed_with_moved_images_and_weights(folder, digits_pth, tmp_path, monkeypatch, no_charts):
    evaluate(digits_pth, folder, batch_size=4, device="cpu", folder=tmp_path / "uninterrupted")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        count_calls(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            evaluate(digits_pth, folder, batch_size=4, device="cpu", folder=run)
    data = folder.rename(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir()
    weights = digits_pth.rename(tmp_path / "other" / digits_pth.name)
    resized = shutil.copytree(data, tmp_path / "resized")
    for path in resized.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((40, 40)).save(path)
    with pytest.raises(DoesNotFit, match=r"resized: \S+.*\.png is not the image .*run"):
        resume(run, moved={"data": resized, "weights": [weights]})
    with pytest.raises(UsageError, match=r"--weights: 2 .*expected 1"):
        resume(run, moved={"data": data, "weights": [weights, weights]})
    with pytest.raises(UsageError, match=r"--weights .*digits\.pth"):
        resume(run, moved={"weights": [data]})
    with pytest.raises(UsageError, match=r"list_file: .*without"):
        resume(run, moved={"data": data, "weights": [weights], "list_file": weights})
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    from fcvit.cli import main

    words = ["eval", "--resume", str(run), "--data", str(data), "--weights", str(weights), "--workers", "0"]
    assert main(words) == 0 and rows(run) == rows(tmp_path / "uninterrupted")
    assert json.loads((run / "run.json").read_text())["request"]["data"] == str(data)
    assert main(words[:3]) == 0, "the run must remember the new paths"


@pytest.mark.slow
@needs_paddle
def test_a_run_is_not_resumed_with_changed_inputs(folder, digits_pth, tmp_path, monkeypatch, digits_tensors):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        count_calls(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(digits_pth, folder, batch_size=4, device="cpu", folder=run)
    shutil.copyfile(folder / "1" / "01 with space.png", folder / "1" / "new.png")
    with pytest.raises(DoesNotFit, match=r"list of images changed.*start a new run"):
        resume(run)
    (folder / "1" / "new.png").unlink()
    write_pth(digits_pth, {name: tensor + 1 for name, tensor in digits_tensors.items()})
    with pytest.raises(DoesNotFit, match="weights changed"):
        resume(run)
    write_pth(digits_pth, digits_tensors)
    with monkeypatch.context() as patch:
        patch.setattr("fcvit.run_folder.versions", lambda: {"paddlepaddle": "4.0"})
        with pytest.raises(DoesNotFit, match=r"packages changed \(.*paddlepaddle .* to 4.0.*\)"):
            resume(run)
    assert resume(run).results[0].images == 23
    with pytest.raises(UnreadableFile, match=r"run\.json: .*expected a run folder"):
        resume(folder)
    record = json.loads((run / "run.json").read_text())
    request = record["request"]
    changes = [{"weights": ["x"]}, {"task": "x"}, {"settings": "x"}]
    changes += [
        {"settings": {**request["settings"], **one}} for one in ({"batch_size": 3}, {"protocol": "both"}, {"more": 1})
    ]
    changes += [{"options": {**request["options"], **one}} for one in ({"subset": 3}, {"more": 1})]
    for change in changes:
        (run / "run.json").write_text(json.dumps({**record, "request": {**request, **change}}))
        with pytest.raises(UnreadableFile, match=r"run.json: .*settings .*start a new run"):
            resume(run)
    (run / "run.json").write_text('{"command": "eval"}')
    with pytest.raises(UnreadableFile, match=r"run.json: .*settings .*start a new run"):
        resume(run)
    (run / "run.json").write_text('{"command": "quickstart"}')
    with pytest.raises(UsageError, match="not a run of fcvit eval"):
        resume(run)


# Result files


@needs_paddle
@pytest.mark.slow
@pytest.mark.charts
def test_the_files_of_a_run(folder, digits_pth, tmp_path):
    evaluation = evaluate(digits_pth, folder, batch_size=8, device="cpu", folder=tmp_path / "run")
    run, result_folder = tmp_path / "run", tmp_path / "run" / "digits-authors"
    assert sorted(p.name for p in run.iterdir()) == ["digits-authors", "journals", "report.html", "run.json"]
    assert sorted(p.name for p in result_folder.iterdir()) == [
        "confusion.png",
        "metrics.json",
        "per_class.csv",
        "predictions.csv",
        "reliability.png",
        "worst.png",
    ]
    (result,) = evaluation.results
    metrics = json.loads((result_folder / "metrics.json").read_text())
    assert metrics["top1"] == result.top1 and metrics["mapping"] == {str(i): i for i in range(10)}
    assert len(metrics["weights_sha256"]) == len(metrics["fingerprint"]) == 64
    assert {"python", "numpy", "pillow", "paddlepaddle"} <= set(metrics["versions"])
    assert (metrics["precision"], metrics["batch_size"], metrics["device"]) == ("float32", 8, "cpu")
    predicted = rows(run)
    assert [row["path"] for row in predicted] == sorted(row["path"] for row in predicted) and len(predicted) == 23
    correct = [row["truth"] == row["class_1"] for row in predicted]
    assert 100 * sum(correct) / 23 == pytest.approx(result.top1) and 0 < sum(correct) < 23
    assert all(row["truth"] == row["path"][0] for row in predicted)
    assert all(float(row["probability_1"]) >= float(row["probability_5"]) for row in predicted)
    with (result_folder / "per_class.csv").open(newline="") as file:
        classes = {row["class"]: row for row in csv.DictReader(file)}
    assert sum(int(row["images"]) for row in classes.values()) == 23
    taken = [row["class_1"] for row in predicted if row["truth"] == "3" and row["class_1"] != "3"]
    assert classes["3"]["mistaken_for"] in taken
    assert int(classes["3"]["times"]) == max(taken.count(name) for name in taken)
    for name in ("worst.png", "confusion.png", "reliability.png"):
        with Image.open(result_folder / name) as image:
            assert min(image.size) > 100


@needs_paddle
def test_all_metrics_can_be_recomputed_from_the_logits(folder, digits_pth, tmp_path):
    """Recompute the metrics in NumPy from logits.npy and the folder names only."""
    options = {"batch_size": 6, "device": "cpu", "save_logits": True}
    (result,) = evaluate(digits_pth, folder, **options, folder=tmp_path / "run").results
    logits = np.load(tmp_path / "run" / "digits-authors" / "logits.npy").astype(np.float64)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    truth = np.array([int(name[0]) for name in names])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    rank = np.argmax(order == truth[:, None], axis=1)
    assert rank.max() > 5 and (rank == 5).any()  # otherwise top-5 accuracy would not be tested
    assert result.top1 == pytest.approx(100 * (rank == 0).mean())
    assert result.top_k == pytest.approx(100 * (rank < 5).mean())
    assert result.top1_interval == wilson(int((rank == 0).sum()), 23)
    assert result.top_k_interval == wilson(int((rank < 5).sum()), 23)
    assert result.loss == pytest.approx(-np.log(probabilities[np.arange(23), truth]).mean(), rel=1e-6)
    expected = calibration(probabilities.max(1), rank == 0)
    assert result.calibration.counts == expected.counts
    assert result.calibration.error == pytest.approx(expected.error, abs=1e-6)
    for row, name, best, probability, label in zip(
        rows(tmp_path / "run"), names, order, probabilities, truth, strict=True
    ):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert (row["path"], row["truth"], row["image"]) == (name, str(label), digest[:16])
        for k in range(1, 6):
            assert row[f"class_{k}"] == str(best[k - 1])
            assert float(row[f"probability_{k}"]) == pytest.approx(probability[best[k - 1]], abs=1e-5)
    for row in result.per_class:
        members = truth == int(row.id)
        assert (row.images, row.top1) == (members.sum(), pytest.approx(100 * (rank[members] == 0).mean()))
        assert row.top_k == pytest.approx(100 * (rank[members] < 5).mean())


@needs_paddle
@pytest.mark.slow
def test_the_fingerprint_depends_on_contents_and_classes_only(folder, digits_pth):
    def fingerprint():
        return evaluate(digits_pth, folder, device="cpu").results[0].fingerprint

    before = fingerprint()
    image = folder / "3" / "03 with space.png"
    moved = image.rename(folder / "3" / "renamed.png")
    assert fingerprint() == before
    moved.rename(folder / "4" / "renamed.png")
    assert fingerprint() != before
    (folder / "4" / "renamed.png").rename(image)
    image.write_bytes(image.read_bytes() + b"\0")
    assert fingerprint() != before


@needs_paddle
def test_the_image_grid_shows_the_most_confident_errors(folder, digits_pth, tmp_path, monkeypatch):
    grids = []
    draw = results.image_grid
    monkeypatch.setattr(results, "image_grid", lambda tiles, title: grids.append((tiles, title)) or draw(tiles, title))
    result = evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run").results[0]
    ((tiles, title),) = grids
    wrong = [row for row in rows(tmp_path / "run") if row["truth"] != row["class_1"]]
    wrong.sort(key=lambda row: -float(row["probability_1"]))
    assert [(t.truth, t.predicted) for t in tiles] == [(row["truth"], row["class_1"]) for row in wrong]
    assert all(tile.image.size == (30, 40) for tile in tiles)
    assert title.startswith(f"{len(wrong)} of {result.images} images misclassified")


@needs_paddle
def test_images_deleted_during_the_run_do_not_change_the_predictions(folder, digits_pth, tmp_path, monkeypatch):
    compute = PaddleEngine.__call__

    def compute_and_delete(self, images):
        out = compute(self, images)
        shutil.rmtree(folder)
        return out

    monkeypatch.setattr(PaddleEngine, "__call__", compute_and_delete)
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 23


@needs_paddle
@pytest.mark.slow
def test_unusual_image_names_survive_the_csv_file(folder, digits_pth, tmp_path):
    names = ["a,b.png", 'quo"te.png', "new\nline.png", "car\rriage.png", "semi;colon.png"]
    for name in names:
        shutil.copyfile(folder / "0" / "00 with space.png", folder / "3" / name)
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    assert {row["path"] for row in rows(tmp_path / "run")} >= {f"3/{name}" for name in names}
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "again")
    assert compare(tmp_path / "run", tmp_path / "again").differing == ()


STRANGE = ("=1+1", "@x", "-2", "'=y", "a\nb", "\x1b[2J", "$\\frac{$", "[red]z", "\u202ee", "<b>")


@needs_paddle
@pytest.mark.slow
def test_unusual_class_names_survive_the_csv_file(folder, digits_pth, tmp_path):
    """With formulas, line breaks and escapes in names, the result can be drawn, compared and resumed."""
    (tmp_path / "classes.json").write_text(json.dumps(STRANGE))
    lines = "".join(f"{path.relative_to(folder)} {path.parent.name}\n" for path in folder.rglob("*.png"))
    (tmp_path / "list.txt").write_text(lines)
    (folder / "=3").mkdir()
    shutil.copyfile(folder / "3" / "03 with space.png", folder / "=3" / "x.png")
    (tmp_path / "list.txt").write_text(f"{lines}=3/x.png 3\n")
    options = {"list_file": tmp_path / "list.txt", "classes": tmp_path / "classes.json", "device": "cpu"}
    for run in ("run", "again"):
        evaluate(digits_pth, folder, folder=tmp_path / run, **options)
    assert {row["truth"] for row in rows(tmp_path / "run")} >= {"'=1+1", "'@x", "'-2", "''=y", "a\nb"}
    read = results.read_result(tmp_path / "run")
    assert set(read.truth) == set(STRANGE) == set(read.class_names) and "=3/x.png" in read.names
    assert compare(tmp_path / "run", tmp_path / "again").differing == ()
    before = files(tmp_path / "run")
    resume(tmp_path / "run")
    assert files(tmp_path / "run") == before


@pytest.mark.slow
@needs_paddle
def test_class_folder_names_that_are_not_valid_text(tmp_path, folder):
    try:
        (folder / "0").rename(folder / os.fsdecode(b"\xff"))
    except OSError:
        pytest.skip("this file system only accepts names that are valid text")
    for label in range(2, 10):
        shutil.rmtree(folder / str(label))
    two = write_pth(tmp_path / "two.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=2)))
    evaluate(two, folder, device="cpu", folder=tmp_path / "run")
    evaluate(two, folder, device="cpu", folder=tmp_path / "again")
    assert compare(tmp_path / "run", tmp_path / "again").images == 6


@needs_paddle
@pytest.mark.slow
def test_a_wrong_class_order_is_detected(folder, tmp_path, monkeypatch, notes):
    """The warning is logged and stored in the result. It mentions labels that count from 1."""
    with np.load(Path(fcvit.__file__).parent / "assets" / "digits_held_out.npz") as held_out:
        images, truth = held_out["images"], held_out["labels"]
    for index in np.concatenate([np.flatnonzero(truth == digit)[:6] for digit in range(9)]):
        Image.fromarray(images[index]).save(folder / f"{index}.png")
    weights = Path(fcvit.__file__).parent / "assets" / "digits.pth.tar"
    for name, label in (
        ("right", lambda digit: digit),
        ("from1", lambda digit: digit + 1),
        ("other", (8 - np.arange(9)).item),
    ):
        listed = [f"{path.name} {label(truth[int(path.stem)])}\n" for path in folder.glob("*.png")]
        (tmp_path / name).write_text("".join(listed))
        notes.clear()
        result = evaluate(weights, folder, list_file=tmp_path / name, device="cpu").results[0]
        warnings = [note for note in notes if "permuted" in note]
        assert warnings == ([result.hint] if name != "right" else [])
        assert ("count from 1" in result.hint) == (name == "from1")


@needs_paddle
def test_folder_names_are_the_class_names_if_the_weights_have_none(tmp_path, folder):
    for label, name in enumerate(("cat", "cow", "dog")):
        (folder / str(label)).rename(folder / name)
    for label in range(3, 10):
        shutil.rmtree(folder / str(label))
    three = write_pth(tmp_path / "three.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=3)))
    result = evaluate(three, folder, device="cpu", folder=tmp_path / "run").results[0]
    assert [row.name for row in result.per_class] == ["cat", "cow", "dog"]
    assert {row["truth"] for row in rows(tmp_path / "run", "three-authors")} == {"cat", "cow", "dog"}


@pytest.mark.slow
@needs_paddle
def test_a_run_folder_inside_the_data_is_rejected(folder, digits_pth):
    for run in (folder, folder / "run", folder / "3" / "run"):
        with pytest.raises(UsageError, match="is inside --data"):
            evaluate(digits_pth, folder, device="cpu", folder=run)
    assert sorted(path.name for path in folder.iterdir()) == [str(i) for i in range(10)]


@pytest.mark.slow
@needs_paddle
def test_a_run_cannot_be_resumed_twice_at_the_same_time(folder, digits_pth, tmp_path):
    import fcvit.run_folder

    if fcvit.run_folder.fcntl is None:
        pytest.skip("file locks are not available")
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    record = fcvit.run_folder.read_run(tmp_path / "run", "eval")
    with (
        fcvit.run_folder.continued_run(tmp_path / "run", record),
        pytest.raises(UsageError, match="another process"),
    ):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run").results[0].images == 23


@needs_paddle
@pytest.mark.slow
@pytest.mark.charts
def test_the_report_page_contains_all_results(few, digits_pth, tmp_path):
    (few / "0" / "<b>bad.png").touch()
    evaluate([digits_pth, digits_pth], few, protocol="both", device="cpu", folder=tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    metrics = json.loads((tmp_path / "run" / "digits-authors" / "metrics.json").read_text())
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", html)
    start = cells.index("digits-authors")
    assert cells[start + 1 : start + 6] == [
        f"{metrics['top1']:.2f}",
        f"{metrics['top1_interval'][0]:.2f} to {metrics['top1_interval'][1]:.2f}",
        f"{metrics['top_k']:.2f}",
        f"{metrics['loss']:.4f}",
        f"{metrics['calibration']['error']:.4f}",
    ]
    listed = [c["id"] for c in sorted(metrics["per_class"], key=lambda c: (c["top1"], c["id"]))]
    table = html[html.index("Classes, lowest accuracy first") :]
    assert re.findall(r"<tr>\s*<t[dh][^>]*>(\d)</t", table)[:10] == listed
    for configuration in (
        "digits-authors",
        "digits-resize256-bilinear",
        "digits-authors-2",
        "digits-resize256-bilinear-2",
    ):
        assert f">{configuration}</" in html
    assert html.count("data:image/png;base64") == 12
    assert "&lt;b&gt;bad.png" in html and "not a readable image" in html and "McNemar" in html


@needs_paddle
@pytest.mark.slow
@pytest.mark.charts
def test_without_the_extra_report_no_charts_are_written(folder, digits_pth, tmp_path, monkeypatch, no_charts, notes):
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    monkeypatch.undo()
    left = sorted(p.name for p in (tmp_path / "run" / "digits-authors").iterdir())
    assert left == ["metrics.json", "per_class.csv", "predictions.csv", "worst.png"]
    assert "charts" in notes[-1] and f"fcvit resume {tmp_path / 'run'}" in notes[-1]
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


@needs_paddle
def test_without_a_folder_nothing_is_written(folder, digits_pth, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(digits_pth, folder, device="cpu").results[0].images == 23
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UsageError, match=r"save_logits.*folder"):
        evaluate(digits_pth, folder, device="cpu", save_logits=True)


# Several configurations in one pass


@pytest.mark.slow
@needs_paddle
@needs_torch
def test_several_weights_protocols_and_engines_in_one_pass(few, digits_pth, tmp_path, digits_tensors):
    """Each configuration gives the same result as alone. Engines and protocols are compared."""
    other = write_pth(
        tmp_path / "other.v2.pth", {n: t[::-1].copy() if t.ndim else t for n, t in digits_tensors.items()}
    )
    options = {"batch_size": 10, "device": "cpu"}
    evaluation = evaluate(
        (digits_pth, other), few, engines=("paddle", "torch"), protocol="both", **options, folder=tmp_path / "all"
    )
    names = [
        f"{w}-{p}-{e}"
        for w in ("digits", "other.v2")
        for p in ("authors", "resize256-bilinear")
        for e in ("paddle", "torch")
    ]
    assert [result.name for result in evaluation.results] == names
    alone = evaluate(other, few, protocol="resize256-bilinear", **options).results[0]
    result = evaluation.results[6]
    same = ("top1", "top_k", "loss", "calibration", "per_class", "protocol", "weights_sha256", "fingerprint")
    assert all(getattr(result, key) == getattr(alone, key) for key in same)
    assert result.protocol.preprocessing.resize == 256 and result.protocol.preprocessing.input_size == 224
    assert len(evaluation.agreements) == len(evaluation.effects) == 4
    assert evaluation.results[0].seconds != evaluation.results[2].seconds  # measured separately
    for both in evaluation.agreements:
        assert (
            both.configurations[0] != both.configurations[1]
            and both.engines == ("paddle", "torch")
            and both.top1_agreement == 100
        )
        assert 0 < both.mean_difference < both.max_difference < 1e-4
    effect = evaluation.effects[0]
    assert effect.configurations == ("digits-authors-paddle", "digits-resize256-bilinear-paddle")
    assert effect.difference == pytest.approx(evaluation.results[2].top1 - evaluation.results[0].top1)
    assert effect.interval[0] <= effect.difference <= effect.interval[1] and 0 < effect.p_value <= 1


@pytest.mark.slow
@needs_paddle
@needs_torch
def test_disagreement_of_engines_is_reported(folder, digits_pth, monkeypatch):
    """With negated logits, the top-1 class differs on every image and the difference is twice the logit."""
    compute = TorchEngine.__call__
    logits = []

    def negated(self, images):
        logits.append(compute(self, images))
        return -logits[-1]

    monkeypatch.setattr(TorchEngine, "__call__", negated)
    (both,) = evaluate(digits_pth, folder, engines=("paddle", "torch"), device="cpu").agreements
    (outputs,) = logits
    assert both.top1_agreement == 0
    assert both.max_difference == pytest.approx(2 * np.abs(outputs).max(), rel=1e-4)
    assert both.mean_difference == pytest.approx(2 * np.abs(outputs).mean(), rel=1e-4)


def test_processes_with_different_images_are_rejected():
    """Otherwise images would be counted twice or not at all."""

    def identity(images):
        return {"weights": ["a"], "list_of_images": images}

    class SecondProcess:
        rank = 1

        def broadcast(self, value):
            return json.dumps(identity("x")).encode()

    assert agreed_identity(identity("x"), SecondProcess())["list_of_images"] == "x"
    with pytest.raises(DoesNotFit, match=r"process 1 .*process 0.*list of images"):
        agreed_identity(identity("y"), SecondProcess())


def test_weights_with_different_classes_are_rejected(folder, digits_pth, tmp_path):
    three = write_pth(tmp_path / "three.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=3)))
    with pytest.raises(DoesNotFit, match=r"three.pth has 3 classes .*digits.pth has 10; .*separately"):
        evaluate([digits_pth, three], folder)
    from fcvit import convert

    named = tmp_path / "named.safetensors"
    convert(digits_pth, named, classes=tuple(ClassName(str(9 - i), f"n{i}") for i in range(10)), verify=False)
    with pytest.raises(DoesNotFit, match=r"named.safetensors.*class names.*--classes FILE"):
        evaluate([digits_pth, named], folder)


# Classes


@pytest.mark.slow
@needs_paddle
def test_a_class_list_maps_the_folders(folder, digits_pth, tmp_path):
    """With a reversed class list, the true class of every image changes."""
    plain = evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "plain")
    (tmp_path / "classes.txt").write_text("\n".join(str(9 - i) for i in range(10)))
    evaluation = evaluate(digits_pth, folder, classes=tmp_path / "classes.txt", device="cpu", folder=tmp_path / "run")
    mapping = json.loads((tmp_path / "run" / "digits-authors" / "metrics.json").read_text())["mapping"]
    assert (
        mapping == {str(i): 9 - i for i in range(10)} and evaluation.rule == "class folders are the model's class ids"
    )
    before, after = rows(tmp_path / "plain"), rows(tmp_path / "run")
    assert [int(a["class_1"]) for a in after] == [9 - int(b["class_1"]) for b in before]
    assert evaluation.results[0].loss != plain.results[0].loss


@needs_paddle
@pytest.mark.slow
def test_predictions_can_be_restricted_to_the_classes_of_the_data(folder, digits_pth, tmp_path):
    for label in (0, 1, 4, 5, 6, 8, 9):
        shutil.rmtree(folder / str(label))
    (tmp_path / "classes.txt").write_text("\n".join(str(i) for i in range(10)))
    options = {"classes": tmp_path / "classes.txt", "device": "cpu"}
    evaluate(digits_pth, folder, **options, save_logits=True, folder=tmp_path / "all")
    result = evaluate(digits_pth, folder, **options, class_subset="present", folder=tmp_path / "part").results[0]
    assert (result.classes, result.k, result.top_k) == (3, 3, 100)
    logits = np.load(tmp_path / "all" / "digits-authors" / "logits.npy")[:, [2, 3, 7]].astype(np.float64)
    best = np.array([2, 3, 7])[logits.argmax(1)]
    assert [int(row["class_1"]) for row in rows(tmp_path / "part")] == best.tolist()
    truth = np.array([[2, 3, 7].index(int(row["truth"])) for row in rows(tmp_path / "part")])
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(truth)), truth]
    assert result.loss == pytest.approx(loss.mean(), rel=1e-6)
    drawn = evaluate(digits_pth, folder, **options, class_subset="present", subset=2).results[0]
    assert (drawn.images, drawn.classes) == (
        2,
        3,
    )  # the classes of all data, not of the sample
    (tmp_path / "subset.txt").write_text("2\n3\n7\n9\n")
    assert evaluate(digits_pth, folder, **options, class_subset=tmp_path / "subset.txt").results[0].classes == 4
    (tmp_path / "subset.txt").write_text("2\n3\n")
    with pytest.raises(DoesNotFit, match=r"subset.txt: .* 1 classes .*7"):
        evaluate(digits_pth, folder, **options, class_subset=tmp_path / "subset.txt")


@needs_paddle
def test_mismatched_classes_are_reported_before_an_engine_is_created(folder, digits_pth, monkeypatch):
    calls = count_calls(monkeypatch, None)
    settings = "fcvit.evaluation.settings"
    monkeypatch.setattr(f"{settings}.create_engine", lambda *_: calls.append("engine created") or 1 / 0)
    (folder / "eleven").mkdir()
    for engines in ("auto", ("paddle",)):
        with pytest.raises(DoesNotFit, match=r"11 class folders .* 10 outputs"):
            evaluate_with_any_engine(digits_pth, folder, engines=engines)
    assert not calls


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """Weights of the small network with ImageNet's 1,000 outputs."""
    spec = ModelSpec(DIGITS.variant, 1000)
    return write_pth(tmp_path_factory.mktemp("weights") / "thousand.pth", synthetic_tensors(spec))


@pytest.fixture
def validation(tmp_path):
    """Twelve images with names of ImageNet's validation set, and their list."""
    generator = np.random.default_rng(1)
    (tmp_path / "val").mkdir()
    lines = []
    for number in range(1, 13):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        Image.fromarray(generator.integers(0, 256, (50, 60, 3), np.uint8)).save(tmp_path / "val" / name)
        lines.append(f"{name} {37 * number}")
    (tmp_path / "val_list.txt").write_text("\n".join(lines))
    return tmp_path / "val"


@needs_paddle
@pytest.mark.slow
def test_imagenet_real(validation, thousand, tmp_path):
    """An image is correct if its top-1 class is one of its labels. Images without labels are excluded."""
    options = {"list_file": tmp_path / "val_list.txt", "device": "cpu"}
    evaluate(thousand, validation, **options, folder=tmp_path / "run")
    from fcvit.data.classes import imagenet

    index = {c.id: i for i, c in enumerate(imagenet())}
    best = [index[row["class_1"]] for row in rows(tmp_path / "run", "thousand-authors")]
    labels = [[] for _ in range(50_000)]
    for number, guess in enumerate(best):
        labels[number] = [guess, 999] if number < 3 else [(guess + 1) % 1000]
    labels[5] = []
    (tmp_path / "real.json").write_text(json.dumps(labels))
    options["real"] = tmp_path / "real.json"
    result = evaluate(thousand, validation, **options).results[0]
    assert result.real.images == 11 and result.real.top1 == pytest.approx(300 / 11)
    assert result.real.interval[0] < result.real.top1 < result.real.interval[1]
    shuffled = "\n".join(c.id for c in reversed(imagenet()))
    (tmp_path / "shuffled.txt").write_text(shuffled)
    with pytest.raises(DoesNotFit, match=r"--real.*order.*--classes FILE"):
        evaluate(thousand, validation, **options, classes=tmp_path / "shuffled.txt")
    # With a class subset, predictions are indices into the subset, but the labels are not.
    evaluate(thousand, validation, **options, class_subset="present", folder=tmp_path / "part")
    guesses = [index[row["class_1"]] for row in rows(tmp_path / "part", "thousand-authors")]
    (tmp_path / "real.json").write_text(json.dumps([[guess] for guess in guesses] + [[]] * 49_988))
    assert evaluate(thousand, validation, **options, class_subset="present").results[0].real.top1 == 100


@pytest.mark.slow
@needs_paddle
def test_the_comparison_with_the_published_figure(validation, thousand, tmp_path, monkeypatch):
    """Compare as a published variant, which replaces the small variant in this test."""
    from fcvit.models.variants import VARIANTS, published
    from fcvit.tasks.classification import published as protocols

    monkeypatch.setattr(protocols, "published", lambda variant: published(VARIANTS["fcvit_b12"]))
    options = {"list_file": tmp_path / "val_list.txt", "device": "cpu"}
    ours, port = evaluate(thousand, validation, **options, protocol="both").results
    assert (ours.published.whose, ours.published.figure) == ("the authors", 80.9)
    assert (port.published.whose, port.published.figure) == ("the earlier port", 80.5)
    assert ours.published.verdict == "inconsistent"  # twelve images, none correct
    for module in ("tasks.classification.evaluation", "tasks.classification.published"):
        monkeypatch.setattr(f"fcvit.{module}.VALIDATION_IMAGES", 12)
    assert evaluate(thousand, validation, **options).results[0].published.verdict == "differs"
    (validation / "ILSVRC2012_val_00000003.JPEG").write_bytes(b"")  # an unreadable image does not make it a sample
    result = evaluate(thousand, validation, **options).results[0]
    assert result.published.verdict == "differs" and "1 unreadable image" in result.published.reason
    result = evaluate(thousand, validation, **options, subset=11).results[0]
    assert result.published.verdict == "inconsistent" and result.images + result.unreadable == 11
    (validation / "ILSVRC2012_val_00000004.JPEG").rename(validation / "x.JPEG")
    text = (tmp_path / "val_list.txt").read_text()
    (tmp_path / "val_list.txt").write_text(text.replace("ILSVRC2012_val_00000004", "x"))
    assert evaluate(thousand, validation, **options).results[0].published.verdict == "not comparable"


# Images


@pytest.mark.slow
@needs_paddle
def test_unreadable_images_are_listed_and_skipped(folder, digits_pth):
    (folder / "3" / "broken.png").write_bytes(b"not an image")
    (folder / "0" / "00 empty.png").touch()
    evaluation = evaluate(digits_pth, folder, batch_size=5, device="cpu")
    assert (evaluation.results[0].images, evaluation.results[0].unreadable) == (23, 2)
    assert evaluation.unreadable == (
        "0/00 empty.png: not a readable image: an empty file",
        "3/broken.png: not a readable image: a text file",
    )
    with pytest.raises(BadImages, match=r"0/00 empty.png: not a readable image.*--strict"):
        evaluate(digits_pth, folder, batch_size=5, device="cpu", strict=True)
    with pytest.raises(BadImages, match=r"0/00 empty.png"):
        evaluate(digits_pth, folder, batch_size=5, device="cpu", strict=True, workers=1)


@needs_paddle
def test_a_data_set_without_readable_images_is_an_error(tmp_path, digits_pth):
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
    (tmp_path / "data" / "3" / "x.png").touch()
    with pytest.raises(BadImages, match=r"none of .*1 images can be used.*x.png"):
        evaluate(digits_pth, tmp_path / "data", device="cpu", folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@needs_paddle
def test_image_names_that_are_not_valid_text(folder, digits_pth, tmp_path):
    strange = os.fsencode(folder / "3") + b"/\xff.png"
    try:
        shutil.copyfile(folder / "0" / "00 with space.png", strange)
    except OSError:
        pytest.skip("this file system only accepts names that are valid text")
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    assert b"3/\xff.png" in (tmp_path / "run" / "digits-authors" / "predictions.csv").read_bytes()


@needs_paddle
def test_nan_logits_are_an_error(folder, tmp_path, digits_tensors):
    """Comparisons with NaN are false, so the true class would otherwise rank first."""
    huge = dict(digits_tensors)  # the weights are finite, but the logits are not
    huge["head.weight"] = np.full_like(huge["head.weight"], 3e38)
    path = write_pth(tmp_path / "huge.pth", huge)
    with pytest.raises(NumbersDisagree, match=r"0/00 with space.png are not finite"):
        evaluate(path, folder, device="cpu")


# Options


@needs_paddle
def test_a_changed_preprocessing_is_named_custom(folder, digits_pth):
    result = evaluate(digits_pth, folder, engines="paddle", preprocessing={"input_size": 48}, device="cpu").results[0]
    assert (result.protocol.name, result.protocol.changed) == ("custom", {"input_size": (32, 48)})
    assert result.name == "digits-custom" and result.protocol.preprocessing.crop_fraction == 1.0


@needs_paddle
@pytest.mark.slow
def test_the_seed_determines_the_subset(folder, digits_pth, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        evaluate(digits_pth, folder, subset=12, seed=seed, device="cpu", folder=tmp_path / name)
    one, again, two = ([row["path"] for row in rows(tmp_path / name)] for name in ("one", "again", "two"))
    assert one == again != two and len(two) == 12
    assert all(row["truth"] == row["path"][0] for row in rows(tmp_path / "two"))  # the labels are still correct


@needs_paddle
@pytest.mark.slow
def test_the_automatic_batch_size_is_logged_and_stored(folder, digits_pth, tmp_path, notes):
    evaluation = evaluate(digits_pth, folder, batch_size="auto", device="cpu", folder=tmp_path / "run")
    size = evaluation.results[0].batch_size
    assert size >= 8 and notes[1].startswith(f"batch size: {size}")
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["request"]["settings"]
    assert stored["batch_size"] == size  # a resumed run must use the same size


@needs_torch
@pytest.mark.slow
def test_a_lower_precision_is_compared_with_float32(folder, digits_pth):
    evaluation = evaluate(digits_pth, folder, engines="torch", precision="bfloat16", device="cpu")
    exact, half = evaluation.results
    assert exact.precision == "float32" and half.precision == "bfloat16"
    assert 1e-5 < abs(half.loss - exact.loss) < 0.2
    (effect,) = evaluation.effects
    assert effect.of == "precision" and effect.configurations == (exact.name, half.name)
    assert effect.difference == pytest.approx(half.top1 - exact.top1)
    assert effect.interval[0] <= effect.difference <= effect.interval[1]
    (agreement,) = evaluation.agreements
    assert agreement.engines == ("torch (float32)", "torch (bfloat16)") and 1e-5 < agreement.max_difference < 0.5


@needs_torch
@pytest.mark.slow
def test_effects_of_precision_and_protocol_are_separate(folder, digits_pth):
    evaluation = evaluate(digits_pth, folder, engines="torch", precision="bfloat16", protocol="both", device="cpu")
    names = [row.name for row in evaluation.results]
    assert len(set(names)) == 4
    pairs = {
        (effect.of, names.index(effect.configurations[0]), names.index(effect.configurations[1]))
        for effect in evaluation.effects
    }
    assert pairs == {("precision", 0, 1), ("precision", 2, 3), ("protocol", 0, 2), ("protocol", 1, 3)}


@needs_paddle
@pytest.mark.parametrize("engine", ["paddle", "torch"])
@pytest.mark.slow
def test_an_unsupported_precision_is_rejected(folder, digits_pth, engine):
    if not frameworks.installed(engine):
        pytest.skip(f"{engine} is not installed")
    with pytest.raises(UsageError, match=r"float16: .* on cpu; use (float32|.*bfloat16)"):
        evaluate(digits_pth, folder, engines=engine, precision="float16", device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": "many"},
        {"workers": -1},
        {"engines": ()},
        {"engines": ("paddle", "paddle")},
        {"engines": ("onnx",)},
        {"protocol": "x"},
        {"precision": "int8"},
        {"protocol": "both", "preprocessing": {"input_size": 64}},
        {"subset": 24},
    ],
)
def test_invalid_options_are_rejected(folder, digits_pth, options):
    with pytest.raises(UsageError):
        evaluate(digits_pth, folder, **options)
    with pytest.raises(UsageError, match="at least one file"):
        evaluate([], folder)


def test_weights_without_a_head_and_missing_data_are_rejected(folder, tmp_path, digits_pth):
    bare = write_pth(tmp_path / "bare.pth", synthetic_tensors(ModelSpec(DIGITS.variant, 0)))
    with pytest.raises(DoesNotFit, match=r"bare.pth: .* has no head"):
        evaluate(bare, folder)
    with pytest.raises(UnreadableFile, match="no such folder or tar"):
        evaluate(digits_pth, tmp_path / "nowhere")


@needs_paddle
def test_the_device_of_the_caller_is_restored(folder, digits_pth, monkeypatch):
    device = frameworks.import_framework("paddle").device
    calls = []
    monkeypatch.setattr(device, "get_device", lambda: "gpu:7")
    monkeypatch.setattr(device, "set_device", calls.append)
    with pytest.raises(ZeroDivisionError), frameworks.on_paddle_device("cpu"):
        raise ZeroDivisionError
    assert calls == ["cpu", "gpu:7"]


@needs_paddle
def test_the_automatic_engine_is_chosen_once(folder, digits_pth, tmp_path, monkeypatch):
    """run.json stores the chosen engine, so that a resumed run uses it."""
    from fcvit.evaluation import settings

    create = settings.create_engine
    chosen = {"auto": "paddle"}
    monkeypatch.setattr(settings, "create_engine", lambda name, *given: create(chosen.get(name, name), *given))
    done = evaluate(digits_pth, folder, engines="auto", device="cpu", folder=tmp_path / "run")
    assert done.results[0].engine == "paddle"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["request"]["settings"]["engines"] == "paddle"


@pytest.mark.slow
@needs_paddle
def test_weights_in_memory_give_the_same_result_as_their_file(folder, digits_pth):
    from fcvit.weights.reading import read_weights

    one, other = (evaluate(w, folder, device="cpu").results[0] for w in (digits_pth, read_weights(digits_pth)))
    assert (one.top1, one.loss, one.weights) == (other.top1, other.loss, other.weights)
