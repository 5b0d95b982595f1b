"""Tests of `fcvit.load` and `fcvit.Predictor`: construction, pickling, and batches of Ray Data."""

import io
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import DIGITS, write_detector, write_synthetic
from fcvit.errors import BadImages, DoesNotFit, MissingExtra, UsageError
from fcvit.metrics.detection import decode_masks
from fcvit.models.spec import ModelSpec, SemanticFPNOptions
from fcvit.tasks import predictor as module

pytest.importorskip("onnxruntime")
KINDS = {"classification": fcvit.Classifier, "segmentation": fcvit.Segmenter, "detection": fcvit.Detector}
OPTIONS = {"classification": {"top_k": 3}, "segmentation": {}, "detection": {"score_threshold": 0.0}}
SMALL_FPN = SemanticFPNOptions(16, 8, 128, 64, 32)
SLOW = [pytest.param("detection", marks=pytest.mark.slow), pytest.param("segmentation", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_synthetic(folder / "classification.safetensors", DIGITS)
    write_synthetic(folder / "segmentation.safetensors", ModelSpec(DIGITS.variant, 5, "semantic_fpn", SMALL_FPN))
    write_detector(folder / "detection.safetensors")
    return {task: folder / f"{task}.safetensors" for task in KINDS}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three images and a file that is none."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(3)
    for index in range(3):
        Image.fromarray(generator.integers(0, 256, (50 + 7 * index, 54, 3), np.uint8)).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes(b"no image")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("task", ["classification", *SLOW])
def test_a_predictor_loads_a_file_and_can_be_pickled(task, files, photos):
    predictor = fcvit.Predictor(files[task], engine="paddle", device="cpu", threads=1)
    assert type(predictor) is KINDS[task] and isinstance(predictor, fcvit.Predictor)
    before = [predictor.rows(result) for result in predictor.predict(photos[:3], **OPTIONS[task])]
    content = pickle.dumps(predictor)
    assert len(content) < 5000 and len(content) < files[task].stat().st_size / 10, "the weights are not pickled"
    module._loaded.cache_clear()
    copies = [pickle.loads(content), pickle.loads(pickle.dumps(pickle.loads(content)))]
    assert not module._loaded.cache_info().currsize, "nothing is loaded before the first use"
    for copy in copies:
        assert type(copy) is KINDS[task] and copy.classes == predictor.classes
        assert [copy.rows(result) for result in copy.predict(photos[:3], **OPTIONS[task])] == before
    assert module._loaded.cache_info().misses == 1 and copies[0].engine is copies[1].engine
    assert copies[0].engine.threads == 1 and copies[0].engine.name == "paddle"


def test_a_changed_file_is_an_error_in_the_other_process(files, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(files["classification"].read_bytes())
    content = pickle.dumps(fcvit.load(path, engine="paddle", device="cpu"))
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    copy = pickle.loads(content)
    with pytest.raises(DoesNotFit, match=r"x\.safetensors: the file has changed"):
        copy.predict(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(AttributeError, match="Classifier has no attribute 'other'"):
        _ = copy.other


def test_a_predictor_without_a_file_is_not_pickled(files):
    weights = fcvit.read_weights(files["classification"])
    predictor = fcvit.load(weights, engine="paddle", device="cpu")
    with pytest.raises(UsageError, match="not loaded from a file, and cannot be pickled"):
        pickle.dumps(predictor)


def encoded(photos):
    return np.array([path.read_bytes() for path in photos], object)


@pytest.mark.parametrize("form", ["bytes", "image", "struct", "path"])
def test_the_images_of_a_batch_have_several_forms(form, files, photos):
    pytest.importorskip("pyarrow")
    predictor = fcvit.load(files["classification"], engine="paddle", device="cpu")
    names = np.array([str(path) for path in photos])
    batch = {
        "bytes": {"bytes": encoded(photos), "path": names},
        "image": {"image": [np.asarray(Image.open(path)) for path in photos[:3]] + [None], "path": names},
        "struct": {
            "image": [{"bytes": path.read_bytes(), "path": str(path)} for path in photos[:3]]
            + [{"bytes": None, "path": str(photos[3])}]
        },
        "path": {"path": names},
    }[form]
    table = predictor(batch | {"label": np.arange(4), "place": np.ones((4, 2))}, top_k=2)
    assert {*table.column_names} == {"path", "label", "place", "predictions", "error"}
    assert table["label"].to_pylist() == [0, 1, 2, 3] and table["path"].to_pylist() == [str(path) for path in photos]
    expected = [predictor.rows(result) for result in predictor.predict(photos[:3], top_k=2)]
    assert table["predictions"].to_pylist() == [*expected, None]
    assert table["error"].to_pylist()[:3] == [None] * 3
    assert table["error"].to_pylist()[3].startswith(f"{photos[3]}: not a readable image")


@pytest.mark.slow
def test_label_maps_are_png_files(files, photos):
    pytest.importorskip("pyarrow")
    predictor = fcvit.load(files["segmentation"], engine="paddle", device="cpu")
    table = predictor({"bytes": encoded(photos)}, one_based=True)
    assert table.column_names == ["predictions", "label_map", "error"]
    for result, content in zip(predictor.predict(photos), table["label_map"].to_pylist(), strict=True):
        if isinstance(result, BadImages):
            assert content is None
        else:
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), result.labels + 1)


@pytest.mark.slow
def test_masks_are_run_lengths(files, photos):
    pytest.importorskip("pyarrow")
    predictor = fcvit.load(files["detection"], engine="paddle", device="cpu")
    (table, none) = (predictor({"bytes": encoded(photos)}, score_threshold=score) for score in (0, 1))
    assert none.schema == table.schema and none["predictions"].to_pylist() == [[], [], [], None]
    for result, row in zip(predictor.predict(photos[:3], score_threshold=0), table.to_pylist(), strict=False):
        assert (row["height"], row["width"]) == result.size and len(row["predictions"]) == len(result) > 0
        for index, found in enumerate(row["predictions"]):
            (mask,) = decode_masks([{"size": [*result.size], "counts": found["mask"].encode()}])
            np.testing.assert_array_equal(mask, result.mask(index))


def test_a_batch_without_images_is_refused(files):
    pytest.importorskip("pyarrow")
    predictor = fcvit.load(files["classification"], engine="paddle", device="cpu")
    with pytest.raises(UsageError, match="the batch has the columns label; expected bytes, image, path"):
        predictor({"label": np.arange(2)})
    assert predictor({"path": np.array([], object)}).num_rows == 0


def test_a_missing_pyarrow_is_named(files, monkeypatch):
    predictor = fcvit.load(files["classification"], engine="paddle", device="cpu")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"fcvit\[ray\]"):
        predictor({"path": []})


@pytest.mark.parametrize(
    ("mode", "cpus", "threads"), [(1, {"CPU": 3.0}, 3), (1, {"CPU": 0.5}, 1), (1, {}, 1), (0, {}, None)]
)
def test_a_worker_of_ray_uses_the_cpus_that_are_assigned_to_it(mode, cpus, threads, monkeypatch, files):
    context = types.SimpleNamespace(worker=types.SimpleNamespace(mode=mode), get_assigned_resources=lambda: cpus)
    ray = types.SimpleNamespace(WORKER_MODE=1, is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    given = []
    monkeypatch.setattr(module, "create_engine", lambda *_, threads: given.append(threads))
    fcvit.load(files["classification"])
    fcvit.load(files["classification"], threads=2)
    assert given == [threads, 2]
