"""What heads have in common, how maps change with depth, and whether queries would: FCViT's, and a plain ViT's."""

import importlib
import json

import numpy as np
import pytest

from conftest import DIGITS, image_by_rule, needs_paddle, needs_torch, write_pth
from fcvit.analysis import plain_vit
from fcvit.analysis.heads import agreement, between_heads, heads, measure, measure_queries, sparseness
from fcvit.analysis.similarity import Viewer
from fcvit.data.transforms.preprocess import normalize, preprocess
from fcvit.errors import DoesNotFit, MissingExtra, UsageError
from fcvit.frameworks import import_framework
from fcvit.models.maps import Similarity, SimilarityMap
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_input


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


def test_attention_is_measured_query_by_query():
    """Two blocks of attention, (images, heads, queries, keys), against loops."""
    blocks = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 20))
    found = measure_queries(blocks)
    assert list(found) == ["block1", "block2"] and np.isnan(found["block1"]["kept"]).all()
    image, before = blocks[1, 1], blocks[0, 1]
    pairs = [(0, 1), (0, 2), (1, 2)]
    mass = np.exp(image) / np.exp(image).sum(-1, keepdims=True)
    expected = {
        "correlation": np.mean([correlation(image[i, q], image[j, q]) for i, j in pairs for q in range(4)]),
        "entropy": np.mean(-(mass * np.log(mass)).sum(-1)) / np.log(20),
        "top_decile": np.mean(np.sort(mass, -1)[..., -2:].sum(-1)),
        "kept": np.mean([correlation(image[:, q].mean(0), before[:, q].mean(0)) for q in range(4)]),
        "agreement": np.mean([correlation(image[h, q], image[h].mean(0)) for h in range(3) for q in range(4)]),
    }
    for name, value in expected.items():
        assert found["block2"][name][1] == pytest.approx(value), name
    same = np.broadcast_to(blocks[0][:, :, :1], blocks[0].shape)
    assert measure_queries([same])["block1"]["agreement"] == pytest.approx([1, 1]), "one query, whoever asks"


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
    found = heads(digits_pth, photos, tmp_path / "run")
    (network,) = found.networks
    assert found.images == 3 and not found.unreadable
    names = [one.name for one in network.layers]
    assert names[:3] == ["stage1.block1.context1", "stage1.block1.context2", "stage2.block1.context1"]
    for one in network.layers[:8]:
        assert -1 <= one.correlation <= 1 and 0 < one.entropy <= 1 and -1 <= one.agreement <= 1
    assert np.isnan(network.layers[-1].entropy), "a single position has no entropy"
    kept = json.loads((tmp_path / "run" / "heads.json").read_text())["networks"][0]["layers"]
    assert kept[0]["entropy"] == network.layers[0].entropy and kept[-1]["entropy"] is None
    assert (tmp_path / "run" / "heads.png").read_bytes().startswith(b"\x89PNG")
    # Every image counts, wherever the batches end; a file that is no image is left out, and named.
    (tmp_path / "bad.png").write_bytes(b"?")
    many = heads(digits_pth, [*(3 * photos), tmp_path / "bad.png"])
    assert many.images == 9 and [one.partition(":")[0] for one in many.unreadable] == [str(tmp_path / "bad.png")]
    for one, other in zip(many.networks[0].layers[:8], network.layers[:8], strict=True):
        assert one.correlation == pytest.approx(other.correlation, abs=1e-6)
        assert one.entropy == pytest.approx(other.entropy, abs=1e-6)
    viewer = Viewer(read_weights(digits_pth))
    seen = viewer.similarity(np.stack([preprocess(path, viewer.preprocessing) for path in photos]), tokens=True)
    last = seen.at(3).standardised.reshape(3, 8, -1)
    assert network.layers[7].top_decile == pytest.approx(sparseness(last)[1].mean(), abs=1e-6)
    assert network.layers[7].entropy == pytest.approx(sparseness(last)[0].mean(), abs=1e-6)
    again = heads(digits_pth, photos)
    assert again.folder is None and again.networks[0].layers[1:8] == network.layers[1:8]


@needs_paddle
def test_a_vit_is_a_name_and_a_file(digits_pth, photos):
    for half in ({"vit": "vit_tiny_patch16_224"}, {"vit_weights": "x.safetensors"}):
        with pytest.raises(UsageError, match="both its name in timm, --vit NAME, and its weights, --vit-weights FILE"):
            heads(digits_pth, photos, **half)


