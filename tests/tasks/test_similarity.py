"""Maps of images, what heads have in common, and whether maps are to be trusted."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import DIGITS, image_by_rule, needs_paddle, write_pth
from fcvit.errors import BadImages, DoesNotFit, MissingExtra, UsageError
from fcvit.images.preprocess import crop
from fcvit.tasks.similarity import Viewer, choose_heads, similarity
from fcvit.tasks.trust import STEPS, in_blocks, occlusion, on_crop, removal, summary, trust
from fcvit.weights.lively import lively_tensors
from fcvit.weights.names import Form
from fcvit.weights.reading import read_weights

PIXELS = DIGITS.variant.preprocessing


@pytest.fixture
def photos(tmp_path):
    """Images of odd sizes."""
    paths = [tmp_path / "a" / "wide.png", tmp_path / "a" / "high.png", tmp_path / "b" / "wide.png"]
    for path, size in zip(paths, ((71, 40), (33, 90), (32, 32)), strict=True):
        path.parent.mkdir(exist_ok=True)
        image_by_rule(*size).save(path)
    return paths


# Pictures and arrays


@needs_paddle
@pytest.mark.charts
@pytest.mark.slow
def test_what_the_command_leaves(digits_pth, photos, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"?")
    done = similarity(digits_pth, [*photos, tmp_path / "bad.png"], tmp_path / "run", stage=1)
    names = [files for _, files, _ in done.images]
    assert names[0] == ("wide.png", "wide-depth.png", "wide.npz") and names[2][0] == "wide-2.png"
    assert [str(error).partition(":")[0] for error in done.unreadable] == [str(tmp_path / "bad.png")]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"run.json", *(file for files in names for file in files)}
    viewer = Viewer(read_weights(digits_pth))
    expected = viewer.similarity(crop(Image.open(photos[1]).convert("RGB"), PIXELS)[None])
    with np.load(tmp_path / "run" / "high.npz", allow_pickle=False) as kept:
        assert set(kept) == {f"{one.name}.{which}" for one in expected for which in ("standardised", "rescaled")}
        for one in expected:
            assert np.array_equal(kept[f"{one.name}.rescaled"], one.rescaled[0])
    with Image.open(tmp_path / "run" / "wide-depth.png") as depth, Image.open(tmp_path / "run" / "wide.png") as sheet:
        assert depth.height > sheet.height > 300 and depth.width > 1000
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 200, "colours of a map"


@needs_paddle
@pytest.mark.charts
def test_not_one_image_is_an_error(digits_pth, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"?")
    with pytest.raises(BadImages, match="none of 1 images"):
        similarity(digits_pth, [tmp_path / "bad.png"], tmp_path / "run")


@needs_paddle
@pytest.mark.charts
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 5}, "stage 5: expected 1 to 4"),
        ({"heads": "9"}, "--heads 9: expected each, mean, or a number from 1 to 8"),
        ({"heads": "some"}, "--heads some"),
        ({"which": "raw"}, "--values raw"),
        ({"top_k": 0}, "--top-k from 1"),
        ({"images": []}, "at least one image"),
    ],
)
def test_requests_that_cannot_be(options, message, digits_pth, photos, tmp_path):
    given = {"weights": digits_pth, "images": photos, "folder": tmp_path / "run", **options}
    with pytest.raises(UsageError, match=message):
        similarity(given.pop("weights"), given.pop("images"), given.pop("folder"), **given)
    assert not list(tmp_path.glob("run/*.png"))


@needs_paddle
def test_without_the_extra_the_command_is_named(digits_pth, photos, tmp_path, no_charts):
    with pytest.raises(MissingExtra, match=r"fcvit\[report\]"):
        similarity(digits_pth, photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_paddle
def test_a_dense_backbone_has_no_viewer(tmp_path):
    form = Form(DIGITS.variant, dense=True)
    with pytest.raises(DoesNotFit, match="maps come from a classifier"):
        Viewer(read_weights(write_pth(tmp_path / "dense.pth", lively_tensors(form))))


def test_heads_are_chosen_and_named():
    maps = np.arange(24.0).reshape(2, 3, 4)
    assert choose_heads(maps, "each")[1] == ["head 1", "head 2"]
    assert np.array_equal(choose_heads(maps, "2")[0], maps[1:])
    assert np.array_equal(choose_heads(maps, "mean")[0], maps.mean(0, keepdims=True))


# Trust


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
    rows = np.stack([[[fall, slow], [1 - fall, 1 - slow]] for _ in range(20)]) + generator.normal(
        0, 0.01, (20, 2, 2, 1)
    )
    found = summary("x", rows, np.random.default_rng(1))
    expected = 0.5 - np.trapezoid(fall, dx=0.1)
    assert found.deletion_gain == pytest.approx(expected, abs=0.01)
    assert found.insertion_gain == pytest.approx(expected, abs=0.01)
    for gain, (low, high) in (
        (found.deletion_gain, found.deletion_interval),
        (found.insertion_gain, found.insertion_interval),
    ):
        assert low < gain < high and high - low < 0.03
    worse = summary("x", rows[:, :, ::-1], np.random.default_rng(1))
    assert worse.deletion_gain == pytest.approx(-found.deletion_gain)


@needs_paddle
@pytest.mark.charts
@pytest.mark.slow
def test_the_trust_of_a_network(digits_pth, photos, tmp_path):
    photos = photos[:2]
    found = trust(digits_pth, photos, tmp_path / "run", engine="paddle")
    assert [one.name for one in found.curves] == ["1.1.1", "1.1.2", "2.1.1", "2.1.2", "3.1.1", "3.2.2", "occlusion"]
    for one in found.curves:
        assert one.deletion[0] == pytest.approx(one.random_deletion[0]) == pytest.approx(one.insertion[-1], abs=1e-6)
    assert json.loads((tmp_path / "run" / "trust.json").read_text())["images"] == 2
    assert (tmp_path / "run" / "trust.png").read_bytes().startswith(b"\x89PNG")
    again = trust(digits_pth, photos, engine="paddle", every=True)
    names = [one.name for one in again.curves]
    assert names == ["1.1.1", "1.1.2", "2.1.1", "2.1.2", "3.1.1", "3.1.2", "3.2.1", "3.2.2", "occlusion"]
    assert again.curves[0] == found.curves[0], "one seed, one answer"
    assert (
        trust(digits_pth, photos, engine="paddle", seed=1).curves[0].random_deletion != found.curves[0].random_deletion
    )
    assert trust(digits_pth, photos, engine="paddle", absolute=True).curves[0].deletion != found.curves[0].deletion


@needs_paddle
def test_trust_needs_classes_and_several_images(digits_pth, photos, tmp_path):
    with pytest.raises(UsageError, match="at least two images"):
        trust(digits_pth, photos[:1])
    body = write_pth(tmp_path / "body.pth", lively_tensors(Form(DIGITS.variant)))
    with pytest.raises(DoesNotFit, match="predicts nothing"):
        trust(body, photos)
