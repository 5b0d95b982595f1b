"""Tests of the native operators and network, compared with the plain Paddle implementation."""

import copy
import dataclasses
import math

import numpy as np
import pytest

from conftest import golden_arrays, golden_json, needs_paddle
from fcvit.errors import UsageError
from fcvit.frameworks import import_framework, installed
from fcvit.models.spec import ModelSpec, recognize
from fcvit.models.variants import VARIANTS
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

pytestmark = [
    needs_paddle,
    pytest.mark.filterwarnings("ignore::UserWarning:paddle"),  # Paddle's BatchNorm warns in training
]
if installed("paddle"):
    paddle = import_framework("paddle")
OPTIONS = golden_json("options.json")["cases"]
SMALL = dataclasses.replace(VARIANTS["fcvit_digits"], depths=(1, 1, 1, 1), layer_scale=0.5)


@pytest.fixture(autouse=True)
def several_threads(request):
    """Use three threads. The test suite runs with one, which does not test the division of work among threads."""
    if "library" in request.fixturenames:
        request.getfixturevalue("library").omp_set_num_threads(3)


def compare(native, plain, shapes, dtype="float64", tolerance=1e-10):
    """Compare the results and all gradients of two functions for the same random tensors.

    The plain function is always computed in float64. The tolerance is relative to the largest value of each array.
    """
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape).astype(dtype) for shape in shapes]
    outcomes = []
    for function, kind in ((native, dtype), (plain, "float64")):
        tensors = [paddle.to_tensor(array.astype(kind), stop_gradient=False) for array in arrays]
        result = function(*tensors)
        cotangent = np.random.default_rng(1).normal(size=result.shape).astype(dtype)
        (result * paddle.to_tensor(cotangent.astype(kind))).sum().backward()
        outcomes.append([result.numpy(), *(tensor.grad.numpy() for tensor in tensors)])
    assert outcomes[0][0].dtype == dtype
    for actual, expected in zip(*outcomes, strict=True):
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


def precisions(test):
    return pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 3e-6)])(test)


@precisions
@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 5, 7, 8), 3),
        ((2, 5, 7, 19), 11),
        ((3, 1, 1, 10), 11),
        ((2, 2, 1, 16), 3),
        ((1, 4, 3, 33), 11),
        ((2, 13, 12, 5), 11),
        ((2, 6, 9, 17), 5),
        ((1, 3, 3, 4), 9),
        ((2, 4, 4, 20), 1),
        ((2, 20, 21, 40), 11),
        ((7, 4, 4, 35), 11),
        ((70, 1, 1, 8), 3),
        ((9, 2, 3, 5), 7),
    ],
)
def test_depthwise_matches_paddle(library, shape, kernel, activated, dtype, tolerance):
    from fcvit.native import operators

    def plain(x, weight, bias):
        first = paddle.transpose(x, [0, 3, 1, 2])
        y = paddle.nn.functional.conv2d(first, weight, bias, padding=kernel // 2, groups=shape[3])
        return paddle.transpose(paddle.nn.functional.gelu(y) if activated else y, [0, 2, 3, 1])

    width = shape[3]
    shapes = (shape, (width, 1, kernel, kernel), (width,))
    compare(lambda *t: operators.depthwise(*t, gelu=activated), plain, shapes, dtype, tolerance)


@precisions
@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 1, 1),
        (7, 5, 3),
        (40, 33, 17),
        (13, 300, 40),
        (600, 16, 70),
        (130, 520, 90),
        (20, 64, 96),
        (5, 32, 500),
        (520, 130, 50),
    ],
)
def test_linear_matches_paddle(library, rows, inputs, outputs, transposed, activated, dtype, tolerance):
    from fcvit.native import operators

    def plain(x, weight, bias):
        y = paddle.matmul(x, weight, transpose_y=not transposed) + bias
        return paddle.nn.functional.gelu(y) if activated else y

    shapes = ((rows, inputs), (inputs, outputs) if transposed else (outputs, inputs), (outputs,))
    compare(lambda *t: operators.linear(*t, activated, transposed), plain, shapes, dtype, tolerance)


