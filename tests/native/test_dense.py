"""Tests of the native operators of dense heads, and of heads that use them, compared with the plain implementation."""

import copy
import dataclasses

import numpy as np
import pytest
from test_native import compare, precisions, several_threads

from conftest import needs_paddle
from fcvit.errors import UsageError
from fcvit.frameworks import import_framework, installed
from fcvit.models.spec import MaskRCNNOptions, SemanticFPNOptions
from fcvit.models.variants import VARIANTS

__all__ = ["several_threads"]  # a fixture
pytestmark = [
    needs_paddle,
    pytest.mark.filterwarnings("ignore::UserWarning:paddle"),  # Paddle's BatchNorm warns in training
]
if installed("paddle"):
    paddle = import_framework("paddle")
SMALL = dataclasses.replace(VARIANTS["fcvit_digits"], depths=(1, 1, 1, 1), layer_scale=0.5)


def first(x):
    return paddle.transpose(x, [0, 3, 1, 2])


def last(x):
    return paddle.transpose(x, [0, 2, 3, 1])


@precisions
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((2, 5, 7, 3), 5), ((1, 1, 2, 40), 18), ((3, 14, 13, 33), 31), ((2, 30, 41, 24), 50)],
)
def test_conv3x3_matches_paddle(library, shape, outputs, relu, dtype, tolerance):
    from fcvit.native import operators

    def plain(x, weight, bias):
        y = paddle.nn.functional.conv2d(first(x), weight, bias, padding=1)
        return last(paddle.nn.functional.relu(y) if relu else y)

    shapes = (shape, (outputs, shape[3], 3, 3), (outputs,))
    compare(lambda *t: operators.conv3x3(*t, relu), plain, shapes, dtype, 2 * tolerance)


@pytest.mark.slow
def test_conv3x3_sums_the_gradient_of_weights_over_strips(library):
    from fcvit.native import operators

    def plain(x, weight):
        return last(paddle.nn.functional.conv2d(first(x), weight, padding=1))

    # 96 of the 240 tiles are transformed at once.
    shapes = ((1, 62, 58, 16), (512, 16, 3, 3))
    compare(lambda *t: operators.conv3x3(*t, None), plain, shapes, "float32", 6e-6)


def test_gradients_of_conv3x3_do_not_depend_on_threads(library):
    from fcvit.native import operators

    generator = np.random.default_rng(0)
    x, weight = (generator.normal(size=shape).astype("float32") for shape in ((2, 20, 26, 40), (24, 40, 3, 3)))
    results = []
    for threads in (1, 2, 5):
        library.omp_set_num_threads(threads)
        tensors = [paddle.to_tensor(array, stop_gradient=False) for array in (x, weight)]
        (operators.conv3x3(*tensors, None, True) ** 2).sum().backward()
        results.append(b"".join(tensor.grad.numpy().tobytes() for tensor in tensors))
    assert len(set(results)) == 1


@precisions
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (2, 1, 3, 1), (4, 16, 16, 40)])
def test_batch_norm_with_relu_matches_paddle(library, shape, dtype, tolerance):
    from fcvit.native import operators

    def native(x, weight, bias):
        running = paddle.zeros([shape[3]], x.dtype), paddle.ones([shape[3]], x.dtype)
        return operators.batch_norm(x, weight, bias, running, 1e-5, 0.9, relu=True)

    def plain(x, weight, bias):
        running = paddle.zeros([shape[3]], x.dtype), paddle.ones([shape[3]], x.dtype)
        y = paddle.nn.functional.batch_norm(first(x), *running, weight, bias, training=True, epsilon=1e-5)
        return last(paddle.nn.functional.relu(y))

    compare(native, plain, (shape, (shape[3],), (shape[3],)), dtype, 3 * tolerance)


