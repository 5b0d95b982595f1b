"""Tests of the label maps of segmentation networks: arithmetic, options, results and `fcvit predict`."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import GOLDEN, golden_arrays, golden_json, needs_paddle, needs_torch, write_pth
from fcvit.cli import main
from fcvit.data.class_colors import ade20k
from fcvit.data.painting import overlay
from fcvit.data.transforms.segmentation import decode, preprocess
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UsageError
from fcvit.models.spec import ModelSpec, SemanticFPNOptions
from fcvit.models.variants import VARIANTS
from fcvit.tasks.segmentation import logits as arithmetic
from fcvit.tasks.segmentation.logits import View, average_label_map, label_map, probabilities, resize, sliding_logits
from fcvit.tasks.segmentation.prediction import PredictionOptions, SegmentedImage, segmenter
from fcvit.verification.equivalence import FLOAT64_LIMIT
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors
from fcvit.weights.writing import write_weights

NETWORKS, ARRAYS = golden_json("segmentation/network.json")["cases"], "segmentation/network.npz"
SPEC = ModelSpec(VARIANTS["fcvit_digits"], 5, "semantic_fpn", SemanticFPNOptions(16, 8, 128, 64))


def smooth(classes, height, width, seed=0):
    """Return logits with large areas of one best class, and some noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(0, 3, (classes, 3, 4))
    return resize(coarse, (height, width)) + generator.normal(0, 0.1, (classes, height, width))


def whole(logits, mirrored=False):
    return View(logits.shape[1:], (logits,), mirrored)


@pytest.mark.parametrize("name", ["tiny-even", "tiny-odd", "tiny-narrow"])
def test_two_resizes_of_the_heads_logits_equal_mmsegmentations(name):
    case, golden = NETWORKS[name], golden_arrays(ARRAYS)
    size = tuple(case["ori_shape"])
    head = golden[f"{name}/logits"].reshape(case["stages"]["logits"]["shape"])
    resized = [resize(logits, tuple(case["input_shape"][2:])) for logits in head]
    rescaled = np.stack([resize(logits, size) for logits in resized])
    values = {"resized": np.stack(resized), "rescaled": rescaled}
    values["probabilities"] = np.stack([probabilities(logits) for logits in rescaled])
    for stage, array in values.items():
        expected = golden[f"{name}/{stage}"].ravel()
        at = np.arange(len(expected)) * (array.size - 1) // (len(expected) - 1)
        difference = np.abs(array.ravel()[at] - expected).max() / case["stages"][stage]["std"]
        assert difference <= FLOAT64_LIMIT, (stage, difference)
    predicted = np.stack([label_map(logits, size) for logits in resized])
    np.testing.assert_array_equal(predicted, golden[f"{name}/prediction"])


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_label_maps_and_the_average_with_the_mirrored_image_equal_mmsegmentations(name):
    import torch

    from fcvit.reference.build import build_reference

    case, golden = NETWORKS[name], golden_arrays(ARRAYS)
    options = SemanticFPNOptions(case.get("neck", 256), case.get("head", 128))
    spec = ModelSpec(VARIANTS[case["variant"]], case["classes"], "semantic_fpn", options)
    model = build_reference(spec, synthetic_tensors(spec, case["salt"]), torch.float64)
    images = torch.from_numpy(synthetic_input(tuple(case["input_shape"]), case["salt"]).astype(np.float64))
    with torch.inference_mode():
        plain, mirrored = model(images).numpy(), model(images.flip(3)).numpy()
    for index, (one, other) in enumerate(zip(plain, mirrored, strict=True)):
        size = tuple(case["ori_shape"])
        np.testing.assert_array_equal(label_map(one, size), golden[f"{name}/prediction"][index])
        both = average_label_map([whole(one), whole(other, mirrored=True)], size)
        np.testing.assert_array_equal(both, golden[f"{name}/prediction_flip_average"][index])


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [1, 1 << 10, 1 << 18])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_label_map_is_the_argmax_of_the_resized_logits_for_any_size(pixels, dtype, monkeypatch):
    monkeypatch.setattr(arithmetic, "_PIXELS", pixels)
    for logits in (smooth(9, 24, 31), np.random.default_rng(2).normal(size=(256, 24, 31))):
        logits = logits.astype(dtype)
        for size in ((24, 31), (48, 62), (100, 33), (7, 9), (1, 1), (24, 90)):
            result = label_map(logits, size)
            assert result.dtype == np.uint8
            np.testing.assert_array_equal(result, resize(logits, size).argmax(0))
    equal = np.zeros((3, 4, 5))
    assert not label_map(equal, (9, 9)).any(), "the first of equal classes is the best"