@precisions
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (3, 1, 1, 16), (5, 16, 16, 40)])
def test_layer_norm_matches_paddle(library, shape, dtype, tolerance):
    from fcvit.models.layers import LayerNorm2D
    from fcvit.native import operators

    def plain(x, weight, bias):
        layer = LayerNorm2D(shape[3])
        layer.weight, layer.bias = None, None  # replace the parameters by plain tensors
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        return paddle.transpose(layer(paddle.transpose(x, [0, 3, 1, 2])), [0, 2, 3, 1])

    shapes = (shape, (shape[3],), (shape[3],))
    compare(lambda *t: operators.layer_norm(*t, 1e-5), plain, shapes, dtype, tolerance)


@precisions
@pytest.mark.parametrize("shape", [(9, 1, 1, 9), (3, 5, 7, 40)])
def test_batch_norm_matches_paddle(library, shape, dtype, tolerance):
    from fcvit.models.layers import NORM_EPS, BatchNorm
    from fcvit.native import operators

    width, statistics = shape[3], {}

    def plain(x, weight, bias):
        layer = BatchNorm(width).to(dtype="float64")
        layer.weight, layer.bias = None, None  # replace the parameters by plain tensors
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        y = layer(paddle.transpose(x, [0, 3, 1, 2]))
        statistics["plain"] = layer._mean.numpy(), layer._variance.numpy()
        return paddle.transpose(y, [0, 2, 3, 1])

    def native(x, weight, bias):
        running = paddle.zeros([width], dtype), paddle.ones([width], dtype)
        y = operators.batch_norm(x, weight, bias, running=running, eps=NORM_EPS, momentum=0.9)
        statistics["native"] = running[0].numpy(), running[1].numpy()
        return y

    compare(native, plain, (shape, (width,), (width,)), dtype, tolerance)
    for actual, expected in zip(statistics["native"], statistics["plain"], strict=True):
        assert actual == pytest.approx(expected, abs=tolerance)


@precisions
@pytest.mark.parametrize(
    ("shape", "heads"), [((2, 5, 7, 24), 8), ((3, 1, 1, 16), 8), ((2, 3, 4, 30), 5), ((5, 13, 16, 40), 8)]
)
def test_context_matches_paddle(library, shape, heads, dtype, tolerance):
    from fcvit.models.backbone import SIMILARITY_EPS, GlobalContext
    from fcvit.native import operators

    width, inner = shape[3], shape[3] // 8
    variant = dataclasses.replace(SMALL, widths=(width,) * 4, heads=heads)

    def plain(x, *parameters):
        layer = GlobalContext(variant, width)
        names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "rescale_weight", "rescale_bias")
        for name, tensor in zip(names, parameters, strict=True):
            owner = layer if "." not in name else getattr(layer, name.split(".")[0])
            delattr(owner, name.split(".")[-1])
            setattr(owner, name.split(".")[-1], tensor)
        first = paddle.transpose(x, [0, 3, 1, 2])
        return paddle.transpose(first + layer(first), [0, 2, 3, 1])

    def native(x, w1, b1, w2, b2, weight, bias):
        return operators.context(x, w1, b1, w2, b2, weight, bias, eps=SIMILARITY_EPS)

    shapes = (shape, (width, 2 * inner), (2 * inner,), (inner, width), (width,), (heads,), (heads,))
    compare(native, plain, shapes, dtype, tolerance)


@precisions
@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [((9, 6), 7, 4), ((5, 8), 3, 2), ((1, 1), 3, 2), ((33, 40), 7, 4)]
)
def test_strided_matches_paddle(library, size, kernel, stride, dtype, tolerance):
    from fcvit.native import operators

    def plain(x, weight, bias):
        x = paddle.transpose(x, [0, 3, 1, 2])
        return paddle.transpose(paddle.nn.functional.conv2d(x, weight, bias, stride, kernel // 2), [0, 2, 3, 1])

    shapes = ((2, *size, 3), (10, 3, kernel, kernel), (10,))
    compare(lambda *t: operators.strided(*t, stride), plain, shapes, dtype, tolerance)


def test_gelu_is_accurate_in_the_tail(library):
    from fcvit.native import operators

    def gelu(x):
        one = paddle.ones([1, 1, 1, 1])
        return operators.depthwise(paddle.to_tensor(x).reshape([1, -1, 1, 1]), one, None, gelu=True).flatten().numpy()

    x = np.concatenate([np.linspace(-12, 12, 20001), [0.0, 1e-30, -1e-30, 1e4, -1e4]]).astype(np.float32)
    exact = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(float)])
    assert (np.abs(gelu(x) - exact) <= 1e-6 * np.abs(exact)).all()
    special = gelu(np.array([np.nan, np.inf, 1.0], np.float32))
    assert np.isnan(special[0])
    assert special[1] == np.inf
    assert special[2] == pytest.approx(0.8413447, rel=1e-6)


