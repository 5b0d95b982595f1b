"""Test the Paddle networks: parameter names, options, weights, and use with Paddle's own tools."""

import dataclasses

import numpy as np
import pytest

from conftest import DIGITS, needs_paddle, needs_torch, write_pth
from fcvit.errors import DoesNotFit, FreshWeights, UsageError
from fcvit.frameworks import import_framework
from fcvit.models.spec import (
    CONV,
    LINEAR,
    ModelSpec,
    SemanticFPNOptions,
    is_counter,
    paddle_name,
    parameter_count,
    tensor_specs,
)
from fcvit.models.variants import VARIANTS, published
from fcvit.weights.synthetic import synthetic_tensors

pytestmark = needs_paddle
SEGMENTER = ModelSpec(VARIANTS["fcvit_digits"], 10, "semantic_fpn", SemanticFPNOptions())


@pytest.fixture(scope="module")
def paddle():
    return import_framework("paddle")


@pytest.fixture(scope="module")
def fcvit():
    import fcvit

    return fcvit


def images(paddle, *shape):
    return paddle.to_tensor(np.random.default_rng(0).standard_normal(shape).astype("float32"))


def all_options():
    digits = VARIANTS["fcvit_digits"]
    return dataclasses.replace(
        digits, spatial_attention=True, channel_attention=True, competition=False, token_factor=1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        *(pytest.param(v, marks=[pytest.mark.slow] if max(v.depths) > 6 else []) for v in VARIANTS.values()),
        all_options(),
    ],
    ids=lambda v: v.name,
)
def test_the_tensor_specs_match_the_model(fcvit, paddle, variant):
    """Every tensor has the specified shape and the type of layer that decides its layout."""
    spec = ModelSpec(variant, 1000)
    model = fcvit.create_model(variant)
    table = {paddle_name(name): entry for name, entry in tensor_specs(spec).items() if not is_counter(name)}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        name: entry.paddle_shape for name, entry in table.items()
    }
    layers = dict(model.named_sublayers())
    linear = {f"{name}.weight" for name, layer in layers.items() if isinstance(layer, paddle.nn.Linear)}
    convs = {f"{name}.weight" for name, layer in layers.items() if type(layer).__name__ in ("Conv2D", "Conv1D")}
    assert linear == {n for n, e in table.items() if e.layer == LINEAR and n.endswith("weight")}
    assert linear == {n for n, e in table.items() if e.transposed_in_paddle}
    assert convs == {n for n, e in table.items() if e.layer == CONV and n.endswith("weight")}
    count = sum(int(p.size) for p in model.parameters() if not p.stop_gradient)
    assert count == parameter_count(spec)
    if figures := published(variant):
        assert count == figures.parameters


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (95, 32), (64, 130)])
@pytest.mark.slow
def test_any_image_size_from_32_pixels_works(fcvit, paddle, size):
    model = fcvit.create_model("fcvit_digits", num_classes=3)
    x = images(paddle, 2, 3, *size)
    assert model(x).shape == [2, 3]
    strides = (4, 8, 16, 32)
    expected = [[2, w, -(-size[0] // s), -(-size[1] // s)] for w, s in zip(model.variant.widths, strides, strict=True)]
    assert [f.shape for f in model.features(x)] == expected
    dense = fcvit.create_backbone("fcvit_digits")
    assert [f.shape for f in dense(x)] == expected


def test_a_model_without_a_head_returns_pooled_embeddings(fcvit, paddle, digits_pth):
    x = images(paddle, 2, 3, 32, 32)
    full = fcvit.create_model("fcvit_digits", digits_pth)
    bare = fcvit.create_model("fcvit_digits", digits_pth, num_classes=0)
    assert bare(x).shape == [2, 48]
    np.testing.assert_allclose(full.head(bare(x)).numpy(), full(x).numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_new_model_is_in_evaluation_mode_with_the_authors_initialization(fcvit, paddle):
    paddle.seed(0)
    model = fcvit.create_model("fcvit_tiny")
    assert not model.training
    state = {name: t.numpy() for name, t in model.state_dict().items()}
    fan_out = 11 * 11 * 320 // 320
    assert state["network.6.0.token_mixer.dw1.weight"].std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert state["network.6.0.channel_mixer.fc1.weight"].std() == pytest.approx((2 / 1280) ** 0.5, rel=0.02)
    assert state["head.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert np.abs(state["head.weight"]).max() > 0.06  # the truncation bounds are far away
    assert not state["head.bias"].any() and not state["patch_embed.proj.bias"].any()
    assert (state["network.0.0.layer_scale_1"] == np.float32(1e-5)).all()
    assert (state["network.0.0.norm1.weight"] == 1).all()
    dense = fcvit.create_backbone("fcvit_digits")
    assert dense.network[0][0].layer_scale_1.numpy()[0] == np.float32(1e-6)


def test_drop_path_grows_over_all_blocks_and_works_per_image(fcvit, paddle):
    model = fcvit.create_model("fcvit_digits", num_classes=10, drop_path_rate=0.4)
    rates = [layer.rate for name, layer in model.named_sublayers() if name.endswith("drop_path")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    from fcvit.models.layers import DropPath

    paddle.seed(0)
    layer = DropPath(0.25)
    x = paddle.ones([4000, 2, 1, 1])
    layer.train()
    out = layer(x).numpy()[:, :, 0, 0]
    assert (out[:, 0] == out[:, 1]).all()
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert (out > 0).mean() == pytest.approx(0.75, abs=0.03)
    layer.eval()
    assert layer(x) is x


def test_reset_classifier_replaces_only_the_head(fcvit, paddle, digits_pth):
    model = fcvit.create_model("fcvit_digits", digits_pth)
    x = images(paddle, 2, 3, 32, 32)
    before = model.features(x)[-1].numpy()
    model.reset_classifier(4)
    assert model(x).shape == [2, 4]
    model.reset_classifier(0)
    assert model(x).shape == [2, 48]
    assert "head.weight" not in model.state_dict()
    np.testing.assert_array_equal(model.features(x)[-1].numpy(), before)


def test_the_number_of_classes_is_the_files_by_default(fcvit, digits_pth):
    assert fcvit.create_model("fcvit_digits").num_classes == 1000
    assert fcvit.create_model("fcvit_digits", digits_pth).num_classes == 10
    with pytest.warns(FreshWeights, match="the head for 3 classes"):
        assert fcvit.create_model("fcvit_digits", digits_pth, num_classes=3).num_classes == 3


@pytest.mark.parametrize(
    "options",
    [{"num_classes": -1}, {"num_classes": 2.0}, {"num_classes": True}, {"drop_path_rate": 1}, {"drop_rate": -0.1}],
)
def test_options_out_of_range_are_rejected(fcvit, options):
    with pytest.raises(UsageError):
        fcvit.create_model("fcvit_digits", **options)


def test_unknown_options_and_names_are_errors(fcvit):
    with pytest.raises(TypeError):
        fcvit.create_model("fcvit_digits", pretrained=True)
    with pytest.raises(UsageError, match="did you mean 'fcvit_tiny'"):
        fcvit.create_model("fcvit_tyni")


def test_weights_of_another_variant_are_rejected(fcvit, digits_pth):
    with pytest.raises(DoesNotFit, match="does not fit fcvit_tiny"):
        fcvit.create_model("fcvit_tiny", digits_pth)


def test_a_backbone_from_a_classifier_file_has_new_norms(fcvit, paddle, digits_pth):
    with pytest.warns(FreshWeights, match="norm0, norm2, norm4, norm6"):
        dense = fcvit.create_backbone("fcvit_digits", digits_pth)
    classifier = fcvit.create_model("fcvit_digits", digits_pth)
    x = images(paddle, 1, 3, 40, 56)
    for norm, raw, out in zip((0, 2, 4, 6), classifier.features(x), dense(x), strict=True):
        new_norm = getattr(dense, f"norm{norm}")
        np.testing.assert_allclose(new_norm(raw).numpy(), out.numpy(), rtol=0, atol=1e-5)


def test_a_backbone_is_read_from_a_detector_file(fcvit, paddle, tmp_path, recwarn):
    """Neck and heads are skipped by name, and only by `create_backbone`."""
    tensors = synthetic_tensors(dataclasses.replace(DIGITS, num_classes=0, head="backbone"))
    extra = {"neck.fpn.weight": np.ones((2, 2), np.float32), "roi_head.bbox.bias": np.ones(3, np.float32)}
    path = write_pth(tmp_path / "detector.pth", {f"backbone.{n}": t for n, t in tensors.items()} | extra)
    dense = fcvit.create_backbone("fcvit_digits", path)
    assert not recwarn.list
    np.testing.assert_array_equal(dense.norm4.weight.numpy(), tensors["norm4.weight"])
    with pytest.raises(DoesNotFit, match=r"neck.*only fcvit\.create_backbone skips it"):
        fcvit.create_model("fcvit_digits", path)
    stranger = write_pth(tmp_path / "x.pth", {**tensors, "surprise.weight": np.ones(1, np.float32)})
    with pytest.raises(DoesNotFit, match="surprise"):
        fcvit.create_backbone("fcvit_digits", stranger)


def test_a_backbone_file_is_rejected_as_a_classifier(fcvit, tmp_path):
    path = write_pth(tmp_path / "d.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=0, head="backbone")))
    with pytest.raises(DoesNotFit, match="create_backbone"):
        fcvit.create_model("fcvit_digits", path)


def test_our_layer_norm_agrees_with_paddles(paddle):
    """Compare the norm with one reduction per axis with Paddle's own kernel."""
    from fcvit.models.layers import LayerNorm2D

    layer = LayerNorm2D(24)
    layer.weight.set_value(images(paddle, 24))
    x = images(paddle, 2, 24, 9, 14) * 3 + 1
    np.testing.assert_allclose(layer(x).numpy(), paddle.nn.GroupNorm.forward(layer, x).numpy(), rtol=0, atol=1e-5)


tasks = pytest.mark.parametrize("task", ["classification", "segmentation"])


@pytest.mark.slow
@tasks
@pytest.mark.filterwarnings("ignore::UserWarning:paddle")  # a warning of Paddle's BatchNorm in training
def test_works_in_paddles_high_level_api(fcvit, paddle, task):
    from fcvit.tasks.segmentation.losses import pixel_cross_entropy

    class Ramp(paddle.io.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            label = np.array([index]) if task == "classification" else np.full((32, 40), index)
            return np.full((3, 32, 40), index, np.float32), label

    model = fcvit.create_model("fcvit_digits", num_classes=6, task=task)
    wrapped = paddle.Model(model)
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
    last = model.head if task == "classification" else model.decode_head.conv_seg
    if task == "classification":
        wrapped.prepare(optimizer, paddle.nn.CrossEntropyLoss(), paddle.metric.Accuracy(topk=(1, 5)))
    else:
        wrapped.prepare(optimizer, pixel_cross_entropy)
    before = last.weight.numpy()
    wrapped.fit(Ramp(), epochs=1, batch_size=2, verbose=0)
    assert not np.array_equal(last.weight.numpy(), before)
    result = wrapped.evaluate(Ramp(), batch_size=2, verbose=0)
    assert set(result) == {"loss"} | ({"acc_top1", "acc_top5"} if task == "classification" else set())
    assert np.isfinite(result["loss"]).all()


@pytest.mark.slow
@tasks
@pytest.mark.filterwarnings("ignore:The program will return to single-card operation")
def test_works_with_summary_save_and_data_parallel(fcvit, paddle, tmp_path, capsys, task):
    model = fcvit.create_model("fcvit_digits", num_classes=10, task=task)
    counted = paddle.summary(model, (1, 3, 32, 32))
    statistics = sum(int(p.size) for p in model.state_dict().values() if p.stop_gradient)
    spec = DIGITS if task == "classification" else SEGMENTER
    assert counted["total_params"] - statistics == parameter_count(spec)
    paddle.save(model.state_dict(), str(tmp_path / "m.pdparams"))
    other = fcvit.create_model("fcvit_digits", num_classes=10, task=task)
    assert other.set_state_dict(paddle.load(str(tmp_path / "m.pdparams"))) == ([], [])
    x = images(paddle, 2, 3, 32, 32)
    np.testing.assert_array_equal(other(x).numpy(), model(x).numpy())
    np.testing.assert_array_equal(paddle.DataParallel(model)(x).numpy(), model(x).numpy())


@pytest.mark.ci
@pytest.mark.parametrize(
    ("spec", "size"), [(DIGITS, (None, None)), (SEGMENTER, (48, 33))], ids=["free", "segmentation"]
)
def test_works_in_to_static_and_jit_save(fcvit, paddle, tmp_path, spec, size):
    """A saved classifier accepts all sizes. A saved segmentation network has the size for which it was saved."""
    spec = dataclasses.replace(spec, variant=dataclasses.replace(spec.variant, depths=(1, 1, 1, 1)))
    weights = write_pth(tmp_path / "x.pth", synthetic_tensors(spec))
    model = fcvit.create_model(spec.variant, weights, task=spec.task)
    inputs = [images(paddle, 2, 3, 32, 32), images(paddle, 1, 3, 48, 33)]
    expected = [model(x).numpy() for x in inputs]
    paddle.jit.save(model, str(tmp_path / "m"), input_spec=[paddle.static.InputSpec([None, 3, *size], "float32")])
    loaded = paddle.jit.load(str(tmp_path / "m"))
    static = paddle.jit.to_static(model, full_graph=True)  # otherwise parts of it could stay eager
    for x, logits in zip(inputs, expected, strict=True):
        np.testing.assert_allclose(static(x).numpy(), logits, rtol=0, atol=1e-5)
        if size in ((None, None), (*x.shape[2:],)):
            np.testing.assert_allclose(loaded(x).numpy(), logits, rtol=0, atol=1e-5)


def test_gradients_reach_every_parameter(fcvit, paddle):
    model = fcvit.create_model(all_options(), num_classes=4)
    model.eval()
    model(images(paddle, 2, 3, 32, 32)).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if not p.stop_gradient]
    without_gradient = [n for n, p in trained if p.grad is None or not np.abs(p.grad.numpy()).any()]
    assert not without_gradient


def test_a_single_head_at_a_single_position_is_finite(fcvit, paddle):
    """With the smallest image, the deviation is 0, and the division by it must stay finite."""
    variant = dataclasses.replace(VARIANTS["fcvit_digits"], heads=1)
    model = fcvit.create_model(variant, num_classes=3)
    assert np.isfinite(model(images(paddle, 1, 3, 32, 32)).numpy()).all()


@pytest.mark.slow
@needs_torch
def test_a_single_head_at_a_single_position_is_equal_in_both_networks(tmp_path):
    from fcvit.commands.convert import convert

    spec = ModelSpec(dataclasses.replace(VARIANTS["fcvit_digits"], heads=1), 10)
    done = convert(
        write_pth(tmp_path / "x.pth", synthetic_tensors(spec)), tmp_path / "x.safetensors", variant=spec.variant
    )
    assert done.verification.passed


def test_a_new_head_has_the_dtype_of_the_model(fcvit, paddle):
    model = fcvit.create_model("fcvit_digits", num_classes=np.int64(5))
    model.to(dtype="float64")
    model.reset_classifier(3)
    assert model(images(paddle, 1, 3, 32, 32).astype("float64")).shape == [1, 3]


def test_warnings_refer_to_the_callers_line(fcvit, digits_pth):
    with pytest.warns(FreshWeights) as caught:
        fcvit.create_model("fcvit_digits", digits_pth, num_classes=3)
        fcvit.create_backbone("fcvit_digits", digits_pth)
    assert [w.filename for w in caught] == [__file__, __file__]