@pytest.mark.parametrize("pixels", [1, 1 << 15])
def test_the_average_of_views_of_different_sizes_is_that_of_their_probabilities(pixels, monkeypatch):
    monkeypatch.setattr(arithmetic, "_PIXELS_OF_ALL_CLASSES", pixels)
    first, second, third = smooth(6, 20, 30), smooth(6, 27, 45, 1), smooth(6, 12, 18, 2)
    size = (33, 41)
    mean = probabilities(resize(first, size))
    mean += probabilities(resize(second, size))[:, :, ::-1]
    mean += probabilities(resize(third, size))
    views = [whole(first), whole(second, mirrored=True), View((12, 18), iter(np.split(third, 4, axis=1)))]
    result = average_label_map(views, size)
    np.testing.assert_array_equal(result, mean.argmax(0))
    assert (result != label_map(first, size)).any()


def slide_inference(compute, image, crop, stride):
    """Compute mmsegmentation 0.19's `slide_inference` literally, for one image."""
    (h_stride, w_stride), (h_crop, w_crop), (h_img, w_img) = stride, crop, image.shape[1:]
    h_grids = max(h_img - h_crop + h_stride - 1, 0) // h_stride + 1
    w_grids = max(w_img - w_crop + w_stride - 1, 0) // w_stride + 1
    sums, count = 0, np.zeros((h_img, w_img))
    for h_idx in range(h_grids):
        for w_idx in range(w_grids):
            y1, x1 = h_idx * h_stride, w_idx * w_stride
            y2, x2 = min(y1 + h_crop, h_img), min(x1 + w_crop, w_img)
            y1, x1 = max(y2 - h_crop, 0), max(x2 - w_crop, 0)
            logits = compute(image[:, y1:y2, x1:x2])
            sums = sums + np.pad(logits, [(0, 0), (y1, h_img - y2), (x1, w_img - x2)])
            count[y1:y2, x1:x2] += 1
    assert count.all()
    return sums / count


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((50, 70), (32, 32), (21, 21)),
        ((64, 96), (32, 48), (32, 48)),
        ((65, 97), (32, 32), (16, 32)),
        ((20, 90), (32, 32), (5, 31)),
        ((20, 24), (32, 32), (21, 21)),
        ((33, 33), (32, 32), (1, 1)),
    ],
)
def test_a_sliding_window_gives_the_logits_of_mmsegmentation(size, window, stride):
    image = np.random.default_rng(0).normal(size=(3, *size))

    def compute(pixels):  # the result depends on the position in the window
        ramp = np.add.outer(np.arange(pixels.shape[1]), 3 * np.arange(pixels.shape[2]))
        return np.concatenate([pixels * ramp, pixels[:1] - ramp])

    bands = list(sliding_logits(compute, image, window, stride))
    np.testing.assert_array_equal(np.concatenate(bands, axis=1), slide_inference(compute, image, window, stride))
    assert max(band.shape[1] for band in bands) <= window[0], "rows are finished as early as possible"


