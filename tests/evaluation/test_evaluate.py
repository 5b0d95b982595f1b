"""Evaluation: figures that hang on nothing but weights, images and protocol, and all that a run leaves."""

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
from fcvit.commands.evaluate import evaluate as evaluate_by
from fcvit.data.classes import ClassName
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UnreadableFile, UsageError
from fcvit.evaluation.logits import LogitFiles
from fcvit.evaluation.results import NotWritten
from fcvit.evaluation.runner import _agreed, resume
from fcvit.inference.engines import PaddleEngine, TorchEngine
from fcvit.metrics.classification import calibration, wilson
from fcvit.models.spec import ModelSpec
from fcvit.tasks.classification import page, results
from fcvit.weights.synthetic import synthetic_tensors

# The network itself, whichever engine is the fastest here; tests/deploy has those.
evaluate = functools.partial(evaluate_by, engines=("paddle",))


@pytest.fixture
def folder(tmp_path):
    """23 noisy images in ten class folders, an odd number for any batch."""
    generator = np.random.default_rng(0)
    for index in range(23):
        path = tmp_path / "data" / str(index % 10) / f"{index:02d} with space.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def few(folder):
    """One image of each class: networks at 224 pixels take their time."""
    for path in sorted(folder.glob("*/*.png"))[::-1]:
        if len(list(path.parent.iterdir())) > 1:
            path.unlink()
    return folder


@pytest.fixture(autouse=True)
def charts(request):
    """Only tests that are marked draw charts."""
    if request.node.get_closest_marker("charts") is None:
        request.getfixturevalue("no_charts")


def files(run, lane="digits-authors"):
    """Everything of a result that must not hang on how it was computed."""
    found = {path.name: path.read_bytes() for path in (run / lane).iterdir()}
    figures = json.loads(found.pop("metrics.json"))
    assert figures.pop("seconds") > 0
    shown = run / "report.html"
    return found | {"metrics": figures} | ({shown.name: shown.read_bytes()} if shown.exists() else {})