def test_gradients_are_computed_only_for_tensors_that_need_them(library):
    from fcvit.native import operators

    x = paddle.randn([2, 3, 3, 8])
    weight, bias = paddle.randn([8, 1, 3, 3]), paddle.randn([8])
    bias.stop_gradient = False
    operators.depthwise(x, weight, bias).sum().backward()
    assert x.grad is None
    assert weight.grad is None
    assert bias.grad.numpy() == pytest.approx(np.full(8, 18.0))


def synthetic_model(variant, dtype="float64", backbone=False, **rates):
    """Return a model with perturbed parameters, so that all of them affect the outputs."""
    from fcvit.models.backbone import FCViTBackbone
    from fcvit.models.classifier import FCViT

    paddle.seed(0)
    model = FCViTBackbone(variant, **rates) if backbone else FCViT(variant, 10, **rates)
    model.to(dtype=dtype)
    generator = np.random.default_rng(0)
    for parameter in model.parameters():
        moved = parameter.numpy() + 0.2 * generator.normal(size=parameter.shape) / max(parameter.ndim - 1, 1)
        parameter.set_value(moved.astype(dtype))
    return model


def accelerated(model):
    from fcvit.native.network import accelerate

    native = copy.deepcopy(model)
    accelerate(native)
    return native


def step(model, size=(40, 51), batch=3, seed=7):
    """Return the outputs and gradients of one training step, and the running statistics afterwards."""
    dtype = str(model.patch_embed.proj.weight.dtype).removeprefix("paddle.")
    generator = np.random.default_rng(1)
    images = paddle.to_tensor(generator.normal(size=(batch, 3, *size)).astype(dtype))
    model.train()
    paddle.seed(seed)
    outputs = model(images)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    loss = sum(
        (output * paddle.to_tensor(generator.normal(size=output.shape).astype(dtype))).sum() for output in outputs
    )
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: buffer.numpy() for name, buffer in model.named_buffers()}
    return [output.numpy() for output in outputs], gradients, statistics


def assert_same_step(plain, native, tolerance=1e-9, **settings):
    outputs, gradients, statistics = step(native, **settings)
    plain_outputs, plain_gradients, plain_statistics = step(plain, **settings)
    for output, expected in zip(outputs, plain_outputs, strict=True):
        assert np.abs(output - expected).max() <= tolerance * expected.std()
    assert gradients.keys() == plain_gradients.keys()
    largest = max(np.abs(gradient).max() for gradient in plain_gradients.values())
    for name, expected in plain_gradients.items():  # a bias before a BatchNorm has gradient 0, up to rounding
        error = np.abs(gradients[name] - expected).max()
        assert error <= tolerance * np.abs(expected).max() + 1e-13 * largest, name
    for name, expected in plain_statistics.items():
        assert np.abs(statistics[name] - expected).max() <= tolerance * max(np.abs(expected).max(), 1), name