class Colors:
    """An engine whose logits are linear in the colors of each pixel, and that records the images."""

    name, device, precision = "paddle", "cpu", "float32"

    def __init__(self):
        self.images = []

    def __call__(self, images):
        self.images.append(images[0])
        matrix = np.random.default_rng(5).normal(size=(5, 3)).astype(np.float32)
        return np.einsum("kc,bchw->bkhw", matrix, images.astype(np.float32) - 128)


@pytest.fixture
def weights(tmp_path):
    read = read_weights(write_pth(tmp_path / "seg.pth", synthetic_tensors(SPEC)))
    return dataclasses.replace(read, spec=SPEC)  # a PyTorch file does not contain the size of the input


@pytest.fixture
def predictor(weights):
    return segmenter(weights, SPEC.variant.preprocessing, None, Colors)


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(3)
    paths = [tmp_path / "photos" / f"{index}.png" for index in range(3)]
    paths[0].parent.mkdir()
    for index, path in enumerate(paths):
        colors = generator.integers(0, 256, (5 + index, 6, 3), np.uint8)
        Image.fromarray(colors.repeat(10, 0).repeat(9, 1)).save(path)
    return paths


def test_a_label_map_has_the_size_of_its_image(predictor, photos):
    results = predictor.predict(photos)
    assert [result.labels.shape for result in results] == [(50, 54), (60, 54), (70, 54)]
    assert [image.shape for image in predictor.engine.images] == [(3, 64, 96), (3, 96, 64), (3, 96, 64)]
    for path, result, image in zip(photos, results, predictor.engine.images, strict=True):
        np.testing.assert_array_equal(image, preprocess(np.asarray(Image.open(path)), (128, 64)))
        expected = resize(Colors()(image[None])[0], result.labels.shape).argmax(0)
        np.testing.assert_array_equal(result.labels, expected)


def test_the_size_of_the_input_comes_from_the_weights(weights, photos):
    spec = dataclasses.replace(SPEC, options=SemanticFPNOptions(16, 8, 256, 48, 16))
    predictor = segmenter(dataclasses.replace(weights, spec=spec), SPEC.variant.preprocessing, None, Colors)
    predictor.predict(photos)
    assert [image.shape for image in predictor.engine.images] == [(3, 48, 64), (3, 64, 48), (3, 64, 48)]


def test_areas_are_shares_of_the_pixels_with_the_largest_first(predictor, photos):
    (result,) = predictor.predict(photos[0])
    shares = [area.share for area in result.areas]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True) and len(shares) > 2
    for area in result.areas:
        assert area.share == (result.labels == area.index).mean() > 0
        assert (area.id, area.name) == (str(area.index), f"class {area.index}")
    assert f"54 x 50: class {result.areas[0].index} " in repr(result)


