"""Necks and heads in the native engine: goldens, ragged sizes, threads, values that are not finite, planted faults."""

import functools

import numpy as np
import pytest

from conftest import golden_arrays, golden_json
from detection_goldens import MINI, synthetic_weights
from fcvit.errors import NumbersDisagree
from fcvit.frameworks import installed
from fcvit.inference.check import check_export, pixels, reference, sample_images, sample_inputs
from fcvit.inference.detector import BINS, BOX_HEAD, MASK_HEAD, TRUNK, part_outputs
from fcvit.inference.interface import Interface
from fcvit.inference.native_network import NativeNetwork
from fcvit.models.spec import MaskRCNNOptions, ModelSpec, SemanticFPNOptions
from fcvit.models.variants import VARIANTS, Preprocessing
from fcvit.verification.equivalence import RATIO_LIMIT
from fcvit.weights.synthetic import synthetic_input

PIXELS = Preprocessing()
# Numbers of channels that fill no vector.
SPECS = {
    "": ModelSpec(MINI, 5, "semantic_fpn", SemanticFPNOptions(neck=20, channels=36)),
    TRUNK: ModelSpec(MINI, 3, "mask_rcnn", MaskRCNNOptions(neck=20, rpn=36, box_channels=18, mask_channels=20)),
}
SPECS |= dict.fromkeys((BOX_HEAD, MASK_HEAD), SPECS[TRUNK])
pytestmark = pytest.mark.usefixtures("library")
needs_reference = pytest.mark.skipif(not (installed("torch") or installed("paddle")), reason="no framework")
CASES = golden_json("segmentation/network.json")["cases"]


@functools.cache
def weights(spec):
    return synthetic_weights(spec)


@functools.cache
def network(part, threads=1):
    return NativeNetwork(weights(SPECS[part]), PIXELS, threads, part)


def inputs(part, size=(97, 79)):
    """Return the interface and the input of a part: 3 images of a size, or features of 5 RoIs."""
    interface = Interface(None if part in BINS else size, False, False, PIXELS, part)
    if part in BINS:
        return interface, synthetic_input((5, SPECS[part].options.neck, BINS[part], BINS[part]))
    return interface, sample_images(SPECS[part], size)[:3]


def computed(part):
    """Return the input of a part in the form that the network takes."""
    interface, x = inputs(part)
    return pixels(x, interface)


@functools.cache
def expected_outputs(part):
    """Return what `reference` returns for `inputs`."""
    interface, x = inputs(part)
    return reference(weights(SPECS[part]), interface, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-odd", "tiny-narrow"])
def test_the_float32_error_of_the_authors_semantic_fpn_is_at_most_three_times_that_of_pytorch(name):
    case, golden = CASES[name], golden_arrays("segmentation/network.npz")[f"{name}/resized"].ravel()
    options = SemanticFPNOptions(case.get("neck", 256), case.get("head", 128))
    given = synthetic_weights(
        ModelSpec(VARIANTS[case["variant"]], case["classes"], "semantic_fpn", options), case["salt"]
    )
    (logits,) = NativeNetwork(given, PIXELS, 1)(synthetic_input(tuple(case["input_shape"]), case["salt"]))
    positions = np.arange(len(golden)) * (logits.size - 1) // (len(golden) - 1)
    error = (logits.ravel()[positions] - golden) / case["stages"]["resized"]["std"]
    assert np.sqrt((error**2).mean()) <= RATIO_LIMIT * case["float32_error_of_pytorch"]["resized"]["rms"]


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("size", [(33, 7), (1, 1)])
@pytest.mark.parametrize("part", ["", TRUNK])
def test_ragged_sizes_have_the_error_of_float32(part, size):
    given = weights(SPECS[part])
    interface = Interface(size, False, False, PIXELS, part)
    assert check_export(network(part), given, interface, sample_inputs(given.spec, interface)[0], "it").passed


@pytest.mark.slow
@needs_reference
def test_a_mask_head_of_full_width_has_the_error_of_float32():
    given = weights(
        ModelSpec(MINI, 3, "mask_rcnn", MaskRCNNOptions(box_channels=2))
    )  # sums over 256 channels, four times
    interface = Interface(None, False, False, PIXELS, MASK_HEAD)
    native = NativeNetwork(given, PIXELS, 1, MASK_HEAD)
    assert check_export(native, given, interface, sample_inputs(given.spec, interface)[0][:1], "it").passed


@pytest.mark.parametrize("part", SPECS)
def test_the_number_of_threads_does_not_change_a_bit(part):
    for count in (1, 3):
        x = computed(part)
        outputs = [network(part, threads)(x[:count]) for threads in (1, 2, 3)]
        for other in outputs[1:]:
            for one, expected in zip(other, outputs[0], strict=True):
                np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", SPECS)
def test_what_is_not_finite_comes_through_and_stays_in_its_image(part, value):
    x = computed(part)
    expected = network(part)(x)
    spoiled = x.copy()
    spoiled[1, 0, 3, 3] = value
    others = np.arange(len(x)) != 1
    for one, other in zip(network(part)(spoiled), expected, strict=True):
        assert not np.isfinite(one[1]).all()
        np.testing.assert_array_equal(one[others], other[others])


def test_no_images_and_no_rois_give_no_outputs():
    for part, spec in SPECS.items():
        x = computed(part)
        shapes = [(0, *shape) for shape in part_outputs(spec, part, 97, 79).values()]
        assert [output.shape for output in network(part)(x[:0])] == shapes


def change(kind, index, **numbers):
    """Return a fault: other numbers of one of the operations of a kind."""

    def spoil(program):
        op = [op for (name, _), op in zip(program.costs, program.ops, strict=True) if name == kind][index]
        for name, number in numbers.items():
            assert getattr(op, name) != number
            setattr(op, name, number)

    return spoil


FAULTS = {
    "no ReLU in the segmentation head": ("", change("convolution", -1, activation=0)),
    "ReLU in the neck": ("", change("convolution", 0, activation=2)),
    "bilinear neck": ("", change("resize", 0, kernel=2)),
    "a level is not added": ("", change("resize", 2, z=-1)),
    "nearest in the head": ("", change("resize", -1, kernel=1)),
    "fifth level from other positions": (TRUNK, change("resize", -1, stride=0)),
    "no ReLU in the RPN": (TRUNK, change("convolution", -1, activation=0)),
    "no ReLU in the box head": (BOX_HEAD, change("pointwise", 0, activation=0)),
    "no ReLU after the upsampling": (MASK_HEAD, change("pointwise", 1, within=0)),
    "quarters exchanged": (MASK_HEAD, change("output", 1, stride=2)),
}


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_detected(name, monkeypatch):
    part, spoil = FAULTS[name]
    monkeypatch.setattr("fcvit.inference.check.reference", lambda *_: expected_outputs(part))
    interface, x = inputs(part)
    native = NativeNetwork(weights(SPECS[part]), PIXELS, 1, part)
    assert check_export(native, weights(SPECS[part]), interface, x, "it").passed
    correct = native.program

    @functools.cache
    def spoiled(*arguments):
        program = correct(*arguments)
        spoil(program)
        return program

    native.program = spoiled
    with pytest.raises(NumbersDisagree, match="it: the outputs do not match the weights"):
        check_export(native, weights(SPECS[part]), interface, x, "it")
