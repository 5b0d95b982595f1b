"""Which preprocessing a protocol is, and when a measured accuracy reproduces a published one."""

import dataclasses

import pytest

from fcvit.errors import UsageError
from fcvit.evaluation.protocols import BOTH, protocols
from fcvit.models.variants import RESIZE256_BILINEAR, VARIANTS
from fcvit.tasks.classification.published import compare_with_published

B12 = VARIANTS["fcvit_b12"]


def test_both_are_the_authors_and_the_earlier_ports():
    ours, port = protocols(BOTH, B12.preprocessing, B12)
    assert (ours.name, ours.preprocessing, ours.changed) == ("authors", B12.preprocessing, {})
    assert (port.name, port.preprocessing) == ("resize256-bilinear", RESIZE256_BILINEAR)
    assert [p.name for p in protocols("authors", B12.preprocessing, B12)] == ["authors"]
    assert [p.name for p in protocols("resize256-bilinear", B12.preprocessing, B12)] == ["resize256-bilinear"]


def test_another_preprocessing_is_never_called_the_authors():
    """Whether an option or the weights' own header changed it."""
    changed = dataclasses.replace(B12.preprocessing, input_size=288, interpolation="bilinear")
    (found,) = protocols("authors", changed, B12)
    assert found.name == "custom"
    assert found.changed == {"input_size": (224, 288), "interpolation": ("bicubic", "bilinear")}
    assert compare_with_published(B12, 1000, found, "all", 80.9, (80.5, 81.3), 50_000) is None


def test_unknown_protocols():
    with pytest.raises(UsageError, match="expected authors, resize256-bilinear, both"):
        protocols("official", B12.preprocessing, B12)


def of(top1, *, protocol=0, images="all", classes=1000, variant=B12, count=500, unreadable=0):
    chosen = protocols(BOTH, variant.preprocessing, variant)[protocol]
    return compare_with_published(variant, classes, chosen, images, top1, (top1 - 1, top1 + 1), count, unreadable)


@pytest.mark.parametrize(
    ("top1", "verdict"),
    [(80.9, "reproduced"), (81.0, "reproduced"), (80.8, "reproduced"), (80.79, "differs"), (81.01, "differs")],
)
def test_on_all_images_only_rounding_and_decoders_are_allowed(top1, verdict):
    """The interval of this case would allow a point, but nothing was sampled."""
    found = of(top1)
    assert (found.whose, found.figure, found.verdict) == ("the authors", 80.9, verdict)
    assert f"{top1 - 80.9:+.2f} points" in found.reason


def test_images_that_were_left_out_widen_the_bound_by_what_they_could_change():
    """One of 50,000 by 0.002 points: no interval comes in through the back door."""
    assert of(80.60, unreadable=1).verdict == "differs"
    assert of(80.795, unreadable=0).verdict == "differs" and of(80.795, unreadable=5).verdict == "reproduced"
    assert "0.010 for 5 images left out" in of(80.795, unreadable=5).reason


@pytest.mark.parametrize(("top1", "verdict"), [(80.0, "consistent"), (79.7, "inconsistent"), (82.1, "inconsistent")])
def test_on_a_part_the_interval_decides(top1, verdict):
    assert of(top1, images="part").verdict == verdict


def test_a_part_that_is_nearly_all_has_hardly_an_interval():
    assert of(80.7, images="part", count=500).verdict == "consistent"
    assert of(80.7, images="part", count=49_999).verdict == "inconsistent"


def test_each_protocol_has_its_own_published_figure():
    assert (of(80.49, protocol=1).whose, of(80.49, protocol=1).verdict) == ("the earlier port", "reproduced")
    assert of(80.49).verdict == "differs"  # the point of it: the port's figure is not the authors'
    assert [of(0, variant=VARIANTS[name]).figure for name in list(VARIANTS)[:4]] == [74.9, 80.9, 82.5, 83.6]
    assert [of(0, variant=VARIANTS[n], protocol=1).figure for n in list(VARIANTS)[:4]] == [74.5, 80.5, 81.5, 82.6]


def test_what_cannot_be_compared():
    assert of(80.9, images="other").verdict == "not comparable"
    assert of(80.9, classes=200).verdict == "not comparable"
    assert of(99, variant=VARIANTS["fcvit_digits"]) is None
    assert of(80.9, variant=dataclasses.replace(B12, competition=False)) is None
    other_mean = dataclasses.replace(B12.preprocessing, mean=(0.5, 0.5, 0.5))
    assert compare_with_published(B12, 1000, protocols(BOTH, other_mean, B12)[1], "all", 80.5, (80, 81), 50_000) is None
