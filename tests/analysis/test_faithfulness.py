"""Whether maps mark what predictions rest on: the measures of it, on maps that do and maps that do not."""

import json
import shutil

import numpy as np
import pytest

from conftest import DIGITS, image_by_rule, needs_paddle, write_pth
from fcvit.analysis import faithfulness as task
from fcvit.analysis.faithfulness import (
    MIN_IMAGES,
    OCCLUSION,
    STEPS,
    Attribution,
    ImageCurves,
    measure,
    named_maps,
    occlusion,
    over_blocks,
    rank_correlation,
    removal,
    spread,
    summary,
)
from fcvit.commands import faithfulness as command
from fcvit.commands.faithfulness import faithfulness, image_order, partner
from fcvit.errors import BadImages, DoesNotFit, UsageError
from fcvit.models.maps import SimilarityMap, short
from fcvit.models.spec import ModelSpec
from fcvit.weights.synthetic import synthetic_tensors


@pytest.fixture
def photos(tmp_path):
    sizes = [(71, 40), (33, 90), (32, 32), (40, 41), (50, 32), (32, 70), (36, 36), (64, 33), (39, 52), (45, 45)]
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        image_by_rule(*size).save(path)
    return paths


def mass(batch):
    """A prediction that rests on the upper left quarter alone."""
    return batch[:, :, :16, :16].mean((1, 2, 3)) / 255


def quarter():
    pixels = np.full((3, 32, 32), 0, np.uint8)
    pixels[:, :16, :16] = 255
    return pixels


# Single measures


def test_a_map_of_what_matters_beats_one_of_what_does_not():
    right = np.zeros((32, 32))
    right[:16, :16] = 1
    deletion, insertion = removal(quarter(), right, mass)
    nothing = round(255 / 4) / 255  # the image's mean color
    assert len(deletion) == STEPS and deletion[0] == insertion[-1] == 1
    assert deletion[-1] == insertion[0] == pytest.approx(nothing, abs=1e-2)
    wrong_deletion, wrong_insertion = removal(quarter(), -right, mass)
    assert deletion[3] < 0.3 < 0.99 < wrong_deletion[3] and insertion[3] == 1 and wrong_insertion[3] < 0.3


def test_occlusion_finds_what_matters():
    found = occlusion(quarter(), mass)
    assert found.shape == (8, 8) and (found[:4, :4] > 0.01).all()
    assert (found[4:] == 0).all() and (found[:, 4:] == 0).all()
    blocks = spread(OCCLUSION, found, 32)
    assert (blocks[:16, :16] > 0).all() and (blocks[16:] == 0).all()


def test_a_map_lies_on_the_crop_where_the_network_computed_it():
    values = np.zeros((8, 8))
    values[2, 5] = 1
    assert np.unravel_index(spread("stage1.block1.context1", values, 32).argmax(), (32, 32)) == (8, 20)


