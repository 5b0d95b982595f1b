"""Faithfulness of maps: deletion, insertion and occlusion, on faithful and unfaithful maps."""

import json
import shutil

import numpy as np
import pytest

from conftest import DIGITS, image_by_rule, needs_paddle, write_pth
from fcvit.analysis import faithfulness as analysis
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
    """Return a fake probability that depends only on the upper left quarter of the image."""
    return batch[:, :, :16, :16].mean((1, 2, 3)) / 255


def bright_quarter():
    """Return a black image with a white upper left quarter."""
    pixels = np.full((3, 32, 32), 0, np.uint8)
    pixels[:, :16, :16] = 255
    return pixels


# Measures of a single map


def test_a_faithful_map_has_better_curves_than_an_unfaithful_map():
    faithful = np.zeros((32, 32))
    faithful[:16, :16] = 1
    deletion, insertion = removal(bright_quarter(), faithful, mass)
    mean_color = round(255 / 4) / 255
    assert len(deletion) == STEPS and deletion[0] == insertion[-1] == 1
    assert deletion[-1] == insertion[0] == pytest.approx(mean_color, abs=1e-2)
    wrong_deletion, wrong_insertion = removal(bright_quarter(), -faithful, mass)
    assert deletion[3] < 0.3 < 0.99 < wrong_deletion[3] and insertion[3] == 1 and wrong_insertion[3] < 0.3


def test_occlusion_finds_the_pixels_that_matter():
    decrease = occlusion(bright_quarter(), mass)
    assert decrease.shape == (8, 8) and (decrease[:4, :4] > 0.01).all()
    assert (decrease[4:] == 0).all() and (decrease[:, 4:] == 0).all()
    blocks = spread(OCCLUSION, decrease, 32)
    assert (blocks[:16, :16] > 0).all() and (blocks[16:] == 0).all()


def test_a_map_is_resized_to_the_positions_of_the_network():
    values = np.zeros((8, 8))
    values[2, 5] = 1
    assert np.unravel_index(spread("stage1.block1.context1", values, 32).argmax(), (32, 32)) == (8, 20)


@pytest.mark.parametrize("side", [32, 50])
def test_over_blocks_averages_each_patch(side):
    values = np.random.default_rng(0).normal(size=(side, side))
    blocks = [np.flatnonzero(np.arange(side) * 8 // side == block) for block in range(8)]
    expected = [[values[np.ix_(rows, columns)].mean() for columns in blocks] for rows in blocks]
    assert np.allclose(over_blocks(values, 8), expected)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_matches_scipy(ties):
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 8, 8))
    other += one
    if ties:
        one, other = one.round(), other.round()
    stats = pytest.importorskip("scipy.stats")
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one.ravel(), other.ravel()).statistic)
    assert rank_correlation(one, np.exp(one)) == pytest.approx(1) and rank_correlation(one, -one) == pytest.approx(-1)
    assert np.isnan(rank_correlation(one, np.zeros((8, 8))))


def test_maps_are_selected_by_head_and_absolute_values_are_taken_per_head():
    values = np.array([[[1.0, -3.0]], [[-1.0, 1.0]]])[None]  # two heads, 1 x 2 positions
    context = SimilarityMap(2, 1, 2, values, values)
    assert named_maps(context, "mean", False)["stage2.block1.context2"].tolist() == [[0, -1]]
    assert named_maps(context, "mean", True)["stage2.block1.context2"].tolist() == [[1, 2]]
    assert named_maps(context, "2", False)["stage2.block1.context2, head 2"].tolist() == [[-1, 1]]
    assert list(named_maps(context, "each", False)) == [f"stage2.block1.context2, head {n}" for n in (1, 2)]
    assert not named_maps(SimilarityMap(4, 1, 1, values[..., :1], values), "mean", False), (
        "a single position is not a map"
    )


# One image


def attribution(number, kind):
    """Return an image whose prediction depends on the upper left quarter.

    Its first map highlights this quarter ("faithful") or the opposite quarter ("unfaithful").
    """
    maps = {"stage1.block1.context1": np.zeros((8, 8)), "stage1.block1.context2": np.zeros((8, 8))}
    maps["stage1.block1.context1"][{"faithful": np.s_[:4, :4], "unfaithful": np.s_[4:, 4:]}[kind]] = 1
    maps["stage2.block1.context1"] = np.arange(16.0).reshape(4, 4)
    return Attribution(number, bright_quarter(), 1, maps | {OCCLUSION: occlusion(bright_quarter(), mass)})


