"""Maps of images: pictures and arrays."""

import numpy as np
import pytest
from PIL import Image

from conftest import DIGITS, image_by_rule, needs_paddle, write_pth
from fcvit.errors import BadImages, DoesNotFit, MissingExtra, UsageError
from fcvit.images.preprocess import crop
from fcvit.tasks import similarity as task
from fcvit.tasks.similarity import Viewer, choose_heads, similarity
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
    assert written == {"run.json", "overview.png", *(file for files in names for file in files)}
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
@pytest.mark.slow
def test_the_overview_has_every_image_and_takes_no_name_away(digits_pth, photos, tmp_path, monkeypatch):
    """Of one image there is none; of very many some, evenly over them."""
    (named := photos[0].with_name("overview.png")).write_bytes(photos[0].read_bytes())
    done = similarity(digits_pth, [named], tmp_path / "one")
    assert done.images[0][1][0] == "overview-2.png" and not (tmp_path / "one" / "overview.png").exists()
    drawn = []
    monkeypatch.setattr(task, "overview", lambda panels, title: drawn.append((panels, title)) or b"png")
    similarity(digits_pth, [named, *photos], tmp_path / "all")
    monkeypatch.setattr(task, "MOST", 2)
    similarity(digits_pth, [named, *photos], tmp_path / "some")
    (every, title), (some, of_how_many) = drawn
    assert title == f"{digits_pth.name}: 4 images" and of_how_many == f"{digits_pth.name}: 2 of 4 images"
    assert [one.title[0] for one in every] == [path.name for path in (named, *photos)]
    assert [one.title for one in some] == [every[0].title, every[2].title]
    assert all(one.maps.shape == (4, *one.image.shape[:2]) for one in every)


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
