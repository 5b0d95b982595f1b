"""Attention statistics: what heads have in common, how maps change with depth, and whether queries would."""

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


def test_two_heads_that_are_one_correlate_by_one():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 1, 500))
    twice = np.stack([one, 3 * one + 2], axis=1)
    assert between_heads(twice) == pytest.approx(1)
    assert between_heads(np.stack([one, -one], axis=1)) == pytest.approx(-1)
    assert abs(between_heads(np.stack([one, other], axis=1)).item()) < 0.15
    three = np.stack([one, one, -one], axis=1)
    assert between_heads(three) == pytest.approx(-1 / 3)
    assert np.isnan(between_heads(one[:, None])).all() and np.isnan(between_heads(0 * twice)).all()


def test_a_head_that_is_flat_does_not_count_among_the_others():
    one = np.random.default_rng(0).normal(size=(1, 500))
    assert between_heads(np.stack([one, 2 * one, 0 * one], axis=1)) == pytest.approx(1)


def test_sparseness_of_flat_and_peaked_maps():
    flat, peaked = np.zeros((1, 1, 100)), np.zeros((1, 1, 100))
    peaked[..., 3] = 50
    entropy, top = sparseness(flat)
    assert entropy == pytest.approx(1) and top == pytest.approx(0.1)
    entropy, top = sparseness(peaked)
    assert entropy == pytest.approx(0, abs=1e-9) and top == pytest.approx(1)
    assert np.isnan(sparseness(np.zeros((1, 1, 1)))).all()


@pytest.mark.parametrize("positions", [4, 16, 25, 100])
def test_a_tenth_of_the_positions_is_a_tenth_of_any_number(positions):
    """Of a flat map 0.1; of one peak all of it from ten positions on, below that the part that a tenth is."""
    assert sparseness(np.zeros((1, 1, positions)))[1] == pytest.approx(0.1)
    peaked = np.zeros((1, 1, positions))
    peaked[..., 2] = 60
    assert sparseness(peaked)[1] == pytest.approx(min(1, positions / 10))
    steps = np.log(np.arange(1.0, positions + 1))[None, None]  # mass 1, 2, 3, ...
    whole, part = divmod(positions / 10, 1)
    most = np.arange(positions, 0, -1)
    expected = (most[: int(whole)].sum() + part * most[int(whole)]) / most.sum()
    assert sparseness(steps)[1] == pytest.approx(expected)


def test_noise_is_as_sparse_as_its_noise_and_a_few_peaks_are_sparser():
    generator = np.random.default_rng(1)
    noise = generator.normal(size=(4, 8, 20, 20)) * np.array([0.3, 0.5, 0.8, 1, 0.3, 0.5, 0.8, 1])[:, None, None]
    peaks = np.where(generator.random((4, 8, 20, 20)) < 0.02, 7.0, 0.0)

    def figures(values):
        return measure(Similarity(values, [SimilarityMap(1, 1, 1, values, values, values)]))["stage1.block1.context1"]

    alike, sparser = figures(noise), figures(peaks)
    assert alike["entropy"] == pytest.approx(alike["noise_entropy"], abs=0.01)
    assert alike["top_decile"] == pytest.approx(alike["noise_top_decile"], abs=0.02)
    assert (sparser["entropy"] < sparser["noise_entropy"] - 0.1).all()
    assert (sparser["top_decile"] > sparser["noise_top_decile"] + 0.1).all()


def test_what_is_kept_is_compared_where_it_lies():
    """Position i of a stage is position 2 i of the one before."""
    values = np.random.default_rng(0).normal(size=(2, 8, 6, 6))

    def kept(second):
        maps = [SimilarityMap(1, 1, 1, values, values, values), SimilarityMap(2, 1, 1, second, second, second)]
        found = measure(Similarity(values, maps))
        return found["stage1.block1.context1"]["kept"], found["stage2.block1.context1"]["kept"]

    first, second = kept(values[:, :, ::2, ::2])
    assert np.isnan(first).all() and second == pytest.approx([1, 1])
    assert np.abs(kept(values[:, :, 1::2, 1::2])[1]).max() < 0.9


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_the_agreement_of_queries_is_that_of_maps_made_one_by_one(shift):
    tokens = np.random.default_rng(0).normal(shift, 1, size=(2, 8, 3, 5))
    expected = []
    for image in tokens:
        for head in image.reshape(2, 4, 15):
            maps = head.T @ head  # of each query, over the positions
            expected.append([correlation(row, head.mean(1) @ head) for row in maps])
            assert np.allclose(maps.mean(0), head.mean(1) @ head), "the map without a query is the mean over all"
    assert np.allclose(agreement(tokens, 2), np.reshape(expected, (2, -1)).mean(1), atol=1e-12)


def test_queries_that_all_look_alike_agree():
    generator = np.random.default_rng(0)
    alike = 5 + 0.01 * generator.normal(size=(1, 8, 6, 6))
    apart = generator.normal(size=(1, 8, 6, 6))
    assert agreement(alike, 2) > 0.99 > 0.5 > agreement(apart, 2)
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
def test_the_measures_of_a_network(digits_pth, photos, tmp_path):
    found = head_stats(*photos, weights=digits_pth, output=tmp_path / "run")
    assert found.images == 3 and not found.unreadable
    names = [one.name for one in found.layers]
    assert names[:3] == ["stage1.block1.context1", "stage1.block1.context2", "stage2.block1.context1"]
    for one in found.layers[:8]:
        assert -1 <= one.correlation <= 1 and 0 < one.entropy <= 1 and -1 <= one.agreement <= 1
    assert np.isnan(found.layers[-1].entropy), "a single position has no entropy"
    kept = json.loads((tmp_path / "run" / "heads.json").read_text())["networks"][0]["layers"]
    assert kept[0]["entropy"] == found.layers[0].entropy and kept[-1]["entropy"] is None
    assert (tmp_path / "run" / "heads.png").read_bytes().startswith(b"\x89PNG")
    # Every image counts, wherever the batches end; a file that is no image is left out, and named.
    (tmp_path / "bad.png").write_bytes(b"?")
    copies = [shutil.copy(path, tmp_path / f"copy-{number}-{path.name}") for number in range(3) for path in photos]
    many = head_stats(*copies, tmp_path / "bad.png", weights=digits_pth)
    assert many.images == 9 and [one.partition(":")[0] for one in many.unreadable] == [str(tmp_path / "bad.png")]
    for one, other in zip(many.layers[:8], found.layers[:8], strict=True):
        assert one.correlation == pytest.approx(other.correlation, abs=1e-6)
        assert one.entropy == pytest.approx(other.entropy, abs=1e-6)
    viewer = Viewer(read_weights(digits_pth))
    seen = viewer.similarity(np.stack([preprocess(path, viewer.preprocessing) for path in photos]), tokens=True)
    last = seen.at(3).standardised.reshape(3, 8, -1)
    assert found.layers[7].top_decile == pytest.approx(sparseness(last)[1].mean(), abs=1e-6)
    assert found.layers[7].entropy == pytest.approx(sparseness(last)[0].mean(), abs=1e-6)
    again = head_stats(*photos, weights=digits_pth)
    assert again.folder is None and again.layers[1:8] == found.layers[1:8]