@precisions
@pytest.mark.parametrize("size", [(6, 5), (1, 1)])
@pytest.mark.parametrize("change", [{}, {"second_mix": False, "token_factor": 1, "layer_scale": None}])
def test_a_whole_block_matches_paddle(library, monkeypatch, size, change, dtype, tolerance):
    """The gradients of the input and of all parameters, with one image whose first branch is dropped."""
    from fcvit.models.backbone import Block
    from fcvit.native import network

    monkeypatch.setattr(network, "linear", None)  # the block does not use single operators

    def block(kind):
        layer = Block(dataclasses.replace(SMALL, **change), 24, 96, 0.5, 0.0).to(dtype=kind)
        generator = np.random.default_rng(0)
        for parameter in layer.parameters():
            parameter.set_value(generator.normal(size=parameter.shape).astype(dtype).astype(kind) / 2)
        return layer

    plain, native = block("float64"), block(dtype)
    x = np.random.default_rng(1).normal(size=(3, *size, 24)).astype(dtype)
    outcomes = []
    for layer, kind, compute in ((native, dtype, network._block), (plain, "float64", None)):
        paddle.seed(3)
        given = paddle.to_tensor(x.astype(kind), stop_gradient=False)
        if compute:
            y = compute(layer, given)
        else:
            y = paddle.transpose(layer(paddle.transpose(given, [0, 3, 1, 2])), [0, 2, 3, 1])
        cotangent = np.random.default_rng(2).normal(size=y.shape).astype(dtype)
        (y * paddle.to_tensor(cotangent.astype(kind))).sum().backward()
        outcomes.append([y.numpy(), given.grad.numpy(), *(p.grad.numpy() for p in layer.parameters())])
    for actual, expected in zip(*outcomes, strict=True):
        assert np.abs(actual - expected).max() <= 10 * tolerance * max(np.abs(expected).max(), 1e-2)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow
def test_network_with_every_option_matches_paddle(library, name):
    shapes = {key: tuple(shape) for key, shape in OPTIONS[name]["state_dict"].items()}
    model = synthetic_model(recognize(shapes).variant, drop_path_rate=0.4)
    assert_same_step(model, accelerated(model), batch=2)


@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
@pytest.mark.slow
def test_network_with_published_widths(library, size):
    """Drop path draws the same random numbers. In evaluation, the outputs and `features` agree too."""
    model = synthetic_model(dataclasses.replace(VARIANTS["fcvit_tiny"], depths=(1, 2, 1, 1)), drop_path_rate=0.5)
    native = accelerated(model)
    assert_same_step(model, native, size=size, batch=4)
    model.eval()
    native.eval()
    images = paddle.to_tensor(np.random.default_rng(2).normal(size=(2, 3, *size)))
    for output, expected in zip(
        [*native.features(images), native(images)], [*model.features(images), model(images)], strict=True
    ):
        assert output.shape == expected.shape
        assert np.abs((output - expected).numpy()).max() <= 1e-9 * expected.numpy().std()


def test_the_backbone_matches_plain_paddle(library):
    model = synthetic_model(SMALL, backbone=True, drop_path_rate=0.3)
    assert_same_step(model, accelerated(model))


def test_the_head_can_be_removed(library):
    model = synthetic_model(SMALL)
    native = accelerated(model)
    for network in (model, native):
        network.reset_classifier(0)
    assert_same_step(model, native)


def test_dropout_is_applied_in_training(library):
    """Every channel mixer calls its dropout layer twice. In evaluation, dropout has no effect."""
    model = synthetic_model(SMALL, drop_rate=0.5)
    native = accelerated(model)
    widths = []
    for stage in native.network[::2]:
        stage[0].channel_mixer.drop.register_forward_post_hook(lambda _, inputs, output: widths.append(output.shape[1]))
    assert np.abs(step(native, seed=1)[0][0] - step(native, seed=2)[0][0]).max() > 1e-3
    assert widths[:8] == [64, 16, 96, 24, 128, 32, 192, 48]
    images = paddle.ones([1, 3, 32, 32], "float64")
    model.eval()
    native.eval()
    model.set_state_dict(native.state_dict())  # copies the running statistics
    assert np.abs((native(images) - model(images)).numpy()).max() < 1e-9


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.slow
def test_results_are_identical_for_any_number_of_threads(library, dtype):
    """The tensors are large enough for every operator to use several threads."""
    results = []
    for threads in (3, 3, 1, 2):
        library.omp_set_num_threads(threads)
        model = accelerated(synthetic_model(VARIANTS["fcvit_digits"], dtype, drop_path_rate=0.2))
        results.append(step(model, size=(128, 136), batch=5))
    for other in results[1:]:
        assert all((a == b).all() for a, b in zip(other[0], results[0][0], strict=True))
        assert all((other[1][name] == gradient).all() for name, gradient in results[0][1].items())


