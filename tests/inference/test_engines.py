"""Tests of the engines: equal outputs, the choice of the fastest engine, and error messages."""

import dataclasses
import functools
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from conftest import DIGITS, needs_paddle, needs_torch
from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import MissingExtra, NumbersDisagree, UsageError
from fcvit.frameworks import import_framework, installed
from fcvit.inference import cache, engines
from fcvit.inference.check import reference
from fcvit.inference.detector import run_part
from fcvit.inference.engines import ENGINES, create_engine
from fcvit.inference.runtimes import RUNTIMES, pieces
from fcvit.models.spec import ModelSpec
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors

PIXELS = DIGITS.variant.preprocessing
NEEDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "paddle-inference": "paddle", "torch": "torch"}


def engine_or_skip(name, *arguments, **options):
    if not installed(NEEDS.get(name, "paddle")):
        pytest.skip(f"{name} is not installed")
    try:
        return create_engine(name, *arguments, **options)
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture
def weights(digits_pth):
    return read_weights(digits_pth)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.ci) if name == "paddle-inference" else name for name in ENGINES]
)
def test_all_engines_agree_for_different_batches_and_sizes(name, weights, images):
    engine, reference = engine_or_skip(name, weights, PIXELS, threads=2), create_engine("torch", weights, PIXELS)
    assert (engine.name, engine.device, engine.precision) == (name, "cpu", "float32")
    wide = np.random.default_rng(1).integers(0, 256, (2, 3, 33, 48), np.uint8)
    for batch in (images, images[:1], images[:0], wide, normalize(images, PIXELS)):
        logits, expected = engine(batch), reference(batch)
        assert logits.dtype == np.float32 and logits.shape == (len(batch), 10)
        assert np.allclose(logits, expected, atol=1e-4) and (not len(batch) or np.ptp(logits) > 0.1)