def logits(batch):
    """Return logits of three classes. The probability of class 1 depends on the upper left quarter."""
    brightness = mass(batch)
    return np.stack([0 * brightness, np.log(np.maximum(2 * brightness, 1e-3)), 0 * brightness], axis=1)


def test_a_map_is_compared_with_random_maps_and_the_map_of_another_image():
    faithful, unfaithful = attribution(0, "faithful"), attribution(1, "unfaithful")
    measured = measure(faithful, unfaithful, logits, seed=0)
    assert list(measured) == [*faithful.maps]
    curves = measured["stage1.block1.context1"]
    assert curves.own.shape == curves.random.shape == curves.other.shape == (2, STEPS)
    starts = [kind[0, 0] for kind in (curves.own, curves.random, curves.other)]
    assert starts == pytest.approx([0.5] * 3), "probability of the predicted class without deletion"
    assert curves.own[0, 3] < curves.random[0, 3] < curves.other[0, 3], "deletion"
    assert curves.own[1, 3] > curves.random[1, 3] > curves.other[1, 3], "insertion"
    assert curves.occlusion > 0.8
    pair = attribution(0, "unfaithful"), attribution(1, "faithful")
    swapped = measure(*pair, logits, seed=0)["stage1.block1.context1"]
    assert np.array_equal(swapped.own, curves.other) and np.array_equal(swapped.other, curves.own)
    assert swapped.occlusion < 0 and np.isnan(measured[OCCLUSION].occlusion)


def test_random_maps_have_the_resolution_of_the_map_and_differ_between_images(monkeypatch):
    first_run = []
    monkeypatch.setattr(analysis, "removal", lambda _, values, __: first_run.append(values) or np.zeros((2, STEPS)))
    for number in (0, 1):
        measure(attribution(number, "faithful"), attribution(2, "unfaithful"), logits, seed=0)
    per_image = len(first_run) // 2
    # Four maps with their own and the other image's map, and three shapes including the shape of occlusion.
    assert per_image == 4 * 2 + 3 * analysis.RANDOM
    unique = {values.tobytes() for values in first_run}
    # Only the maps of the first context differ between an image and the other image.
    assert len(unique) == 2 + 1 + 1 + 1 + 2 * 3 * analysis.RANDOM
    for values in first_run[: analysis.RANDOM]:
        cells = values[::4, ::4]
        assert len(np.unique(cells)) == 64, "a random value for each position of the map"
        assert np.array_equal(spread("any", cells, 32), values), "interpolated like the map"
    second_run = []
    monkeypatch.setattr(analysis, "removal", lambda _, values, __: second_run.append(values) or np.zeros((2, STEPS)))
    measure(attribution(0, "faithful"), attribution(2, "unfaithful"), logits, seed=0)
    assert all(np.array_equal(one, other) for one, other in zip(first_run, second_run, strict=False))


# Summaries over images


def test_summaries_contain_mean_curves_and_improvements_with_intervals():
    generator = np.random.default_rng(0)
    fall, slow = np.linspace(1, 0, STEPS) ** 3, np.linspace(1, 0, STEPS)
    own, random, other = np.stack([fall, 1 - fall]), np.stack([slow, 1 - slow]), np.stack([slow**2, 1 - slow**2])
    noise = generator.normal(0, 0.01, (20, 3, 2, 1))
    measured = [ImageCurves(own + a, random + b, other + c, 0.4 + a[0, 0]) for a, b, c in noise]
    result = summary("x", measured, 1)
    curves = {"own": fall, "random": slow, "other": slow**2}
    area = {name: 0.1 * (curve.sum() - (curve[0] + curve[-1]) / 2) for name, curve in curves.items()}
    for estimate, expected in (
        (result.deletion_over_random, area["random"] - area["own"]),
        (result.insertion_over_random, area["random"] - area["own"]),
        (result.deletion_over_other, area["other"] - area["own"]),
        (result.insertion_over_other, area["other"] - area["own"]),
        (result.occlusion, 0.4),
    ):
        assert estimate.mean == pytest.approx(expected, abs=0.01)
        assert estimate.low < estimate.mean < estimate.high and estimate.high - estimate.low < 0.03
    for curve, expected in (
        (result.deletion, fall),
        (result.insertion, 1 - fall),
        (result.random_deletion, slow),
        (result.random_insertion, 1 - slow),
        (result.other_deletion, slow**2),
        (result.other_insertion, 1 - slow**2),
    ):
        assert curve == pytest.approx(expected, abs=0.01)
    swapped = [ImageCurves(image.random, image.own, image.other, float("nan")) for image in measured]
    worse = summary("x", swapped, 1)
    assert worse.deletion_over_random.mean == pytest.approx(-result.deletion_over_random.mean)
    assert np.isnan(worse.occlusion.mean) and np.isnan(worse.occlusion.low)
    with_nan = [*measured, ImageCurves(own, random, other, float("nan"))]
    assert summary("x", with_nan, 1).occlusion.mean == pytest.approx(result.occlusion.mean), "NaN does not count"


