"""Detectors in all engines: graphs against the authors' numbers in float64, equal detections, and planted faults."""

import dataclasses
import functools

import numpy as np
import pytest

from conftest import needs_paddle, needs_torch
from detection_goldens import MINI, Case, assert_close, assert_summary
from detection_goldens import synthetic_weights as detector_weights
from fcvit.data.transforms.segmentation import normalize
from fcvit.errors import MissingExtra, NumbersDisagree, UsageError
from fcvit.inference.check import check_export, sample_inputs
from fcvit.inference.detector import BOX_HEAD, MASK_HEAD, TRUNK, detect_with_parts, parts
from fcvit.inference.engines import create_engine
from fcvit.inference.interface import Interface
from fcvit.inference.runtimes import RUNTIMES
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.models.variants import Preprocessing
from fcvit.weights.synthetic import synthetic_input

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx.reference import ReferenceEvaluator  # noqa: E402

from fcvit.inference.onnx_graph import onnx_model  # noqa: E402
from inference.test_onnx_graph import Gelu  # noqa: E402

PIXELS = Preprocessing()
SMALL = ModelSpec(MINI, 3, "mask_rcnn", MaskRCNNOptions(neck=8, rpn=8, box_channels=16, mask_channels=8))


@functools.cache
def case():
    return Case("e2e_mini_batch")


@functools.cache
def weights():
    return detector_weights(case().spec, case().salt)


@functools.cache
def engine(name):
    try:
        return create_engine(name, weights(), PIXELS, threads=1)
    except MissingExtra as error:
        pytest.skip(str(error))


def graph(given, part, dtype="float32"):
    return onnx_model(given, Interface(None, False, False, PIXELS, part), dtype=dtype)


def evaluator(given, part):
    """Return a part as a function in float64."""
    model = graph(given, part, "float64")
    name = model.graph.input[0].name
    return lambda x: ReferenceEvaluator(model, new_ops=[Gelu]).run(None, {name: x})


@pytest.mark.slow
def test_graphs_and_selection_give_the_authors_detections_in_float64():
    networks = {part: evaluator(weights(), part) for part in parts(case().spec)}
    images = case().images.astype(np.float64)
    outputs = networks[TRUNK](images)
    for name, levels in (
        ("neck", [x.transpose(0, 3, 1, 2) for x in outputs[:4]]), ("rpn_cls", outputs[4:9]), ("rpn_bbox", outputs[9:]),
    ):  # fmt: skip
        for level, summary in zip(levels, case().golden[name], strict=False):
            assert_summary(level, summary)
    networks[TRUNK] = lambda _: outputs
    mask_head, count = networks[MASK_HEAD], len(case().arrays["mask_logits"])

    def some_masks(features):
        (logits,) = mask_head(features[:count])  # the evaluator is slow
        return [np.pad(logits, [(0, len(features) - count), (0, 0), (0, 0), (0, 0)])]

    networks[MASK_HEAD] = some_masks
    found = detect_with_parts(networks, case().spec.options, images, case().image_sizes, case().scale_factors)
    for image, one in enumerate(found):
        boxes = np.concatenate([one.boxes, one.scores[:, None]], axis=1)
        assert_close(boxes, case().arrays[f"boxes{image}"])
        np.testing.assert_array_equal(one.labels, case().arrays[f"labels{image}"])
    assert_close(found[0].mask_logits[:count], case().arrays["mask_logits"])


def assert_equal_detections(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert len(other.boxes) and one.boxes.dtype == one.scores.dtype == one.mask_logits.dtype == np.float32
        np.testing.assert_array_equal(one.labels, other.labels)
        assert np.abs(one.scores - other.scores).max() <= 1e-4
        assert np.abs(one.boxes - other.boxes).max() <= 1e-2
        assert np.abs(one.mask_logits - other.mask_logits).max() <= 1e-2


@pytest.mark.slow
@needs_paddle
@pytest.mark.parametrize(
    "name",
    [
        "onnxruntime",
        pytest.param("torch", marks=needs_torch),
        pytest.param("openvino", marks=pytest.mark.slow),
        pytest.param("native", marks=pytest.mark.slow),
    ],
)
def test_all_engines_return_the_detections_of_the_paddle_network(name):
    given = case().images, case().image_sizes, case().scale_factors
    assert_equal_detections(engine(name).detect(*given), engine("paddle").detect(*given))
    # One image of another size, without padding and scale factors.
    odd = case().images[:1, :, :93, :71], [(93, 71)]  # no equal scores at the limit
    assert_equal_detections(engine(name).detect(*odd), engine("paddle").detect(*odd))


@pytest.mark.slow
@needs_paddle
@pytest.mark.parametrize("name", ["onnxruntime", "paddle"])
def test_the_padding_of_uint8_images_is_0_after_the_normalization(name):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 128), np.uint8)  # the padding is not black
    sizes = [(70, 100), (96, 60)]
    results, expected = (
        engine(name).detect(given, np.array(sizes)) for given in (images, normalize(images, PIXELS, sizes))
    )
    unpadded = engine(name).detect(normalize(images, PIXELS), sizes)
    for one, other, wrong in zip(results, expected, unpadded, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)
        assert not np.array_equal(one.scores, wrong.scores), "the padding affects the detections"


