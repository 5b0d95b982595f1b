"""Tests of the evaluation of detectors with real networks: engines, excluded images, and where data is found."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import needs_paddle, write_detector, write_shapes
from fcvit.cli import main
from fcvit.commands.evaluate import evaluate
from fcvit.evaluation.runner import resume
from fcvit.frameworks import installed
from fcvit.models.variants import VARIANTS

pytest.importorskip("cv2")
pytest.importorskip("pycocotools")
pytestmark = needs_paddle
FILES = ("predictions.csv", "per_class.csv", "detections.bbox.json", "detections.segm.json", "misses.png", "best.png")
CPU = {"engines": "paddle", "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A data set with 2 training and 7 validation images of different sizes. No test changes it."""
    root = write_shapes(tmp_path_factory.mktemp("shapes") / "data", "train", [(48, 64)] * 2)
    return write_shapes(root, "val", [(40 + 4 * index, 64 - 3 * index) for index in range(7)])


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp("weights") / "shapes.safetensors")


@pytest.fixture(scope="module")
def expected(shapes, detector, tmp_path_factory):
    """The files of an uninterrupted evaluation of the validation images."""
    run = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcvit.tasks.detection.page.write_page", lambda *_: None)
        evaluate(detector, shapes, **CPU, folder=run, batch_size=3)
    return files(run)


def files(run, configuration="shapes-authors"):
    return {name: (run / configuration / name).read_bytes() for name in FILES}


@pytest.mark.slow
def test_all_engines_give_the_same_detections(shapes, detector, no_charts):
    packages = {"torch": "torch", "onnxruntime": "onnxruntime"}
    engines = ["paddle", *(engine for engine, package in packages.items() if installed(package))]
    evaluation = evaluate(detector, shapes, engines=engines, device="cpu")
    assert len(evaluation.agreements) == len(engines) - 1
    for result in evaluation.results:
        assert result.detections == evaluation.results[0].detections == 70
        assert result.box_ap == pytest.approx(evaluation.results[0].box_ap, abs=1e-9) and result.box_ap > 0
        assert result.mask_ap == pytest.approx(evaluation.results[0].mask_ap, abs=0.2)
    for agreement in evaluation.agreements:
        assert agreement.common == 100 and agreement.largest < 1e-4


@pytest.mark.slow
def test_batches_workers_and_a_cut_journal_do_not_change_the_files(shapes, detector, expected, tmp_path, no_charts):
    evaluate(detector, shapes, **{**CPU, "workers": 1}, folder=tmp_path / "workers", batch_size=2)
    assert files(tmp_path / "workers") == expected
    evaluate(detector, shapes, **CPU, folder=tmp_path / "cut", batch_size=3)
    (journal,) = (tmp_path / "cut" / "journals").iterdir()
    with journal.open("r+b") as stream:
        stream.truncate(journal.stat().st_size - 40)  # the last batch is incomplete
    shutil.rmtree(tmp_path / "cut" / "shapes-authors")
    resume(tmp_path / "cut")
    assert files(tmp_path / "cut") == expected


@pytest.mark.slow
def test_several_weights_in_one_pass_give_the_files_of_each(shapes, detector, expected, tmp_path, no_charts):
    other = shutil.copy(detector, tmp_path / "other.safetensors")
    evaluation = evaluate([detector, other], shapes, **CPU, folder=tmp_path / "run", batch_size=3)
    assert [result.name for result in evaluation.results] == ["shapes-authors", "other-authors"]
    assert files(tmp_path / "run") == files(tmp_path / "run", "other-authors") == expected


@pytest.mark.slow
def test_bad_images_and_images_of_another_size_are_left_out_by_name(shapes, detector, tmp_path, capsys, no_charts):
    data = shutil.copytree(shapes, tmp_path / "data")
    (data / "val" / "02.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (33, 44)).save(data / "val" / "04.png")
    words = ["eval", "--weights", str(detector), "--data", str(data), "--engine", "paddle", "--workers", "0"]
    assert main([*words, "-o", str(tmp_path / "run")]) == 6
    out, err = capsys.readouterr()
    text = " ".join((out + err).split())
    assert "2 images excluded" in text and "val/02.png" in text
    assert "val/04.png" in text and "33 x 44" in text and "52 x 56" in text
    metrics = json.loads((tmp_path / "run" / "shapes-authors" / "metrics.json").read_text())
    assert (metrics["images"], metrics["unreadable"], metrics["objects"]) == (5, 2, 10)
    rows = (tmp_path / "run" / "shapes-authors" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 6 and not any("02.png" in row or "04.png" in row for row in rows)


@pytest.mark.slow
def test_the_data_is_a_split_or_a_json_file(shapes, detector, tmp_path, capsys, no_charts):
    listed = shapes / "annotations" / "instances_train.json"
    for run, words in (("split", [shapes, "--split", "train"]), ("file", [listed])):
        command = [
            "eval",
            "--weights",
            detector,
            "--engine",
            "paddle",
            "--workers",
            0,
            "-o",
            tmp_path / run,
            "--data",
            *words,
        ]
        assert main([*map(str, command)]) == 0, capsys.readouterr()
    assert files(tmp_path / "split") == files(tmp_path / "file")
    assert len((tmp_path / "split" / "shapes-authors" / "predictions.csv").read_text().splitlines()) == 3
    assert main(["eval", "--weights", str(detector), "--data", str(shapes), "--split", "test"]) == 2
    assert "train, val" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_red_green_and_blue_reach_the_network_in_this_order(detector, tmp_path, monkeypatch, command):
    """mmdetection reads images as BGR and swaps the channels, so the network gets RGB."""
    from fcvit.models.mask_rcnn.network import MaskRCNN

    data, seen, forward = write_shapes(tmp_path / "data", "val", [(48, 64)]), [], MaskRCNN.forward

    def recorded(self, images, *sizes):
        seen.append(images.numpy())
        return forward(self, images, *sizes)

    monkeypatch.setattr(MaskRCNN, "forward", recorded)
    color = (200, 100, 50)
    image = data / "val" / "00.png"
    Image.new("RGB", (64, 48), color).save(image)
    if command == "evaluate":
        evaluate(detector, data, **CPU)
    else:
        fcvit.load(detector, engine="paddle", device="cpu").predict(image)
    (batch,) = seen
    preprocessing = VARIANTS["fcvit_digits"].preprocessing
    values = (np.array(color) / 255 - preprocessing.mean) / preprocessing.std
    assert batch.shape[:2] == (1, 3)
    assert np.allclose(batch[0, :, :48, :64], values[:, None, None], atol=1e-5)