def test_all_forms_of_an_image_give_the_same_label_map(predictor, photos, tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    Image.open(photos[0]).save(turned, exif=tag)
    for path in (photos[0], turned):
        array = np.asarray(decode(path))
        assert array.shape[:2] == ((54, 50) if path == turned else (50, 54))
        forms = [path, str(path), Image.open(path), array]
        results = predictor.predict(forms)
        for result in results:
            np.testing.assert_array_equal(result.labels, results[0].labels)
            np.testing.assert_array_equal(result.overlay(), results[0].overlay())
        assert results[0].labels.shape == array.shape[:2]
    np.testing.assert_array_equal(predictor.predict(Image.open(turned))[0].labels, results[0].labels)


def test_images_that_cannot_be_read_are_errors_in_their_places(predictor, photos, tmp_path):
    cut = Image.open(io.BytesIO(photos[0].read_bytes()[:200]))
    results = predictor.predict([tmp_path / "none.png", photos[0], tmp_path, cut, photos[1]])
    assert [isinstance(result, BadImages) for result in results] == [True, False, True, True, False]
    assert "none.png: No such file" in str(results[0]) and "image 4: " in str(results[3])
    assert len(predictor.engine.images) == 2
    with pytest.raises(UsageError, match=r"image 2: .* type int"):
        predictor.predict([photos[0], 3])


def test_a_stream_reads_only_one_image_ahead(predictor, photos):
    taken = []
    results = predictor.stream(taken.append(path) or path for path in 3 * photos)
    next(results)
    assert len(taken) == 2 and len(predictor.engine.images) == 1
    assert len(list(results)) == 8


def test_a_saved_label_map_contains_class_indices_or_numbers_from_one(predictor, photos, tmp_path):
    (result,) = predictor.predict(photos[0])
    colors = np.array(result.palette, np.uint8)
    assert len({*map(tuple, result.palette)}) == 5
    for one_based in (False, True):
        result.save(tmp_path / "x.png", one_based=one_based)
        with Image.open(tmp_path / "x.png") as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image), result.labels + one_based)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colors[result.labels])
            assert not one_based or image.getpalette()[:3] == [0, 0, 0]
    (numbered,) = predictor.predict(photos[0], one_based=True)
    numbered.save(tmp_path / "y.png")
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x.png").read_bytes()
    with pytest.raises(UsageError, match=r"x.jpg: .* ends in .png"):
        result.save(tmp_path / "x.jpg")
    many = SegmentedImage(result.labels, ade20k().classes[:1] * 256, ((0, 0, 0),) * 256, photos[0])
    many.save(tmp_path / "many.png")
    with pytest.raises(UsageError, match="8 bits cannot number 256 classes"):
        many.save(tmp_path / "many.png", one_based=True)


def test_the_overlay_is_painted_over_the_original_image(predictor, photos):
    (result,) = predictor.predict(photos[0])
    image = np.asarray(Image.open(photos[0]))
    for opacity in (0.5, 0.2):
        expected = overlay(image, result.labels, result.palette, opacity)
        np.testing.assert_array_equal(np.asarray(result.overlay(opacity)), expected)
    Image.open(photos[1]).save(photos[0])
    with pytest.raises(UsageError, match="same height and width"):
        result.overlay()


def test_mirrored_and_scaled_images_are_averaged(predictor, photos):
    (plain,), engine = predictor.predict(photos[0]), predictor.engine
    engine.images.clear()
    (result,) = predictor.predict(photos[0], flip=True, scales=(0.5, 1, 1.75))
    sizes = [image.shape[1:] for image in engine.images]
    assert sizes == [(32, 64), (32, 64), (64, 96), (64, 96), (128, 128), (128, 128)]
    pixels, size = np.asarray(Image.open(photos[0])), result.labels.shape
    mean = 0
    for position, scale in enumerate(((64, 32), (128, 64), (224, 112))):
        one, other = engine.images[2 * position : 2 * position + 2]
        np.testing.assert_array_equal(one, preprocess(pixels, scale))
        np.testing.assert_array_equal(other, one[:, :, ::-1])
        for image, step in ((one, 1), (other, -1)):
            mean = mean + probabilities(resize(Colors()(image[None])[0], size))[:, :, ::step]
    np.testing.assert_array_equal(result.labels, mean.argmax(0))
    np.testing.assert_array_equal(predictor.predict(photos[0], scales="0.5,1,1.75", flip=True)[0].labels, result.labels)
    # The logits of this engine do not depend on the surroundings, so mirroring changes nothing.
    np.testing.assert_array_equal(predictor.predict(photos[0], flip=True)[0].labels, plain.labels)


