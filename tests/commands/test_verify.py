"""Test that the verification detects planted errors.

Each error is one that occurred in an earlier port, or could have occurred. With synthetic weights, most of them
change the logits so little that a simple float32 comparison would not detect them.
"""

import dataclasses

import numpy as np
import pytest

from conftest import DIGITS, needs_paddle, needs_torch, write_pdparams, write_pth
from fcvit.commands.convert import convert
from fcvit.commands.verify import verify
from fcvit.errors import DoesNotFit, NumbersDisagree
from fcvit.models.spec import is_counter, paddle_name, tensor_specs
from fcvit.verification.comparison import Comparison, LayerDrift, verify_weights
from fcvit.verification.equivalence import FLOAT64_LIMIT, RATIO_LIMIT, float64_difference
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors

pytestmark = [needs_paddle, needs_torch]


@pytest.fixture
def converted(tmp_path, digits_pth):
    convert(digits_pth, tmp_path / "digits.safetensors", verify=False)
    return tmp_path / "digits.safetensors"


@pytest.mark.slow
def test_a_correct_conversion_passes(digits_pth, converted):
    verification = verify(converted, digits_pth)
    assert verification.passed and not verification.different and verification.synthetic is None
    assert verification.tensors == len(tensor_specs(DIGITS))
    assert 0 < verification.comparison.float64_difference < 1e-11
    assert 0.2 < verification.comparison.error_ratio < RATIO_LIMIT
    assert 0 < verification.comparison.float32_mean < verification.comparison.float32_max < 1e-4
    layers = [layer.name for layer in verification.comparison.drift]
    expected = ["patch_embed", "network.0.0", "network.0", "network.1", "network.2.0", "network.2", "network.3"]
    expected += ["network.4.0", "network.4.1", "network.4", "network.5", "network.6.0", "network.6", "norm", "output"]
    assert layers == expected


def plant_paddle_code(monkeypatch, fault):
    """Plant one error in the Paddle network."""
    from fcvit.models import backbone as model

    paddle, functional = model.paddle, model.F
    if fault == "GELU by tanh":
        exact = functional.gelu
        monkeypatch.setattr(model.F, "gelu", lambda x, *_: exact(x, approximate=True))
    elif fault == "eps of GroupNorm":
        forward = model.LayerNorm2D.forward

        def with_other_eps(self, x):
            self._epsilon = 1e-6
            return forward(self, x)

        monkeypatch.setattr(model.LayerNorm2D, "forward", with_other_eps)
    elif fault == "eps of BatchNorm":
        forward = paddle.nn.BatchNorm2D.forward

        def with_other_eps(self, x):
            self._epsilon = 1e-6
            return forward(self, x)

        monkeypatch.setattr(paddle.nn.BatchNorm2D, "forward", with_other_eps)
    elif fault == "eps of the similarity":
        monkeypatch.setattr(model, "SIMILARITY_EPS", 1e-6)
    elif fault == "biased standard deviation":
        similarity = model.GlobalContext.similarity

        def biased(self, x, context):
            count = self.heads * x.shape[2] * x.shape[3]
            return similarity(self, x, context) * (count / (count - 1)) ** 0.5

        monkeypatch.setattr(model.GlobalContext, "similarity", biased)
    elif fault == "max instead of mean context":
        mean = model.mean
        monkeypatch.setattr(
            model,
            "mean",
            lambda x, axes: x.max(axis=[2, 3], keepdim=True) if axes == (2, 3) and x.shape[2] > 1 else mean(x, axes),
        )
    elif fault == "halves of the competition interleaved":

        def interleaved(self, context):
            both = self.fc1(context)
            return self.fc2(paddle.maximum(both[:, ::2], both[:, 1::2]))

        monkeypatch.setattr(model.GlobalContext, "bottleneck", interleaved)
    else:
        raise AssertionError(fault)