@pytest.mark.slow
def test_nan_and_infinity_are_propagated(library):
    model = accelerated(synthetic_model(SMALL, "float32")).eval()
    images = np.zeros((2, 3, 32, 32), np.float32)
    images[1, 2, 3, 4] = np.nan
    logits = model(paddle.to_tensor(images))
    assert np.isnan(logits.numpy()[1]).all()
    assert np.isfinite(logits.numpy()[0]).all()
    logits.sum().backward()
    assert all(np.isnan(p.grad.numpy()).any() for p in model.parameters() if p.grad is not None and p.ndim > 1)
    huge = accelerated(synthetic_model(SMALL, "float32"))
    huge.network[0][0].token_mixer.dw1.weight.set_value(np.full((16, 1, 11, 11), np.inf, np.float32))
    assert not np.isfinite(huge(paddle.ones([2, 3, 32, 32])).numpy()).any()


@pytest.mark.slow
def test_a_published_variant_in_float32(library):
    """The float32 error of the logits is within the limit of the error ratio to PyTorch."""
    from fcvit.models.build import build_network
    from fcvit.native.network import accelerate
    from fcvit.verification.equivalence import RATIO_LIMIT, error_ratio

    spec = ModelSpec(VARIANTS["fcvit_tiny"], 1000)
    model = build_network(Weights(spec, synthetic_tensors(spec), None, "torch", None, None, (), ()), "float32")
    accelerate(model)
    golden = golden_arrays("fcvit_tiny.npz")
    with paddle.no_grad():
        logits = model.eval()(paddle.to_tensor(synthetic_input((2, 3, 224, 224)).astype(np.float32))).numpy()
    assert error_ratio(logits, golden["float32_logits"], golden["logits"]) <= RATIO_LIMIT


def test_accelerate_keeps_the_class_and_parameter_names(library):
    from fcvit.models.classifier import FCViT
    from fcvit.native.network import accelerate

    model = synthetic_model(SMALL, "float32")
    names = list(model.state_dict())
    accelerate(model)
    accelerate(model)
    assert isinstance(model, FCViT)
    assert list(model.state_dict()) == names
    with pytest.raises(UsageError, match="not Linear"):
        accelerate(paddle.nn.Linear(2, 2))


# Tests of the optimizer.

SHAPES = [(3, 5), (40,), (7, 1, 3, 3), (2, 600)]
BETAS, EPS, DECAY = (0.9, 0.95), 1e-6, 0.3


def parameters(dtype="float32"):
    """Return parameters whose learning rates differ by powers of 2."""
    generator = np.random.default_rng(0)
    made = []
    for number, shape in enumerate(SHAPES):
        parameter = paddle.create_parameter(shape, dtype)
        parameter.set_value(generator.normal(size=shape).astype(dtype))
        parameter.optimize_attr["learning_rate"] = 0.5**number
        made.append(parameter)
    return made


def native_adamw(given, clip_norm=None):
    from fcvit.native.optimizer import AdamW

    return AdamW(given, {p.name for p in given if p.ndim > 1}, 0.1, BETAS, EPS, DECAY, clip_norm)


def paddle_adamw(given, clip_norm=None):
    decayed = {p.name for p in given if p.ndim > 1}
    clip = None if clip_norm is None else paddle.nn.ClipGradByGlobalNorm(clip_norm)
    settings = {"beta1": BETAS[0], "beta2": BETAS[1], "epsilon": EPS, "weight_decay": DECAY, "grad_clip": clip}
    return paddle.optimizer.AdamW(0.1, parameters=given, apply_decay_param_fun=lambda name: name in decayed, **settings)


def adamw_steps(optimizer, given, steps, dtype="float32"):
    """Take steps with random gradients and a new learning rate in each. The second parameter has none in step 1."""
    for number in steps:
        generator = np.random.default_rng(number)
        for index, parameter in enumerate(given):
            gradient = generator.normal(size=parameter.shape).astype(dtype)
            parameter.grad = None if (number, index) == (1, 1) else paddle.to_tensor(gradient)
        optimizer.set_lr(0.1 / (number + 1))
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        assert all(parameter.grad is None for parameter in given)


