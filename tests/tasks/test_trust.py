"""Whether maps mark what predictions rest on: the measures of it, on maps that do and maps that do not."""

import json

import numpy as np
import pytest

from conftest import DIGITS, image_by_rule, needs_paddle, write_pth
from fcvit.errors import DoesNotFit, UsageError
from fcvit.maps import short
from fcvit.tasks.trust import (
    STEPS,
    Marks,
    in_blocks,
    occlusion,
    on_crop,
    over_blocks,
    rank_correlation,
    removal,
    summary,
    trust,
)
from fcvit.weights.lively import lively_tensors
from fcvit.weights.names import Form


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, size in zip(paths, ((71, 40), (33, 90)), strict=True):
        image_by_rule(*size).save(path)
    return paths


def mass(batch):
    """A prediction that rests on the upper left quarter alone."""
    return batch[:, :, :16, :16].mean((1, 2, 3)) / 255


def test_a_map_of_what_matters_beats_one_of_what_does_not():
    pixels = np.full((3, 32, 32), 0, np.uint8)
    pixels[:, :16, :16] = 255
    right = np.zeros((32, 32))
    right[:16, :16] = 1
    deletion, insertion = removal(pixels, right, mass)
    nothing = round(255 / 4) / 255  # the image's mean colour
    assert (
        len(deletion) == STEPS
        and deletion[0] == insertion[-1] == 1
        and deletion[-1] == pytest.approx(nothing, abs=1e-2)
    )
    wrong_deletion, wrong_insertion = removal(pixels, -right, mass)
    assert deletion[3] < 0.3 < 0.99 < wrong_deletion[3] and insertion[3] == 1 and wrong_insertion[3] < 0.3


def test_occlusion_finds_what_matters():
    pixels = np.full((3, 32, 32), 0, np.uint8)
    pixels[:, :16, :16] = 255
    found = occlusion(pixels, mass)
    assert (
        found.shape == (8, 8) and (found[:4, :4] > 0.01).all() and (found[4:] == 0).all() and (found[:, 4:] == 0).all()
    )
    blocks = in_blocks(found, 32)
    assert (blocks[:16, :16] > 0).all() and (blocks[16:] == 0).all()


def test_a_map_lies_on_the_crop_where_the_network_computed_it():
    values = np.zeros((8, 8))
    values[2, 5] = 1
    assert np.unravel_index(on_crop(values, 32).argmax(), (32, 32)) == (8, 20)


def test_gains_are_positive_where_the_map_is_better_and_intervals_hold_them():
    generator = np.random.default_rng(0)
    fall, slow = np.linspace(1, 0, STEPS) ** 3, np.linspace(1, 0, STEPS)
    own, random = np.stack([fall, 1 - fall]), np.stack([slow, 1 - slow])
    noise = generator.normal(0, 0.01, (20, 2, 2, 1))
    marks = [Marks(own + one, random + other, 0.4 + one[0, 0]) for one, other in noise]
    found = summary("x", marks, np.random.default_rng(1))
    expected = 0.5 - np.trapezoid(fall, dx=0.1)
    assert found.deletion_gain == pytest.approx(expected, abs=0.01)
    assert found.insertion_gain == pytest.approx(expected, abs=0.01)
    assert found.occlusion == pytest.approx(0.4, abs=0.01)
    for gain, (low, high) in (
        (found.deletion_gain, found.deletion_interval),
        (found.insertion_gain, found.insertion_interval),
        (found.occlusion, found.occlusion_interval),
    ):
        assert low < gain < high and high - low < 0.03
    assert found.deletion[3] == pytest.approx(fall[3], abs=0.01) and found.insertion[3] > found.deletion[3]
    assert found.random_deletion[3] == pytest.approx(slow[3], abs=0.01)
    worse = summary("x", [Marks(one.random, one.own, float("nan")) for one in marks], np.random.default_rng(1))
    assert worse.deletion_gain == pytest.approx(-found.deletion_gain) and np.isnan(worse.occlusion)
    some = [*marks, Marks(own, random, float("nan"))]
    assert summary("x", some, np.random.default_rng(1)).occlusion == pytest.approx(found.occlusion), "what is known"


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    flat, held = np.zeros((2, STEPS)), 0
    for _ in range(200):
        marks = [Marks(flat, flat + gain, 0.0) for gain in generator.normal(0.1, 0.05, 40)]
        low, high = summary("x", marks, generator).deletion_interval
        held += low < 0.1 < high
    assert 178 <= held <= 198  # 95 %, a little less with 40 images


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_correlate_as_scipy_says(ties):
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 8, 8))
    other += one
    if ties:
        one, other = one.round(), other.round()
    stats = pytest.importorskip("scipy.stats")
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one.ravel(), other.ravel()).statistic)
    assert rank_correlation(one, np.exp(one)) == pytest.approx(1) and rank_correlation(one, -one) == pytest.approx(-1)
    assert np.isnan(rank_correlation(one, np.zeros((8, 8))))


