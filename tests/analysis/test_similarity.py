"""Similarity maps of images as figures and arrays."""

import io

import numpy as np
import pytest
from PIL import Image

from conftest import DIGITS, image_by_rule, needs_paddle, needs_torch, write_pth
from fcvit.analysis import similarity as analysis
from fcvit.analysis.placement import place
from fcvit.analysis.similarity import MapChoice, Seen, Viewer, choose_heads
from fcvit.commands import similarity as command
from fcvit.commands.similarity import free_names, similarity
from fcvit.data.classes import ClassName
from fcvit.data.transforms.preprocess import crop, normalize
from fcvit.errors import BadImages, DoesNotFit, MissingExtra, NumbersDisagree, UsageError
from fcvit.frameworks import import_framework
from fcvit.metrics.classification import softmax
from fcvit.models.maps import Similarity, SimilarityMap
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import Preprocessing
from fcvit.tasks.classification.prediction import Prediction
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors

PIXELS = DIGITS.variant.preprocessing


@pytest.fixture
def photos(tmp_path):
    """Images of several sizes in two folders."""
    paths = [tmp_path / "a" / "wide.png", tmp_path / "a" / "high.png", tmp_path / "b" / "wide.png"]
    for path, size in zip(paths, ((71, 40), (33, 90), (32, 32)), strict=True):
        path.parent.mkdir(exist_ok=True)
        image_by_rule(*size).save(path)
    return paths


# Figures and arrays


@needs_paddle
@pytest.mark.charts
@pytest.mark.slow
def test_the_command_writes_its_files(digits_pth, photos, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"?")
    done = similarity(*photos, tmp_path / "bad.png", weights=digits_pth, output=tmp_path / "run", stage=1)
    names = [files for _, files, _ in done.images]
    assert names[0] == ("wide.png", "wide-depth.png", "wide.npz") and names[2][0] == "wide-2.png"
    assert [error.partition(":")[0] for error in done.unreadable] == [str(tmp_path / "bad.png")]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"run.json", "overview.png", *(file for files in names for file in files)}
    viewer = Viewer(read_weights(digits_pth))
    expected = viewer.similarity(crop(Image.open(photos[1]).convert("RGB"), PIXELS)[None])
    with np.load(tmp_path / "run" / "high.npz", allow_pickle=False) as kept:
        assert set(kept) == {f"{maps.name}.{which}" for maps in expected for which in ("standardized", "rescaled")}
        for maps in expected:
            assert np.array_equal(kept[f"{maps.name}.rescaled"], maps.rescaled[0])
    with Image.open(tmp_path / "run" / "wide-depth.png") as depth, Image.open(tmp_path / "run" / "wide.png") as figure:
        assert depth.height > figure.height > 300 and depth.width > 1000
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 200, "colors of a map"


@needs_paddle
@pytest.mark.charts
@pytest.mark.slow
def test_the_overview_contains_all_images_or_an_even_sample(digits_pth, photos, tmp_path, monkeypatch):
    """A single image has no overview. Files of an image named overview.png do not overwrite the overview."""
    (named := photos[0].with_name("overview.png")).write_bytes(photos[0].read_bytes())
    done = similarity(named, weights=digits_pth, output=tmp_path / "one")
    assert done.images[0][1][0] == "overview-2.png" and not (tmp_path / "one" / "overview.png").exists()
    drawn = []
    monkeypatch.setattr(analysis, "maps_figure", lambda *_: b"png")
    monkeypatch.setattr(command, "overview", lambda panels, title, *_: drawn.append((panels, title)) or b"png")
    similarity(named, *photos, weights=digits_pth, output=tmp_path / "all")
    monkeypatch.setattr(command, "MAX_PANELS", 2)
    similarity(named, *photos, weights=digits_pth, output=tmp_path / "some")
    (every, title), (some, sample_title) = drawn
    assert title == f"{digits_pth.name}: 4 images" and sample_title == f"{digits_pth.name}: 2 of 4 images"
    assert [panel.title.partition(": ")[0] for panel in every] == [path.name for path in (named, *photos)]
    assert [panel.title for panel in some] == [every[0].title, every[2].title]
    assert all(panel.maps.shape == (4, *panel.scene.seen.shape) for panel in every)


@needs_paddle
@pytest.mark.charts
def test_no_readable_image_is_an_error(digits_pth, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"?")
    with pytest.raises(BadImages, match=r"none of .*\b1\b.*bad\.png"):
        similarity(tmp_path / "bad.png", weights=digits_pth, output=tmp_path / "run")


