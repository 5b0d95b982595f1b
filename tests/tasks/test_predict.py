"""Engines, and what they say of images."""

import numpy as np
import pytest
from PIL import Image

from conftest import DIGITS, needs_paddle, needs_torch
from fcvit.classes import ClassName
from fcvit.deploy.engines import create_engine
from fcvit.errors import BadImages, DoesNotFit, UsageError
from fcvit.images.preprocess import normalise
from fcvit.tasks.convert import convert
from fcvit.tasks.predict import load, predict_files, rank
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
def test_an_engine_takes_both_kinds_of_input(digits_pth, name):
    preprocessing = DIGITS.variant.preprocessing
    engine = create_engine(name, read_weights(digits_pth), preprocessing, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    logits = engine(pixels)
    assert logits.shape == (2, 10) and logits.dtype == np.float32
    np.testing.assert_array_equal(engine(normalise(pixels, preprocessing)), logits)
    for wrong in (pixels[0], pixels.transpose(0, 2, 3, 1), pixels.astype(np.float64)):
        with pytest.raises(UsageError, match="expected"):
            engine(wrong)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("device", ["tpu", "gpu:x", "cpu:1", "gpu:99"])
def test_devices_that_are_none(digits_pth, name, device):
    with pytest.raises(UsageError, match=f"--device '?{device}"):
        create_engine(name, read_weights(digits_pth), DIGITS.variant.preprocessing, device)


@needs_paddle
def test_on_a_gpu(digits_pth):
    from fcvit.frameworks import import_framework

    if not import_framework("paddle").is_compiled_with_cuda():
        pytest.skip("this build of PaddlePaddle has no GPU support")
    weights, pixels = read_weights(digits_pth), np.full((2, 3, 32, 32), 7, np.uint8)
    gpu, cpu = (create_engine("paddle", weights, DIGITS.variant.preprocessing, d)(pixels) for d in ("gpu", "cpu"))
    np.testing.assert_allclose(gpu, cpu, atol=1e-3)


@needs_paddle
def test_load_gives_all_that_predict_needs(tmp_path, digits_pth, pictures):
    convert(digits_pth, tmp_path / "x.safetensors", classes=NAMES, verify=False)
    classifier = load(tmp_path / "x.safetensors", device="cpu")
    assert classifier.classes == NAMES and classifier.preprocessing.input_size == 32
    found = classifier.predict([pictures[0], Image.open(pictures[1])], top_k=3)
    assert [len(ranked) for ranked in found] == [3, 3]
    best = found[0][0]
    assert best.name == f"digit {best.index}" and best.id == str(best.index)
    assert 1 >= found[0][0].probability >= found[0][1].probability >= found[0][2].probability > 0
    assert sum(p.probability for p in classifier.predict(pictures, top_k=99)[2]) == pytest.approx(1)
    with pytest.raises(UsageError, match="give a list"):
        classifier.predict(str(pictures[0]))
    with pytest.raises(BadImages):
        classifier.predict([tmp_path / "none.png"])


@pytest.mark.parametrize("name", ENGINES)
def test_files_one_by_one_bad_ones_in_their_place(tmp_path, digits_pth, pictures, name):
    (tmp_path / "bad.png").write_bytes(b"?")
    paths = [pictures[0], tmp_path / "bad.png", pictures[1]]
    found = list(predict_files(read_weights(digits_pth), paths, top_k=2, engine_name=name, device="cpu"))
    assert [path for path, _ in found] == paths
    assert isinstance(found[1][1], BadImages)
    assert [p.name for p in found[0][1]] == [f"class {p.index}" for p in found[0][1]]


def test_wrong_requests(digits_pth, pictures):
    weights = read_weights(digits_pth)
    with pytest.raises(UsageError, match="at least 1"):
        predict_files(weights, pictures, top_k=0)
    with pytest.raises(DoesNotFit, match="3 classes are listed"):
        predict_files(weights, pictures, classes=NAMES[:3])
    with pytest.raises(DoesNotFit, match="2 outputs, but 10 class names"):
        rank(np.zeros((1, 2), np.float32), NAMES, 1)
