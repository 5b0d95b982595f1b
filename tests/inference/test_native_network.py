"""Classifiers and backbones in the native engine: goldens, sizes, threads, values that are not finite, faults."""

import dataclasses
import functools
from importlib import resources

import numpy as np
import pytest

import fcvit.inference.native_network as native_network
from conftest import golden_arrays, golden_json
from fcvit.errors import NumbersDisagree, UsageError
from fcvit.frameworks import installed
from fcvit.inference.check import check_export, compute, sample_images
from fcvit.inference.engines import create_engine
from fcvit.inference.interface import Interface
from fcvit.inference.native_network import NativeNetwork, unsupported
from fcvit.models.spec import ModelSpec, recognize
from fcvit.models.variants import VARIANTS, Preprocessing
from fcvit.native import build
from fcvit.verification.equivalence import RATIO_LIMIT, error_ratio
from fcvit.weights.reading import Weights, read_weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

PIXELS = Preprocessing()
OPTIONS = golden_json("options.json")
# Widths and heads that fill no vector, and two mixes with different kernels.
RAGGED = dataclasses.replace(
    VARIANTS["fcvit_digits"],
    widths=(12, 21, 30, 39),
    heads=3,
    reduction=3,
    mlp_ratios=(3, 2, 3, 2),
    kernel_sizes=(5, 9),
)
pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.skipif(not (installed("torch") or installed("paddle")), reason="no framework"),
]
FRAMEWORK = "torch" if installed("torch") else "paddle"
# Compiling the library for another level takes long.
BEST, *OTHERS = build.levels()
LEVELS = [BEST, *(pytest.param(level, marks=pytest.mark.slow) for level in OTHERS)]


@functools.cache
def synthetic_weights(spec, salt=""):
    return Weights(spec, synthetic_tensors(spec, salt), None, "torch", None, None, (), ())


def native(spec, threads=1, level=None, salt=""):
    return NativeNetwork(synthetic_weights(spec, salt), PIXELS, threads, level=level)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS["cases"])
def test_every_supported_option_has_the_error_of_float32(name):
    salt = f"options/{name}/"
    spec = recognize({key: tuple(shape) for key, shape in OPTIONS["cases"][name]["state_dict"].items()})
    if reason := unsupported(spec):
        assert spec.variant.spatial_attention or spec.variant.channel_attention
        with pytest.raises(UsageError, match=reason):
            native(spec, salt=salt)
        return
    images = synthetic_input(tuple(OPTIONS["input_shape"]), salt).astype(np.float32)
    (single,) = compute(FRAMEWORK, synthetic_weights(spec, salt), images)
    (logits,) = native(spec, salt=salt)(images)
    assert error_ratio(logits, single, golden_arrays("options.npz")[name]) <= RATIO_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_backbone_with_an_unusual_image_size(level):
    spec, images = ModelSpec(VARIANTS["fcvit_tiny"], head="backbone"), synthetic_input((1, 3, 72, 104), "features/")
    singles = compute(FRAMEWORK, synthetic_weights(spec, "features/"), images.astype(np.float32))
    outputs = native(spec, level=level, salt="features/")(images.astype(np.float32))
    for stage, (output, single) in enumerate(zip(outputs, singles, strict=True)):
        assert error_ratio(output, single, golden_arrays("features.npz")[f"stage{stage}"]) <= RATIO_LIMIT


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [(33, 7), (1, 1), (20, 45)])
def test_ragged_sizes_have_the_error_of_float32(size, level):
    spec, interface = ModelSpec(RAGGED, 7), Interface(size, True, False, PIXELS)
    images = sample_images(spec, size)[:12]
    check = check_export(native(spec, 2, level), synthetic_weights(spec), interface, images, "native")
    assert check.ratio <= RATIO_LIMIT


def test_layers_with_the_three_inputs_of_an_image_have_the_error_of_float32():
    narrow = dataclasses.replace(RAGGED, token_minimum=3, token_factor=100)
    spec, size = ModelSpec(narrow, 7), (33, 47)
    images, interface = sample_images(spec, size)[:12], Interface(size, True, False, PIXELS)
    assert check_export(native(spec), synthetic_weights(spec), interface, images, "native").ratio <= RATIO_LIMIT


@pytest.mark.parametrize("size", [(20, 45), (97, 121)])
def test_threads_and_the_other_images_of_a_batch_do_not_change_a_bit(size):
    spec, images = ModelSpec(RAGGED, 7), np.random.default_rng(0).integers(0, 256, (5, 3, *size), np.uint8)
    (expected,) = native(spec)(images)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(native(spec, threads)(images)[0], expected)
    np.testing.assert_array_equal(native(spec, 3)(images[1:2])[0], expected[1:2])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_through_and_stays_in_its_image(value):
    spec = ModelSpec(RAGGED, 7)
    images = np.random.default_rng(0).normal(size=(4, 3, 40, 33)).astype(np.float32)
    (expected,) = native(spec)(images)
    images[2, 1, 39, 32] = value
    (logits,) = native(spec)(images)
    assert not np.isfinite(logits[2]).any()
    np.testing.assert_array_equal(np.delete(logits, 2, 0), np.delete(expected, 2, 0))


@pytest.mark.slow
def test_the_ranking_of_held_out_digits_is_that_of_onnx_runtime(digits_pth):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    weights = read_weights(digits_pth)
    with resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb") as file:
        digits = np.load(file, allow_pickle=False)["images"]
    images = np.stack([digits] * 3, axis=1)
    pixels = dataclasses.replace(weights.spec.variant.preprocessing, input_size=images.shape[2])
    ranks = [np.argsort(-create_engine(name, weights, pixels)(images), 1) for name in ("native", "onnxruntime")]
    assert len(images) == 360
    np.testing.assert_array_equal(*ranks)


FAULTS = {
    "epsilon": ("_EPS", 1e-4),
    "GELU": ("_GELU", native_network._RELU),
    "competition": ("_LINEAR", native_network._GELU),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_detected(name, monkeypatch):
    monkeypatch.setattr(native_network, *FAULTS[name])
    spec, size = ModelSpec(RAGGED, 7), (33, 47)
    images, interface = sample_images(spec, size)[:4], Interface(size, True, False, PIXELS)
    with pytest.raises(NumbersDisagree, match="do not match the weights"):
        check_export(native(spec), synthetic_weights(spec), interface, images, "native")
