"""Compare both networks numerically with outputs of the authors' code.

In float64 they must agree to rounding. In float32 the error is compared with PyTorch's own error.
"""

import dataclasses

import numpy as np
import pytest

from conftest import PUBLISHED, golden_arrays, golden_json, needs_paddle, needs_torch
from fcvit.models.spec import ModelSpec, recognize, tensor_specs
from fcvit.models.variants import VARIANTS, Variant
from fcvit.verification.equivalence import FLOAT64_LIMIT, RATIO_LIMIT, error_ratio
from fcvit.verification.traces import trace_paddle, trace_torch
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

OPTIONS = golden_json("options.json")
CI_ONLY = ("fcvit_b24", "fcvit_b48")  # a trace of these variants takes many seconds
PUBLISHED_VARIANTS = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.ci] if n in CI_ONLY else [pytest.mark.slow] if n != "fcvit_tiny" else [])
        for n in PUBLISHED
    ],
)
NETWORKS = [
    pytest.param(trace_paddle, marks=needs_paddle, id="paddle"),
    pytest.param(trace_torch, marks=needs_torch, id="reference"),
]


def synthetic_weights(spec: ModelSpec, salt: str = "") -> Weights:
    return Weights(spec, synthetic_tensors(spec, salt), None, "torch", None, None, (), ())


def assert_equal(computed: np.ndarray, expected: np.ndarray) -> None:
    assert computed.dtype == expected.dtype == np.float64
    assert np.abs(computed - expected).max() <= FLOAT64_LIMIT * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize("trace", NETWORKS)
@PUBLISHED_VARIANTS
def test_published_variants_match_in_float64(name, trace):
    golden = golden_json(f"{name}.json")
    layers = trace(synthetic_weights(ModelSpec(VARIANTS[name], 1000)), synthetic_input((2, 3, 224, 224)), "float64")
    assert_equal(layers["output"], golden_arrays(f"{name}.npz")["logits"])
    stages = ("patch_embed", *(f"network.{i}" for i in range(7)), "norm")
    for stage in stages:
        expected, computed = golden["stages"][stage], layers[stage]
        assert list(computed.shape) == expected["shape"]
        assert np.abs(computed.ravel()[expected["index"]] - expected["value"]).max() <= FLOAT64_LIMIT * expected["std"]
        assert computed.mean() == pytest.approx(expected["mean"], abs=FLOAT64_LIMIT * expected["std"])
        assert computed.std() == pytest.approx(expected["std"], rel=FLOAT64_LIMIT)


@needs_paddle
@PUBLISHED_VARIANTS
@pytest.mark.slow
def test_published_variants_match_in_float32(name):
    golden = golden_arrays(f"{name}.npz")
    layers = trace_paddle(
        synthetic_weights(ModelSpec(VARIANTS[name], 1000)), synthetic_input((2, 3, 224, 224)), "float32"
    )
    assert error_ratio(layers["output"], golden["float32_logits"], golden["logits"]) <= RATIO_LIMIT


@pytest.mark.parametrize("trace", NETWORKS)
@pytest.mark.parametrize("name", OPTIONS["cases"])
@pytest.mark.slow
def test_every_option_matches_in_float64(name, trace):
    shapes = {key: tuple(shape) for key, shape in OPTIONS["cases"][name]["state_dict"].items()}
    salt = f"options/{name}/"
    layers = trace(
        synthetic_weights(recognize(shapes), salt), synthetic_input(tuple(OPTIONS["input_shape"]), salt), "float64"
    )
    assert_equal(layers["output"], golden_arrays("options.npz")[name])


@pytest.mark.parametrize("trace", NETWORKS)
@pytest.mark.slow
def test_the_backbone_matches_in_float64(trace):
    weights = synthetic_weights(ModelSpec(VARIANTS["fcvit_tiny"], head="backbone"), "features/")
    layers = trace(weights, synthetic_input((1, 3, 72, 104), "features/"), "float64")
    for stage, expected in golden_arrays("features.npz").items():
        assert_equal(layers[f"output{stage.removeprefix('stage')}"], expected)


@pytest.mark.slow
@needs_torch
def test_the_goldens_detect_an_ignored_option():
    """The same tensors without the weighting of the context give different logits."""
    spec = ModelSpec(dataclasses.replace(VARIANTS["fcvit_tiny"], weighted_context=False), 1000)
    layers = trace_torch(synthetic_weights(spec), synthetic_input((2, 3, 224, 224)), "float64")
    expected = golden_arrays("fcvit_tiny.npz")["logits"]
    assert np.abs(layers["output"] - expected).max() > 1e-3 * expected.std()


@pytest.mark.parametrize("name", OPTIONS["cases"])
def test_every_setting_of_the_authors_is_a_field_of_the_variant(name):
    """A variant built from the authors' settings equals the variant that is recognized from the tensors."""
    case = OPTIONS["cases"][name]
    context, spatial = case["options"]["global_context"], case["options"]["spatial_mixer"]
    channel, attention = case["options"]["channel_mixer"], case["options"]["spatial_att"]
    pooled = case["options"]["channel_att"]
    variant = Variant(
        "custom",
        tuple(OPTIONS["depths"]),
        tuple(OPTIONS["widths"]),
        tuple(OPTIONS["mlp_ratios"]),
        global_context=spatial["use_globalcontext"],
        weighted_context=context["weighted_gc"],
        competition=context["compete"],
        heads=context["head"],
        reduction=context["gc_reduction"],
        second_mix=spatial["useSecondTokenMix"],
        kernel_sizes=(spatial["mix_size_1"], spatial["mix_size_2"]),
        token_factor=spatial["fc_factor"],
        token_minimum=spatial["fc_min_value"],
        spatial_attention=spatial["useSpatialAtt"],
        spatial_attention_kernel=attention["kernel_size"],
        spatial_attention_reduction=attention["dim_reduction"],
        channel_dwconv=channel["useDWconv"],
        channel_kernel=channel["DWconv_size"],
        channel_attention=channel["useChannelAtt"],
        channel_attention_kernels=(pooled["size_1"], pooled["size_2"]),
        layer_scale=1e-5 if case["use_layer_scale"] else None,
    )
    spec = ModelSpec(variant, OPTIONS["num_classes"])
    assert {key: list(entry.shape) for key, entry in tensor_specs(spec).items()} == case["state_dict"]
    assert recognize({key: tuple(shape) for key, shape in case["state_dict"].items()}) == spec
