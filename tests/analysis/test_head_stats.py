"""Attention statistics: correlation of heads, sparseness, change with depth, and agreement of queries."""

import json
import shutil

import numpy as np
import pytest

from conftest import image_by_rule, needs_paddle
from fcvit.analysis.head_stats import agreement, between_heads, measure, sparseness
from fcvit.analysis.similarity import Viewer
from fcvit.commands.head_stats import head_stats
from fcvit.data.transforms.preprocess import preprocess
from fcvit.models.maps import Similarity, SimilarityMap
from fcvit.weights.reading import read_weights


def correlation(one, other):
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


def test_identical_heads_have_a_correlation_of_1():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 1, 500))
    equal_heads = np.stack([one, 3 * one + 2], axis=1)
    assert between_heads(equal_heads) == pytest.approx(1)
    assert between_heads(np.stack([one, -one], axis=1)) == pytest.approx(-1)
    assert abs(between_heads(np.stack([one, other], axis=1)).item()) < 0.15
    three = np.stack([one, one, -one], axis=1)
    assert between_heads(three) == pytest.approx(-1 / 3)
    assert np.isnan(between_heads(one[:, None])).all() and np.isnan(between_heads(0 * equal_heads)).all()


def test_a_uniform_head_is_ignored_in_the_correlation():
    one = np.random.default_rng(0).normal(size=(1, 500))
    assert between_heads(np.stack([one, 2 * one, 0 * one], axis=1)) == pytest.approx(1)


def test_sparseness_of_uniform_and_peaked_maps():
    uniform, peaked = np.zeros((1, 1, 100)), np.zeros((1, 1, 100))
    peaked[..., 3] = 50
    entropy, top = sparseness(uniform)
    assert entropy == pytest.approx(1) and top == pytest.approx(0.1)
    entropy, top = sparseness(peaked)
    assert entropy == pytest.approx(0, abs=1e-9) and top == pytest.approx(1)
    assert np.isnan(sparseness(np.zeros((1, 1, 1)))).all()


@pytest.mark.parametrize("positions", [4, 16, 25, 100])
def test_top_decile_is_exact_for_any_number_of_positions(positions):
    """A uniform map has 0.1. A single peak has 1 with at least ten positions, and less with fewer positions."""
    assert sparseness(np.zeros((1, 1, positions)))[1] == pytest.approx(0.1)
    peaked = np.zeros((1, 1, positions))
    peaked[..., 2] = 60
    assert sparseness(peaked)[1] == pytest.approx(min(1, positions / 10))
    steps = np.log(np.arange(1.0, positions + 1))[None, None]  # mass 1, 2, 3, ...
    complete, part = divmod(positions / 10, 1)
    masses = np.arange(positions, 0, -1)
    expected = (masses[: int(complete)].sum() + part * masses[int(complete)]) / masses.sum()
    assert sparseness(steps)[1] == pytest.approx(expected)


def test_noise_matches_the_noise_baseline_and_peaks_are_sparser():
    generator = np.random.default_rng(1)
    noise = generator.normal(size=(4, 8, 20, 20)) * np.array([0.3, 0.5, 0.8, 1, 0.3, 0.5, 0.8, 1])[:, None, None]
    peaks = np.where(generator.random((4, 8, 20, 20)) < 0.02, 7.0, 0.0)

    def figures(values):
        return measure(Similarity(values, [SimilarityMap(1, 1, 1, values, values, values)]))["stage1.block1.context1"]

    equal, sparser = figures(noise), figures(peaks)
    assert equal["entropy"] == pytest.approx(equal["noise_entropy"], abs=0.01)
    assert equal["top_decile"] == pytest.approx(equal["noise_top_decile"], abs=0.02)
    assert (sparser["entropy"] < sparser["noise_entropy"] - 0.1).all()
    assert (sparser["top_decile"] > sparser["noise_top_decile"] + 0.1).all()


