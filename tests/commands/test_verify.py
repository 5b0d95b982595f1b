"""The verification, and that it catches each planted fault.

Every fault is one that an earlier port made or could have made. On synthetic weights most move the
logits by less than a casual float32 comparison would notice.
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


def test_a_right_conversion_passes(digits_pth, converted):
    proof = verify(converted, digits_pth)
    assert proof.passed and not proof.different and proof.synthetic is None
    assert proof.tensors == len(tensor_specs(DIGITS))
    assert 0 < proof.comparison.float64_difference < 1e-11
    assert 0.2 < proof.comparison.error_ratio < RATIO_LIMIT
    assert 0 < proof.comparison.float32_mean < proof.comparison.float32_max < 1e-4
    layers = [layer.name for layer in proof.comparison.drift]
    expected = ["patch_embed", "network.0.0", "network.0", "network.1", "network.2.0", "network.2", "network.3"]
    expected += ["network.4.0", "network.4.1", "network.4", "network.5", "network.6.0", "network.6", "norm", "output"]
    assert layers == expected


def plant_paddle_code(monkeypatch, fault):
    """Change one thing in the Paddle network."""
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
    # fault -> the layer where the first difference must be seen
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
def test_a_fault_in_the_network_is_caught_and_located(digits_pth, converted, monkeypatch, fault):
    plant_paddle_code(monkeypatch, fault)
    proof = verify(converted, digits_pth)
    assert not proof.passed
    assert proof.comparison.float64_difference > FLOAT64_LIMIT
    assert proof.comparison.first_over.name == CODE_FAULTS[fault]
    assert CODE_FAULTS[fault] in proof.failure()


@pytest.mark.parametrize("fault", ["GELU by tanh", "eps of BatchNorm"])
@pytest.mark.slow
def test_convert_leaves_no_file_when_the_verification_fails(tmp_path, digits_pth, monkeypatch, fault):
    plant_paddle_code(monkeypatch, fault)
    with pytest.raises(NumbersDisagree, match="verification failed: the first difference is in"):
        convert(digits_pth, tmp_path / "out.pdparams")
    assert [path.name for path in tmp_path.iterdir()] == ["digits.pth"]


def paddle_file(path, tensors, spec):
    table = tensor_specs(spec)
    stored = {
        paddle_name(n): t.T if table[n].transposed_in_paddle else t for n, t in tensors.items() if not is_counter(n)
    }
    return write_pdparams(path, stored)


def with_counters(weights):
    """The hand-made Paddle file has none; that is no fault here."""
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
def test_a_fault_in_the_tensors_is_caught_twice(tmp_path, fault, layer):
    """By the tensors themselves, and independently by the numbers that come out."""
    spec = dataclasses.replace(DIGITS, num_classes=48)  # as many classes as the last width: a square head
    tensors = synthetic_tensors(spec)
    source = read_weights(write_pth(tmp_path / "source.pth", tensors))
    good = with_counters(read_weights(paddle_file(tmp_path / "good.pdparams", tensors, spec)))
    assert verify_weights(good, source).passed
    faulty = plant_in_tensors(tensors, fault)
    bad = with_counters(read_weights(paddle_file(tmp_path / "bad.pdparams", faulty, spec)))
    proof = verify_weights(bad, source)
    assert not proof.passed
    changed = {name for name in tensors if not np.array_equal(tensors[name], faulty[name])}
    assert set(proof.different) == changed
    assert proof.comparison.float64_difference > FLOAT64_LIMIT
    assert proof.comparison.first_over.name == layer


def test_a_changed_counter_is_caught_although_no_number_moves(digits_pth, converted):
    source, result = read_weights(digits_pth), read_weights(converted)
    name = "network.1.norm.num_batches_tracked"
    proof = verify_weights(dataclasses.replace(result, tensors={**result.tensors, name: np.array(2, np.int64)}), source)
    assert proof.different == (name,) and proof.comparison.passed and not proof.passed


def test_the_error_ratio_catches_sloppy_float32(digits_pth, converted, monkeypatch):
    """Right logic, wrong precision: one activation rounded to half the digits."""
    from fcvit.models import backbone as model

    exact = model.F.gelu

    def coarse(x, *_):
        out = exact(x)
        return out if out.dtype == model.paddle.float64 else (out.astype("bfloat16").astype("float32") + out * 15) / 16

    monkeypatch.setattr(model.F, "gelu", coarse)
    proof = verify(converted, digits_pth)
    assert proof.comparison.float64_difference <= FLOAT64_LIMIT
    assert proof.comparison.error_ratio > RATIO_LIMIT
    assert not proof.passed and "float32 error ratio" in proof.failure()


@pytest.mark.slow
def test_weights_with_a_near_zero_layer_scale_are_not_taken_as_proof(tmp_path, monkeypatch):
    """With the layer scale at its start a wrong mixer hardly shows: synthetic weights are compared too."""
    tensors = {n: np.full_like(t, 1e-5) if "layer_scale" in n else t for n, t in synthetic_tensors(DIGITS).items()}
    source = write_pth(tmp_path / "fresh.pth", tensors)
    done = convert(source, tmp_path / "fresh.safetensors")
    assert done.verification.synthetic is not None and done.verification.passed
    plant_paddle_code(monkeypatch, "eps of the similarity")
    proof = verify(tmp_path / "fresh.safetensors", source)
    assert proof.synthetic.float64_difference > 100 * proof.comparison.float64_difference
    assert not proof.passed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrower_type_is_held_against_the_rounded_source(tmp_path, digits_pth, dtype):
    proof = convert(digits_pth, tmp_path / "x.safetensors", dtype=dtype).verification
    assert proof.passed and proof.stored_as == dtype
    assert 1e-4 < proof.rounding_cost < 0.3
    wide = convert(digits_pth, tmp_path / "y.safetensors").verification
    assert wide.rounding_cost == 0


@pytest.mark.slow
def test_the_way_back_is_verified_too(tmp_path, digits_pth, converted):
    done = convert(converted, tmp_path / "back.pth")
    assert done.verification.passed
    assert verify(tmp_path / "back.pth", digits_pth).passed


def test_a_dense_backbone_is_verified_on_its_four_maps(tmp_path):
    spec = dataclasses.replace(DIGITS, num_classes=0, head="backbone")
    done = convert(write_pth(tmp_path / "d.pth", synthetic_tensors(spec)), tmp_path / "d.safetensors")
    names = [layer.name for layer in done.verification.comparison.drift]
    assert names[-4:] == ["output0", "output1", "output2", "output3"] and done.verification.passed


def test_two_networks_that_are_not_one_are_refused(tmp_path, digits_pth):
    other = write_pth(tmp_path / "other.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=11)))
    with pytest.raises(DoesNotFit, match="not the same network"):
        verify(other, digits_pth)


def test_not_a_number_never_passes():
    nan = np.array([1.0, np.nan])
    assert float64_difference(nan, np.array([1.0, 2.0])) == np.inf
    comparison = Comparison((2, 3, 8, 8), float("nan"), 1.0, 0.0, 0.0, 1.0, ())
    assert not comparison.passed
    layer = LayerDrift("x", float("nan"))
    assert Comparison((2, 3, 8, 8), 0.0, 1.0, 0.0, 0.0, 1.0, (layer,)).first_over is layer