@pytest.mark.slow
def test_intervals_cover_the_true_value_in_95_percent_of_the_cases():
    generator = np.random.default_rng(0)
    flat, covered = np.zeros((2, STEPS)), 0
    for seed in range(200):
        measured = [ImageCurves(flat, flat + gain, flat, 0.0) for gain in generator.normal(0.1, 0.05, 40)]
        estimate = summary("x", measured, seed).deletion_over_random
        covered += estimate.low < 0.1 < estimate.high
    assert 178 <= covered <= 198  # about 95%, slightly less with 40 images


@pytest.fixture(params=["short", pytest.param("full", marks=[pytest.mark.ci, pytest.mark.slow])])
def count(request, monkeypatch):
    """Set the size of the measurement, "short" (a few seconds) or "full", and return its number of images."""
    if request.param == "full":
        return 10
    for module, name, value in (
        (analysis, "STEPS", 3),
        (analysis, "RANDOM", 1),
        (analysis, "PATCHES", 2),
        (command, "MIN_IMAGES", 3),
    ):
        monkeypatch.setattr(module, name, value)
    return 3


@needs_paddle
@pytest.mark.slow
@pytest.mark.charts
def test_the_faithfulness_of_a_network(count, digits_pth, photos, tmp_path):
    photos = photos[:count]
    (bad := tmp_path / "bad.png").write_bytes(b"?")
    options = {"weights": digits_pth, "engine": "paddle", "device": "cpu"}
    result = faithfulness(photos[0], bad, *photos[1:], output=tmp_path / "run", **options)
    assert result.images == count and [reason.partition(":")[0] for reason in result.unreadable] == [str(bad)]
    names = [short(curves.name) for curves in result.curves]
    assert names == ["1.1.1", "1.1.2", "2.1.1", "2.1.2", "3.1.1", "3.2.2", "occlusion"]
    for curves in result.curves:
        ends = curves.deletion[0], curves.random_deletion[0], curves.other_deletion[0], curves.insertion[-1]
        assert ends == pytest.approx([curves.deletion[0]] * 4, abs=1e-6)
        assert curves.deletion[0] > 0.1, "the predicted class of ten classes"
        assert curves.other_deletion != curves.deletion
    assert all(-1 <= curves.occlusion.mean <= 1 for curves in result.curves[:-1])
    assert np.isnan(result.curves[-1].occlusion.mean)
    written = json.loads((tmp_path / "run" / "faithfulness.json").read_text())
    assert written["images"] == count and written["curves"][-1]["occlusion"]["mean"] is None
    assert written["curves"][0]["name"] == "stage1.block1.context1" and written["values"] == "signed"
    assert (tmp_path / "run" / "faithfulness.png").read_bytes().startswith(b"\x89PNG")
    first, second, third = (curves.random_deletion for curves in result.curves[:3])
    assert first == second, "maps of the same shape have the same random maps"
    assert first != third
    every = faithfulness(*photos, every=True, **options)
    names = [short(curves.name) for curves in every.curves]
    assert names == ["1.1.1", "1.1.2", "2.1.1", "2.1.2", "3.1.1", "3.1.2", "3.2.1", "3.2.2", "occlusion"]
    by_name = {curves.name: curves for curves in every.curves}
    for curves in result.curves:
        assert repr(curves) == repr(by_name[curves.name]), "the curves of a map do not depend on the other maps"
    other = faithfulness(*photos, seed=1, absolute=True, **options)
    assert other.curves[0].random_deletion != every.curves[0].random_deletion
    assert other.curves[0].deletion != every.curves[0].deletion and other.values == "absolute"