def test_large_images_are_computed_in_windows_at_their_own_size(predictor, photos):
    (result,) = predictor.predict(photos[2], no_resize=True, window=32)
    assert {image.shape for image in predictor.engine.images} == {(3, 32, 32)}
    assert len(predictor.engine.images) == 3 * 3  # windows from 0, 21 and 38 down, and from 0, 21 and 22 across
    (whole_image,) = predictor.predict(photos[2], no_resize=True)
    assert predictor.engine.images[-1].shape == (3, 70, 54)
    np.testing.assert_array_equal(predictor.engine.images[-1].transpose(1, 2, 0), np.asarray(Image.open(photos[2])))
    np.testing.assert_array_equal(result.labels, whole_image.labels)
    predictor.predict(photos[2], no_resize=True, scales=2)
    assert predictor.engine.images[-1].shape == (3, 140, 108)
    predictor.engine.images.clear()
    predictor.predict(photos[2], window=64, stride=32, flip=True)
    assert len(predictor.engine.images) == 4, "windows of both views at the size of the training images"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "--scales"),
        ({"scales": "1,x"}, "--scales '1,x'"),
        ({"scales": (1, 0)}, "above 0"),
        ({"scales": float("nan")}, "above 0"),
        ({"scales": 17}, "at most 16"),
        ({"window": 8}, "--window 8: expected at least 32"),
        ({"window": "64"}, "--window '64'"),
        ({"stride": 8}, "--stride 8: expected --window"),
        ({"window": 64, "stride": 65}, "--stride 65"),
        ({"window": 64, "stride": 0}, "--stride 0"),
        ({"top_k": 3}, "unknown options top_k of segmentation"),
    ],
)
def test_wrong_options_are_rejected_before_the_first_image(predictor, photos, options, message):
    with pytest.raises(UsageError, match=message):
        predictor.stream(photos, **options)
    assert PredictionOptions(window=512).step == 341 and not predictor.engine.images


def test_classes_and_colors_come_from_the_list_the_weights_or_ade20k(weights, tmp_path, notes):
    preprocessing = SPEC.variant.preprocessing
    authors = read_weights(GOLDEN / "segmentation" / "mmseg_small.pth")
    of_file = segmenter(authors, preprocessing, None, Colors)
    assert of_file.classes[7].name == "bed" and of_file.palette == authors.palette and not notes
    bare = segmenter(dataclasses.replace(authors, classes=None, palette=None), preprocessing, None, Colors)
    assert (bare.classes, bare.palette) == ade20k()[:2] and "ADE20K" in notes[0]
    path = tmp_path / "list.csv"
    path.write_text("name,red,green,blue\n" + "".join(f"name {i},{i},0,9\n" for i in range(5)))
    listed = segmenter(weights, preprocessing, path, Colors)
    assert listed.classes[4].name == "name 4" and listed.palette[4] == (4, 0, 9)
    assert segmenter(authors, preprocessing, ["x" * n for n in range(1, 151)], Colors).classes[1].name == "xx"
    named = segmenter(weights, preprocessing, ["a", "b", "c", "d", "e"], Colors)
    assert named.classes[0].name == "a" and named.palette[0] == (128, 0, 0)
    with pytest.raises(DoesNotFit, match=r"3 classes, but .* has 5"):
        segmenter(weights, preprocessing, ["a", "b", "c"], Colors)
    many = dataclasses.replace(weights, spec=dataclasses.replace(SPEC, num_classes=257))
    with pytest.raises(DoesNotFit, match="257 classes; label maps with 8 bits have at most 256"):
        segmenter(many, preprocessing, None, Colors)


def test_logits_that_are_not_finite_are_rejected(predictor, photos):
    def broken(images):
        logits = Colors()(images)
        logits[0, 3, 10, 10] = np.nan
        return logits

    broken.precision = "float32"
    predictor = dataclasses.replace(predictor, engine=broken)
    with pytest.raises(NumbersDisagree, match=r"seg\.pth: the logits of .*1\.png are not finite"):
        predictor.predict(photos[1:])


@pytest.fixture
def file(weights, tmp_path):
    write_weights(tmp_path / "seg.safetensors", weights)
    return tmp_path / "seg.safetensors"