@needs_torch
@pytest.mark.parametrize("prefix", [0, 1])
def test_attention_before_its_softmax(prefix):
    """Against PyTorch's own attention: an identity for values gives the softmax back."""
    torch = import_framework("torch")
    nn, functional = torch.nn, torch.nn.functional

    class Attention(nn.Module):
        num_heads, scale = 2, 0.3

        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)

    torch.manual_seed(0)
    attention, x = Attention(), torch.randn(2, 5, 8)
    with torch.inference_mode():
        found = plain_vit.attention_logits(attention, x, prefix)
        query, key, _ = attention.qkv(x).chunk(3, dim=-1)
        query, key = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (query, key))
        query, key = attention.q_norm(query)[:, :, prefix:], attention.k_norm(key)[:, :, prefix:]
        values = torch.eye(5 - prefix).expand(2, 2, -1, -1)
        expected = functional.scaled_dot_product_attention(query, key, values, scale=0.3)
        assert found.shape == (2, 2, 5 - prefix, 5 - prefix)
        assert torch.allclose(found.softmax(-1), expected, atol=1e-6)


@needs_torch
@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'timm'"), RuntimeError("operator nms")])
def test_without_timm_it_is_named(monkeypatch, tmp_path, error):
    def missing(name):
        raise error

    monkeypatch.setattr(plain_vit, "_import", missing)
    with pytest.raises(MissingExtra, match=r"timm cannot be had \((No module|operator nms).*pip install timm"):
        plain_vit.PlainViT("vit_tiny_patch16_224", tmp_path / "x.pth", "cpu")


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """A plain ViT of the installed timm, and its weights in a file."""
    try:
        timm = importlib.import_module("timm")
    except Exception as error:  # RuntimeError where torchvision does not fit PyTorch
        pytest.skip(f"no timm that loads: {error}")
    torch = import_framework("torch")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_the_attention_is_the_one_that_timm_computes(vit_file):
    torch = import_framework("torch")
    vit = plain_vit.PlainViT("vit_tiny_patch16_224", vit_file, "cpu")
    batch = (64 * synthetic_input((2, 3, 224, 224)) + 128).clip(0, 255).astype(np.uint8)
    found, attention = vit.logits(batch), []
    for block in vit.model.blocks:
        assert not block.attn._forward_pre_hooks, "none of our hooks stays"
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, given: attention.append(given[0].numpy()))
    with torch.inference_mode():
        vit.model(torch.from_numpy(normalize(batch, vit.preprocessing)))
    assert len(found) == len(attention) == 12
    for logits, whole in zip(found, attention, strict=True):
        patches = whole[:, :, 1:, 1:] / whole[:, :, 1:, 1:].sum(-1, keepdims=True)
        mass = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert np.abs(mass - patches).max() < 1e-6


@needs_paddle
@pytest.mark.filterwarnings("ignore")
def test_both_networks_are_measured(digits_pth, photos, vit_file):
    found = heads(digits_pth, photos, vit="vit_tiny_patch16_224", vit_weights=vit_file, device="cpu")
    assert [one.network for one in found.networks] == ["fcvit_digits (10 classes)", "vit_tiny_patch16_224"]
    assert len(found.networks[1].layers) == 12
    assert all(abs(one.agreement) <= 1 and one.entropy <= 1 for one in found.networks[1].layers)


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_vit_or_has_other_weights_is_refused(vit_file, tmp_path):
    for name, message in (
        ("vit_tinny", "has no such network; timm.list_models"),
        ("vit_tiny", "did you mean vit_tiny_patch16_224 or"),
        ("swin_tiny_patch4_window7_224", "no plain ViT"),
    ):
        with pytest.raises(UsageError, match=f"--vit {name}: .*{message}"):
            plain_vit.PlainViT(name, vit_file, "cpu")
    with pytest.raises(
        DoesNotFit, match=r"151 tensor\(s\) differ, first: blocks.0.attn.proj.bias is 192, expected 384"
    ):
        plain_vit.PlainViT("vit_small_patch16_224", vit_file, "cpu")
    other = write_pth(tmp_path / "other.pth", {"head.weight": np.zeros((10, DIGITS.num_classes))})
    with pytest.raises(DoesNotFit, match=r"first: blocks.0.attn.proj.bias is missing, expected 192"):
        plain_vit.PlainViT("vit_tiny_patch16_224", other, "cpu")