def printed_by_openvino(code, folder):
    """Run code in a new process with the path of a small network as its argument, and return its output."""
    openvino = pytest.importorskip("openvino")
    images = openvino.opset13.parameter([-1, 1], np.float32)
    openvino.save_model(openvino.Model([openvino.opset13.relu(images)], [images]), folder / "network.xml")
    command = [sys.executable, "-c", code, str(folder / "network.xml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


_TWO_THREADS = """
import builtins, sys, time
from pathlib import Path

import numpy as np

from fcvit.inference.runtimes import openvino

runtime = openvino(Path(sys.argv[1]), threads=2)
imported = builtins.__import__

def slow_import(name, *arguments, **options):
    time.sleep(0.2 if name.startswith("numpy") else 0)  # let the other thread run in between
    return imported(name, *arguments, **options)

builtins.__import__ = slow_import
print(len(runtime(np.zeros((4, 1), np.float32))[0]))
"""


@pytest.mark.slow
def test_openvino_does_not_deadlock_when_two_threads_run_the_first_batch(tmp_path):
    assert printed_by_openvino(_TWO_THREADS, tmp_path) == "4\n"


_TWO_CORES = """
import gc, openvino, pathlib, signal, sys
from fcvit.inference.runtimes import openvino as openvino_network
first = openvino_network(pathlib.Path(sys.argv[1]), 1)
second = openvino_network(pathlib.Path(sys.argv[1]), 1)
for runtime in ("first", "second"):
    del globals()[runtime]
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_ctrl_c_works_after_openvino_is_freed(tmp_path):
    """An `openvino.Core` sets an alternate signal stack and frees it, after which Ctrl-C would crash the process."""
    assert printed_by_openvino(_TWO_CORES, tmp_path) == "interrupted\n"


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_arrays_that_are_not_image_batches_are_rejected(name, weights):
    engine = engine_or_skip(name, weights, PIXELS)
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32)):
        with pytest.raises(UsageError, match=re.escape(str(shape))):
            engine(np.zeros(shape, np.uint8))
    with pytest.raises(UsageError, match=r"float64.*uint8.*float32"):
        engine(np.zeros((1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tensorflow"}, "--engine 'tensorflow'"),
        ({"precision": "float8"}, "--precision 'float8'"),
        ({"threads": 0}, "--threads 0"),
        ({"name": "onnxruntime", "device": "gpu"}, "--device gpu: onnxruntime .*--engine paddle"),
        ({"name": "onnxruntime", "precision": "int8"}, "int8.*calibration"),
    ],
)
def test_invalid_options_are_rejected(options, message, weights):
    with pytest.raises(UsageError, match=message):
        create_engine(**{"name": "torch", **options}, weights=weights, preprocessing=PIXELS)


def test_onnxruntime_has_no_half_precision(weights):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UsageError, match=r"--precision bfloat16: .*float32 and int8"):
        create_engine("onnxruntime", weights, PIXELS, precision="bfloat16")


@pytest.mark.slow
def test_bfloat16_if_the_processor_supports_it(weights, images):
    pytest.importorskip("openvino")
    try:
        half = create_engine("auto", weights, PIXELS, precision="bfloat16")
    except (UsageError, MissingExtra) as error:
        pytest.skip(str(error))
    difference = np.abs(half(images) - create_engine("openvino", weights, PIXELS)(images)).max()
    assert half.precision == "bfloat16" and 1e-5 < difference < 0.2


@pytest.mark.slow
def test_int8_outputs_are_close_to_float32(weights, images):
    pytest.importorskip("onnxruntime")
    exact = create_engine("onnxruntime", weights, PIXELS)(images)
    quantized = create_engine("onnxruntime", weights, PIXELS, precision="int8", calibration=images)(images)
    assert 1e-4 < np.abs(quantized - exact).max() < np.ptp(exact) / 4
    with pytest.raises(UsageError, match=r"calibration images .*\(16, 16\).*\(32, 32\)"):
        create_engine("onnxruntime", weights, PIXELS, precision="int8", calibration=images[:, :, :16, :16])


@pytest.fixture
def automatic(monkeypatch):
    """Replace the engines. `results` has the error or name of each, and `created` lists those that were loaded."""
    created = []
    results = {name: MissingExtra(f"{name} is missing") for name in ENGINES} | {"native": "native"}

    class Fake:
        def __init__(self, name, *_rest):
            created.append(name)
            if isinstance(results[name], Exception):
                raise results[name]
            self.name = name

    for name in results:
        monkeypatch.setitem(ENGINES, name, functools.partial(Fake, name))
    monkeypatch.setattr(engines, "unsupported", lambda spec: None)
    monkeypatch.setattr(engines.build, "is_built", lambda: True)
    return types.SimpleNamespace(results=results, created=created)


def test_auto_takes_the_first_engine_that_is_installed_and_correct(weights, automatic, notes):
    assert create_engine("auto", weights, PIXELS).name == "native" and notes == ["engine: native"]
    notes.clear()
    automatic.created.clear()
    automatic.results |= {
        "native": NumbersDisagree("wrong"),
        "openvino": NumbersDisagree("different"),
        "torch": "torch",
    }
    assert create_engine("auto", weights, PIXELS).name == "torch"
    assert automatic.created == ["native", "onnxruntime", "openvino", "torch"]
    assert notes == [
        "skipping engine native: wrong",
        "skipping engine openvino: different",
        "engine: torch; for a faster engine: pip install 'fcvit[onnx]'",
    ]


def test_auto_never_compiles_the_native_engine(weights, automatic, monkeypatch, notes):
    monkeypatch.setattr(engines.build, "is_built", lambda: False)
    monkeypatch.setattr(engines.build, "library", lambda *_: pytest.fail("it was compiled"))
    automatic.results["openvino"] = "openvino"
    assert create_engine("auto", weights, PIXELS).name == "openvino"
    assert automatic.created == ["onnxruntime", "openvino"]
    assert notes == ["engine: openvino; for a faster engine: fcvit doctor --build"]


def test_auto_skips_the_native_engine_for_other_networks_precisions_and_devices(weights, automatic, monkeypatch, notes):
    automatic.results |= {"native": MissingExtra("3 heads"), "onnxruntime": "onnxruntime", "openvino": "openvino"}
    monkeypatch.setattr(engines, "unsupported", lambda spec: "3 heads")
    monkeypatch.setattr(engines.build, "is_built", lambda: False)
    assert create_engine("auto", weights, PIXELS).name == "onnxruntime"
    assert create_engine("auto", weights, PIXELS, precision="bfloat16").name == "openvino"
    automatic.results["paddle"] = "paddle"
    assert create_engine("auto", weights, PIXELS, "gpu").name == "paddle"
    assert automatic.created == ["native", "onnxruntime", "openvino", "paddle"]
    assert notes == ["engine: onnxruntime", "engine: openvino", "engine: paddle"]


def test_auto_without_an_engine_names_the_install_command(weights, monkeypatch):
    def missing(*_rest):
        raise MissingExtra("paddle is not installed; install it with: pip install paddlepaddle")

    for name in ENGINES:
        monkeypatch.setitem(ENGINES, name, missing)
    with pytest.raises(MissingExtra, match=r"no engine .* pip install paddlepaddle"):
        create_engine("auto", weights, PIXELS)


class FakeNetwork:
    """A network of the native engine, computed by PyTorch. `faults` changes its outputs, `calls` counts them."""

    faults, calls, loaded = staticmethod(lambda images, outputs: outputs), 0, []

    def __init__(self, weights, preprocessing, threads, part=""):
        from fcvit.reference.build import build_reference

        self.torch, self.preprocessing, self.part = import_framework("torch"), preprocessing, part
        self.model = build_reference(weights.spec, weights.tensors)
        FakeNetwork.loaded.append((part, threads))

    def __call__(self, images):
        FakeNetwork.calls += 1
        given = normalize(images, self.preprocessing) if images.dtype == np.uint8 else images
        with self.torch.inference_mode():
            outputs = run_part(self.model, self.part, self.torch.from_numpy(given))
        return FakeNetwork.faults(images, [output.numpy() for output in outputs])


REFERENCES = {}


def known_reference(weights, interface, images):
    """Compute the reference once for each input."""
    key = (interface, images.shape)
    if key not in REFERENCES:
        REFERENCES[key] = reference(weights, interface, images)
    return REFERENCES[key]


@pytest.fixture
def fake_network(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engines, "NativeNetwork", FakeNetwork)
    monkeypatch.setattr(engines, "unsupported", lambda spec: None)
    monkeypatch.setattr(engines.build, "key", lambda: "one library")
    monkeypatch.setattr(FakeNetwork, "faults", staticmethod(lambda images, outputs: outputs))
    monkeypatch.setattr(FakeNetwork, "calls", 0)
    monkeypatch.setattr(FakeNetwork, "loaded", [])
    return FakeNetwork


@needs_torch
@pytest.mark.slow
def test_the_native_engine_is_checked_once_for_its_weights_and_library(
    weights, images, fake_network, monkeypatch, notes
):
    engine = create_engine("native", weights, PIXELS, threads=3)
    assert (engine.name, engine.device, fake_network.loaded) == ("native", "cpu", [("", 3)])
    (note,) = notes
    assert "checking the native engine" in note and str(cache.cache_folder()) in note
    for batch in (images, normalize(images, PIXELS), images[:1]):
        assert np.allclose(engine(batch), create_engine("torch", weights, PIXELS)(batch), atol=1e-4)
    fake_network.calls = 0
    monkeypatch.setattr(engines, "own_threads", lambda: 7)  # the cores of this process, within the container's limit
    create_engine("native", weights, PIXELS)
    assert fake_network.loaded[-1] == ("", 7)
    create_engine("native", weights, dataclasses.replace(PIXELS, mean=(0, 0, 0)), check=False)
    assert fake_network.calls == 0 and len(notes) == 1
    monkeypatch.setattr(engines.build, "key", lambda: "another library")
    create_engine("native", weights, PIXELS)
    assert fake_network.calls > 0 and len(notes) == 2


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        lambda images, outputs: [outputs[0] * (1 + 1e-4)],
        lambda images, outputs: [np.where(images.shape[3] % 2, outputs[0][::-1], outputs[0])],  # odd sizes
        lambda images, outputs: [outputs[0][::-1] if images.dtype == np.float32 else outputs[0]],
        lambda images, outputs: [
            outputs[0][:, ::-1] if len(images) == 1 else outputs[0]
        ],  # threads that share an image
        lambda images, outputs: [np.full_like(outputs[0], np.nan)],
    ],
)
def test_a_wrong_native_engine_is_detected(weights, fake_network, fault, monkeypatch):
    monkeypatch.setattr("fcvit.inference.check.reference", known_reference)
    monkeypatch.setattr(fake_network, "faults", staticmethod(fault))
    with pytest.raises(NumbersDisagree, match=r"native engine: the outputs do not match"):
        create_engine("native", weights, PIXELS)
    assert not cache.cache_folder().exists()


def test_the_native_engine_rejects_what_it_does_not_support(weights, fake_network, monkeypatch):
    with pytest.raises(UsageError, match=r"--precision bfloat16: the native engine .* only in float32"):
        create_engine("native", weights, PIXELS, precision="bfloat16")
    with pytest.raises(UsageError, match=r"--device gpu: the native engine .*--engine paddle"):
        create_engine("native", weights, PIXELS, "gpu")
    monkeypatch.setattr(engines, "unsupported", lambda spec: "it has 3 heads")
    with pytest.raises(MissingExtra, match="it has 3 heads; use --engine onnxruntime"):
        create_engine("native", weights, PIXELS)
    monkeypatch.setattr(engines, "unsupported", lambda spec: None)
    monkeypatch.setattr("fcvit.inference.check.installed", lambda name: False)
    with pytest.raises(MissingExtra, match="checked against PyTorch or Paddle; install one"):
        create_engine("native", weights, PIXELS)


_CHECKED_BEFORE = """
import sys
import numpy as np
import fcvit
from fcvit.inference.engines import create_engine
weights = fcvit.read_weights(sys.argv[1])
engine = create_engine("auto", weights, weights.spec.variant.preprocessing)
engine(np.zeros((2, 3, 40, 33), np.uint8))
print(engine.name, *sorted({"paddle", "torch", "onnxruntime"} & set(sys.modules)))
"""


@needs_torch
@pytest.mark.slow
def test_a_checked_native_engine_imports_no_framework(weights, digits_pth):
    engine_or_skip("native", weights, PIXELS)
    command = [sys.executable, "-c", _CHECKED_BEFORE, str(digits_pth)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "native\n"


@needs_paddle
def test_auto_on_a_gpu_is_paddle(weights, monkeypatch, notes):
    paddle = types.SimpleNamespace(name="paddle")
    monkeypatch.setitem(ENGINES, "paddle", lambda *given: notes.append(given[2]) or paddle)
    create_engine("auto", weights, PIXELS, "gpu:1")
    assert notes == ["gpu:1", "engine: paddle"]


def test_a_missing_runtime_names_its_install_command(weights, monkeypatch, tmp_path, notes):
    from fcvit.inference import runtimes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pytest.importorskip("onnx")

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(runtimes.importlib, "import_module", missing)
    for name, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        with pytest.raises(MissingExtra, match=rf"{name} is not available .*pip install 'fcvit\[{extra}\]'"):
            create_engine(name, weights, PIXELS)
    assert not notes and not (tmp_path / "fcvit").exists(), "a missing runtime must not start an export"


@pytest.mark.parametrize("package", ["onnx", "framework for the check"])
def test_missing_packages_are_reported_before_an_export_is_logged(package, weights, monkeypatch, tmp_path, notes):
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if package == "onnx":
        monkeypatch.setitem(sys.modules, "onnx", None)
        monkeypatch.delitem(sys.modules, "fcvit.inference.onnx_graph", raising=False)
    else:
        monkeypatch.setattr("fcvit.inference.check.installed", lambda name: False)
    with pytest.raises(MissingExtra, match="install"):
        create_engine("onnxruntime", weights, PIXELS)
    assert not notes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "onnxruntime",
        pytest.param("openvino", marks=pytest.mark.slow),
        pytest.param("paddle-inference", marks=pytest.mark.ci),
    ],
)
def test_a_loaded_export_does_not_need_its_file(name, weights, images, tmp_path, monkeypatch, notes):
    """Single images and batches still work after the temporary export is deleted."""
    expected = engine_or_skip(name, weights, PIXELS, threads=2)(images)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    notes.clear()
    engine = create_engine(name, weights, PIXELS, threads=2)
    assert np.array_equal(engine(images), expected) and engine(images[:1]).shape == (1, 10)
    (note,) = notes
    assert "temporary folder" in note and "cannot be written (Not a directory)" in note and "XDG_CACHE_HOME" in note


@pytest.mark.slow
def test_an_entry_that_is_deleted_before_loading_is_exported_again(weights, images, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = create_engine("onnxruntime", weights, PIXELS)(images)
    load = RUNTIMES["onnxruntime"]

    def deleted(path, *rest):
        shutil.rmtree(tmp_path / "fcvit", ignore_errors=True)
        return load(path, *rest)

    monkeypatch.setitem(RUNTIMES, "onnxruntime", deleted)
    assert np.array_equal(create_engine("onnxruntime", weights, PIXELS)(images), expected)


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:1", "CUDA", "gpu0", "GPU:2", "1", "nvidia", "mps", "tpu", "cpu:0", ""]
)
@pytest.mark.parametrize("name", ["auto", "onnxruntime", "torch"])
def test_wrong_device_names_are_rejected_with_a_hint(name, device, weights):
    hints = {
        "cuda": "use gpu",
        "CUDA": "use gpu",
        "nvidia": "use gpu",
        "cuda:1": "use gpu:1",
        "gpu0": "use gpu:0",
        "GPU:2": "use gpu:2",
        "1": "use gpu:1",
        "mps": "only NVIDIA GPUs",
        "tpu": "only NVIDIA GPUs",
    }
    with pytest.raises(UsageError, match=f"--device '{device}': expected auto, cpu, gpu or gpu:N") as error:
        create_engine(name, weights, PIXELS, device)
    assert hints.get(device, "") in str(error.value)


def test_the_thread_count_of_the_process_changes_only_on_request(weights, monkeypatch):
    """The thread count changes the order of sums, so an engine used for validation must not change it."""
    paddle = pytest.importorskip("paddle")
    thread_counts = []
    monkeypatch.setattr(paddle.base.core, "set_num_threads", thread_counts.append)
    create_engine("paddle", weights, PIXELS)
    assert thread_counts == []
    create_engine("paddle", weights, PIXELS, threads=1)
    assert thread_counts == [1]


@pytest.mark.parametrize(
    ("images", "threads", "largest", "sizes"),
    [(8, 2, 2, [2, 2, 2, 2]), (3, 2, 2, [2, 1]), (2, 4, 2, [1, 1]), (7, 2, 8, [4, 3]), (1, 2, 2, [1])],
)
def test_a_batch_is_split_into_pieces(images, threads, largest, sizes):
    parts = pieces(images, threads, largest)
    assert [part.stop - part.start for part in parts[:-1]] == sizes[:-1]
    assert np.concatenate([np.arange(images)[part] for part in parts]).tolist() == list(range(images))


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_has_packages_and_a_format(name):
    assert cache.PACKAGES[name] and cache.FORMATS[name] in cache.ENDINGS


def test_uint8_and_normalized_images_give_equal_outputs(weights, images):
    """The two inputs have separate exports, and the mean must not be subtracted twice."""
    engine = engine_or_skip("onnxruntime", weights, dataclasses.replace(PIXELS, mean=(0.1, 0.5, 0.9)))
    assert np.allclose(engine(images), engine(normalize(images, engine.preprocessing)), atol=1e-4)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("name", [pytest.param("paddle", marks=needs_paddle), "torch", "onnxruntime"])
@pytest.mark.parametrize("head", ["classifier", "backbone"])
def test_a_network_without_classes_returns_all_outputs(name, head, weights, images):
    """One output is an array and several outputs are a list, also for an empty batch."""
    spec = ModelSpec(DIGITS.variant, head=head)
    without_classes = dataclasses.replace(weights, spec=spec, tensors=synthetic_tensors(spec))
    engine = engine_or_skip(name, without_classes, PIXELS)
    for batch in (images, images[:0]):
        outputs = engine(batch)
        if head == "classifier":
            assert outputs.shape == (len(batch), 48)
            continue
        shapes = [(16, 8, 8), (24, 4, 4), (32, 2, 2), (48, 1, 1)]
        assert [output.shape for output in outputs] == [(len(batch), *shape) for shape in shapes]
        assert {output.dtype for output in outputs} == {np.dtype(np.float32)}
