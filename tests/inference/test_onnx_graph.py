"""Tests of the ONNX graph: comparison with the authors' goldens in float64, computed by onnx's reference evaluator."""

import dataclasses

import numpy as np
import pytest
from scipy.special import erf

from conftest import DIGITS, golden_arrays, golden_json
from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import UsageError
from fcvit.inference.interface import Interface
from fcvit.metrics.classification import softmax
from fcvit.models.spec import ModelSpec, recognize
from fcvit.models.variants import VARIANTS, Preprocessing
from fcvit.verification.equivalence import FLOAT64_LIMIT, float64_difference
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

from fcvit.inference.onnx_graph import onnx_model  # noqa: E402

OPTIONS = golden_json("options.json")
PIXELS = Preprocessing()


def synthetic_weights(spec, salt=""):
    return Weights(spec, synthetic_tensors(spec, salt), None, "torch", None, None, (), ())


def write(weights, size, uint8=False, probabilities=False, preprocessing=PIXELS):
    return onnx_model(weights, Interface(size, uint8, probabilities, preprocessing), dtype="float64")


class Gelu(OpRun):
    """GELU in float64. The evaluator computes the square root of two in float32."""

    op_domain = ""

    def _run(self, x, approximate="none"):
        assert approximate == "none"
        return (0.5 * x * (1 + erf(x / np.sqrt(2))),)


def run(model, images):
    images = images if images.dtype == np.uint8 else images.astype(np.float64)
    return ReferenceEvaluator(model, new_ops=[Gelu]).run(None, {model.graph.input[0].name: images})


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="fixed"), pytest.param(True, id="dynamic", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", OPTIONS["cases"])
@pytest.mark.slow
def test_every_option_matches_the_authors_golden(name, dynamic):
    shapes = {key: tuple(shape) for key, shape in OPTIONS["cases"][name]["state_dict"].items()}
    salt = f"options/{name}/"
    images = synthetic_input(tuple(OPTIONS["input_shape"]), salt)
    model = write(synthetic_weights(recognize(shapes), salt), None if dynamic else images.shape[2:])
    (logits,) = run(model, images)
    assert float64_difference(logits, golden_arrays("options.npz")[name]) <= FLOAT64_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_a_backbone_with_an_unusual_image_size(dynamic):
    images = synthetic_input((1, 3, 72, 104), "features/")
    model = write(
        synthetic_weights(ModelSpec(VARIANTS["fcvit_tiny"], head="backbone"), "features/"),
        None if dynamic else (72, 104),
    )
    features = dict(zip((o.name for o in model.graph.output), run(model, images), strict=True))
    for stage, expected in golden_arrays("features.npz").items():
        assert float64_difference(features[f"features.{stage.removeprefix('stage')}"], expected) <= FLOAT64_LIMIT


@pytest.mark.slow
def test_a_published_variant_with_grouped_hidden_channels():
    model = write(synthetic_weights(ModelSpec(VARIANTS["fcvit_tiny"], 1000)), (224, 224))
    adds = [node for node in model.graph.node if node.op_type == "Add" and "channel_mixer" in node.name]
    assert len(adds) > sum(VARIANTS["fcvit_tiny"].depths)
    (logits,) = run(model, synthetic_input((2, 3, 224, 224))[:1])
    assert float64_difference(logits, golden_arrays("fcvit_tiny.npz")["logits"][:1]) <= FLOAT64_LIMIT


def test_grouped_hidden_channels_compute_the_same_function(monkeypatch):
    from fcvit.inference import onnx_graph

    weights, images = synthetic_weights(DIGITS), synthetic_input((2, 3, 32, 32))
    ungrouped = write(weights, (32, 32))
    (expected,) = run(ungrouped, images)
    monkeypatch.setattr(onnx_graph, "_HIDDEN_BYTES", 2048)
    grouped = write(weights, (32, 32))
    assert len(grouped.graph.node) > len(ungrouped.graph.node)
    (logits,) = run(grouped, images)
    assert np.abs(logits - expected).max() > 0 and float64_difference(logits, expected) <= FLOAT64_LIMIT


def test_uint8_images_are_normalized_by_the_graph_including_borders():
    pixels = Preprocessing(mean=(0.2, 0.5, 0.7), std=(0.1, 0.3, 0.2))
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 33, 40), np.uint8)
    normalized = (images / 255 - np.array(pixels.mean)[:, None, None]) / np.array(pixels.std)[:, None, None]
    assert np.abs(normalize(images, pixels) - normalized).max() < 1e-5
    weights = synthetic_weights(DIGITS)
    (expected,) = run(write(weights, (33, 40)), normalized)
    (logits,) = run(write(weights, (33, 40), uint8=True, preprocessing=pixels), images)
    assert float64_difference(logits, expected) <= FLOAT64_LIMIT


def test_probabilities_are_the_softmax_of_the_logits():
    weights, images = synthetic_weights(DIGITS), synthetic_input((3, 3, 32, 32))
    (logits,) = run(write(weights, (32, 32)), images)
    (probabilities,) = run(write(weights, (32, 32), probabilities=True), images)
    assert np.abs(probabilities - softmax(logits)).max() < 1e-12
    with pytest.raises(UsageError, match="has no classes"):
        write(synthetic_weights(ModelSpec(DIGITS.variant)), (32, 32), probabilities=True)


def test_a_network_without_a_head_returns_embeddings():
    weights = synthetic_weights(DIGITS)
    headless = dataclasses.replace(weights, spec=ModelSpec(DIGITS.variant))
    images = synthetic_input((2, 3, 32, 32))
    (embeddings,) = run(write(headless, (32, 32)), images)
    (logits,) = run(write(weights, (32, 32)), images)
    head = weights.tensors["head.weight"].astype(np.float64), weights.tensors["head.bias"].astype(np.float64)
    assert float64_difference(embeddings @ head[0].T + head[1], logits) <= FLOAT64_LIMIT


def test_one_head_and_one_position_give_finite_outputs():
    variant = dataclasses.replace(DIGITS.variant, heads=1, depths=(1, 1, 1, 1))
    weights, images = synthetic_weights(ModelSpec(variant, 10)), synthetic_input((2, 3, 32, 32))
    fixed, dynamic = (run(write(weights, size), images)[0] for size in ((32, 32), None))
    assert np.isfinite(fixed).all() and float64_difference(dynamic, fixed) <= FLOAT64_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), None])
def test_the_graph_has_no_unnecessary_nodes(size):
    model = write(synthetic_weights(ModelSpec(VARIANTS["fcvit_tiny"], 1000)), size)
    kinds = [node.op_type for node in model.graph.node]
    for kind in ("Identity", "Gather", "If", "Unsqueeze", "Cast", "BatchNormalization", "Constant", "Transpose"):
        assert kinds.count(kind) == 0 or (kind == "Cast" and size is None)
    assert kinds.count("Shape") == (0 if size else 4)
    assert {o.name for o in model.graph.output} == {"logits"}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_an_empty_image_size_is_rejected():
    with pytest.raises(UsageError, match=r"image size \(0, 32\)"):
        write(synthetic_weights(DIGITS), (0, 32))