def test_an_image_may_have_no_detections_and_a_batch_no_images():
    fast = engine("onnxruntime")
    options = dataclasses.replace(case().spec.options, score_threshold=1.0)
    networks = {part: fast.network(None, uint8=False, part=part) for part in parts(case().spec)}
    for one in detect_with_parts(networks, options, case().images, case().image_sizes):
        assert one.boxes.shape == (0, 4) and one.mask_logits.shape == (0, 28, 28)
    assert fast.detect(case().images[:0], np.zeros((0, 2))) == []


@needs_torch
@pytest.mark.parametrize("name", [pytest.param("paddle", marks=needs_paddle), "torch", "onnxruntime", "native"])
def test_called_engines_return_the_outputs_of_the_trunk(name):
    neck = case().spec.options.neck
    for batch in (synthetic_input((2, 3, 97, 65)), np.zeros((0, 3, 97, 65), np.uint8)):
        outputs = engine(name)(batch)
        sizes = [(25, 17), (13, 9), (7, 5), (4, 3), (2, 2)]
        maps = [(*size, neck) for size in sizes[:4]]
        shapes = [*maps, *((3, *size) for size in sizes), *((12, *size) for size in sizes)]
        assert [x.shape for x in outputs] == [(len(batch), *shape) for shape in shapes]


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("name", [pytest.param("paddle", marks=needs_paddle), "torch"])
@pytest.mark.parametrize("layer", ["rpn_head.rpn_cls", "roi_head.bbox_head.fc_cls"])
def test_scores_that_are_not_finite_are_reported_and_not_no_detections(name, layer):
    given = detector_weights(SMALL)
    given.tensors[f"{layer}.bias"][0] = np.nan
    with pytest.raises(
        NumbersDisagree, match=rf"{'rpn' if 'rpn' in layer else 'box'}_head: the outputs are not finite"
    ):
        create_engine(name, given, PIXELS).detect(np.zeros((1, 3, 64, 64), np.float32), [(64, 64)])


@pytest.mark.parametrize("part", [TRUNK, BOX_HEAD, MASK_HEAD])
def test_outputs_of_a_runtime_that_are_not_finite_are_reported(part):
    fast = engine("onnxruntime")
    networks = {one: fast.network(None, uint8=False, part=one) for one in parts(case().spec)}
    correct = networks[part]
    networks[part] = lambda x: [*correct(x)[:-1], correct(x)[-1] * np.float32(np.nan)]
    with pytest.raises(NumbersDisagree, match=f"{part}: the outputs are not finite"):
        detect_with_parts(networks, case().spec.options, case().images, case().image_sizes)


def test_engines_that_cannot_run_detectors_say_so():
    with pytest.raises(UsageError, match="--engine paddle-inference is not available for detectors; use onnxruntime"):
        create_engine("paddle-inference", weights(), PIXELS)
    with pytest.raises(UsageError, match="int8 is not available for detectors"):
        create_engine(
            "onnxruntime", weights(), PIXELS, precision="int8", calibration=np.zeros((1, 3, 32, 32), np.uint8)
        )


def skip_node(model, kind, index):
    """Remove a node: its readers get its input."""
    node = [node for node in model.graph.node if node.op_type == kind][index]
    for other in model.graph.node:
        other.input[:] = [node.input[0] if name == node.output[0] else name for name in other.input]


def swap_outputs(model):
    one, other = model.graph.output
    for node in model.graph.node:
        names = {one.name: other.name, other.name: one.name}
        node.output[:] = [names.get(name, name) for name in node.output]


def wrong_cells(model):
    """Take the fifth level from odd instead of even positions."""
    node = next(node for node in model.graph.node if node.op_type == "MaxPool")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("kernel_shape", [2, 2]))
    node.attribute.append(onnx.helper.make_attribute("strides", [2, 2]))
    node.attribute.append(onnx.helper.make_attribute("pads", [0, 0, 1, 1]))


def linear_upsampling(model):
    node = next(node for node in model.graph.node if node.op_type == "Resize")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("mode", "linear"))


def turned_kernel(model):
    node = next(node for node in model.graph.node if node.op_type == "ConvTranspose")
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    turned = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).swapaxes(2, 3))
    tensor.CopyFrom(onnx.numpy_helper.from_array(turned, tensor.name))


def relu(index):
    def spoil(model):
        skip_node(model, "Relu", index)

    spoil.__name__ = f"without_relu_{index}"
    return spoil


FAULTS = [
    (TRUNK, relu(0)),
    (TRUNK, relu(4)),  # the level with the fewest positions
    (TRUNK, wrong_cells),
    (TRUNK, linear_upsampling),
    *((BOX_HEAD, relu(index)) for index in range(2)),
    (BOX_HEAD, swap_outputs),
    *((MASK_HEAD, relu(index)) for index in (0, 4)),
    (MASK_HEAD, turned_kernel),
]


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize(("part", "spoil"), FAULTS, ids=[f"{part} {spoil.__name__}" for part, spoil in FAULTS])
def test_a_planted_error_in_a_part_is_detected(part, spoil, tmp_path):
    given, interface = detector_weights(SMALL), Interface(None, False, False, PIXELS, part)
    inputs = sample_inputs(SMALL, interface)[0]
    for spoiled in (False, True):
        model = graph(given, part)
        if spoiled:
            spoil(model)
        path = tmp_path / "network.onnx"
        path.write_bytes(model.SerializeToString())
        network = RUNTIMES["onnxruntime"](path, 1)
        if spoiled:
            with pytest.raises(NumbersDisagree, match="it: the outputs do not match the weights"):
                check_export(network, given, interface, inputs, "it")
        else:
            check = check_export(network, given, interface, inputs, "it")
            assert check.passed and check.part == part
