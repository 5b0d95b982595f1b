"""Test that similarity maps are those of the forward pass and equal in both networks, for every option."""

import dataclasses

import numpy as np
import pytest

from conftest import DIGITS, golden_json, needs_paddle, needs_torch
from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec, recognize
from fcvit.models.variants import VARIANTS
from fcvit.verification.equivalence import FLOAT64_LIMIT, float64_difference
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

OPTIONS = golden_json("options.json")


def synthetic_weights(spec, salt=""):
    return Weights(spec, synthetic_tensors(spec, salt), None, "torch", None, None, (), ())


def paddle_similarity(weights, images):
    paddle = import_framework("paddle")
    from fcvit.models.build import build_network

    model = build_network(weights, "float64")
    with paddle.no_grad():
        return model, model.similarity(paddle.to_tensor(images.astype("float64")))


def reference_similarity(weights, images):
    torch = import_framework("torch")
    from fcvit.reference.build import build_reference

    with torch.inference_mode():
        reference_model = build_reference(weights.spec, weights.tensors, torch.float64)
        return reference_model, reference_model.similarity(torch.from_numpy(images.astype("float64")))


@needs_paddle
@needs_torch
@pytest.mark.parametrize("name", [*OPTIONS["cases"], "fcvit_tiny"])
@pytest.mark.slow
def test_both_networks_give_the_same_maps_in_float64(name):
    if name == "fcvit_tiny":
        weights, images = synthetic_weights(ModelSpec(VARIANTS[name], 1000)), synthetic_input((1, 3, 97, 130))
    else:
        shapes = {key: tuple(shape) for key, shape in OPTIONS["cases"][name]["state_dict"].items()}
        salt = f"options/{name}/"
        weights, images = (
            synthetic_weights(recognize(shapes), salt),
            synthetic_input(tuple(OPTIONS["input_shape"]), salt),
        )
    variant = weights.spec.variant
    if not (variant.global_context and variant.weighted_context):
        for compute in (paddle_similarity, reference_similarity):
            with pytest.raises(UsageError, match=r"no similarity maps.*(global|weighted)_context is off"):
                compute(weights, images)
        return
    (_, ours), (_, theirs) = paddle_similarity(weights, images), reference_similarity(weights, images)
    assert float64_difference(ours.output.numpy(), theirs.output.numpy()) <= FLOAT64_LIMIT
    mixes = 2 if variant.second_mix else 1
    assert len(ours.maps) == len(theirs.maps) == sum(variant.depths) * mixes
    for one, other in zip(ours, theirs, strict=True):
        assert one.name == other.name and one.standardized.shape[1] == variant.heads
        for field in ("standardized", "rescaled"):
            assert np.abs(getattr(one, field).numpy() - getattr(other, field).numpy()).max() <= 1e-10
    names = [one.name for one in ours]
    expected = [
        f"stage{stage}.block{block}.context{context}"
        for stage, depth in enumerate(variant.depths, 1)
        for block in range(1, depth + 1)
        for context in range(1, mixes + 1)
    ]
    assert names == expected


@needs_paddle
def test_the_maps_are_used_in_the_pass_and_do_not_change_it():
    paddle = import_framework("paddle")
    weights, images = synthetic_weights(DIGITS), synthetic_input((3, 3, 32, 40))
    model, result = paddle_similarity(weights, images)
    x = paddle.to_tensor(images.astype("float64"))
    with paddle.no_grad():
        assert np.array_equal(model(x).numpy(), result.output.numpy())
    context = model.network[6][-1].token_mixer.gc2
    last = result.at()
    assert last.name == "stage4.block1.context2" and last.standardized.shape == [3, 8, 1, 2]
    weight = context.rescale_weight.reshape([1, -1, 1, 1]).numpy()
    bias = context.rescale_bias.reshape([1, -1, 1, 1]).numpy()
    assert np.allclose(last.rescaled.numpy(), last.standardized.numpy() * weight + bias, atol=1e-12)
    first = result.at(1, 1, 1).standardized.numpy()
    assert np.abs(first.mean((1, 2, 3))).max() < 1e-12
    assert np.allclose(first.std((1, 2, 3), ddof=1), 1, atol=1e-3)
    assert all(one.tokens is None for one in result), "only on request"
    with paddle.no_grad():
        tokens = model.similarity(x, tokens=True).at(1, 1, 1).tokens
        expected = model.network[0][0].norm1(model.patch_embed(x))
    assert np.array_equal(tokens.numpy(), expected.numpy()), "the input of the first context"
    # The context is multiplied by the map, so a map of zeros changes the output.
    similarity = type(context).similarity
    try:
        type(context).similarity = lambda self, x, c: 0 * similarity(self, x, c)
        changed = model.similarity(x)
    finally:
        type(context).similarity = similarity
    assert not np.array_equal(changed.output.numpy(), result.output.numpy())
    assert all((one.standardized.numpy() == 0).all() for one in changed)


@needs_paddle
def test_an_accelerated_network_has_the_same_maps():
    paddle = import_framework("paddle")
    from fcvit.errors import MissingExtra
    from fcvit.models.build import build_network
    from fcvit.native.network import accelerate

    weights, images = synthetic_weights(DIGITS), synthetic_input((2, 3, 32, 32))
    model = build_network(weights)
    expected = model.similarity(paddle.to_tensor(images))
    try:
        accelerate(model)
    except MissingExtra as error:
        pytest.skip(str(error))
    similarity = model.similarity(paddle.to_tensor(images))
    assert np.array_equal(similarity.at().rescaled.numpy(), expected.at().rescaled.numpy())


@needs_torch
def test_maps_are_selected_by_number():
    _, similarity = reference_similarity(synthetic_weights(DIGITS), synthetic_input((1, 3, 32, 32)))
    assert similarity.at(3).name == "stage3.block2.context2"
    assert (
        similarity.at(3, 1, -2).name == "stage3.block1.context1" and similarity.at(-4).name == "stage1.block1.context2"
    )
    for wrong in ((5,), (0,), (-5,), (1, 2), (1, 1, 3)):
        with pytest.raises(
            UsageError,
            match=r"(stage|block|context) -?\d: expected 1(, the only value| to \d, or from the end -1 to -\d)$",
        ):
            similarity.at(*wrong)


@needs_torch
def test_a_block_without_the_second_mix_has_one_map():
    variant = dataclasses.replace(DIGITS.variant, second_mix=False)
    _, similarity = reference_similarity(synthetic_weights(ModelSpec(variant, 10)), synthetic_input((1, 3, 32, 32)))
    assert [one.context for one in similarity] == [1] * 5