CODE_FAULTS = {
    # fault -> layer where the first difference must be reported
    "GELU by tanh": "network.0.0",
    "eps of GroupNorm": "network.0.0",
    "eps of BatchNorm": "patch_embed",
    "eps of the similarity": "network.0.0",
    "biased standard deviation": "network.0.0",
    "max instead of mean context": "network.0.0",
    "halves of the competition interleaved": "network.0.0",
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
@pytest.mark.slow
def test_an_error_in_the_network_is_detected_and_located(digits_pth, converted, monkeypatch, fault):
    plant_paddle_code(monkeypatch, fault)
    verification = verify(converted, digits_pth)
    assert not verification.passed
    assert verification.comparison.float64_difference > FLOAT64_LIMIT
    assert verification.comparison.first_over.name == CODE_FAULTS[fault]
    assert CODE_FAULTS[fault] in verification.failure()


@pytest.mark.parametrize("fault", ["GELU by tanh", "eps of BatchNorm"])
@pytest.mark.slow
def test_convert_leaves_no_file_if_the_verification_fails(tmp_path, digits_pth, monkeypatch, fault):
    plant_paddle_code(monkeypatch, fault)
    with pytest.raises(NumbersDisagree, match=CODE_FAULTS[fault]):
        convert(digits_pth, tmp_path / "out.pdparams")
    assert [path.name for path in tmp_path.iterdir()] == ["digits.pth"]


def paddle_file(path, tensors, spec):
    table = tensor_specs(spec)
    stored = {
        paddle_name(n): t.T if table[n].transposed_in_paddle else t for n, t in tensors.items() if not is_counter(n)
    }
    return write_pdparams(path, stored)


def with_counters(weights):
    """Set the counters, which the hand-made Paddle file does not contain, to 1."""
    one = np.array(1, np.int64)
    return dataclasses.replace(weights, tensors={n: one if is_counter(n) else t for n, t in weights.tensors.items()})


def plant_in_tensors(tensors, fault):
    faulty = dict(tensors)
    if fault == "one untransposed square Linear":
        faulty["head.weight"] = tensors["head.weight"].T
    elif fault == "two swapped tensors of one shape":
        one, other = "network.0.0.norm1.weight", "network.0.0.norm2.weight"
        faulty[one], faulty[other] = tensors[other], tensors[one]
    elif fault == "one tensor left at its initial value":
        faulty["network.4.1.token_mixer.gc2.rescale_bias"] = np.zeros(8, np.float32)
    return faulty


@pytest.mark.parametrize(
    ("fault", "layer"),
    [
        ("one untransposed square Linear", "output"),
        ("two swapped tensors of one shape", "network.0.0"),
        ("one tensor left at its initial value", "network.4.1"),
    ],
)
@pytest.mark.slow
def test_an_error_in_the_tensors_is_detected_twice(tmp_path, fault, layer):
    """The error is detected in the tensors, and independently in the outputs."""
    spec = dataclasses.replace(DIGITS, num_classes=48)  # equal to the last width, so that the head is square
    tensors = synthetic_tensors(spec)
    source = read_weights(write_pth(tmp_path / "source.pth", tensors))
    good = with_counters(read_weights(paddle_file(tmp_path / "good.pdparams", tensors, spec)))
    assert verify_weights(good, source).passed
    faulty = plant_in_tensors(tensors, fault)
    bad = with_counters(read_weights(paddle_file(tmp_path / "bad.pdparams", faulty, spec)))
    verification = verify_weights(bad, source)
    assert not verification.passed
    changed = {name for name in tensors if not np.array_equal(tensors[name], faulty[name])}
    assert set(verification.different) == changed
    assert verification.comparison.float64_difference > FLOAT64_LIMIT
    assert verification.comparison.first_over.name == layer


@pytest.mark.slow
def test_a_changed_counter_is_detected_although_outputs_are_equal(digits_pth, converted):
    source, result = read_weights(digits_pth), read_weights(converted)
    name = "network.1.norm.num_batches_tracked"
    changed = dataclasses.replace(result, tensors={**result.tensors, name: np.array(2, np.int64)})
    verification = verify_weights(changed, source)
    assert verification.different == (name,) and verification.comparison.passed and not verification.passed


@pytest.mark.slow
def test_the_error_ratio_detects_reduced_precision(digits_pth, converted, monkeypatch):
    """The logic is correct, but one activation is rounded to half of the digits."""
    from fcvit.models import backbone as model

    exact = model.F.gelu

    def coarse(x, *_):
        out = exact(x)
        return out if out.dtype == model.paddle.float64 else (out.astype("bfloat16").astype("float32") + out * 15) / 16

    monkeypatch.setattr(model.F, "gelu", coarse)
    verification = verify(converted, digits_pth)
    assert verification.comparison.float64_difference <= FLOAT64_LIMIT
    assert verification.comparison.error_ratio > RATIO_LIMIT
    assert not verification.passed and "float32 error ratio" in verification.failure()


@pytest.mark.slow
def test_near_zero_layer_scale_is_verified_with_synthetic_weights(tmp_path, monkeypatch):
    """With the initial layer scale, a wrong mixer hardly changes the outputs. Synthetic weights are compared too."""
    tensors = {n: np.full_like(t, 1e-5) if "layer_scale" in n else t for n, t in synthetic_tensors(DIGITS).items()}
    source = write_pth(tmp_path / "fresh.pth", tensors)
    conversion = convert(source, tmp_path / "fresh.safetensors")
    assert conversion.verification.synthetic is not None and conversion.verification.passed
    plant_paddle_code(monkeypatch, "eps of the similarity")
    verification = verify(tmp_path / "fresh.safetensors", source)
    assert verification.synthetic.float64_difference > 100 * verification.comparison.float64_difference
    assert not verification.passed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrower_type_is_compared_with_the_rounded_source(tmp_path, digits_pth, dtype):
    verification = convert(digits_pth, tmp_path / "x.safetensors", dtype=dtype).verification
    assert verification.passed and verification.stored_as == dtype
    assert 1e-4 < verification.rounding_cost < 0.3
    wide = convert(digits_pth, tmp_path / "y.safetensors").verification
    assert wide.rounding_cost == 0


@pytest.mark.slow
def test_a_conversion_to_pytorch_is_verified(tmp_path, digits_pth, converted):
    conversion = convert(converted, tmp_path / "back.pth")
    assert conversion.verification.passed
    assert verify(tmp_path / "back.pth", digits_pth).passed


def test_a_dense_backbone_is_verified_with_its_four_outputs(tmp_path):
    spec = dataclasses.replace(DIGITS, num_classes=0, head="backbone")
    conversion = convert(write_pth(tmp_path / "d.pth", synthetic_tensors(spec)), tmp_path / "d.safetensors")
    names = [layer.name for layer in conversion.verification.comparison.drift]
    assert names[-4:] == ["output0", "output1", "output2", "output3"] and conversion.verification.passed


def test_different_networks_are_rejected(tmp_path, digits_pth):
    other = write_pth(tmp_path / "other.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=11)))
    with pytest.raises(DoesNotFit, match=r"11 classes.*10 classes|10 classes.*11 classes"):
        verify(other, digits_pth)


def test_nan_never_passes():
    nan = np.array([1.0, np.nan])
    assert float64_difference(nan, np.array([1.0, 2.0])) == np.inf
    comparison = Comparison((2, 3, 8, 8), float("nan"), 1.0, 0.0, 0.0, 1.0, ())
    assert not comparison.passed
    layer = LayerDrift("x", float("nan"))
    assert Comparison((2, 3, 8, 8), 0.0, 1.0, 0.0, 0.0, 1.0, (layer,)).first_over is layer
