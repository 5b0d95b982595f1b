"""Semantic FPN in both frameworks against the numbers of mmsegmentation with the authors' backbone, in float64."""

import numpy as np
import pytest

from conftest import golden_arrays, golden_json, needs_paddle, needs_torch
from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec, SemanticFPNOptions, multiply_accumulates, parameter_count, tensor_specs
from fcvit.models.variants import VARIANTS
from fcvit.tasks.segmentation.logits import label_map
from fcvit.verification.equivalence import FLOAT64_LIMIT, RATIO_LIMIT
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

CASES = golden_json("segmentation/network.json")["cases"]
frameworks = pytest.mark.parametrize(
    "framework", [pytest.param("paddle", marks=needs_paddle), pytest.param("torch", marks=needs_torch)]
)


def run(framework, spec, tensors, images, dtype="float64"):
    """Return the outputs of backbone, neck and head, and the logits at the size of the images."""
    if framework == "paddle":
        from fcvit.models.build import build_network
        from fcvit.weights.checkpoint import MEMORY, Checkpoint
        from fcvit.weights.reading import Weights

        paddle = import_framework("paddle")
        weights = Weights(spec, tensors, Checkpoint("x", MEMORY, {}, None, b""), "torch", None, None, (), ())
        model, x, mode = build_network(weights, dtype), paddle.to_tensor(images.astype(dtype)), paddle.no_grad
    else:
        import torch

        from fcvit.reference.build import build_reference

        model = build_reference(spec, tensors, getattr(torch, dtype))
        x, mode = torch.from_numpy(images.astype(dtype)), torch.inference_mode
    with mode():
        backbone = model.backbone(x)
        neck = model.neck(backbone)
        outputs = [*backbone, *neck, model.decode_head(neck), model(x)]
    names = [f"{part}{level}" for part in ("backbone", "neck") for level in range(4)]
    return dict(zip([*names, "logits", "resized"], [value.numpy() for value in outputs], strict=True))


def spec_of(case):
    options = SemanticFPNOptions(case.get("neck", 256), case.get("head", 128))
    return ModelSpec(VARIANTS[case["variant"]], case["classes"], "semantic_fpn", options)


def sampled(values):
    """Return the values at the positions that the goldens contain."""
    count = values.size if values.size <= 8192 else 2048
    return values.ravel()[np.arange(count) * (values.size - 1) // (count - 1)]


@pytest.mark.slow
@frameworks
@pytest.mark.parametrize("name", CASES)
def test_every_part_and_the_label_map_equal_the_authors_numbers_in_float64(framework, name):
    case, arrays = CASES[name], golden_arrays("segmentation/network.npz")
    spec = spec_of(case)
    images = synthetic_input(tuple(case["input_shape"]), case["salt"])
    outputs = run(framework, spec, synthetic_tensors(spec, case["salt"]), images)
    for part, values in outputs.items():
        golden, about = arrays[f"{name}/{part}"], case["stages"][part]
        assert list(values.shape) == about["shape"]
        difference = np.abs(sampled(values) - golden.ravel()).max() / about["std"]
        assert difference <= FLOAT64_LIMIT, (part, difference)
    for logits, expected in zip(outputs["resized"], arrays[f"{name}/prediction"], strict=True):
        np.testing.assert_array_equal(label_map(logits, tuple(case["ori_shape"])), expected)


@needs_paddle
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-even", "tiny-odd"])
def test_the_float32_error_is_at_most_three_times_that_of_pytorch(name):
    case, arrays = CASES[name], golden_arrays("segmentation/network.npz")
    spec, images = spec_of(case), synthetic_input(tuple(case["input_shape"]), case["salt"])
    outputs = run("paddle", spec, synthetic_tensors(spec, case["salt"]), images, "float32")
    error = sampled(outputs["resized"]) - arrays[f"{name}/resized"].ravel()
    ratio = np.sqrt((error**2).mean()) / case["stages"]["resized"]["std"]
    assert ratio <= RATIO_LIMIT * case["float32_error_of_pytorch"]["resized"]["rms"]


def test_names_shapes_and_order_are_those_of_the_authors_files():
    names = golden_json("segmentation/network.json")["names_fcvit_tiny"]
    specs = tensor_specs(ModelSpec(VARIANTS["fcvit_tiny"], 7, "semantic_fpn"))
    assert [(name, list(entry.shape)) for name, entry in specs.items()] == list(names.items())


@pytest.mark.parametrize(
    ("variant", "parameters", "gmacs"),
    [
        ("fcvit_tiny", 8_616_222, 25.89),
        ("fcvit_b12", 18_456_502, 35.25),
        ("fcvit_b24", 30_714_902, 47.84),
        ("fcvit_b48", 55_231_702, 73.03),
    ],
)
def test_parameters_and_multiply_accumulates(variant, parameters, gmacs):
    spec = ModelSpec(VARIANTS[variant], 150, "semantic_fpn")
    assert parameter_count(spec) == parameters
    assert multiply_accumulates(spec, 512, 512) / 1e9 == pytest.approx(gmacs, abs=0.005)