@needs_paddle
def test_load_returns_a_segmenter_that_computes_with_the_network(file, photos):
    loaded = fcvit.load(file, engine="paddle", device="cpu")
    assert repr(loaded).startswith("<Segmenter seg.safetensors: fcvit_digits (Semantic FPN, 5 classes), engine paddle")
    (result,) = loaded.predict(photos[0], progress=True)
    logits = loaded.engine(preprocess(np.asarray(Image.open(photos[0])), (128, 64))[None])
    np.testing.assert_array_equal(result.labels, resize(logits[0], (50, 54)).argmax(0))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fcvit.tasks.predictor.create_engine", lambda *_, **__: Colors())

    def call(*words):
        code = main(["predict", *map(str, words), "--weights", "seg.safetensors"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_prints_areas_and_writes_label_maps_and_overlays(run, predictor, photos):
    (photos[0].parent / "deeper").mkdir()
    photos[1].rename(photos[0].parent / "b.png")
    photos[2].rename(photos[0].parent / "deeper" / "B.JPG")  # the same name on some file systems
    (photos[0].parent / "bad.png").write_bytes(b"x")
    code, out, err = run("photos", "-o", "out")
    assert code == 6 and "bad.png" in err and "area (%)" in out and "written to out" in out
    expected = {path: predictor.predict(path)[0] for path in ("photos/0.png", "photos/b.png", "photos/deeper/B.JPG")}
    for (path, result), name in zip(expected.items(), ("0", "b", "B-2"), strict=True):
        with Image.open(f"out/labels/{name}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), result.labels)
        with Image.open(f"out/overlays/{name}.jpg") as image:
            assert np.abs(np.asarray(image) - np.asarray(result.overlay(), np.float64)).mean() < 16
        assert f"{100 * result.areas[0].share:.1f}" in out and path in out
    report = json.loads(run("photos", "--json")[1])
    rows = {path: [dataclasses.asdict(area) for area in result.areas] for path, result in expected.items()}
    assert report["predictions"] == rows and len(report["unreadable"]) == 1
    listed = list(csv.DictReader(io.StringIO(run("photos", "--csv")[1])))
    assert listed[0]["path"] == "photos/0.png" and float(listed[0]["share"]) == round(
        rows["photos/0.png"][0]["share"], 6
    )


def test_options_of_the_command_change_the_label_maps(run, predictor, photos):
    words = ("--flip", "--scales", "0.5,1", "--window", "48", "--stride", "40", "--no-resize", "--one-based")
    assert run(photos[0], *words, "-o", "out")[0] == 0
    options = {"flip": True, "scales": (0.5, 1), "window": 48, "stride": 40, "no_resize": True}
    (result,) = predictor.predict(photos[0], **options)
    with Image.open("out/labels/0.png") as image:
        np.testing.assert_array_equal(np.asarray(image), result.labels + 1)


def test_options_of_another_task_are_rejected_in_one_line(run, photos, capsys, digits_pth):
    code, _, err = run(photos[0], "--top-k", "3")
    assert code == 2 and "--top-k: not an option for segmentation; use --flip, --scales" in err
    assert main(["predict", str(photos[0]), "--weights", str(digits_pth), "--flip", "--window", "64"]) == 2
    err = capsys.readouterr().err
    assert "--flip, --window: not an option for classification; use --top-k" in err
    code, _, err = run(photos[0], "--scales", "0")
    assert code == 2 and "--scales '0': expected numbers above 0" in err


def test_the_table_shows_the_ten_largest_areas_of_an_image(predictor, photos):
    rows = [{"index": i, "id": str(i), "name": f"n{i}", "share": (16 - i) / 136} for i in range(16)]
    table = predictor.table([(photos[0], rows), (photos[1], rows[:2])])
    image, area, name, _ = (list(column.cells) for column in table.columns)
    assert len(image) == 13 and image[0] == str(photos[0]) and image[1] == "" and image[11] == str(photos[1])
    assert name[10] == "... and 6 more" and area[10] == f"{100 * 21 / 136:.1f}"
