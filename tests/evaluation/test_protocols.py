"""Tests of the protocols and of the comparison with published figures."""

import dataclasses

import pytest

from fcvit.errors import UsageError
from fcvit.evaluation.protocols import BOTH, protocols
from fcvit.models.variants import RESIZE256_BILINEAR, VARIANTS
from fcvit.tasks.classification.published import compare_with_published

B12 = VARIANTS["fcvit_b12"]


def test_the_preprocessing_of_each_protocol():
    ours, port = protocols(BOTH, B12.preprocessing, B12)
    assert (ours.name, ours.preprocessing, ours.changed) == ("authors", B12.preprocessing, {})
    assert (port.name, port.preprocessing) == ("resize256-bilinear", RESIZE256_BILINEAR)
    assert [p.name for p in protocols("authors", B12.preprocessing, B12)] == ["authors"]
    assert [p.name for p in protocols("resize256-bilinear", B12.preprocessing, B12)] == ["resize256-bilinear"]


def test_a_changed_preprocessing_is_named_custom():
    """It does not matter whether an option or the header of the weights changed it."""
    changed = dataclasses.replace(B12.preprocessing, input_size=288, interpolation="bilinear")
    (protocol,) = protocols("authors", changed, B12)
    assert protocol.name == "custom"
    assert protocol.changed == {"input_size": (224, 288), "interpolation": ("bicubic", "bilinear")}
    assert compare_with_published(B12, 1000, protocol, "all", 80.9, (80.5, 81.3), 50_000) is None


def test_an_unknown_protocol_is_rejected():
    with pytest.raises(UsageError, match="expected authors, resize256-bilinear, both"):
        protocols("official", B12.preprocessing, B12)


def compare_top1(top1, *, protocol=0, images="all", classes=1000, variant=B12, count=500, unreadable=0):
    chosen = protocols(BOTH, variant.preprocessing, variant)[protocol]
    return compare_with_published(variant, classes, chosen, images, top1, (top1 - 1, top1 + 1), count, unreadable)


@pytest.mark.parametrize(
    ("top1", "verdict"),
    [(80.9, "reproduced"), (81.0, "reproduced"), (80.8, "reproduced"), (80.79, "differs"), (81.01, "differs")],
)
def test_on_all_images_the_tolerance_covers_only_rounding_and_decoders(top1, verdict):
    """The confidence interval is not used, since all images were evaluated."""
    comparison = compare_top1(top1)
    assert (comparison.whose, comparison.figure, comparison.verdict) == ("the authors", 80.9, verdict)
    assert f"{top1 - 80.9:+.2f} points" in comparison.reason


def test_unreadable_images_increase_the_tolerance():
    """Each of 50,000 images can change the accuracy by 0.002 points."""
    assert compare_top1(80.60, unreadable=1).verdict == "differs"
    assert (
        compare_top1(80.795, unreadable=0).verdict == "differs"
        and compare_top1(80.795, unreadable=5).verdict == "reproduced"
    )
    assert "0.010 for 5 unreadable images" in compare_top1(80.795, unreadable=5).reason


@pytest.mark.parametrize(("top1", "verdict"), [(80.0, "consistent"), (79.7, "inconsistent"), (82.1, "inconsistent")])
def test_on_a_subset_the_confidence_interval_is_used(top1, verdict):
    assert compare_top1(top1, images="part").verdict == verdict


def test_the_confidence_interval_is_narrow_for_nearly_all_images():
    assert compare_top1(80.7, images="part", count=500).verdict == "consistent"
    assert compare_top1(80.7, images="part", count=49_999).verdict == "inconsistent"


def test_each_protocol_has_its_own_published_figure():
    assert (compare_top1(80.49, protocol=1).whose, compare_top1(80.49, protocol=1).verdict) == (
        "the earlier port",
        "reproduced",
    )
    assert compare_top1(80.49).verdict == "differs"  # the figure of the port, not of the authors
    assert [compare_top1(0, variant=VARIANTS[name]).figure for name in list(VARIANTS)[:4]] == [
        74.9,
        80.9,
        82.5,
        83.6,
    ]
    assert [compare_top1(0, variant=VARIANTS[n], protocol=1).figure for n in list(VARIANTS)[:4]] == [
        74.5,
        80.5,
        81.5,
        82.6,
    ]


def test_results_that_are_not_comparable():
    assert compare_top1(80.9, images="other").verdict == "not comparable"
    assert compare_top1(80.9, classes=200).verdict == "not comparable"
    assert compare_top1(99, variant=VARIANTS["fcvit_digits"]) is None
    assert compare_top1(80.9, variant=dataclasses.replace(B12, competition=False)) is None
    other_mean = dataclasses.replace(B12.preprocessing, mean=(0.5, 0.5, 0.5))
    assert compare_with_published(B12, 1000, protocols(BOTH, other_mean, B12)[1], "all", 80.5, (80, 81), 50_000) is None