def expected_adamw(steps, dtype, clip_norm):
    """Compute AdamW in float64 as its paper defines it."""
    values = [p.numpy().astype(np.float64) for p in parameters(dtype)]
    first, second = [np.zeros(shape) for shape in SHAPES], [np.zeros(shape) for shape in SHAPES]
    counts = [0] * len(SHAPES)
    for number in steps:
        generator = np.random.default_rng(number)
        gradients = [generator.normal(size=shape).astype(dtype).astype(np.float64) for shape in SHAPES]
        present = [index for index in range(len(SHAPES)) if (number, index) != (1, 1)]
        norm = np.sqrt(sum((gradients[index] ** 2).sum() for index in present))
        scale = 1.0 if clip_norm is None else clip_norm / max(norm, clip_norm)
        for index in present:
            rate, g = 0.1 / (number + 1) * 0.5**index, gradients[index] * scale
            counts[index] += 1
            first[index] = BETAS[0] * first[index] + (1 - BETAS[0]) * g
            second[index] = BETAS[1] * second[index] + (1 - BETAS[1]) * g * g
            values[index] *= 1 - rate * DECAY * (values[index].ndim > 1)
            mean, variance = (m[index] / (1 - b ** counts[index]) for m, b in zip((first, second), BETAS, strict=True))
            values[index] -= rate * mean / (np.sqrt(variance) + EPS)
    return values


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-6)])
@pytest.mark.parametrize("clip_norm", [None, 1.5, 1e4])
def test_adamw_matches_its_definition_and_paddle(library, clip_norm, dtype, tolerance):
    """Paddle's powers of beta are in float32, so its numbers have a larger error."""
    native, plain = parameters(dtype), parameters(dtype)
    adamw_steps(native_adamw(native, clip_norm), native, range(4), dtype)
    adamw_steps(paddle_adamw(plain, clip_norm), plain, range(4), dtype)
    for actual, by_paddle, expected in zip(native, plain, expected_adamw(range(4), dtype, clip_norm), strict=True):
        assert np.abs(actual.numpy() - expected).max() <= tolerance
        assert np.abs(by_paddle.numpy() - expected).max() <= 2e-6


def test_a_gradient_that_is_not_finite_reaches_the_weights(library):
    """The training loop then stops."""
    for clip_norm in (None, 1.0):
        given = parameters()
        optimizer = native_adamw(given, clip_norm)
        for parameter in given:
            parameter.grad = paddle.full(parameter.shape, np.nan)
        optimizer.step()
        assert all(np.isnan(parameter.numpy()).all() for parameter in given)


@pytest.mark.parametrize("before", [native_adamw, paddle_adamw])
def test_adamw_continues_from_a_state(library, before):
    """A state of this optimizer continues bit for bit, and a state of Paddle's continues up to rounding."""
    uninterrupted, interrupted = parameters(), parameters()
    adamw_steps(native_adamw(uninterrupted), uninterrupted, range(4))
    first = before(interrupted)
    adamw_steps(first, interrupted, range(2))
    state = {name: paddle.to_tensor(tensor.numpy()) for name, tensor in first.state_dict().items()}
    second = native_adamw(interrupted)
    second.set_state_dict(state)
    adamw_steps(second, interrupted, range(2, 4))
    for one, other in zip(uninterrupted, interrupted, strict=True):
        assert np.abs(one.numpy() - other.numpy()).max() <= (0 if before is native_adamw else 2e-6)


def test_ema_weights_are_equal_with_and_without_the_operator(library):
    from fcvit.training.optimizer import EMA

    model = paddle.nn.Sequential(paddle.nn.Linear(3, 50), paddle.nn.Linear(50, 70))
    averages = EMA(model, 0.9), EMA(model, 0.9, native=True)
    for number, parameter in enumerate(model.parameters()):
        parameter.set_value(parameter + number)
    for average in averages:
        average.update(model, 3)
    for name, tensor in averages[0].tensors.items():
        assert averages[1].tensors[name].numpy() == pytest.approx(tensor.numpy(), rel=1e-6, abs=1e-6), name


def test_keep_memory_returns_false_without_glibc(monkeypatch):
    from fcvit.native import allocator

    assert allocator.keep_memory() in (True, False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.keep_memory() is False
