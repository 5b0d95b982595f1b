"""Tests of the prediction of detectors: results, options, files and `fcvit predict`."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import needs_paddle, needs_torch, write_pth
from fcvit.cli import main
from fcvit.data.class_colors import bright_colors
from fcvit.data.coco import find_coco, read_coco
from fcvit.data.masks import decode_segmentation
from fcvit.data.transforms.detection import pad_batch, preprocess
from fcvit.data.transforms.segmentation import decode
from fcvit.errors import BadImages, DoesNotFit, UsageError
from fcvit.models.mask_rcnn.detections import Detections
from fcvit.models.mask_rcnn.masks import paste_mask
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.tasks.detection.prediction import PredictionOptions, detector
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors
from fcvit.weights.writing import write_weights

pytest.importorskip("cv2")
pytest.importorskip("pycocotools")

OPTIONS = MaskRCNNOptions(
    8, 8, 16, 8, proposals_before_nms=50, max_proposals=20, max_detections=5, long_side=128, short_side=64
)
SPEC = ModelSpec(VARIANTS["fcvit_digits"], 3, "mask_rcnn", OPTIONS)
BOXES = np.array([[2.5, 3, 30, 40], [10, 8, 50, 45.25], [0, 0, 12, 9], [30, 30, 30, 44]], np.float32)
SCORES = np.array([0.9, 0.6, 0.3, 0.25], np.float32)
LABELS = np.array([2, 0, 2, 1])


class Fixed:
    """An engine that finds the same objects in every image, and records its input."""

    name, device, precision = "paddle", "cpu", "float32"

    def __init__(self, masks=True):
        self.inputs = []
        self.logits = np.random.default_rng(4).normal(1, 3, (4, 28, 28)).astype(np.float32) if masks else None

    def detect(self, images, image_sizes, scale_factors):
        self.inputs.append((images, image_sizes, scale_factors))
        return [Detections(BOXES, SCORES, LABELS, self.logits)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = write_pth(tmp_path_factory.mktemp("weights") / "det.pth", synthetic_tensors(SPEC))
    return dataclasses.replace(read_weights(path), spec=SPEC)  # a PyTorch file does not contain the options


@pytest.fixture
def predictor(weights):
    return detector(weights, SPEC.variant.preprocessing, ["cat", "dog", "cow"], Fixed)


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(3)
    paths = [tmp_path / "photos" / f"{index}.png" for index in range(3)]
    paths[0].parent.mkdir()
    for index, path in enumerate(paths):
        Image.fromarray(generator.integers(0, 256, (50 + 7 * index, 54, 3), np.uint8)).save(path)
    return paths


def test_objects_are_in_pixels_of_the_image_and_named(predictor, photos):
    (result,) = predictor.predict(photos[0])
    np.testing.assert_array_equal(result.boxes, BOXES[:3])
    assert result.names == ["cow", "cat", "cow"] and result.counts == {2: 2, 0: 1} and len(result) == 3
    assert result.scores.tolist() == SCORES[:3].tolist() and result.size == (50, 54)
    assert repr(result) == "<DetectedImage 54 x 50: 2 cow, 1 cat>"
    assert result.masks.shape == (3, 50, 54) and result.masks.dtype == bool and result.masks.any((1, 2)).all()
    for index, mask in enumerate(result.masks):
        np.testing.assert_array_equal(mask, paste_mask(predictor.engine.logits[index], BOXES[index], (50, 54)))
        np.testing.assert_array_equal(result.mask(index), mask)
    one = result.take(result.labels == 0)
    assert one.names == ["cat"] and (one.masks == result.masks[1:2]).all()
    none = result.take(result.scores > 1)
    assert none.masks.shape == (0, 50, 54) and none.counts == {} and "no objects" in repr(none)


def test_images_are_resized_and_padded_as_in_evaluation(predictor, photos):
    predictor.predict(photos)
    for path, (images, sizes, factors) in zip(photos, predictor.engine.inputs, strict=True):
        pixels, expected = preprocess(np.asarray(Image.open(path)), (128, 64))
        padded, valid = pad_batch([pixels])
        np.testing.assert_array_equal(images, padded)
        np.testing.assert_array_equal(sizes, valid)
        np.testing.assert_array_equal(factors, [expected])
        assert images.dtype == np.uint8 and images.shape[2] % 32 == images.shape[3] % 32 == 0


def test_the_options_select_by_score_and_class(predictor, photos):
    def scores(**options):
        return predictor.predict(photos[0], **options)[0].scores.tolist()

    every = SCORES.tolist()
    assert scores(score_threshold=0) == every and scores(score_threshold=np.float32(0.6)) == every[:2]
    assert scores(score_threshold=1) == [] and scores() == every[:3]
    assert scores(only=["dog", "cat"], score_threshold=0) == [every[1], every[3]]
    assert scores(only="cow") == [every[0], every[2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, "--score-threshold 1.5: expected a number from 0 to 1"),
        ({"score_threshold": float("nan")}, "--score-threshold nan"),
        ({"score_threshold": "high"}, "--score-threshold 'high'"),
        ({"score_threshold": True}, "--score-threshold True"),
        ({"only": ["cat", "horse"]}, "--only 'horse': the network has no such class; it has cat, cow, dog"),
        ({"flip": True}, "unknown options flip of detection"),
    ],
)
def test_wrong_options_are_rejected_before_the_first_image(predictor, photos, options, message):
    with pytest.raises(UsageError, match=message):
        predictor.stream(photos, **options)
    assert PredictionOptions().score_threshold == 0.3 and not predictor.engine.inputs


@pytest.mark.slow
def test_all_forms_of_an_image_give_the_same_picture(predictor, photos, tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    Image.open(photos[0]).save(turned, exif=tag)
    for path in (photos[0], turned):
        array = np.asarray(decode(path))
        results = predictor.predict([path, str(path), Image.open(path), array])
        for result in results:
            assert result.size == array.shape[:2] == ((54, 50) if path == turned else (50, 54))
            np.testing.assert_array_equal(result.draw(), results[0].draw())
    gray = np.full((50, 54, 1), 7, np.uint8)
    results = predictor.predict([gray, gray[:, :, 0], np.dstack([gray] * 3)])
    assert len({result.draw().tobytes() for result in results}) == 1


def test_images_that_cannot_be_read_are_errors_in_their_places(predictor, photos, tmp_path):
    cut = Image.open(io.BytesIO(photos[0].read_bytes()[:200]))
    tiny = np.zeros((1, 1, 3), np.uint8)
    results = predictor.predict([tmp_path / "none.png", photos[0], tmp_path, cut, tiny])
    assert [isinstance(result, BadImages) for result in results] == [True, False, True, True, False]
    assert "none.png: No such file" in str(results[0]) and "image 4: " in str(results[3])
    assert results[4].masks.shape == (3, 1, 1) and max(results[4].draw().size) == 720
    with pytest.raises(UsageError, match=r"image 2: .* type int"):
        predictor.predict([photos[0], 3])


def test_a_stream_reads_only_one_image_ahead(predictor, photos):
    taken = []
    results = predictor.stream(taken.append(path) or path for path in 3 * photos)
    next(results)
    assert len(taken) == 2 and len(predictor.engine.inputs) == 1
    assert len(list(results)) == 8


def test_a_saved_file_is_read_back_with_the_same_boxes_and_masks(predictor, photos):
    (result,) = predictor.predict(photos[0])
    result.save(photos[0].parent / "detections.json")
    layout = find_coco(photos[0].parent)
    images = read_coco(layout, next(iter(layout.splits)))
    (target,) = images.targets
    assert [c.name for c in images.classes] == ["cat", "dog", "cow"] and target.labels.tolist() == [2, 0, 2]
    np.testing.assert_allclose(target.corners(), BOXES[:3])
    masks = [decode_segmentation(mask, target.size) for mask in target.masks]
    np.testing.assert_array_equal(masks, result.masks)
    assert target.areas.tolist() == result.masks.sum((1, 2)).tolist()
    content = json.loads((photos[0].parent / "detections.json").read_text())
    assert [a["score"] for a in content["annotations"]] == SCORES[:3].tolist()
    assert [c["id"] for c in content["categories"]] == [1, 2, 3]
    assert content["images"] == [{"id": 1, "file_name": str(photos[0]), "height": 50, "width": 54}]
    with pytest.raises(UsageError, match=r"x\.png: .* ends in .json"):
        result.save("x.png")


def test_a_detector_without_masks_saves_and_draws_boxes(weights, photos, tmp_path):
    predictor = detector(weights, SPEC.variant.preprocessing, None, lambda: Fixed(masks=False))
    (result,) = predictor.predict(photos[0])
    assert result.masks is None and result.names == ["class 2", "class 0", "class 2"]
    result.save(tmp_path / "boxes.json")
    first = json.loads((tmp_path / "boxes.json").read_text())["annotations"][0]
    assert "segmentation" not in first and first["bbox"] == [2.5, 3, 27.5, 37] and first["area"] == 27.5 * 37
    assert "area" not in predictor.rows(result)[0]
    inside = np.asarray(result.draw())[10 * 14, 18 * 14]
    np.testing.assert_array_equal(inside, np.asarray(Image.open(photos[0]))[10, 18], "no mask is painted")


def test_a_picture_has_the_colors_of_the_classes_and_follows_the_opacity(predictor, photos):
    (result,) = predictor.predict(photos[0], only=["cat"])
    assert result.palette == bright_colors(3)
    drawn, faint = (np.asarray(result.draw(opacity)) for opacity in (1.0, 0.0))
    factor = drawn.shape[1] // 54
    mask = result.masks[0].repeat(factor, 0).repeat(factor, 1)
    color = np.array(result.palette[0])
    assert (drawn[mask] == color).all(1).mean() > 0.8 > (faint[mask] == color).all(1).mean()
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="expected a number from 0 to 1"):
            result.draw(opacity)
    Image.open(photos[1]).save(photos[0])
    with pytest.raises(UsageError, match="same height and width"):
        result.draw()


def test_the_number_of_classes_must_be_that_of_the_network(weights):
    with pytest.raises(DoesNotFit, match=r"2 classes, but .* has 3"):
        detector(weights, SPEC.variant.preprocessing, ["a", "b"], Fixed)
    many = dataclasses.replace(weights, spec=dataclasses.replace(SPEC, num_classes=150))
    assert detector(many, SPEC.variant.preprocessing, None, Fixed).classes[0].name == "class 0", "not ADE20K's"


@pytest.fixture
def file(weights, tmp_path):
    write_weights(tmp_path / "det.safetensors", weights)
    return tmp_path / "det.safetensors"


@needs_paddle
@needs_torch
def test_load_returns_a_detector_that_computes_with_the_network(file, photos):
    found = {}
    for engine in ("paddle", "torch"):
        loaded = fcvit.load(file, engine=engine, device="cpu")
        assert type(loaded) is fcvit.Detector
        assert repr(loaded).startswith("<Detector det.safetensors: fcvit_digits (Mask R-CNN, 3 classes), engine")
        (found[engine],) = loaded.predict(photos[1], score_threshold=0, progress=True)
        assert type(found[engine]) is fcvit.DetectedImage
    one, other = found.values()
    assert 0 < len(one) <= 5 and one.labels.tolist() == other.labels.tolist()
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
    assert (one.boxes[:, 2:] <= [54.01, 57.01]).all(), "in pixels of the image"
    assert np.count_nonzero(one.masks != other.masks) <= 10


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fcvit.tasks.predictor.create_engine", lambda *_, **__: Fixed())
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")

    def call(*words):
        code = main(["predict", *map(str, words), "--weights", "det.safetensors", "--classes", "names.txt"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_writes_pictures_and_one_coco_file(run, predictor, photos):
    (photos[0].parent / "deeper").mkdir()
    photos[1].rename(photos[0].parent / "b.png")
    photos[2].rename(photos[0].parent / "deeper" / "B.JPG")  # the same name on some file systems
    (photos[0].parent / "bad.png").write_bytes(b"x")
    code, out, err = run("photos", "-o", "out")
    assert code == 6 and "bad.png" in err and "written to out" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["photos/0.png", "0.90", "cow", "2,", "3,", "30,", "40"] in [line[:7] for line in lines]
    assert ["cow", "6", "3"] in lines and ["cat", "3", "3"] in lines, "the number of objects, and of images"
    expected = {path: predictor.predict(path)[0] for path in ("photos/0.png", "photos/b.png", "photos/deeper/B.JPG")}
    content = json.loads(Path("out/detections.json").read_text())
    assert [image["file_name"] for image in content["images"]] == list(expected)
    assert [a["image_id"] for a in content["annotations"]] == [1] * 3 + [2] * 3 + [3] * 3
    assert [a["id"] for a in content["annotations"]] == list(range(1, 10))
    for (path, result), name in zip(expected.items(), ("0", "b", "B-2"), strict=True):
        with Image.open(f"out/pictures/{name}.jpg") as image:
            assert np.abs(np.asarray(image, np.float64) - np.asarray(result.draw())).mean() < 16
        assert path in out
    report = json.loads(run("photos", "--json")[1])
    assert report["predictions"] == {path: predictor.rows(result) for path, result in expected.items()}
    row, second, _ = report["predictions"]["photos/0.png"]
    assert second["score"] == float(SCORES[1]) and second["area"] == expected["photos/0.png"].masks[1].sum()
    assert list(row) == ["index", "id", "name", "score", "x1", "y1", "x2", "y2", "area"] and row["name"] == "cow"
    listed = list(csv.DictReader(io.StringIO(run("photos", "--csv")[1])))
    assert listed[0]["x1"] == "2.500000" and listed[3]["path"] == "photos/b.png" and len(listed) == 9


def test_options_of_the_command_select_objects(run, photos):
    code, out, _ = run(photos[0], "--score-threshold", "0", "--only", "dog", "--only", "cow", "--json")
    rows = next(iter(json.loads(out)["predictions"].values()))
    assert code == 0 and [row["name"] for row in rows] == ["cow", "cow", "dog"]
    code, _, err = run(photos[0], "--score-threshold", "2")
    assert code == 2 and "--score-threshold 2" in err and err.count("\n") == 1
    code, _, err = run(photos[0], "--top-k", "3")
    assert code == 2 and "--top-k: not an option for detection; use --score-threshold, --only" in err
    code, out, _ = run(photos[0], "--score-threshold", "1", "-o", "out")
    assert code == 0 and "no objects" in out
    assert json.loads(Path("out/detections.json").read_text())["annotations"] == []


def test_the_table_shows_twenty_objects_of_an_image(predictor, photos):
    row = {"index": 0, "id": "cat", "name": "cat", "score": 0.5, "x1": 0.0, "y1": 1.0, "x2": 2.0, "y2": 3.0}
    listed, counts = predictor.table([(photos[0], [row] * 33), (photos[1], [row])]).renderables
    image, score, name, box, area = (list(column.cells) for column in listed.columns)
    assert len(image) == 22 and image[0] == str(photos[0]) and image[1] == "" and image[21] == str(photos[1])
    assert name[20] == "... and 13 more" and score[0] == "0.50" and box[0] == "0, 1, 2, 3" and area[0] == ""
    assert [list(column.cells) for column in counts.columns] == [["cat"], ["34"], ["2"]]
