"""Tests of exported files in the place of weights: the same numbers, and one line for files that are not exports."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import DIGITS, needs_paddle, needs_torch, write_detector, write_squares, write_synthetic
from fcvit.cli import main
from fcvit.data.classes import ClassName
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.inference.check import sample_images
from fcvit.inference.detector import parts
from fcvit.inference.engines import create_engine
from fcvit.inference.export import ENDINGS, KEY, part_path, write_export
from fcvit.inference.exported import read_network
from fcvit.inference.interface import Interface
from fcvit.inference.quantize import quantize
from fcvit.models.spec import HEADS, ModelSpec, SemanticFPNOptions
from fcvit.weights.reading import read_weights

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = needs_paddle

NAMES = tuple(ClassName(f"n{i}", f"dïgit {i}") for i in range(10))
OPTIONS = {"classification": {"top_k": 10}, "segmentation": {}, "detection": {"score_threshold": 0.0}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    fpn = ModelSpec(DIGITS.variant, 5, "semantic_fpn", SemanticFPNOptions(16, 8, 128, 64, 32))
    write_synthetic(folder / "classification.safetensors", DIGITS, NAMES)
    write_synthetic(folder / "segmentation.safetensors", fpn)
    write_detector(folder / "detection.safetensors")
    return {task: read_weights(folder / f"{task}.safetensors") for task in OPTIONS}


@pytest.fixture(scope="module")
def photos():
    generator = np.random.default_rng(3)
    return [generator.integers(0, 256, (50 + 7 * index, 54, 3), np.uint8) for index in range(3)]


def written(weights, path, **changes):
    """Write an export as `fcvit export` does, without the check, which other tests cover."""
    target = next(name for name, endings in ENDINGS.items() if endings[-1] == path.suffix)
    size = None if HEADS[weights.spec.head].any_size else (32, 32)
    for part in parts(weights.spec):
        given = {"size": size, "uint8": False, "probabilities": False, **changes}
        interface = Interface(**given, preprocessing=weights.preprocessing, part=part)
        write_export(weights, interface, target, part_path(path, part))
    return path


@pytest.fixture(scope="module")
def classifier(weights, tmp_path_factory):
    return written(weights["classification"], tmp_path_factory.mktemp("exported") / "net.onnx")


@pytest.fixture
def exported(classifier, tmp_path):
    shutil.copy(classifier, tmp_path)
    return tmp_path / "net.onnx"


CASES = [
    ("classification", ".onnx"),
    *(
        pytest.param(task, ending, marks=pytest.mark.slow if ending == ".onnx" else pytest.mark.ci)
        for task, ending in [
            ("classification", ".xml"),
            ("classification", ".json"),
            ("segmentation", ".onnx"),
            ("segmentation", ".xml"),
            ("detection", ".onnx"),
            ("detection", ".xml"),
        ]
    ),
]


@pytest.mark.parametrize(("task", "ending"), CASES)
def test_an_export_predicts_what_its_weights_predict(task, ending, weights, photos, tmp_path):
    if ending == ".xml":
        pytest.importorskip("openvino")
    path = written(weights[task], tmp_path / f"net{ending}")
    of_file = fcvit.load(path)
    of_weights = fcvit.load(weights[task], engine="paddle", device="cpu")
    assert type(of_file) is type(of_weights) and of_file.weights.spec == weights[task].spec
    assert (of_file.classes, of_file.preprocessing) == (of_weights.classes, of_weights.preprocessing)
    pairs = zip(*(each.predict(photos, **OPTIONS[task]) for each in (of_file, of_weights)), strict=True)
    for rows, expected in ((of_file.rows(one), of_weights.rows(other)) for one, other in pairs):
        assert len(rows) == len(expected) > 0
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, abs=1e-4) and row["name"] == other["name"]


def test_an_export_can_normalize_and_return_probabilities(weights, photos, tmp_path):
    path = written(weights["classification"], tmp_path / "net.onnx", uint8=True, probabilities=True, size=(40, 40))
    of_file = fcvit.load(path)
    assert of_file.preprocessing.input_size == 40, "the size of the images is that of the export"
    given = dataclasses.replace(weights["classification"].preprocessing, input_size=40)
    of_weights = fcvit.load(weights["classification"], engine="paddle", device="cpu", preprocessing=given)
    for ranked, expected in zip(of_file.predict(photos, 10), of_weights.predict(photos, 10), strict=True):
        assert [one.index for one in ranked] == [one.index for one in expected]
        np.testing.assert_allclose(
            [one.probability for one in ranked], [one.probability for one in expected], atol=1e-6
        )
    with pytest.raises(UsageError, match="takes uint8 images"):
        of_file.engine(np.zeros((1, 3, 40, 40), np.float32))
    with pytest.raises(UsageError, match="normalizes with its own mean and std"):
        fcvit.load(path, preprocessing=dataclasses.replace(given, mean=(0.0, 0.0, 0.0)))


@pytest.mark.slow
def test_an_int8_export_runs_in_int8(weights, tmp_path):
    path = written(weights["classification"], tmp_path / "net.onnx")
    images = sample_images(DIGITS, (32, 32))
    quantize(path, images[:4], Interface((32, 32), False, False, DIGITS.variant.preprocessing))
    engine = fcvit.load(path).engine
    assert engine.precision == "int8" and fcvit.inspect(path)["precision"] == "int8"
    difference = engine(images) - create_engine("paddle", weights["classification"], engine.preprocessing, "cpu")(
        images
    )
    assert 1e-4 < np.abs(difference).max() < 1


def test_an_export_takes_images_of_its_size_only(weights, exported, tmp_path):
    engine = fcvit.load(exported).engine
    with pytest.raises(UsageError, match=r"net\.onnx: the export takes images of 32 x 32, but they have 40 x 32"):
        engine(np.zeros((1, 3, 40, 32), np.uint8))
    dynamic = fcvit.load(written(weights["classification"], tmp_path / "any.onnx", size=None)).engine
    assert dynamic(np.zeros((2, 3, 40, 33), np.uint8)).shape == (2, 10)
    assert dynamic(np.zeros((0, 3, 40, 33), np.uint8)).shape == (0, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "paddle"}, r"--engine paddle: .*net\.onnx is run by onnxruntime; omit --engine"),
        ({"device": "gpu"}, r"--device gpu: .*net\.onnx runs only on the CPU"),
        ({"ema": True}, r"net\.onnx: an export contains one set of weights"),
    ],
)
def test_options_that_an_export_does_not_have_are_refused(options, message, exported):
    with pytest.raises(UsageError, match=message):
        fcvit.load(exported, **options)
    for precision in ("int8", "bfloat16"):
        with pytest.raises(UsageError, match=f"--precision {precision}"):
            create_engine("auto", read_network(exported), DIGITS.variant.preprocessing, precision=precision)


def change(path, edit):
    model = onnx.load(path)
    edit(model)
    path.write_bytes(model.SerializeToString())


def describe(path, edit):
    """Edit the description in an ONNX file."""

    def apply(model):
        about = json.loads(model.metadata_props[0].value)
        edit(about)
        model.metadata_props[0].value = json.dumps(about)

    change(path, apply)


def external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def external_constant(model):
    node = onnx.helper.make_node("Constant", [], ["more"], value=onnx.numpy_helper.from_array(np.zeros(1), "x"))
    node.attribute[0].t.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(node)


def nested(model):
    graph = onnx.helper.make_graph([], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=graph, else_branch=graph))


def renamed_input(model):
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]


def other_operator(model):
    model.graph.node[0].op_type = "Spoiled"


def other_shape(model):
    """Ten outputs for a description with nine classes."""
    about = json.loads(model.metadata_props[0].value)
    about |= {"num_classes": 9, "classes": about["classes"][:9]}
    model.metadata_props[0].value = json.dumps(about)


DAMAGE = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "not an ONNX file, or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "was not written by fcvit export"),
    "text": (lambda path: path.write_bytes(b"hello"), "not an ONNX file, or damaged"),
    "foreign": (lambda path: change(path, lambda m: m.ClearField("metadata_props")), "was not written by fcvit export"),
    "no JSON": (lambda path: change(path, lambda m: setattr(m.metadata_props[0], "value", "{")), "description"),
    "a list": (lambda path: change(path, lambda m: setattr(m.metadata_props[0], "value", "[]")), "description"),
    "old": (lambda path: describe(path, lambda a: a.update(format_version=1)), "older version of fcvit"),
    "new": (lambda path: describe(path, lambda a: a.update(format_version=9)), "update fcvit"),
    "no input": (lambda path: describe(path, lambda a: a.pop("input")), "the description of the export is damaged"),
    "odd size": (lambda path: describe(path, lambda a: a["input"].update(size=[1, "x"])), "description .* is damaged"),
    "large": (lambda path: describe(path, lambda a: a["input"].update(size=[99999, 9])), "description .* is damaged"),
    "other part": (lambda path: describe(path, lambda a: a.update(part="trunk")), "description .* is damaged"),
    "too few": (lambda path: describe(path, lambda a: a.pop("preprocessing")), "header is damaged"),
    "outputs": (
        lambda path: describe(path, lambda a: a.update(outputs=["probabilities"])),
        "inputs and outputs differ",
    ),
    "input name": (lambda path: change(path, renamed_input), "inputs and outputs differ"),
    "external": (lambda path: change(path, external), "data in other files"),
    "external constant": (lambda path: change(path, external_constant), "data in other files"),
    "nested": (lambda path: change(path, nested), "nested graphs"),
    "operator": (lambda path: change(path, other_operator), "onnxruntime cannot run it"),
    "shape": (lambda path: change(path, other_shape), "the shapes of the outputs differ"),
    "missing": (lambda path: path.unlink(), "cannot be opened: No such file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_foreign_onnx_file_gives_one_line(case, exported):
    damage, message = DAMAGE[case]
    damage(exported)
    with pytest.raises(UnreadableFile, match=rf"net\.onnx: .*{message}") as caught:
        fcvit.load(exported)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".xml", pytest.param(".json", marks=pytest.mark.ci)])
def test_the_files_of_an_export_belong_together(ending, weights, tmp_path):
    if ending == ".xml":
        pytest.importorskip("openvino")
    path = written(weights["classification"], tmp_path / f"net{ending}")
    binary = path.with_suffix(".bin" if ending == ".xml" else ".pdiparams")
    content = binary.read_bytes()
    binary.write_bytes(content[:-4] + b"\0\0\1\0")
    with pytest.raises(UnreadableFile, match=rf"net\{ending}\.fcvit\.json describes other files; copy all files"):
        read_network(path)
    binary.unlink()
    with pytest.raises(UnreadableFile, match=rf"{binary.name}: cannot be opened: No such file"):
        read_network(path)
    binary.write_bytes(content)
    read_network(path)
    path.with_name(f"{path.name}.fcvit.json").unlink()
    with pytest.raises(UnreadableFile, match=rf"net\{ending}\.fcvit\.json: cannot be opened: .*; copy it too"):
        read_network(path)


@pytest.mark.slow
def test_the_graphs_of_a_detector_belong_together(weights, tmp_path):
    path = written(weights["detection"], tmp_path / "det.onnx")
    with pytest.raises(UsageError, match=r"det\.boxes\.onnx: this is one part of a detector"):
        read_network(tmp_path / "det.boxes.onnx")
    hashes = {read_network(path).source.sha256}
    shutil.copy(tmp_path / "det.boxes.onnx", tmp_path / "det.masks.onnx")
    with pytest.raises(DoesNotFit, match=r"det\.masks\.onnx and det\.onnx are from different exports"):
        read_network(path)
    written(weights["detection"], path)
    describe(tmp_path / "det.masks.onnx", lambda about: about.update(source_sha256="1" * 64))
    with pytest.raises(DoesNotFit, match=r"det\.masks\.onnx and det\.onnx are from different exports"):
        read_network(path)
    written(weights["detection"], path)
    change(tmp_path / "det.masks.onnx", lambda model: setattr(model, "doc_string", "changed"))
    assert read_network(path).source.sha256 not in hashes, "the hash covers all files"


@needs_torch
@pytest.mark.parametrize(
    "line",
    [
        "convert net.onnx -o x.safetensors",
        "verify net.onnx --against net.onnx",
        "train digits --weights net.onnx --data images",
        "export net.onnx -o other.onnx",
    ],
)
def test_commands_that_need_tensors_refuse_an_export(line, exported, monkeypatch, capsys):
    monkeypatch.chdir(exported.parent)
    write_squares(exported.parent / "images", {"a": 1})
    assert main(line.split()) == UnreadableFile.exit_code
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 1 and "pass the checkpoint it was exported from" in message[0]


def test_functions_that_need_tensors_refuse_an_export(exported, tmp_path):
    weights = fcvit.load(exported).weights
    for needs in (lambda: fcvit.export(weights, tmp_path / "x.onnx"), lambda: fcvit.load(exported).model):
        with pytest.raises(DoesNotFit, match=r"net\.onnx: an export does not contain the network's named weights"):
            needs()


@pytest.mark.parametrize(
    ("name", "message"), [("net.json", "an exported Paddle network"), ("net.pdiparams", "its .json file")]
)
def test_a_file_of_a_paddle_export_is_recognized(name, message, tmp_path):
    (tmp_path / "net.json").write_text('{"base_code": {}, "program": {}}')
    (tmp_path / "net.pdiparams").write_bytes(b"\0" * 20)
    with pytest.raises(UnreadableFile, match=message):
        read_weights(tmp_path / name)


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capsys, no_charts):
    monkeypatch.chdir(tmp_path)
    write_squares(tmp_path / "images", {f"n{index}": 1 for index in range(3)})
    written(weights["classification"], tmp_path / "net.onnx")

    def call(line):
        code = main(line.split())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.slow
def test_weights_and_their_export_are_evaluated_in_one_run(run, weights, tmp_path):
    shutil.copy(weights["classification"].source.path, tmp_path / "own.safetensors")
    line = "eval --weights own.safetensors --weights net.onnx --data images --engine paddle,onnxruntime --workers 0"
    code, _, err = run(f"{line} --device cpu -o both --save-logits -q")
    assert code == 0, err
    logits = [np.load(path) for path in sorted(tmp_path.glob("both/*/logits.npy"))]
    assert len(logits) == 3
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4)
    code, _, err = run("eval --weights net.onnx --data images --workers 0 -o alone -q")
    assert code == 0 and '"engines": "onnxruntime"' in (tmp_path / "alone" / "run.json").read_text()
    results = tmp_path / "alone" / "net-authors"
    before = (results / "metrics.json").read_bytes()
    shutil.rmtree(results)
    assert run("eval --resume alone -q")[0] == 0 and (results / "metrics.json").read_bytes() == before
    code, _, err = run("eval --weights net.onnx --data images --workers 0 --engine paddle -o other")
    assert code == 2 and "net.onnx is run by onnxruntime" in err


@pytest.mark.slow
def test_an_export_is_predicted_with_and_inspected_on_the_command_line(run, weights, tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "x.png")
    code, out, err = run("predict x.png --weights net.onnx --csv")
    assert code == 0 and out.startswith("path,place,index,id,name,probability") and "dïgit" in out, err
    code, out, _ = run("inspect net.onnx --json")
    about = json.loads(out)
    assert code == 0 and about["runtime"] == "onnxruntime" and about["images"] == "float32, normalized, 32 x 32"
    assert about["source_sha256"] == weights["classification"].source.sha256 and about["classes"][3][0] == "n3"
    assert KEY == "fcvit"