@precisions
@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [((5, 7), (10, 14)), ((1, 3), (7, 5)), ((9, 6), (4, 6)), ((3, 13), (8, 25))]
)
def test_resize_matches_paddle(library, before, after, nearest, dtype, tolerance):
    from fcvit.models.semantic_fpn import resize_bilinear
    from fcvit.native import operators

    def plain(x):
        if nearest:
            return last(paddle.nn.functional.interpolate(first(x), after, mode="nearest"))
        return last(resize_bilinear(first(x), after))

    compare(lambda x: operators.resize(x, after, nearest), plain, [(2, *before, 11)], dtype, tolerance)


def accelerated(model, dtype):
    from fcvit.native.network import accelerate

    model.to(dtype=dtype)
    native = copy.deepcopy(model)
    accelerate(native)
    return native


def outcome(model, run):
    """Return the outputs, the running statistics and all gradients of a model as arrays."""
    paddle.seed(3)
    outputs = run(model)
    draw = np.random.default_rng(1)
    loss = sum((x * paddle.to_tensor(draw.normal(size=x.shape)).astype(x.dtype)).sum() for x in outputs)
    loss.backward()
    arrays = {f"output {index}": x.numpy() for index, x in enumerate(outputs)}
    arrays |= {name: t.numpy() for name, t in model.state_dict().items()}
    arrays |= {f"gradient of {name}": p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return arrays


def assert_equal(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        difference = np.abs(actual[name] - array).max(initial=0)
        assert difference <= tolerance * max(np.abs(array).max(initial=0), 1e-3), name


@pytest.mark.parametrize("training", [True, False])
def test_semantic_fpn_matches_paddle(library, training):
    from fcvit.models.semantic_fpn import SemanticFPN

    paddle.seed(0)
    model = SemanticFPN(SMALL, 5, SemanticFPNOptions(12, 20), head_dropout=0.5)
    images = np.random.default_rng(0).normal(size=(2, 3, 43, 60))
    native = accelerated(model, "float64")
    for one in (model, native):
        one.train() if training else one.eval()
    results = [outcome(one, lambda m: [m(paddle.to_tensor(images))]) for one in (native, model)]
    assert_equal(*results, 1e-9)


@pytest.mark.slow
def test_mask_rcnn_matches_paddle(library):
    from fcvit.models.mask_rcnn.network import MaskRCNN

    paddle.seed(0)
    model = MaskRCNN(SMALL, 2, MaskRCNNOptions(neck=12, rpn=10, box_channels=14, mask_channels=9))
    images = np.random.default_rng(0).normal(size=(2, 3, 43, 60))
    rois = np.array([[0, 3.0, 5, 40, 30], [1, 10, 2, 30, 40], [1, 0, 0, 59, 42]])

    def run(m):
        maps, logits, deltas = m(paddle.to_tensor(images))
        masks = m.roi_head.mask_head(m.roi_head.mask_features(maps, rois))
        return [*maps, *logits, *deltas, masks, *m.roi_head.bbox_head(m.roi_head.box_features(maps, rois))]

    native = accelerated(model, "float64")
    assert_equal(outcome(native, run), outcome(model, run), 1e-9)


def test_accelerated_heads_keep_their_error_for_a_single_position(library):
    from fcvit.models.semantic_fpn import ConvNormReLU, FPNHead
    from fcvit.native.dense import NativeFPNHead

    head = FPNHead(4, 4, 2, 0.0)
    assert isinstance(head.scale_heads[0][0], ConvNormReLU)
    head.__class__ = NativeFPNHead
    with pytest.raises(UsageError, match="single position"):
        head([paddle.ones([1, 4, 1, 1])] * 4)


def test_other_inputs_use_paddle(library):
    from fcvit.models.semantic_fpn import FPN
    from fcvit.native.dense import NativeFPN

    neck = FPN((4, 4, 4, 4), 8)
    neck.__class__ = NativeFPN
    assert [x.shape for x in neck([paddle.ones([0, 4, 2, 2])] * 4)] == [[0, 8, 2, 2]] * 4
