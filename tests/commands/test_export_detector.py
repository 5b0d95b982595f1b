"""Test the export of detectors: a graph for each part, all or none, with a description that is sufficient to run it."""

import dataclasses
import json

import numpy as np
import pytest

from conftest import needs_torch
from detection_goldens import MINI, synthetic_weights
from fcvit.commands import export as task
from fcvit.commands.export import export
from fcvit.data.classes import ClassName
from fcvit.errors import NumbersDisagree, UsageError
from fcvit.inference.detector import BOX_HEAD, MASK_HEAD, TRUNK, detect_with_parts
from fcvit.inference.engines import create_engine
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.models.variants import Preprocessing

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = needs_torch

OPTIONS = MaskRCNNOptions(neck=8, rpn=8, box_channels=16, mask_channels=8)
NAMES = ("det.boxes.onnx", "det.masks.onnx", "det.onnx")


def detector(**changes):
    spec = ModelSpec(MINI, 3, "mask_rcnn", dataclasses.replace(OPTIONS, **changes))
    classes = tuple(ClassName(f"{i}", name) for i, name in enumerate(("cat", "dog", "bird")))
    return dataclasses.replace(synthetic_weights(spec), classes=classes)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def network(path):
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    return lambda x: session.run(None, {given.name: x})


@pytest.mark.slow
def test_the_files_of_a_detector_are_sufficient_to_run_it(tmp_path):
    exported = export(detector(), tmp_path / "det.onnx")
    assert names(tmp_path) == sorted(NAMES) and [file.rpartition("/")[2] for file in exported.files] == list(NAMES)
    assert exported.input["shape"] == [None, 3, None, None] and exported.outputs[:2] == ("maps.0", "maps.1")
    assert [check.part for check in exported.checks] == [BOX_HEAD, MASK_HEAD, TRUNK, TRUNK]
    assert all(check.passed for check in exported.checks) and exported.bytes > 1000
    (table,) = exported.tables()
    assert any("box_head: 4 RoIs of 7 x 7, run by onnxruntime" in cell for cell in table.columns[1].cells)
    about = json.loads({p.key: p.value for p in onnx.load(exported.files[-1]).metadata_props}["fcvit"])
    assert about["task"] == "detection" and about["part"] == TRUNK and about["classes"][1] == ["1", "dog"]
    options = MaskRCNNOptions(**about["head_options"])
    assert options == OPTIONS and about["preprocessing"]["mean"] == list(Preprocessing().mean)
    networks = dict(zip((BOX_HEAD, MASK_HEAD, TRUNK), map(network, exported.files), strict=True))
    images = np.random.default_rng(0).standard_normal((1, 3, 64, 96)).astype(np.float32)
    (found,) = detect_with_parts(networks, options, images, np.array([(64, 96)]))
    (expected,) = create_engine("torch", detector(), Preprocessing()).detect(images, [(64, 96)])
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)


@pytest.mark.slow
def test_a_detector_without_masks_has_two_files(tmp_path):
    export(detector(masks=False), tmp_path / "det.onnx")
    assert names(tmp_path) == ["det.boxes.onnx", "det.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("part", [BOX_HEAD, MASK_HEAD, TRUNK])
def test_a_wrong_part_leaves_no_file_and_all_previous_ones(part, tmp_path, monkeypatch):
    write = task.write_export

    def faulty(weights, interface, target, path):
        write(weights, interface, target, path)
        if interface.part == part:
            model = onnx.load(path)
            tensor = next(t for t in model.graph.initializer if len(t.dims) > 1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, tensor.name))
            onnx.save(model, path)

    monkeypatch.setattr(task, "write_export", faulty)
    (tmp_path / "det.boxes.onnx").write_bytes(b"the previous file")
    with pytest.raises(NumbersDisagree, match=r"det.*\.onnx: the outputs do not match"):
        export(detector(), tmp_path / "det.onnx", overwrite=True)
    assert names(tmp_path) == ["det.boxes.onnx"]
    assert (tmp_path / "det.boxes.onnx").read_bytes() == b"the previous file"


def test_existing_heads_are_replaced_only_with_overwrite(tmp_path):
    (tmp_path / "det.masks.onnx").touch()
    with pytest.raises(UsageError, match=r"det\.masks\.onnx already exists.*--overwrite"):
        export(detector(), tmp_path / "det.onnx")
    assert names(tmp_path) == ["det.masks.onnx"]


@pytest.mark.slow
def test_a_detector_for_openvino(tmp_path):
    pytest.importorskip("openvino")
    export(detector(), tmp_path / "det.xml", size=(64, 96))
    stems = ("det", "det.boxes", "det.masks")
    assert names(tmp_path) == sorted(f"{stem}{end}" for stem in stems for end in (".xml", ".bin", ".xml.fcvit.json"))
    about = json.loads((tmp_path / "det.masks.xml.fcvit.json").read_text("utf-8"))
    assert about["part"] == MASK_HEAD and about["input"]["size"] == [14, 14] and about["outputs"] == ["logits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uint8": True}, "--uint8 is not available for detectors: the padding .* must be 0 after the normalization"),
        ({"probabilities": True}, "--probabilities is not available for detectors"),
        ({"precision": "int8", "calibration": "."}, "--precision int8 is not available for detectors"),
        ({"output": "det.json"}, "--format paddle does not support detectors; use --format onnx or openvino"),
    ],
)
def test_options_that_a_detector_does_not_have(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        export(detector(), **{"output": "det.onnx", **options})
    assert names(tmp_path) == []


@pytest.mark.slow
def test_a_segmentation_network_accepts_any_size_by_default(tmp_path):
    given = synthetic_weights(ModelSpec(MINI, 3, "semantic_fpn"))
    assert export(given, tmp_path / "seg.onnx").input["shape"] == [None, 3, None, None]