def test_maps_of_two_stages_are_compared_at_the_same_positions():
    """Position i of a stage corresponds to position 2 i of the previous stage."""
    values = np.random.default_rng(0).normal(size=(2, 8, 6, 6))

    def kept(second):
        maps = [SimilarityMap(1, 1, 1, values, values, values), SimilarityMap(2, 1, 1, second, second, second)]
        measured = measure(Similarity(values, maps))
        return measured["stage1.block1.context1"]["kept"], measured["stage2.block1.context1"]["kept"]

    first, second = kept(values[:, :, ::2, ::2])
    assert np.isnan(first).all() and second == pytest.approx([1, 1])
    assert np.abs(kept(values[:, :, 1::2, 1::2])[1]).max() < 0.9


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_agreement_matches_the_correlation_of_separate_maps(shift):
    tokens = np.random.default_rng(0).normal(shift, 1, size=(2, 8, 3, 5))
    expected = []
    for image in tokens:
        for head in image.reshape(2, 4, 15):
            maps = head.T @ head  # one row per query
            expected.append([correlation(row, head.mean(1) @ head) for row in maps])
            assert np.allclose(maps.mean(0), head.mean(1) @ head), "the network's map is the mean over all queries"
    assert np.allclose(agreement(tokens, 2), np.reshape(expected, (2, -1)).mean(1), atol=1e-12)


def test_similar_queries_agree():
    generator = np.random.default_rng(0)
    similar = 5 + 0.01 * generator.normal(size=(1, 8, 6, 6))
    different = generator.normal(size=(1, 8, 6, 6))
    assert agreement(similar, 2) > 0.99 > 0.5 > agreement(different, 2)
    assert np.isnan(agreement(np.ones((1, 8, 1, 1)), 2)).all() and np.isnan(agreement(np.zeros((1, 8, 2, 2)), 2)).all()


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, size in zip(paths, ((71, 40), (33, 90), (32, 32)), strict=True):
        image_by_rule(*size).save(path)
    return paths


@needs_paddle
@pytest.mark.charts
@pytest.mark.slow
def test_the_statistics_of_a_network(digits_pth, photos, tmp_path):
    stats = head_stats(*photos, weights=digits_pth, output=tmp_path / "run")
    assert stats.images == 3 and not stats.unreadable
    names = [layer.name for layer in stats.layers]
    assert names[:3] == ["stage1.block1.context1", "stage1.block1.context2", "stage2.block1.context1"]
    for layer in stats.layers[:8]:
        assert -1 <= layer.correlation <= 1 and 0 < layer.entropy <= 1 and -1 <= layer.agreement <= 1
    assert np.isnan(stats.layers[-1].entropy), "a single position has no entropy"
    kept = json.loads((tmp_path / "run" / "head-stats.json").read_text())["networks"][0]["layers"]
    assert kept[0]["entropy"] == stats.layers[0].entropy and kept[-1]["entropy"] is None
    assert (tmp_path / "run" / "head-stats.png").read_bytes().startswith(b"\x89PNG")
    # All images are measured if the last batch is smaller. An unreadable file is skipped and reported.
    (tmp_path / "bad.png").write_bytes(b"?")
    copies = [shutil.copy(path, tmp_path / f"copy-{number}-{path.name}") for number in range(3) for path in photos]
    many = head_stats(*copies, tmp_path / "bad.png", weights=digits_pth)
    assert many.images == 9 and [reason.partition(":")[0] for reason in many.unreadable] == [str(tmp_path / "bad.png")]
    for one, other in zip(many.layers[:8], stats.layers[:8], strict=True):
        assert one.correlation == pytest.approx(other.correlation, abs=1e-6)
        assert one.entropy == pytest.approx(other.entropy, abs=1e-6)
    viewer = Viewer(read_weights(digits_pth))
    maps = viewer.similarity(np.stack([preprocess(path, viewer.preprocessing) for path in photos]), tokens=True)
    last = maps.at(3).standardized.reshape(3, 8, -1)
    assert stats.layers[7].top_decile == pytest.approx(sparseness(last)[1].mean(), abs=1e-6)
    assert stats.layers[7].entropy == pytest.approx(sparseness(last)[0].mean(), abs=1e-6)
    again = head_stats(*photos, weights=digits_pth)
    assert again.folder is None and again.layers[1:8] == stats.layers[1:8]
