"""Test the table of variants and the tensor specifications derived from it."""

import dataclasses

import pytest

from conftest import PUBLISHED, golden_json
from fcvit.errors import DoesNotFit, UsageError
from fcvit.models.spec import CONV, LINEAR, ModelSpec, parameter_count, recognize, tensor_specs
from fcvit.models.variants import RESIZE256_BILINEAR, VARIANTS, Preprocessing, get_variant, published

STATE_DICT_ENTRIES = {"fcvit_tiny": 500, "fcvit_b12": 464, "fcvit_b24": 896, "fcvit_b48": 1760}
OPTIONS = golden_json("options.json")["cases"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_match_the_authors_code(name):
    spec = ModelSpec(VARIANTS[name], 1000)
    figures = published(spec.variant)
    assert parameter_count(spec) == figures.parameters
    assert len(tensor_specs(spec)) == STATE_DICT_ENTRIES[name]
    # M is 2^20 in the paper. The tiny variant has 4.56 M, printed as 4.6.
    digits = len(figures.parameters_label.rstrip("M").partition(".")[2])
    assert f"{figures.parameters / 2**20:.{digits}f}M" == figures.parameters_label


@pytest.mark.parametrize("name", PUBLISHED)
def test_gmac_matches_the_tensor_specs(name):
    """A convolution is computed once per position, the context's Linear layers and the head once per image."""
    spec = ModelSpec(VARIANTS[name], 1000)
    total = 0
    for key, entry in tensor_specs(spec).items():
        if entry.layer in (CONV, LINEAR) and key.endswith("weight"):
            if key.startswith("patch_embed"):
                side = 56
            elif key.startswith("network."):
                side = 56 >> (int(key.split(".")[1]) + 1) // 2
            positions = side * side if entry.layer == CONV else 1
            count = positions
            for length in entry.shape:
                count *= length
            total += count
    assert total / 1e9 == pytest.approx(published(spec.variant).gmac, abs=0.0006)


@pytest.mark.parametrize("name", OPTIONS)
def test_names_and_shapes_match_for_every_option(name):
    case = OPTIONS[name]
    shapes = {key: tuple(shape) for key, shape in case["state_dict"].items()}
    spec = recognize(shapes)
    assert {key: entry.shape for key, entry in tensor_specs(spec).items()} == shapes
    assert parameter_count(spec) == case["parameters"]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("head", ["classifier", "backbone"])
def test_a_named_variant_is_recognized_from_its_tensors(name, head):
    spec = ModelSpec(VARIANTS[name], 0 if head == "backbone" else 7, head)
    assert recognize({key: entry.shape for key, entry in tensor_specs(spec).items()}) == spec


def test_another_network_is_rejected_with_the_missing_tensor():
    with pytest.raises(DoesNotFit, match=r"network\.0\.0\.norm1\.weight is missing"):
        recognize({"conv1.weight": (64, 3, 7, 7)})


def test_an_unknown_variant_suggests_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'fcvit_b12'"):
        get_variant("fcvit-b12")


def test_an_ablation_has_no_published_figures():
    tiny = get_variant("fcvit_tiny")
    assert published(tiny).top1 == 74.9
    assert published(dataclasses.replace(tiny, competition=False)) is None
    assert published(VARIANTS["fcvit_digits"]) is None


def test_the_table_of_variants_is_frozen():
    with pytest.raises(TypeError):
        VARIANTS["mine"] = VARIANTS["fcvit_tiny"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["fcvit_tiny"].heads = 4


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 7},
        {"heads": 0},
        {"kernel_sizes": (11, 10)},
        {"depths": (1, 1, 1)},
        {"depths": (0, 1, 1, 1)},
        {"widths": (12, 64, 160, 320)},
        {"reduction": 64},
        {"depths": (10**9, 1, 1, 1)},
    ],
)
def test_impossible_architectures_are_rejected(change):
    with pytest.raises(UsageError, match="variant 'fcvit_tiny'"):
        dataclasses.replace(get_variant("fcvit_tiny"), **change)


@pytest.mark.parametrize(
    "change",
    [{"crop_fraction": 0}, {"crop_fraction": 1.1}, {"interpolation": "nearest"}, {"input_size": 0}, {"std": (1, 1, 0)}],
)
def test_impossible_preprocessing_is_rejected(change):
    with pytest.raises(UsageError):
        Preprocessing(**change)


def test_resize_lengths_match_the_authors():
    assert [VARIANTS[name].preprocessing.resize for name in PUBLISHED] == [248, 248, 235, 235]
    assert RESIZE256_BILINEAR.resize == 256
