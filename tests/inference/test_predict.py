"""Tests of prediction: accepted images, batches, errors and progress."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from conftest import DIGITS, needs_paddle, needs_torch, write_pth
from fcvit.commands.convert import convert
from fcvit.data.classes import ClassName
from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import BadImages, DoesNotFit, NumbersDisagree, UsageError
from fcvit.inference.engines import create_engine
from fcvit.tasks.classification.prediction import Classifier, rank
from fcvit.tasks.predictor import load
from fcvit.weights.reading import read_weights

NAMES = tuple(ClassName(str(i), f"digit {i}") for i in range(10))
ENGINES = [pytest.param("paddle", marks=needs_paddle), pytest.param("torch", marks=needs_torch)]


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(1)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (50, 40, 3), np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_takes_uint8_and_normalized_images(digits_pth, name):
    preprocessing = DIGITS.variant.preprocessing
    engine = create_engine(name, read_weights(digits_pth), preprocessing, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    logits = engine(pixels)
    assert logits.shape == (2, 10) and logits.dtype == np.float32
    np.testing.assert_array_equal(engine(normalize(pixels, preprocessing)), logits)
    for wrong in (pixels[0], pixels.transpose(0, 2, 3, 1), pixels.astype(np.float64)):
        with pytest.raises(UsageError, match="expected"):
            engine(wrong)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("device", ["tpu", "gpu:x", "cpu:1", "gpu:99"])
def test_unknown_or_unavailable_devices_are_rejected(digits_pth, name, device):
    with pytest.raises(UsageError, match=f"--device '?{device}"):
        create_engine(name, read_weights(digits_pth), DIGITS.variant.preprocessing, device)


@needs_paddle
def test_gpu_and_cpu_agree(digits_pth):
    from fcvit.frameworks import import_framework

    if not import_framework("paddle").is_compiled_with_cuda():
        pytest.skip("this build of PaddlePaddle has no GPU support")
    weights, pixels = read_weights(digits_pth), np.full((2, 3, 32, 32), 7, np.uint8)
    gpu, cpu = (create_engine("paddle", weights, DIGITS.variant.preprocessing, d)(pixels) for d in ("gpu", "cpu"))
    np.testing.assert_allclose(gpu, cpu, atol=1e-3)


@needs_paddle
def test_load_returns_a_working_classifier(tmp_path, digits_pth, pictures):
    convert(digits_pth, tmp_path / "x.safetensors", classes=NAMES, verify=False)
    classifier = load(tmp_path / "x.safetensors", device="cpu", engine="paddle")
    assert classifier.classes == NAMES and classifier.preprocessing.input_size == 32
    results = classifier.predict([pictures[0], Image.open(pictures[1])], top_k=3)
    assert [len(ranked) for ranked in results] == [3, 3]
    best = results[0][0]
    assert best.name == f"digit {best.index}" and best.id == str(best.index)
    assert 1 >= best.probability >= results[0][1].probability >= results[0][2].probability > 0
    assert sum(p.probability for p in classifier.predict(pictures, top_k=99)[2]) == pytest.approx(1)


class Recorder:
    """An engine that returns the mean of each channel and records the batch sizes."""

    name, device, precision, threads = "recorder", "cpu", "float32", None

    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        self.sizes.append(len(images))
        return np.tile(images.mean((2, 3)), (1, 4))[:, :10].astype(np.float32)


@pytest.fixture
def classifier(digits_pth):
    return Classifier(read_weights(digits_pth), Recorder(), DIGITS.variant.preprocessing, NAMES)


def test_all_forms_of_an_image_give_the_same_prediction(classifier, pictures):
    """The forms are paths, PIL images and arrays, alone or in a list, an iterator or an array."""
    path = pictures[0]
    array = np.asarray(Image.open(path))
    expected = classifier.predict([path])
    assert len(expected) == 1 and [p.name for p in expected[0]] == [p.name for p in expected[0] if p.probability]
    for alone in (path, str(path), Image.open(path), array, array[None], np.array([str(path)])):
        assert classifier.predict(alone) == expected
    opened = Image.open(path)
    assert classifier.predict([opened] * 20) == 20 * expected, "several threads may read one file"
    several = [path, str(path), Image.open(path), array]
    assert classifier.predict(several) == classifier.predict(iter(several)) == 4 * expected
    assert classifier.predict(np.stack([array, array])) == classifier.predict((array, array)) == 2 * expected
    gray = np.full((5, 7), 99, np.uint8)
    assert classifier.predict([gray, gray[:, :, None]]) == 2 * classifier.predict(np.stack([gray] * 3, axis=2))
    assert classifier.predict([]) == classifier.predict(iter(())) == []


def test_images_that_cannot_be_read_keep_their_positions(classifier, pictures, tmp_path):
    truncated = Image.open(io.BytesIO(pictures[0].read_bytes()[:900]))
    closed = Image.open(pictures[0])
    closed.close()
    bad = [tmp_path / "none.png", tmp_path, "x" * 5000, truncated, closed]
    bad.append("data:image/png;base64," + 100_000 * "A")
    images = [image for pair in zip(bad, 2 * pictures, strict=True) for image in pair]
    results = classifier.predict(images, batch_size=4)
    assert all(isinstance(result, BadImages) and len(str(result)) < 500 for result in results[::2])
    assert results[1::2] == classifier.predict(2 * pictures)
    assert classifier.engine.sizes == [2, 2, 2, 6]
    assert "none.png: No such file" in str(results[0]) and "folder; pass its images" in str(results[2])
    assert "image 7: " in str(results[6])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([b"x" * 200_000], "image 1: .* type bytes .*expected a path, a PIL image, .*BytesIO"),
        (b"x" * 200_000, "type bytes"),
        (None, "type NoneType"),
        (io.BytesIO(b"x"), "predict: .* type BytesIO .*PIL.Image.open"),
        ([3], "image 1: .* type int"),
        ([np.zeros((40, 50, 3))], r"image 1: .*\(40, 50, 3\).*float64; expected uint8"),
        (np.zeros((3, 40, 50), np.uint8), r"\(3, 40, 50\).*uint8; expected .*height, width, 3"),
        (np.zeros((2, 0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (iter([["a.png"]]), "image 1: .* type list"),
    ],
)
def test_objects_that_are_not_images_are_rejected_with_a_short_message(classifier, images, message):
    with pytest.raises(UsageError, match=message) as error:
        classifier.predict(images)
    assert len(str(error.value)) < 300 and classifier.engine.sizes == []


def test_a_wrong_type_is_reported_before_the_first_batch(classifier, pictures):
    with pytest.raises(UsageError, match="image 4"):
        classifier.predict([*pictures, 5], batch_size=1)
    assert classifier.engine.sizes == []


def test_images_are_read_batch_by_batch(classifier, pictures):
    taken = []
    images = (taken.append(path) or path for path in 3 * pictures)
    results = classifier.stream(images, batch_size=4)
    next(results)
    assert len(taken) == 4 and len(list(results)) == 8 and classifier.engine.sizes == [4, 4, 1]


def test_progress_is_shown_on_request(classifier, pictures, monkeypatch):
    done = []

    @contextlib.contextmanager
    def progress(what, total):
        yield lambda count: done.append((what, total, count))

    monkeypatch.setattr("fcvit.inference.images.progress_of", progress)
    assert classifier.predict(pictures, progress=True) == classifier.predict(pictures)
    assert done == [("predicting", 3, 1)] * 3


def test_a_classifier_has_a_short_repr(classifier):
    assert repr(classifier) == "<Classifier digits.pth: fcvit_digits (10 classes), engine recorder>"


@needs_paddle
def test_the_paddle_network_is_available_with_any_engine(classifier):
    assert classifier.model.num_classes == 10 and classifier.model is classifier.model
    assert not classifier.model.training


def test_load_has_the_default_engine_of_the_command(digits_pth, monkeypatch):
    given = []
    monkeypatch.setattr("fcvit.tasks.predictor.create_engine", lambda *a, **k: given.append((a, k)) or Recorder())
    load(digits_pth, threads=2)
    load(digits_pth, engine="torch", device="cpu")
    ((auto, *_, first), options), ((name, *_, second), _) = given
    assert (auto, first, options["threads"], name, second) == ("auto", "auto", 2, "torch", "cpu")


@pytest.mark.parametrize("name", ENGINES)
def test_logits_that_overflow_are_rejected(tmp_path, digits_tensors, pictures, name):
    """Finite weights can give infinite logits, which have no order."""
    tensors = {**digits_tensors, "head.weight": np.float32(3e38) * np.sign(digits_tensors["head.weight"])}
    path = write_pth(tmp_path / "large.pth", tensors)
    classifier = load(path, engine=name, device="cpu")
    with pytest.raises(NumbersDisagree, match=r"large\.pth: the logits of .*0\.png are not finite"):
        classifier.predict(pictures)


def test_wrong_options_are_rejected(digits_pth, classifier, pictures):
    for option in ({"top_k": 0}, {"batch_size": 0}, {"top_k": 2.5}, {"batch_size": "4"}, {"top_k": True}):
        with pytest.raises(UsageError, match="at least 1"):
            classifier.predict(pictures, **option)
    with pytest.raises(DoesNotFit, match="3 classes, but the model has 10"):
        load(digits_pth, classes=NAMES[:3])
    with pytest.raises(UsageError, match="--threads '2'"):
        load(digits_pth, threads="2")
    with pytest.raises(UsageError, match="--device 'None'"):
        load(digits_pth, device=None)
    with pytest.raises(UsageError, match="--engine 'tensorflow'"):
        load(digits_pth, engine="tensorflow")
    with pytest.raises(DoesNotFit, match="2 outputs, but 10 class names"):
        rank(np.zeros((1, 2), np.float32), NAMES, 1)
    with pytest.raises(NumbersDisagree, match="not finite"):
        rank(np.array([[1, np.inf]], np.float32), NAMES[:2], 1)