def rows(run, lane="digits-authors"):
    with (run / lane / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# The same numbers


@pytest.mark.slow
@needs_paddle
@pytest.mark.charts
def test_workers_and_interruptions_change_no_byte(folder, digits_pth, tmp_path, monkeypatch):
    """One batch size: predictions, pictures, page and figures are the same bytes."""
    (folder / "5" / "broken.png").touch()
    options = {"batch_size": 4, "device": "cpu"}
    evaluate(digits_pth, folder, **options, workers=0, folder=tmp_path / "alone")
    evaluate(digits_pth, folder, **options, workers=2, folder=tmp_path / "two")
    whole = files(tmp_path / "alone")
    assert len(whole) == 7 and files(tmp_path / "two") == whole
    run = tmp_path / "again"
    for patience in (2, 1, None):  # interrupted after two batches, after one more, then not
        with monkeypatch.context() as patch:
            calls = count_calls(patch, patience)
            try:
                resume(run) if run.exists() else evaluate(digits_pth, folder, **options, folder=run)
                assert patience is None
            except KeyboardInterrupt:
                assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert len(calls) == 3  # of six batches, three were done before
    assert files(run) == whole
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert len(json.loads((run / "run.json").read_text())["continued"]) == 2


def count_calls(patch, patience):
    """Make Paddle's engine interrupt after some batches; the batches that it computed."""
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
def test_other_batch_sizes_give_the_same_figures(folder, digits_pth, tmp_path):
    """Float32 sums depend on the batch: logits to 1e-5, figures equal."""
    runs = [tmp_path / f"run{size}" for size in (23, 4, 50)]
    for run, size in zip(runs, (23, 4, 50), strict=True):
        evaluate(digits_pth, folder, batch_size=size, device="cpu", folder=run, save_logits=True)
    logits = [np.load(run / "digits-authors" / "logits.npy") for run in runs]
    first = json.loads((runs[0] / "digits-authors" / "metrics.json").read_text())
    assert logits[0].shape == (23, 10) and first["images"] == 23
    for run, other in zip(runs[1:], logits[1:], strict=True):
        assert np.abs(other - logits[0]).max() <= 1e-5
        figures = json.loads((run / "digits-authors" / "metrics.json").read_text())
        for key in ("images", "top1", "top_k", "per_class", "top1_interval", "fingerprint"):
            assert figures[key] == first[key]
        assert figures["loss"] == pytest.approx(first["loss"], abs=1e-6)


@needs_paddle
def test_logits_that_are_kept_are_those_of_the_predictions(folder, digits_pth, tmp_path):
    (folder / "5" / "broken.png").touch()  # the last but some: a row of its own, not a number
    evaluate(digits_pth, folder, batch_size=5, device="cpu", folder=tmp_path / "run", save_logits=True)
    logits = np.load(tmp_path / "run" / "digits-authors" / "logits.npy")
    left_out = np.isnan(logits).all(axis=1)
    assert logits.dtype == np.float32 and left_out.sum() == 1 and np.isfinite(logits[~left_out]).all()
    assert [row["class_1"] for row in rows(tmp_path / "run")] == [str(i) for i in logits[~left_out].argmax(1)]


@needs_paddle
@pytest.mark.parametrize("shared", [True, False])
def test_logits_of_zero_are_logits(folder, digits_tensors, tmp_path, monkeypatch, shared, notes):
    """A row of zeros may be a result; what went to a disk of another machine is noticed all the same."""
    zero = {name: np.zeros_like(t) if name.startswith("head.") else t for name, t in digits_tensors.items()}
    path = write_pth(tmp_path / "zero.pth", zero)
    if not shared:
        for method in ("write", "mark"):
            monkeypatch.setattr(LogitFiles, method, lambda *_: None)
    said = notes
    options = {"batch_size": 12, "device": "cpu", "folder": tmp_path / "run", "save_logits": True}
    evaluate(path, folder, **options)
    kept = tmp_path / "run" / "zero-authors" / "logits.npy"
    assert kept.exists() == shared and any("does not share the folder" in text for text in said) != shared
    if shared:
        assert np.load(kept).shape == (23, 10) and not np.load(kept).any()
        resume(tmp_path / "run")
        assert kept.exists()


@needs_paddle
def test_a_full_disk_at_the_end_loses_no_figure(folder, digits_pth, tmp_path, monkeypatch, capsys):
    """Figures are given, the file and the way to go on are named, and nothing is computed twice."""
    usual, run = results.write_result, tmp_path / "a run"

    def full(lane, *_rest):
        raise UnreadableFile(f"{lane}/predictions.csv: cannot be written: No space left on device")

    monkeypatch.setattr(results, "write_result", full)
    again = f"to write them: fcvit eval --resume '{run}'"
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


@needs_paddle
@pytest.mark.parametrize("what", ["journal", "logits", "page"])
def test_a_full_disk_is_named_with_the_way_to_go_on(folder, digits_pth, tmp_path, monkeypatch, what):
    def full(*_rest):
        raise OSError(28, "No space left on device")

    match what:
        case "journal":
            usual = Path.open

            def opened(path, *how, **options):
                return FullFile(path, "w") if path.suffix == ".journal" else usual(path, *how, **options)

            monkeypatch.setattr(Path, "open", opened)
            expected = r"0-0.journal: No space left on device; go on with: fcvit eval --resume"
        case "logits":
            monkeypatch.setattr(os, "posix_fallocate", full)
            expected = r"logits.npy: No space left on device; go on with: fcvit eval --resume"
        case "page":
            monkeypatch.setattr(page, "write_page", full)
            expected = r"run: No space left on device; the figures are complete; to write them: fcvit eval --resume"
    with pytest.raises(UnreadableFile, match=expected):
        evaluate(digits_pth, folder, batch_size=12, device="cpu", folder=tmp_path / "run", save_logits=True)


class FullFile(io.FileIO):
    """A file on a full disk."""

    def write(self, _content):
        raise OSError(28, "No space left on device")


@needs_paddle
def test_a_finished_run_is_only_written_again(folder, digits_pth, tmp_path, monkeypatch):
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    whole = files(tmp_path / "run")
    for name in ("predictions.csv", "worst.png"):
        (tmp_path / "run" / "digits-authors" / name).unlink()
    calls = count_calls(monkeypatch, None)
    resume(tmp_path / "run")
    assert not calls and files(tmp_path / "run") == whole


@needs_paddle
@pytest.mark.slow
def test_a_run_goes_on_with_the_same_images_and_weights_elsewhere(folder, digits_pth, tmp_path, monkeypatch, no_charts):
    evaluate(digits_pth, folder, batch_size=4, device="cpu", folder=tmp_path / "whole")
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
    with pytest.raises(DoesNotFit, match="is not the image that the run in"):
        resume(run, moved={"data": resized, "weights": [weights]})
    with pytest.raises(UsageError, match="--weights: 2 given, the run is of 1"):
        resume(run, moved={"data": data, "weights": [weights, weights]})
    with pytest.raises(UsageError, match=r"expected the name digits\.pth"):
        resume(run, moved={"weights": [data]})
    with pytest.raises(UsageError, match="list_file: the run began without"):
        resume(run, moved={"data": data, "weights": [weights], "list_file": weights})
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    from fcvit.cli import main

    words = ["eval", "--resume", str(run), "--data", str(data), "--weights", str(weights), "--workers", "0"]
    assert main(words) == 0 and rows(run) == rows(tmp_path / "whole")
    assert json.loads((run / "run.json").read_text())["request"]["data"] == str(data)
    assert main(words[:3]) == 0, "from now on it is known where they are"


@needs_paddle
def test_a_run_goes_on_only_with_what_it_began_with(folder, digits_pth, tmp_path, monkeypatch, digits_tensors):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        count_calls(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(digits_pth, folder, batch_size=4, device="cpu", folder=run)
    shutil.copyfile(folder / "1" / "01 with space.png", folder / "1" / "new.png")
    with pytest.raises(DoesNotFit, match="list of images changed since the run began"):
        resume(run)
    (folder / "1" / "new.png").unlink()
    write_pth(digits_pth, {name: tensor + 1 for name, tensor in digits_tensors.items()})
    with pytest.raises(DoesNotFit, match="weights changed since"):
        resume(run)
    write_pth(digits_pth, digits_tensors)
    with monkeypatch.context() as patch:
        patch.setattr("fcvit.run_folder.versions", lambda: {"paddlepaddle": "4.0"})
        with pytest.raises(DoesNotFit, match=r"packages changed \(.*paddlepaddle .* to 4.0.*\) since"):
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
        with pytest.raises(UnreadableFile, match=r"not those that the run began with|without the settings"):
            resume(run)
    (run / "run.json").write_text('{"command": "eval"}')
    with pytest.raises(UnreadableFile, match="without the settings"):
        resume(run)
    (run / "run.json").write_text('{"command": "quickstart"}')
    with pytest.raises(UsageError, match="not a run of fcvit eval"):
        resume(run)


# What a run leaves


@needs_paddle
@pytest.mark.slow
@pytest.mark.charts
def test_what_a_run_leaves(folder, digits_pth, tmp_path):
    found = evaluate(digits_pth, folder, batch_size=8, device="cpu", folder=tmp_path / "run")
    run, lane = tmp_path / "run", tmp_path / "run" / "digits-authors"
    assert sorted(p.name for p in run.iterdir()) == ["digits-authors", "journals", "report.html", "run.json"]
    assert sorted(p.name for p in lane.iterdir()) == [
        "confusion.png",
        "metrics.json",
        "per_class.csv",
        "predictions.csv",
        "reliability.png",
        "worst.png",
    ]
    (result,) = found.results
    metrics = json.loads((lane / "metrics.json").read_text())
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
    with (lane / "per_class.csv").open(newline="") as file:
        classes = {row["class"]: row for row in csv.DictReader(file)}
    assert sum(int(row["images"]) for row in classes.values()) == 23
    taken = [row["class_1"] for row in predicted if row["truth"] == "3" and row["class_1"] != "3"]
    assert classes["3"]["mistaken_for"] in taken
    assert int(classes["3"]["times"]) == max(taken.count(name) for name in taken)
    for name in ("worst.png", "confusion.png", "reliability.png"):
        with Image.open(lane / name) as picture:
            assert min(picture.size) > 100


@needs_paddle
def test_every_figure_follows_from_the_logits(folder, digits_pth, tmp_path):
    """Recomputed in plain NumPy, from logits.npy and the names of the folders alone."""
    found = evaluate(digits_pth, folder, batch_size=6, device="cpu", folder=tmp_path / "run", save_logits=True).results[
        0
    ]
    logits = np.load(tmp_path / "run" / "digits-authors" / "logits.npy").astype(np.float64)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    truth = np.array([int(name[0]) for name in names])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    place = np.argmax(order == truth[:, None], axis=1)
    assert place.max() > 5 and (place == 5).any()  # else top-5 would be no test
    assert found.top1 == pytest.approx(100 * (place == 0).mean())
    assert found.top_k == pytest.approx(100 * (place < 5).mean())
    assert found.top1_interval == wilson(int((place == 0).sum()), 23)
    assert found.top_k_interval == wilson(int((place < 5).sum()), 23)
    assert found.loss == pytest.approx(-np.log(probabilities[np.arange(23), truth]).mean(), rel=1e-6)
    expected = calibration(probabilities.max(1), place == 0)
    assert found.calibration.counts == expected.counts
    assert found.calibration.error == pytest.approx(expected.error, abs=1e-6)
    for row, name, best, sure, label in zip(rows(tmp_path / "run"), names, order, probabilities, truth, strict=True):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert (row["path"], row["truth"], row["image"]) == (name, str(label), digest[:16])
        for k in range(1, 6):
            assert row[f"class_{k}"] == str(best[k - 1])
            assert float(row[f"probability_{k}"]) == pytest.approx(sure[best[k - 1]], abs=1e-5)
    for row in found.per_class:
        members = truth == int(row.id)
        assert (row.images, row.top1) == (members.sum(), pytest.approx(100 * (place[members] == 0).mean()))
        assert row.top_k == pytest.approx(100 * (place[members] < 5).mean())


@needs_paddle
@pytest.mark.slow
def test_the_fingerprint_is_of_contents_and_classes(folder, digits_pth):
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
def test_the_sheet_shows_the_surest_mistakes(folder, digits_pth, tmp_path, monkeypatch):
    sheets = []
    draw = results.image_grid
    monkeypatch.setattr(results, "image_grid", lambda tiles, title: sheets.append((tiles, title)) or draw(tiles, title))
    found = evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run").results[0]
    ((tiles, title),) = sheets
    wrong = [row for row in rows(tmp_path / "run") if row["truth"] != row["class_1"]]
    wrong.sort(key=lambda row: -float(row["probability_1"]))
    assert [(t.truth, t.predicted) for t in tiles] == [(row["truth"], row["class_1"]) for row in wrong]
    assert all(tile.image.size == (30, 40) for tile in tiles)
    assert title.startswith(f"{len(wrong)} of {found.images} wrong")


@needs_paddle
def test_an_image_that_goes_away_costs_its_picture_and_nothing_else(folder, digits_pth, tmp_path, monkeypatch):
    compute = PaddleEngine.__call__

    def last_look(self, images):
        out = compute(self, images)
        shutil.rmtree(folder)
        return out

    monkeypatch.setattr(PaddleEngine, "__call__", last_look)
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 23


@needs_paddle
@pytest.mark.slow
def test_names_with_anything_in_them_come_back_from_the_table(folder, digits_pth, tmp_path):
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
def test_class_names_with_anything_in_them_come_back_from_the_table(folder, digits_pth, tmp_path):
    """Formulas of a spreadsheet, lines, escapes: the sheet is drawn, and the result can be compared and continued."""
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
    assert set(read.truth) == set(STRANGE) == set(read.names) and "=3/x.png" in {path for _, path in read.images}
    assert compare(tmp_path / "run", tmp_path / "again").differing == ()
    before = files(tmp_path / "run")
    resume(tmp_path / "run")
    assert files(tmp_path / "run") == before


@needs_paddle
def test_folders_whose_names_are_no_text_name_the_classes(tmp_path, folder):
    try:
        (folder / "0").rename(folder / os.fsdecode(b"\xff"))
    except OSError:
        pytest.skip("this file system takes only names that are text")
    for label in range(2, 10):
        shutil.rmtree(folder / str(label))
    two = write_pth(tmp_path / "two.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=2)))
    evaluate(two, folder, device="cpu", folder=tmp_path / "run")
    evaluate(two, folder, device="cpu", folder=tmp_path / "again")
    assert compare(tmp_path / "run", tmp_path / "again").images == 6


@needs_paddle
@pytest.mark.slow
def test_classes_in_another_order_are_noticed(folder, tmp_path, monkeypatch, notes):
    """In a note, the figures and the table; labels that count from 1 are called so."""
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
        noticed = [note for note in notes if "look permuted" in note]
        assert noticed == ([result.hint] if name != "right" else [])
        assert ("count from 1" in result.hint) == (name == "from1")


@needs_paddle
def test_folders_that_are_all_that_is_known_name_the_classes(tmp_path, folder):
    for label, name in enumerate(("cat", "cow", "dog")):
        (folder / str(label)).rename(folder / name)
    for label in range(3, 10):
        shutil.rmtree(folder / str(label))
    three = write_pth(tmp_path / "three.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=3)))
    found = evaluate(three, folder, device="cpu", folder=tmp_path / "run").results[0]
    assert [row.name for row in found.per_class] == ["cat", "cow", "dog"]
    assert {row["truth"] for row in rows(tmp_path / "run", "three-authors")} == {"cat", "cow", "dog"}


@needs_paddle
def test_a_run_is_not_written_among_its_images(folder, digits_pth):
    for place in (folder, folder / "run", folder / "3" / "run"):
        with pytest.raises(UsageError, match="is inside --data"):
            evaluate(digits_pth, folder, device="cpu", folder=place)
    assert sorted(path.name for path in folder.iterdir()) == [str(i) for i in range(10)]


@needs_paddle
def test_one_run_is_not_continued_twice_at_once(folder, digits_pth, tmp_path):
    import fcvit.run_folder

    if fcvit.run_folder.fcntl is None:
        pytest.skip("no file locks here")
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
def test_the_page_shows_it_all(few, digits_pth, tmp_path):
    (few / "0" / "<b>bad.png").touch()
    evaluate([digits_pth, digits_pth], few, protocol="both", device="cpu", folder=tmp_path / "run")
    shown = (tmp_path / "run" / "report.html").read_text("utf-8")
    metrics = json.loads((tmp_path / "run" / "digits-authors" / "metrics.json").read_text())
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", shown)
    start = cells.index("digits-authors")
    assert cells[start + 1 : start + 6] == [
        f"{metrics['top1']:.2f}",
        f"{metrics['top1_interval'][0]:.2f} to {metrics['top1_interval'][1]:.2f}",
        f"{metrics['top_k']:.2f}",
        f"{metrics['loss']:.4f}",
        f"{metrics['calibration']['error']:.4f}",
    ]
    listed = [c["id"] for c in sorted(metrics["per_class"], key=lambda c: (c["top1"], c["id"]))]
    table = shown[shown.index("Classes, the worst first") :]
    assert re.findall(r"<tr>\s*<t[dh][^>]*>(\d)</t", table)[:10] == listed
    for lane in ("digits-authors", "digits-resize256-bilinear", "digits-authors-2", "digits-resize256-bilinear-2"):
        assert f">{lane}</" in shown
    assert shown.count("data:image/png;base64") == 12
    assert "&lt;b&gt;bad.png" in shown and "not an image" in shown and "McNemar" in shown


@needs_paddle
@pytest.mark.slow
@pytest.mark.charts
def test_without_the_extra_there_are_figures_but_no_charts(folder, digits_pth, tmp_path, monkeypatch, no_charts, notes):
    heard = notes
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    monkeypatch.undo()
    left = sorted(p.name for p in (tmp_path / "run" / "digits-authors").iterdir())
    assert left == ["metrics.json", "per_class.csv", "predictions.csv", "worst.png"]
    assert "no charts" in heard[-1] and f"--resume {tmp_path / 'run'}" in heard[-1]
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


@needs_paddle
def test_without_a_folder_nothing_is_written(folder, digits_pth, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(digits_pth, folder, device="cpu").results[0].images == 23
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UsageError, match="needs a folder"):
        evaluate(digits_pth, folder, device="cpu", save_logits=True)


# One pass


@pytest.mark.slow
@pytest.mark.slow
@needs_paddle
@needs_torch
def test_several_weights_protocols_and_engines_in_one_pass(few, digits_pth, tmp_path, digits_tensors):
    """Each lane is what it is alone; engines are compared with the first, protocols with each other."""
    other = write_pth(
        tmp_path / "other.v2.pth", {n: t[::-1].copy() if t.ndim else t for n, t in digits_tensors.items()}
    )
    options = {"batch_size": 10, "device": "cpu"}
    found = evaluate(
        (digits_pth, other), few, engines=("paddle", "torch"), protocol="both", **options, folder=tmp_path / "all"
    )
    names = [
        f"{w}-{p}-{e}"
        for w in ("digits", "other.v2")
        for p in ("authors", "resize256-bilinear")
        for e in ("paddle", "torch")
    ]
    assert [result.name for result in found.results] == names
    alone = evaluate(other, few, protocol="resize256-bilinear", **options).results[0]
    lane = found.results[6]
    same = ("top1", "top_k", "loss", "calibration", "per_class", "protocol", "weights_sha256", "fingerprint")
    assert all(getattr(lane, key) == getattr(alone, key) for key in same)
    assert lane.protocol.preprocessing.resize == 256 and lane.protocol.preprocessing.input_size == 224
    assert len(found.agreements) == len(found.effects) == 4
    assert found.results[0].seconds != found.results[2].seconds  # each its own
    for both in found.agreements:
        assert (
            both.configurations[0] != both.configurations[1]
            and both.engines == ("paddle", "torch")
            and both.top1_agreement == 100
        )
        assert 0 < both.mean_difference < both.max_difference < 1e-4
    effect = found.effects[0]
    assert effect.configurations == ("digits-authors-paddle", "digits-resize256-bilinear-paddle")
    assert effect.difference == pytest.approx(found.results[2].top1 - found.results[0].top1)
    assert effect.interval[0] <= effect.difference <= effect.interval[1] and 0 < effect.p_value <= 1


@pytest.mark.slow
@needs_paddle
@needs_torch
def test_engines_that_do_not_agree_are_seen(folder, digits_pth, monkeypatch):
    """One of them turned upside down: another class on every image, and twice the logits apart."""
    compute = TorchEngine.__call__
    logits = []

    def turned(self, images):
        logits.append(compute(self, images))
        return -logits[-1]

    monkeypatch.setattr(TorchEngine, "__call__", turned)
    (both,) = evaluate(digits_pth, folder, engines=("paddle", "torch"), device="cpu").agreements
    (sure,) = logits
    assert both.top1_agreement == 0
    assert both.max_difference == pytest.approx(2 * np.abs(sure).max(), rel=1e-4)
    assert both.mean_difference == pytest.approx(2 * np.abs(sure).mean(), rel=1e-4)


def test_processes_that_see_other_images_do_not_go_on():
    """Else images would be counted twice, or never."""

    class Seen:
        def __init__(self, images):
            self.images = images

        def identity(self):
            return {"weights": ["a"], "list_of_images": self.images}

    class Second:
        rank = 1

        def broadcast(self, value):
            return json.dumps(Seen("x").identity()).encode()

    assert _agreed(Seen("x"), Second())["list_of_images"] == "x"
    with pytest.raises(DoesNotFit, match="process 1 does not see what process 0 sees: list of images changed"):
        _agreed(Seen("y"), Second())


def test_weights_that_know_other_classes_are_not_mixed(folder, digits_pth, tmp_path):
    three = write_pth(tmp_path / "three.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=3)))
    with pytest.raises(DoesNotFit, match=r"has 3 classes, .* 10; evaluate them one by one"):
        evaluate([digits_pth, three], folder)
    from fcvit import convert

    named = tmp_path / "named.safetensors"
    convert(digits_pth, named, classes=tuple(ClassName(str(9 - i), f"n{i}") for i in range(10)), verify=False)
    with pytest.raises(DoesNotFit, match="name other classes"):
        evaluate([digits_pth, named], folder)


# Classes


@needs_paddle
def test_a_class_list_maps_the_folders(folder, digits_pth, tmp_path):
    """Reversed, every image has another truth."""
    plain = evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "plain")
    (tmp_path / "classes.txt").write_text("\n".join(str(9 - i) for i in range(10)))
    found = evaluate(digits_pth, folder, classes=tmp_path / "classes.txt", device="cpu", folder=tmp_path / "run")
    mapping = json.loads((tmp_path / "run" / "digits-authors" / "metrics.json").read_text())["mapping"]
    assert mapping == {str(i): 9 - i for i in range(10)} and found.rule == "class folders are the model's class ids"
    before, after = rows(tmp_path / "plain"), rows(tmp_path / "run")
    assert [int(a["class_1"]) for a in after] == [9 - int(b["class_1"]) for b in before]
    assert found.results[0].loss != plain.results[0].loss


@needs_paddle
@pytest.mark.slow
def test_only_the_classes_of_the_data_are_told_apart(folder, digits_pth, tmp_path):
    for label in (0, 1, 4, 5, 6, 8, 9):
        shutil.rmtree(folder / str(label))
    (tmp_path / "classes.txt").write_text("\n".join(str(i) for i in range(10)))
    options = {"classes": tmp_path / "classes.txt", "device": "cpu"}
    evaluate(digits_pth, folder, **options, save_logits=True, folder=tmp_path / "all")
    found = evaluate(digits_pth, folder, **options, class_subset="present", folder=tmp_path / "part").results[0]
    assert (found.classes, found.k, found.top_k) == (3, 3, 100)
    logits = np.load(tmp_path / "all" / "digits-authors" / "logits.npy")[:, [2, 3, 7]].astype(np.float64)
    best = np.array([2, 3, 7])[logits.argmax(1)]
    assert [int(row["class_1"]) for row in rows(tmp_path / "part")] == best.tolist()
    truth = np.array([[2, 3, 7].index(int(row["truth"])) for row in rows(tmp_path / "part")])
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(truth)), truth]
    assert found.loss == pytest.approx(loss.mean(), rel=1e-6)
    drawn = evaluate(digits_pth, folder, **options, class_subset="present", subset=2).results[0]
    assert (drawn.images, drawn.classes) == (2, 3)  # of all the data: a small sample is not an easier task
    (tmp_path / "subset.txt").write_text("2\n3\n7\n9\n")
    assert evaluate(digits_pth, folder, **options, class_subset=tmp_path / "subset.txt").results[0].classes == 4
    (tmp_path / "subset.txt").write_text("2\n3\n")
    with pytest.raises(DoesNotFit, match="images of 1 other classes are there, first 7"):
        evaluate(digits_pth, folder, **options, class_subset=tmp_path / "subset.txt")


@needs_paddle
def test_the_first_batch_is_not_computed_for_classes_that_do_not_fit(folder, digits_pth, monkeypatch):
    calls = count_calls(monkeypatch, None)
    settings = "fcvit.evaluation.settings"
    monkeypatch.setattr(f"{settings}.create_engine", lambda *_: calls.append("an engine is made") or 1 / 0)
    (folder / "eleven").mkdir()
    for engines in ("auto", ("paddle",)):
        with pytest.raises(DoesNotFit, match=r"11 class folders .* 10 outputs"):
            evaluate_by(digits_pth, folder, engines=engines)
    assert not calls


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """The small network with ImageNet's 1,000 outputs."""
    spec = ModelSpec(DIGITS.variant, 1000)
    return write_pth(tmp_path_factory.mktemp("weights") / "thousand.pth", synthetic_tensors(spec))


@pytest.fixture
def validation(tmp_path):
    """Twelve images named as ImageNet's validation set names them, and their list."""
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
    """Right are the images whose best class is among their labels; those without labels do not count."""
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
    found = evaluate(thousand, validation, **options).results[0]
    assert found.real.images == 11 and found.real.top1 == pytest.approx(300 / 11)
    assert found.real.interval[0] < found.real.top1 < found.real.interval[1]
    shuffled = "\n".join(c.id for c in reversed(imagenet()))
    (tmp_path / "shuffled.txt").write_text(shuffled)
    with pytest.raises(DoesNotFit, match="in their usual order, which the model's are not"):
        evaluate(thousand, validation, **options, classes=tmp_path / "shuffled.txt")
    # With a class subset the best class is another number; its label is not.
    evaluate(thousand, validation, **options, class_subset="present", folder=tmp_path / "part")
    guesses = [index[row["class_1"]] for row in rows(tmp_path / "part", "thousand-authors")]
    (tmp_path / "real.json").write_text(json.dumps([[guess] for guess in guesses] + [[]] * 49_988))
    assert evaluate(thousand, validation, **options, class_subset="present").results[0].real.top1 == 100


@pytest.mark.slow
@needs_paddle
def test_the_published_figure_stands_beside(validation, thousand, tmp_path, monkeypatch):
    """For a published variant, which the small one is made to be here."""
    from fcvit.models.variants import VARIANTS, published
    from fcvit.tasks.classification import published as protocols

    monkeypatch.setattr(protocols, "published", lambda variant: published(VARIANTS["fcvit_b12"]))
    options = {"list_file": tmp_path / "val_list.txt", "device": "cpu"}
    ours, port = evaluate(thousand, validation, **options, protocol="both").results
    assert (ours.published.whose, ours.published.figure) == ("the authors", 80.9)
    assert (port.published.whose, port.published.figure) == ("the earlier port", 80.5)
    assert ours.published.verdict == "inconsistent"  # a part: twelve images, none right
    for place in ("tasks.classification.evaluation", "tasks.classification.published"):
        monkeypatch.setattr(f"fcvit.{place}.VALIDATION_IMAGES", 12)
    assert evaluate(thousand, validation, **options).results[0].published.verdict == "differs"
    (validation / "ILSVRC2012_val_00000003.JPEG").write_bytes(b"")  # one left out makes no sample of it
    found = evaluate(thousand, validation, **options).results[0]
    assert found.published.verdict == "differs" and "1 image left out" in found.published.reason
    found = evaluate(thousand, validation, **options, subset=11).results[0]
    assert found.published.verdict == "inconsistent" and found.images + found.unreadable == 11
    (validation / "ILSVRC2012_val_00000004.JPEG").rename(validation / "x.JPEG")
    text = (tmp_path / "val_list.txt").read_text()
    (tmp_path / "val_list.txt").write_text(text.replace("ILSVRC2012_val_00000004", "x"))
    assert evaluate(thousand, validation, **options).results[0].published.verdict == "not comparable"


# Images


@needs_paddle
def test_bad_images_are_listed_and_the_run_goes_on(folder, digits_pth):
    (folder / "3" / "broken.png").write_bytes(b"not an image")
    (folder / "0" / "00 empty.png").touch()
    found = evaluate(digits_pth, folder, batch_size=5, device="cpu")
    assert (found.results[0].images, found.results[0].unreadable) == (23, 2)
    assert found.unreadable == (
        "0/00 empty.png: not an image that can be read: an empty file",
        "3/broken.png: not an image that can be read: a text file",
    )
    with pytest.raises(BadImages, match=r"0/00 empty.png: not an image .*--strict"):
        evaluate(digits_pth, folder, batch_size=5, device="cpu", strict=True)
    with pytest.raises(BadImages, match=r"0/00 empty.png"):
        evaluate(digits_pth, folder, batch_size=5, device="cpu", strict=True, workers=1)


@needs_paddle
def test_only_bad_images_is_an_error(tmp_path, digits_pth):
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
    (tmp_path / "data" / "3" / "x.png").touch()
    with pytest.raises(BadImages, match="none of 1 images can be read"):
        evaluate(digits_pth, tmp_path / "data", device="cpu", folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@needs_paddle
def test_names_that_are_not_text(folder, digits_pth, tmp_path):
    strange = os.fsencode(folder / "3") + b"/\xff.png"
    try:
        shutil.copyfile(folder / "0" / "00 with space.png", strange)
    except OSError:
        pytest.skip("this file system takes only names that are text")
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    assert b"3/\xff.png" in (tmp_path / "run" / "digits-authors" / "predictions.csv").read_bytes()


@needs_paddle
def test_logits_that_are_no_numbers_are_never_counted_as_right(folder, tmp_path, digits_tensors):
    """NaN is not smaller than anything: the true class would seem to come first."""
    huge = dict(digits_tensors)  # finite, as every file must be, but not what comes of it
    huge["head.weight"] = np.full_like(huge["head.weight"], 3e38)
    path = write_pth(tmp_path / "huge.pth", huge)
    with pytest.raises(NumbersDisagree, match=r"0/00 with space.png are not finite"):
        evaluate(path, folder, device="cpu")


# Options


@needs_paddle
def test_another_preprocessing_is_called_custom(folder, digits_pth):
    found = evaluate(digits_pth, folder, engines="paddle", preprocessing={"input_size": 48}, device="cpu").results[0]
    assert (found.protocol.name, found.protocol.changed) == ("custom", {"input_size": (32, 48)})
    assert found.name == "digits-custom" and found.protocol.preprocessing.crop_fraction == 1.0


@needs_paddle
@pytest.mark.slow
def test_a_subset_is_drawn_by_its_seed(folder, digits_pth, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        evaluate(digits_pth, folder, subset=12, seed=seed, device="cpu", folder=tmp_path / name)
    one, again, two = ([row["path"] for row in rows(tmp_path / name)] for name in ("one", "again", "two"))
    assert one == again != two and len(two) == 12
    assert all(row["truth"] == row["path"][0] for row in rows(tmp_path / "two"))  # each with its own class


@needs_paddle
@pytest.mark.slow
def test_a_batch_size_that_fits_is_found_and_said(folder, digits_pth, tmp_path, notes):
    heard = notes
    found = evaluate(digits_pth, folder, batch_size="auto", device="cpu", folder=tmp_path / "run")
    size = found.results[0].batch_size
    assert size >= 8 and heard[1].startswith(f"batch size: {size} (")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["request"]["settings"]
    assert kept["batch_size"] == size  # a run that goes on must not look again


@needs_torch
@pytest.mark.slow
def test_half_precision_is_computed_and_stated(folder, digits_pth):
    found = evaluate(digits_pth, folder, engines="torch", precision="bfloat16", device="cpu")
    exact, half = found.results
    assert exact.precision == "float32" and half.precision == "bfloat16"
    assert 1e-5 < abs(half.loss - exact.loss) < 0.2
    (effect,) = found.effects
    assert effect.of == "precision" and effect.configurations == (exact.name, half.name)
    assert effect.difference == pytest.approx(half.top1 - exact.top1)
    assert effect.interval[0] <= effect.difference <= effect.interval[1]
    (agreement,) = found.agreements
    assert agreement.engines == ("torch (float32)", "torch (bfloat16)") and 1e-5 < agreement.max_difference < 0.5


@needs_torch
@pytest.mark.slow
def test_precision_and_protocol_are_changes_of_their_own(folder, digits_pth):
    found = evaluate(digits_pth, folder, engines="torch", precision="bfloat16", protocol="both", device="cpu")
    names = [row.name for row in found.results]
    assert len(set(names)) == 4
    pairs = {
        (effect.of, names.index(effect.configurations[0]), names.index(effect.configurations[1]))
        for effect in found.effects
    }
    assert pairs == {("precision", 0, 1), ("precision", 2, 3), ("protocol", 0, 2), ("protocol", 1, 3)}


@needs_paddle
@pytest.mark.parametrize("engine", ["paddle", "torch"])
@pytest.mark.slow
def test_a_precision_that_the_device_does_not_have_is_refused(folder, digits_pth, engine):
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
def test_wrong_options(folder, digits_pth, options):
    with pytest.raises(UsageError):
        evaluate(digits_pth, folder, **options)
    with pytest.raises(UsageError, match="at least one file"):
        evaluate([], folder)


def test_what_cannot_be_evaluated_is_said_before_the_first_batch(folder, tmp_path, digits_pth):
    bare = write_pth(tmp_path / "bare.pth", synthetic_tensors(ModelSpec(DIGITS.variant, 0)))
    with pytest.raises(DoesNotFit, match="has no classes"):
        evaluate(bare, folder)
    with pytest.raises(UnreadableFile, match="no such folder or tar"):
        evaluate(digits_pth, tmp_path / "nowhere")


@needs_paddle
def test_the_callers_device_is_left_alone(folder, digits_pth, monkeypatch):
    device = frameworks.import_framework("paddle").device
    calls = []
    monkeypatch.setattr(device, "get_device", lambda: "gpu:7")
    monkeypatch.setattr(device, "set_device", calls.append)
    with pytest.raises(ZeroDivisionError), frameworks.on_paddle_device("cpu"):
        raise ZeroDivisionError
    assert calls == ["cpu", "gpu:7"]


@needs_paddle
def test_auto_is_decided_once(folder, digits_pth, tmp_path, monkeypatch):
    """A run that goes on must not decide again which engine is the fastest."""
    from fcvit.evaluation import settings

    create = settings.create_engine
    chosen = {"auto": "paddle"}
    monkeypatch.setattr(settings, "create_engine", lambda name, *given: create(chosen.get(name, name), *given))
    done = evaluate(digits_pth, folder, engines="auto", device="cpu", folder=tmp_path / "run")
    assert done.results[0].engine == "paddle"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["request"]["settings"]["engines"] == "paddle"


@needs_paddle
def test_weights_in_memory_are_evaluated_like_their_file(folder, digits_pth):
    from fcvit.weights.reading import read_weights

    one, other = (evaluate(w, folder, device="cpu").results[0] for w in (digits_pth, read_weights(digits_pth)))
    assert (one.top1, one.loss, one.weights) == (other.top1, other.loss, other.weights)