@pytest.mark.parametrize("side", [32, 50])
def test_a_map_over_patches_is_the_mean_in_each(side):
    values = np.random.default_rng(0).normal(size=(side, side))
    found = over_blocks(values, 8)
    cut = [np.flatnonzero(np.arange(side) * 8 // side == block) for block in range(8)]
    expected = [[values[np.ix_(rows, columns)].mean() for columns in cut] for rows in cut]
    assert np.allclose(found, expected)


@needs_paddle
@pytest.mark.charts
@pytest.mark.slow
def test_the_trust_of_a_network(digits_pth, photos, tmp_path):
    found = trust(digits_pth, photos, tmp_path / "run", engine="paddle")
    names = [short(one.name) for one in found.curves]
    assert names == ["1.1.1", "1.1.2", "2.1.1", "2.1.2", "3.1.1", "3.2.2", "occlusion"]
    for one in found.curves:
        assert one.deletion[0] == pytest.approx(one.random_deletion[0]) == pytest.approx(one.insertion[-1], abs=1e-6)
    assert all(-1 <= one.occlusion <= 1 for one in found.curves[:-1]) and np.isnan(found.curves[-1].occlusion)
    kept = json.loads((tmp_path / "run" / "trust.json").read_text())
    assert kept["images"] == 2 and kept["curves"][-1]["occlusion"] is None
    assert kept["curves"][0]["name"] == "stage1.block1.context1"
    assert (tmp_path / "run" / "trust.png").read_bytes().startswith(b"\x89PNG")
    again = trust(digits_pth, photos, engine="paddle", every=True)
    names = [short(one.name) for one in again.curves]
    assert names == ["1.1.1", "1.1.2", "2.1.1", "2.1.2", "3.1.1", "3.1.2", "3.2.1", "3.2.2", "occlusion"]
    assert again.curves[0] == found.curves[0], "one seed, one answer"
    assert found.curves[0].random_deletion == found.curves[1].random_deletion, "one control for maps of one shape"
    assert found.curves[0].random_deletion != found.curves[2].random_deletion
    other = trust(digits_pth, photos, engine="paddle", seed=1)
    assert other.curves[0].random_deletion != found.curves[0].random_deletion
    second = trust(digits_pth, photos, engine="paddle", heads="2")
    assert [short(one.name) for one in second.curves][:2] == ["1.1.1, head 2", "1.1.2, head 2"]
    assert second.curves[0].deletion != found.curves[0].deletion
    assert trust(digits_pth, photos, engine="paddle", absolute=True).curves[0].deletion != found.curves[0].deletion


@needs_paddle
def test_trust_needs_classes_and_several_images(digits_pth, photos, tmp_path):
    with pytest.raises(UsageError, match="at least two images"):
        trust(digits_pth, photos[:1])
    with pytest.raises(UsageError, match="--heads 9: expected each, mean, or a number from 1 to 8"):
        trust(digits_pth, photos, heads="9")
    body = write_pth(tmp_path / "body.pth", lively_tensors(Form(DIGITS.variant)))
    with pytest.raises(DoesNotFit, match="predicts nothing"):
        trust(body, photos)