@needs_paddle
@pytest.mark.charts
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 5}, "stage 5: .*1 to 4"),
        ({"heads": "9"}, "--heads 9: .*each, mean, .*1 to 8"),
        ({"heads": "some"}, "--heads some"),
        ({"values": "raw"}, "--values raw"),
        ({"scale": "each"}, "--scale each: .*picture or head"),
        ({"top_k": 0}, "--top-k 0: .*at least 1"),
        ({"images": []}, "at least one image"),
        ({"weights": None}, "--weights"),
        ({"run": "runs/eval"}, "--run"),
    ],
)
def test_invalid_requests_are_rejected(options, message, digits_pth, photos, tmp_path):
    given = {"weights": digits_pth, "images": photos, "output": tmp_path / "run", **options}
    with pytest.raises(UsageError, match=message):
        similarity(*given.pop("images"), **given)
    assert not list(tmp_path.glob("run/*.png"))


@needs_paddle
def test_a_missing_extra_is_reported_with_its_install_command(digits_pth, photos, tmp_path, no_charts):
    with pytest.raises(MissingExtra, match=r"fcvit\[report\]"):
        similarity(*photos, weights=digits_pth, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_paddle
def test_a_dense_backbone_is_rejected(tmp_path):
    spec = ModelSpec(DIGITS.variant, head="backbone")
    with pytest.raises(DoesNotFit, match=r"dense\.pth is .*classifier"):
        Viewer(read_weights(write_pth(tmp_path / "dense.pth", synthetic_tensors(spec))))


def test_choose_heads_returns_maps_and_names():
    maps = np.arange(24.0).reshape(2, 3, 4)
    assert choose_heads(maps, "each")[1] == ["head 1", "head 2"]
    assert np.array_equal(choose_heads(maps, "2")[0], maps[1:])
    assert np.array_equal(choose_heads(maps, "mean")[0], maps.mean(0, keepdims=True))


# Contents of the figures


STAGES = ((1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 1, 2), (3, 1, 1), (3, 1, 2), (3, 2, 1), (3, 2, 2), (4, 1, 1), (4, 1, 2))


def coded_maps(image):
    """Return an image with fake maps. The hundreds of their values are the number of the context, the ones the head."""
    maps = []
    for number, (stage, block, context) in enumerate(STAGES):
        side = (8, 4, 2, 1)[stage - 1]
        ramp = np.arange(side * side).reshape(side, side) / 1000
        values = 100.0 * number + np.arange(8.0)[:, None, None] + ramp
        maps.append(SimilarityMap(stage, block, context, values, values + 5000))
    predictions = (Prediction(0, "0", "cat", 0.25), Prediction(1, "1", "dog", 0.125))
    return Seen(image, predictions, Similarity(np.zeros(10), tuple(maps)))


@pytest.fixture
def viewer(digits_pth):
    return Viewer(read_weights(digits_pth), device="cpu")


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of all calls of `maps_figure`."""
    calls = []
    monkeypatch.setattr(analysis, "maps_figure", lambda *given: calls.append(given) or b"png")
    return calls


@needs_paddle
@pytest.mark.parametrize("which", ["standardized", "rescaled"])
@pytest.mark.parametrize("where", [(1, 1, 1), (3, 1, 2), (3, 2, 1)])
def test_a_figure_shows_the_maps_of_the_given_context(which, where, viewer, drawn):
    image = image_by_rule(71, 40)
    seen = coded_maps(image)
    analysis.picture(viewer, seen, "a.png", where, MapChoice("each", which))
    ((scene, (row,), title, subtitle, label),) = drawn
    shown = scene.image
    values = getattr(seen.similarity.maps[STAGES.index(where)], which)
    assert title == f"a.png: stage {where[0]}, block {where[1]}, context {where[2]}"
    assert subtitle == "digits.pth: cat: 25.0%, dog: 12.5%" and label == f"{which} similarity"
    assert row.names == [f"head {n}" for n in range(1, 9)]
    scale = shown.shape[1] // 71
    assert shown.shape == (40 * scale, 71 * scale, 3) and np.array_equal(shown[::scale, ::scale], np.asarray(image))
    expected = place(values, image.size, PIXELS, (71 * scale, 40 * scale))
    assert np.allclose(row.maps, expected, equal_nan=True) and np.array_equal(scene.seen, ~np.isnan(expected[0]))


@needs_paddle
def test_each_head_can_have_its_own_color_scale(viewer, drawn):
    seen, choice = coded_maps(image_by_rule(32, 32)), MapChoice(scale="head")
    analysis.picture(viewer, seen, "a.png", (1, 1, 1), choice)
    analysis.depth_picture(viewer, seen, "a.png", 1, choice)
    for _, rows, *_, label in drawn:
        assert label.startswith("standardized similarity, ") and "head" in label
        for row in rows[:3]:
            assert -0.2 < np.nanmin(row.maps) < 0.1 and row.names[7].startswith("head 8 (")
            assert np.allclose(row.maps[0], row.maps[7], atol=1e-6, equal_nan=True), "they differ by a constant"


@needs_paddle
@pytest.mark.parametrize(("heads", "expected"), [("mean", 3.5), ("1", 0), ("8", 7)])
def test_a_figure_shows_one_head_or_the_mean(heads, expected, viewer, drawn):
    analysis.picture(viewer, coded_maps(image_by_rule(32, 32)), "a.png", (3, 2, 1), MapChoice(heads))
    assert np.allclose(drawn[0][1][0].maps, 100 * STAGES.index((3, 2, 1)) + expected, atol=0.01)


@needs_paddle
@pytest.mark.parametrize("context", [1, 2])
def test_the_depth_figure_shows_a_context_of_the_last_block_of_each_stage(context, viewer, drawn):
    analysis.depth_picture(viewer, coded_maps(image_by_rule(32, 32)), "a.png", context, MapChoice(which="rescaled"))
    rows = drawn[0][1]
    last = [(1, 1, context), (2, 1, context), (3, 2, context), (4, 1, context)]
    assert [row.name for row in rows] == ["stage {}\nblock {}\ncontext {}".format(*where) for where in last]
    for row, where in list(zip(rows, last, strict=True))[:3]:
        assert np.array_equal(row.maps[:, 16, 16] // 1, 5000 + 100 * STAGES.index(where) + np.arange(8))
    assert rows[3].maps.shape == rows[0].maps.shape and np.isnan(rows[3].maps).all(), "a single position is not a map"


@needs_paddle
@pytest.mark.parametrize(
    ("choice", "offset"),
    [
        ((), 3.5),
        ((2,), 3.5),
        ((1, MapChoice("each")), 3.5),
        ((2, MapChoice("4")), 3),
        ((1, MapChoice("mean", "rescaled")), 5003.5),
    ],
)
def test_a_panel_shows_the_chosen_maps_of_the_last_block_of_each_stage(choice, offset, viewer, monkeypatch):
    panel = analysis.panel(viewer, coded_maps(image_by_rule(32, 32)), "a.png", *choice)
    context = choice[0] if choice else 1
    last = [(1, 1, context), (2, 1, context), (3, 2, context)]
    assert panel.maps.shape[0] == 4 and panel.title == "a.png"
    expected = [100 * STAGES.index(where) + offset for where in last]
    assert np.allclose(panel.maps[:3, 0, 0], expected, atol=0.01) and np.isnan(panel.maps[3]).all()
    calls = []
    monkeypatch.setattr(analysis, "maps_overview", lambda *given: calls.append(given) or b"")
    analysis.overview([panel], "title", viewer.variant, *choice)
    ((_, names, title, label),) = calls
    assert names == ["stage 1, block 1", "stage 2, block 1", "stage 3, block 2", "stage 4, block 1"]
    shown = choice[1] if len(choice) > 1 else MapChoice()
    heads = "head 4" if shown.heads == "4" else "mean over heads"
    assert (title, label) == ("title", f"{shown.which} similarity, context {context}, {heads}")


@pytest.mark.slow
@needs_paddle
@pytest.mark.parametrize(("size", "stage"), [(32, 3), (33, 4), (224, 4), (16, 2), (4, 4)])
def test_the_default_stage_has_more_than_one_position(size, stage, digits_pth):
    viewer = Viewer(read_weights(digits_pth), preprocessing=Preprocessing(size, 1.0), device="cpu")
    assert viewer.stage == stage


@needs_paddle
@needs_torch
def test_maps_and_arrays_match_the_reference(viewer, digits_tensors):
    """The standardized and the rescaled maps have the right names and shapes."""
    torch = import_framework("torch")
    from fcvit.reference.build import build_reference

    image = image_by_rule(71, 40)
    batch = crop(image, PIXELS)[None]
    with torch.inference_mode():
        expected = build_reference(DIGITS, digits_tensors).similarity(torch.from_numpy(normalize(batch, PIXELS)), True)
    actual = viewer.similarity(batch, tokens=True)
    seen = viewer.see(image)
    with np.load(io.BytesIO(analysis.map_arrays(seen)), allow_pickle=False) as kept:
        assert len(kept) == 2 * len(expected.maps)
        for one, other in zip(actual, expected, strict=True):
            assert one.name == other.name
            assert np.allclose(one.tokens, other.tokens.numpy(), atol=1e-4)
            for which in ("standardized", "rescaled"):
                assert np.allclose(getattr(one, which), getattr(other, which).numpy(), atol=1e-4), (one.name, which)
                assert np.allclose(kept[f"{one.name}.{which}"], getattr(other, which).numpy()[0], atol=1e-4)
    probabilities = softmax(expected.output.numpy())[0]
    assert [row.index for row in seen.predictions] == np.argsort(-probabilities)[:5].tolist()
    assert seen.predictions[0].probability == pytest.approx(probabilities.max(), abs=1e-4)


@needs_paddle
def test_duplicate_class_names_include_the_id(digits_pth):
    classes = tuple(ClassName(f"n{i}", "crane" if i < 9 else "other") for i in range(10))
    seen = Viewer(read_weights(digits_pth), classes, device="cpu").see(image_by_rule(32, 32), 10)
    assert {prediction.name for prediction in seen.predictions} == {*(f"crane (n{i})" for i in range(9)), "other"}


@needs_paddle
def test_maps_that_are_not_finite_are_an_error(tmp_path, digits_tensors):
    name = "network.4.1.norm1.weight"
    broken = digits_tensors | {name: digits_tensors[name] * np.float32(1e30)}
    viewer = Viewer(read_weights(write_pth(tmp_path / "broken.pth", broken)), device="cpu")
    with pytest.raises(NumbersDisagree, match=r"broken\.pth: (output|stage3\.block2\.context\d) .*finite"):
        viewer.see(image_by_rule(32, 32))


# File names


def test_file_names_are_unique():
    taken = {"overview.png"}
    given = ["a", "a-depth", "A", "a", "overview", "é" * 150, "é" * 151, "b\udcfc", "\udcff"]
    files = [file for stem in given for file in free_names(stem, taken)]
    assert len({file.casefold() for file in files}) == len(files) == 3 * len(given)
    assert files[:3] == ["a.png", "a-depth.png", "a.npz"] and "overview.png" not in files
    assert all(len(file.encode()) < 255 for file in files)


@needs_paddle
@pytest.mark.charts
def test_an_invalid_request_creates_no_folder(digits_pth, photos, tmp_path):
    for wrong, message in (({"context": 3}, "context 3"), ({"heads": "9"}, "--heads 9")):
        with pytest.raises(UsageError, match=message):
            similarity(*photos, weights=digits_pth, output=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@needs_paddle
@pytest.mark.charts
def test_an_interruption_keeps_and_reports_the_files_of_finished_images(
    digits_pth, photos, tmp_path, monkeypatch, drawn, notes
):
    """There is no overview."""
    see = Viewer.see

    def interrupted(viewer, image, top_k):
        if image.size == (33, 90):
            raise KeyboardInterrupt
        return see(viewer, image, top_k)

    monkeypatch.setattr(Viewer, "see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        similarity(*photos, weights=digits_pth, output=tmp_path / "run")
    (note,) = notes
    assert "1 of 3 images" in note and str(tmp_path / "run") in note
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "run.json",
        "wide.png",
        "wide-depth.png",
        "wide.npz",
    }
    assert '"interrupted"' in (tmp_path / "run" / "run.json").read_text()


@needs_paddle
@pytest.mark.charts
@pytest.mark.slow
def test_an_image_that_cannot_be_resized_is_reported(digits_pth, photos, tmp_path):
    Image.new("RGB", (5000, 1)).save(tmp_path / "line.png")
    Image.new("RGB", (60000, 1)).save(tmp_path / "longer.png")
    bad = []
    readable = analysis.each_readable([tmp_path / "longer.png", *photos], Preprocessing(4000), bad, lambda _: None)
    assert len(list(readable)) == 3
    assert str(bad[0]).startswith(f"{tmp_path / 'longer.png'}: 60000 x 1 pixels")
