"""Figures over labelled images: right sums, right order, bad images listed."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from conftest import needs_paddle, needs_torch
from fcvit.errors import BadImages, DoesNotFit, UnreadableFile, UsageError
from fcvit.tasks.evaluate import Sums, cross_entropy, evaluate, rank_of_truth, softmax, top_classes


@pytest.fixture
def folder(tmp_path):
    """23 noisy images in ten class folders, an odd number for any batch."""
    generator = np.random.default_rng(0)
    for index in range(23):
        path = tmp_path / "data" / str(index % 10) / f"{index:02d} with space.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return tmp_path / "data"


def test_figures_by_hand():
    logits = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 5.0, 9.0]], np.float32)
    labels = np.array([2, 1, 2])
    assert rank_of_truth(logits, labels).tolist() == [1, 1, 0]  # of equal logits the lower index is first
    sums = Sums()
    sums.add(logits, labels, k=2)
    assert (sums.images, sums.correct, sums.correct_in_k) == (3, 1, 3)
    p = np.exp([3, 1, 2]) / np.exp([3, 1, 2]).sum()
    assert cross_entropy(logits, labels)[:2] == pytest.approx([-np.log(p[2]), np.log(3)])


LOGITS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-50, 50, width=32)
)


@given(LOGITS, st.data())
@settings(derandomize=True, max_examples=80, deadline=None)
def test_figures_agree_with_each_other(logits, data):
    labels = np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits])
    rank = rank_of_truth(logits, labels)
    for k in range(1, logits.shape[1] + 1):
        in_top = (top_classes(logits, k) == labels[:, None]).any(axis=1)
        assert ((rank < k) == in_top).all()
    assert softmax(logits).sum(axis=1) == pytest.approx(1)
    assert np.exp(-cross_entropy(logits, labels)) == pytest.approx(
        softmax(logits)[np.arange(len(labels)), labels], rel=1e-6
    )


@needs_paddle
def test_results_do_not_depend_on_batches_or_workers(folder, digits_pth, tmp_path):
    """A mean of batch means would: 23 does not divide."""
    runs = [
        evaluate(
            digits_pth, folder, batch_size=size, workers=workers, device="cpu", folder=tmp_path / f"run{size}-{workers}"
        )
        for size, workers in ((23, 1), (4, 3), (1, 2), (50, 2))
    ]
    first = runs[0].results[0]
    assert first.images == 23 and first.k == 5
    for run in runs[1:]:
        result = run.results[0]
        assert (result.images, result.top1, result.top_k) == (23, first.top1, first.top_k)
        assert result.loss == pytest.approx(first.loss, abs=1e-6)
    same = [(tmp_path / f"run{name}" / "predictions.csv").read_bytes() for name in ("4-3",)]
    again = evaluate(digits_pth, folder, batch_size=4, workers=1, device="cpu", folder=tmp_path / "again")
    assert again.results[0].images == 23
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == same[0]


@needs_paddle
def test_what_a_run_leaves(folder, digits_pth, tmp_path):
    found = evaluate(digits_pth, folder, batch_size=8, device="cpu", folder=tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.json", "predictions.csv", "run.json"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["results"][0]["top1"] == found.results[0].top1
    assert metrics["classes"] == {str(i): i for i in range(10)}
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows) and len(rows) == 23
    correct = sum(row["truth"] == row["class_1"].replace("class ", "") for row in rows)
    assert 100 * correct / 23 == pytest.approx(found.results[0].top1)
    assert all(float(row["probability_1"]) >= float(row["probability_5"]) for row in rows)


@needs_paddle
def test_k_is_never_above_the_class_count(folder, tmp_path):
    import dataclasses

    from conftest import DIGITS, write_pth
    from fcvit.weights.lively import lively_tensors

    for label in range(3, 10):
        for path in (folder / str(label)).iterdir():
            path.unlink()
        (folder / str(label)).rmdir()
    path = write_pth(tmp_path / "three.pth", lively_tensors(dataclasses.replace(DIGITS, num_classes=3)))
    result = evaluate(path, folder, device="cpu").results[0]
    assert result.k == 3 and result.top_k == 100


@needs_paddle
@needs_torch
def test_two_engines_on_the_same_images(folder, digits_pth):
    found = evaluate(digits_pth, folder, engines=("paddle", "torch"), batch_size=10, device="cpu")
    ours, theirs = found.results
    assert (ours.engine, theirs.engine) == ("paddle", "torch")
    assert (ours.top1, ours.top_k) == (theirs.top1, theirs.top_k)
    assert found.agreement.top1_agreement == 100
    assert 0 < ours.seconds + theirs.seconds < found.seconds and ours.seconds != theirs.seconds
    assert 0 < found.agreement.mean_difference < found.agreement.max_difference < 1e-4


@needs_paddle
def test_bad_images_are_listed_and_the_run_goes_on(folder, digits_pth):
    (folder / "3" / "broken.png").write_bytes(b"not an image")
    (folder / "0" / "00 empty.png").touch()
    found = evaluate(digits_pth, folder, batch_size=5, device="cpu")
    assert found.results[0].images == 23
    assert [reason.split("/data/")[1] for reason in found.unreadable] == [
        "0/00 empty.png: not an image",
        "3/broken.png: not an image",
    ]


@needs_paddle
def test_only_bad_images_is_an_error(tmp_path, digits_pth):
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
    (tmp_path / "data" / "3" / "x.png").touch()
    with pytest.raises(BadImages, match="none of 1 images can be read"):
        evaluate(digits_pth, tmp_path / "data", device="cpu", folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@needs_paddle
def test_the_alternative_protocol_gives_other_pixels(folder, digits_pth):
    found = evaluate(digits_pth, folder, protocol_name="resize256-bilinear", device="cpu")
    assert (found.preprocessing.resize, found.preprocessing.interpolation, found.preprocessing.input_size) == (
        256,
        "bilinear",
        224,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"workers": 0},
        {"engines": ()},
        {"engines": ("paddle", "paddle")},
        {"engines": ("onnx",)},
        {"protocol_name": "x"},
    ],
)
def test_wrong_options(folder, digits_pth, options):
    with pytest.raises(UsageError):
        evaluate(digits_pth, folder, **options)


def test_what_cannot_be_evaluated_is_said_before_the_first_batch(folder, tmp_path, digits_pth):
    from conftest import DIGITS, write_pth
    from fcvit.weights.lively import lively_tensors
    from fcvit.weights.names import Form

    bare = write_pth(tmp_path / "bare.pth", lively_tensors(Form(DIGITS.variant, 0)))
    with pytest.raises(DoesNotFit, match="no classes to evaluate"):
        evaluate(bare, folder)
    with pytest.raises(UnreadableFile, match="not a folder"):
        evaluate(digits_pth, tmp_path / "nowhere")
    (folder / "eleven").mkdir()
    with pytest.raises(DoesNotFit, match=r"11 class folders .* 10 outputs"):
        evaluate(digits_pth, folder)


@needs_paddle
def test_names_that_are_not_text(folder, digits_pth, tmp_path):
    strange = os.fsencode(folder / "3") + b"/\xff.png"
    try:
        shutil.copyfile(folder / "0" / "00 with space.png", strange)
    except OSError:
        pytest.skip("this file system takes only names that are text")
    evaluate(digits_pth, folder, device="cpu", folder=tmp_path / "run")
    assert b"3/\xff.png" in (tmp_path / "run" / "predictions.csv").read_bytes()


@needs_paddle
def test_another_preprocessing_is_called_custom(folder, digits_pth):
    found = evaluate(digits_pth, folder, engines="paddle", preprocessing={"input_size": 48}, device="cpu")
    assert found.protocol == "custom" and found.preprocessing.input_size == 48
    assert found.preprocessing.crop_fraction == 1.0  # the rest is the variant's


@needs_paddle
def test_the_callers_device_is_left_alone(folder, digits_pth, monkeypatch):
    from fcvit.frameworks import import_framework, on_paddle_device

    device = import_framework("paddle").device
    calls = []
    monkeypatch.setattr(device, "get_device", lambda: "gpu:7")
    monkeypatch.setattr(device, "set_device", calls.append)
    with pytest.raises(ZeroDivisionError), on_paddle_device("cpu"):
        raise ZeroDivisionError
    assert calls == ["cpu", "gpu:7"]