@needs_paddle
@pytest.mark.slow
@pytest.mark.parametrize("after", [9, 11])
def test_an_interruption_writes_the_results_so_far(after, digits_pth, photos, tmp_path, monkeypatch, no_charts, notes):
    """The result is written if ten or more images were measured. The images are taken from both halves in turn."""
    measured = []
    copies = [shutil.copy(path, tmp_path / f"copy-{path.name}") for path in photos]

    def interrupted(one, other, *_):
        if len(measured) == after:
            raise KeyboardInterrupt
        measured.append((one.number, other.number))
        return {"x": ImageCurves(*np.full((3, 2, STEPS), one.number), 0.0)}

    monkeypatch.setattr(analysis, "measure", interrupted)
    monkeypatch.setattr(command, "faithfulness_chart", lambda *_: b"png")
    with pytest.raises(KeyboardInterrupt):
        faithfulness(*photos, *copies, weights=digits_pth, output=tmp_path / "run", engine="paddle")
    assert measured[:4] == [(0, 10), (10, 0), (1, 11), (11, 1)]
    assert (tmp_path / "run" / "faithfulness.json").exists() == (after == 11)
    if after == 11:
        assert json.loads((tmp_path / "run" / "faithfulness.json").read_text())["images"] == 11
        assert any("11 of 20 images" in note and str(tmp_path / "run") in note for note in notes)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
@needs_paddle
def test_the_expected_duration_is_logged_first(digits_pth, photos, monkeypatch, notes):
    """The note contains the exact number of forward passes."""
    done = []

    def compute(batch):
        done.append(len(batch))
        return np.zeros((len(batch), 10), np.float32)

    monkeypatch.setattr(command, "create_engine", lambda *_, **__: compute)
    faithfulness(*photos, weights=digits_pth)
    passes = (sum(done) - 1 - 2 * STEPS) // len(photos)  # without the passes that measure the time
    (note,) = notes
    for fact in ("10 images", f"{passes:,} forward passes", "about 0:00:0", "--max-images"):
        assert fact in note


def test_unsupported_requests_are_rejected_first(digits_pth, photos, tmp_path):
    with pytest.raises(UsageError, match=rf"\b9 image.*\b{MIN_IMAGES}\b"):
        faithfulness(*photos[:9], weights=digits_pth)
    with pytest.raises(UsageError, match=r"--heads 9: .*each, mean, .* 1 to 8"):
        faithfulness(*photos, weights=digits_pth, output=tmp_path / "run", heads="9")
    body = write_pth(tmp_path / "body.pth", synthetic_tensors(ModelSpec(DIGITS.variant)))
    with pytest.raises(DoesNotFit, match=r"body\.pth"):
        faithfulness(*photos, weights=body)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("text")
    with pytest.raises(UsageError, match=r"full\b.*not empty"):
        faithfulness(*photos, weights=digits_pth, output=full)
    assert not (tmp_path / "run").exists()


@needs_paddle
def test_too_few_readable_images_are_an_error(digits_pth, photos, tmp_path):
    photos[3].write_bytes(b"?")
    with pytest.raises(BadImages, match=r"9 images .*\b10\b.*3\.png"):
        faithfulness(*photos, weights=digits_pth, engine="paddle")


@pytest.mark.parametrize("count", [10, 11, 360])
def test_images_are_taken_from_both_halves_in_turn(count):
    order = image_order(count)
    assert sorted(order) == list(range(count)) and order[:2] == [0, (count + 1) // 2]


@pytest.mark.parametrize("count", [10, 11, 360])
def test_the_partner_of_an_image_is_from_the_other_half(count):
    """With class folders the partner mostly has another class. Each image is the partner of exactly one other image."""
    partners = [partner(number, count) for number in range(count)]
    assert sorted(partners) == list(range(count)) and min(abs(a - b) for a, b in enumerate(partners)) >= count // 2