@pytest.mark.parametrize("side", [32, 50])
def test_a_map_over_patches_is_the_mean_in_each(side):
    values = np.random.default_rng(0).normal(size=(side, side))
    cut = [np.flatnonzero(np.arange(side) * 8 // side == block) for block in range(8)]
    expected = [[values[np.ix_(rows, columns)].mean() for columns in cut] for rows in cut]
    assert np.allclose(over_blocks(values, 8), expected)


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


def test_heads_are_taken_and_named_and_absolute_values_are_those_of_each():
    values = np.array([[[1.0, -3.0]], [[-1.0, 1.0]]])[None]  # two heads, 1 x 2 positions
    one = SimilarityMap(2, 1, 2, values, values)
    assert named_maps(one, "mean", False)["stage2.block1.context2"].tolist() == [[0, -1]]
    assert named_maps(one, "mean", True)["stage2.block1.context2"].tolist() == [[1, 2]]
    assert named_maps(one, "2", False)["stage2.block1.context2, head 2"].tolist() == [[-1, 1]]
    assert list(named_maps(one, "each", False)) == [f"stage2.block1.context2, head {n}" for n in (1, 2)]
    assert not named_maps(SimilarityMap(4, 1, 1, values[..., :1], values), "mean", False), "one position is no map"


# One image


def seen(number, mark):
    """An image whose prediction rests on the upper left; its map marks that, or the opposite corner."""
    maps = {"stage1.block1.context1": np.zeros((8, 8)), "stage1.block1.context2": np.zeros((8, 8))}
    maps["stage1.block1.context1"][{"right": np.s_[:4, :4], "wrong": np.s_[4:, 4:]}[mark]] = 1
    maps["stage2.block1.context1"] = np.arange(16.0).reshape(4, 4)
    return Attribution(number, quarter(), 1, maps | {OCCLUSION: occlusion(quarter(), mass)})


def logits(batch):
    """Class 1, of three, has a probability that rests on the upper left."""
    brightness = mass(batch)
    return np.stack([0 * brightness, np.log(np.maximum(2 * brightness, 1e-3)), 0 * brightness], axis=1)


def test_a_map_is_held_against_random_ones_and_another_images():
    found = measure(seen(0, "right"), seen(1, "wrong"), logits, seed=0)
    assert list(found) == [*seen(0, "right").maps]
    one = found["stage1.block1.context1"]
    assert one.own.shape == one.random.shape == one.other.shape == (2, STEPS)
    assert one.own[0, 0] == one.random[0, 0] == one.other[0, 0] == pytest.approx(0.5), "of the class that was predicted"
    assert one.own[0, 3] < one.random[0, 3] < one.other[0, 3], "deletion"
    assert one.own[1, 3] > one.random[1, 3] > one.other[1, 3], "insertion"
    assert one.occlusion > 0.8
    swapped = measure(seen(0, "wrong"), seen(1, "right"), logits, seed=0)["stage1.block1.context1"]
    assert np.array_equal(swapped.own, one.other) and np.array_equal(swapped.other, one.own)
    assert swapped.occlusion < 0 and np.isnan(found[OCCLUSION].occlusion)


def test_random_maps_are_several_drawn_on_the_grid_and_others_for_each_image(monkeypatch):
    asked = []
    monkeypatch.setattr(task, "removal", lambda pixels, marked, _: asked.append(marked) or np.zeros((2, STEPS)))
    for number in (0, 1):
        measure(seen(number, "right"), seen(2, "wrong"), logits, seed=0)
    each = len(asked) // 2
    assert each == 4 * 2 + 3 * task.RANDOM, "own and other of four maps; three shapes, occlusion's among them"
    maps = {one.tobytes() for one in asked}
    # Own, other: of context 1 two, which are each other's, of the rest one.
    assert len(maps) == 2 + 1 + 1 + 1 + 2 * 3 * task.RANDOM
    first = asked[: task.RANDOM]
    for one in first:
        cells = one[::4, ::4]
        assert len(np.unique(cells)) == 64 and np.array_equal(spread("any", cells, 32), one), "on the map's grid"
    again = []
    monkeypatch.setattr(task, "removal", lambda pixels, marked, _: again.append(marked) or np.zeros((2, STEPS)))
    measure(seen(0, "right"), seen(2, "wrong"), logits, seed=0)
    assert all(np.array_equal(one, other) for one, other in zip(asked, again, strict=False))


# All images


def test_gains_are_positive_where_the_map_is_better_and_intervals_hold_them():
    generator = np.random.default_rng(0)
    fall, slow = np.linspace(1, 0, STEPS) ** 3, np.linspace(1, 0, STEPS)
    own, random, other = np.stack([fall, 1 - fall]), np.stack([slow, 1 - slow]), np.stack([slow**2, 1 - slow**2])
    noise = generator.normal(0, 0.01, (20, 3, 2, 1))
    marks = [ImageCurves(own + a, random + b, other + c, 0.4 + a[0, 0]) for a, b, c in noise]
    found = summary("x", marks, 1)
    curves = {"own": fall, "random": slow, "other": slow**2}
    area = {name: 0.1 * (curve.sum() - (curve[0] + curve[-1]) / 2) for name, curve in curves.items()}
    for estimate, expected in (
        (found.deletion_over_random, area["random"] - area["own"]),
        (found.insertion_over_random, area["random"] - area["own"]),
        (found.deletion_over_other, area["other"] - area["own"]),
        (found.insertion_over_other, area["other"] - area["own"]),
        (found.occlusion, 0.4),
    ):
        assert estimate.mean == pytest.approx(expected, abs=0.01)
        assert estimate.low < estimate.mean < estimate.high and estimate.high - estimate.low < 0.03
    for curve, expected in (
        (found.deletion, fall),
        (found.insertion, 1 - fall),
        (found.random_deletion, slow),
        (found.random_insertion, 1 - slow),
        (found.other_deletion, slow**2),
        (found.other_insertion, 1 - slow**2),
    ):
        assert curve == pytest.approx(expected, abs=0.01)
    nowhere = [ImageCurves(one.random, one.own, one.other, float("nan")) for one in marks]
    worse = summary("x", nowhere, 1)
    assert worse.deletion_over_random.mean == pytest.approx(-found.deletion_over_random.mean)
    assert np.isnan(worse.occlusion.mean) and np.isnan(worse.occlusion.low)
    some = [*marks, ImageCurves(own, random, other, float("nan"))]
    assert summary("x", some, 1).occlusion.mean == pytest.approx(found.occlusion.mean), "what is known"


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    flat, held = np.zeros((2, STEPS)), 0
    for seed in range(200):
        marks = [ImageCurves(flat, flat + gain, flat, 0.0) for gain in generator.normal(0.1, 0.05, 40)]
        estimate = summary("x", marks, seed).deletion_over_random
        held += estimate.low < 0.1 < estimate.high
    assert 178 <= held <= 198  # 95 %, a little less with 40 images


@pytest.fixture(params=["short", pytest.param("whole", marks=[pytest.mark.ci, pytest.mark.slow])])
def count(request, monkeypatch):
    """A measurement of few images with few points, which takes seconds, or the whole one; returns the images."""
    if request.param == "whole":
        return 10
    for module, name, few in (
        (task, "STEPS", 3),
        (task, "RANDOM", 1),
        (task, "PATCHES", 2),
        (command, "MIN_IMAGES", 3),
    ):
        monkeypatch.setattr(module, name, few)
    return 3


@needs_paddle
@pytest.mark.slow
@pytest.mark.charts
def test_the_faithfulness_of_a_network(count, digits_pth, photos, tmp_path):
    photos = photos[:count]
    (bad := tmp_path / "bad.png").write_bytes(b"?")
    options = {"weights": digits_pth, "engine": "paddle", "device": "cpu"}
    result = faithfulness(photos[0], bad, *photos[1:], output=tmp_path / "run", **options)
    assert result.images == count and [one.partition(":")[0] for one in result.unreadable] == [str(bad)]
    names = [short(one.name) for one in result.curves]
    assert names == ["1.1.1", "1.1.2", "2.1.1", "2.1.2", "3.1.1", "3.2.2", "occlusion"]
    for one in result.curves:
        ends = one.deletion[0], one.random_deletion[0], one.other_deletion[0], one.insertion[-1]
        assert ends == pytest.approx([one.deletion[0]] * 4, abs=1e-6)
        assert one.deletion[0] > 0.1, "the likeliest of ten classes"
        assert one.other_deletion != one.deletion
    assert all(-1 <= one.occlusion.mean <= 1 for one in result.curves[:-1])
    assert np.isnan(result.curves[-1].occlusion.mean)
    written = json.loads((tmp_path / "run" / "trust.json").read_text())
    assert written["images"] == count and written["curves"][-1]["occlusion"]["mean"] is None
    assert written["curves"][0]["name"] == "stage1.block1.context1" and written["values"] == "signed"
    assert (tmp_path / "run" / "trust.png").read_bytes().startswith(b"\x89PNG")
    assert result.curves[0].random_deletion == result.curves[1].random_deletion, "one control for maps of one shape"
    assert result.curves[0].random_deletion != result.curves[2].random_deletion
    every = faithfulness(*photos, every=True, **options)
    names = [short(one.name) for one in every.curves]
    assert names == ["1.1.1", "1.1.2", "2.1.1", "2.1.2", "3.1.1", "3.1.2", "3.2.1", "3.2.2", "occlusion"]
    shared = {one.name: one for one in every.curves}
    for one in result.curves:
        assert repr(one) == repr(shared[one.name]), "the figures of a map do not depend on what else is measured"
    other = faithfulness(*photos, seed=1, absolute=True, **options)
    assert other.curves[0].random_deletion != every.curves[0].random_deletion
    assert other.curves[0].deletion != every.curves[0].deletion and other.values == "absolute"


@needs_paddle
@pytest.mark.slow
@pytest.mark.parametrize("after", [9, 11])
def test_an_interruption_keeps_what_was_measured(after, digits_pth, photos, tmp_path, monkeypatch, no_charts, notes):
    """Of ten images at least; from both halves of them."""
    measured, told = [], notes
    copies = [shutil.copy(path, tmp_path / f"copy-{path.name}") for path in photos]

    def interrupted(one, other, *_):
        if len(measured) == after:
            raise KeyboardInterrupt
        measured.append((one.number, other.number))
        return {"x": ImageCurves(*np.full((3, 2, STEPS), one.number), 0.0)}

    monkeypatch.setattr(task, "measure", interrupted)
    monkeypatch.setattr(command, "faithfulness_chart", lambda *_: b"png")
    with pytest.raises(KeyboardInterrupt):
        faithfulness(*photos, *copies, weights=digits_pth, output=tmp_path / "run", engine="paddle")
    assert measured[:4] == [(0, 10), (10, 0), (1, 11), (11, 1)]
    assert (tmp_path / "run" / "trust.json").exists() == (after == 11)
    if after == 11:
        assert json.loads((tmp_path / "run" / "trust.json").read_text())["images"] == 11
        assert any("the figures of 11 of 20 images are in" in text for text in told)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@needs_paddle
def test_how_long_it_takes_is_told_before_the_work(digits_pth, photos, monkeypatch, notes):
    """By the number of images that go through the network, which is exact."""
    done, told = [], notes

    def compute(batch):
        done.append(len(batch))
        return np.zeros((len(batch), 10), np.float32)

    monkeypatch.setattr(command, "create_engine", lambda *_, **__: compute)
    faithfulness(*photos, weights=digits_pth)
    passes = (sum(done) - 1 - 2 * STEPS) // len(photos)  # without those that the time was taken of
    (note,) = told
    assert note.startswith(f"10 images, each {passes:,} times through the network: about 0:00:0")


def test_what_cannot_be_measured_is_refused_before_the_work(digits_pth, photos, tmp_path):
    with pytest.raises(UsageError, match=f"9 image.* expected at least {MIN_IMAGES}"):
        faithfulness(*photos[:9], weights=digits_pth)
    with pytest.raises(UsageError, match="--heads 9: expected each, mean, or a number from 1 to 8"):
        faithfulness(*photos, weights=digits_pth, output=tmp_path / "run", heads="9")
    body = write_pth(tmp_path / "body.pth", synthetic_tensors(ModelSpec(DIGITS.variant)))
    with pytest.raises(DoesNotFit, match="has no classes"):
        faithfulness(*photos, weights=body)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    with pytest.raises(UsageError, match="full is not empty"):
        faithfulness(*photos, weights=digits_pth, output=full)
    assert not (tmp_path / "run").exists()


@needs_paddle
def test_too_few_images_that_can_be_read_end_it(digits_pth, photos, tmp_path):
    photos[3].write_bytes(b"?")
    with pytest.raises(BadImages, match=r"9 images can be read: expected at least 10; .*3.png"):
        faithfulness(*photos, weights=digits_pth, engine="paddle")


@pytest.mark.parametrize("count", [10, 11, 360])
def test_images_are_taken_from_both_halves_in_turn(count):
    found = image_order(count)
    assert sorted(found) == list(range(count)) and found[:2] == [0, (count + 1) // 2]


@pytest.mark.parametrize("count", [10, 11, 360])
def test_the_partner_of_an_image_is_from_the_other_half(count):
    """So that of class folders it is mostly of another class; nobody is his own, and everybody is one's."""
    found = [partner(number, count) for number in range(count)]
    assert sorted(found) == list(range(count)) and min(abs(a - b) for a, b in enumerate(found)) >= count // 2
