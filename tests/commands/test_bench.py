"""Test the figures of the benchmark, skipped engines and wrong outputs. No test asserts a measured time."""

import csv
import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import DIGITS, PUBLISHED, needs_paddle, needs_torch
from detection_goldens import MINI, synthetic_weights
from fcvit.cli import main
from fcvit.commands import bench as task
from fcvit.commands.bench import bench
from fcvit.errors import MissingExtra, UsageError
from fcvit.inference.interleave import Timing, interleave
from fcvit.models.spec import MaskRCNNOptions, ModelSpec, multiply_accumulates
from fcvit.models.variants import VARIANTS, published
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_accumulates_match_the_authors_code(name):
    counted = multiply_accumulates(ModelSpec(VARIANTS[name], 1000), 224, 224)
    assert round(counted / 1e9, 3) == published(VARIANTS[name]).gmac


def test_multiply_accumulates_depend_on_the_image_size():
    spec = ModelSpec(VARIANTS["fcvit_tiny"], 1000)
    per_image = sum(multiply_accumulates(spec, side, side) for side in (32, 64))
    assert multiply_accumulates(spec, 64, 64) > 3.5 * multiply_accumulates(spec, 32, 32) and per_image > 0
    assert multiply_accumulates(spec, 33, 32) == multiply_accumulates(spec, 36, 32) > multiply_accumulates(spec, 32, 32)


@pytest.fixture
def fake(monkeypatch):
    """Replace measurements by fixed times. `groups` records what is measured together, `options` sets the results."""

    class Setting:
        def __init__(self):
            self.groups, self.options, self.load = [], {}, None

    setting = Setting()

    def interleave(load, jobs, rounds, calls, advance):
        setting.groups.append([job.engine for job in jobs if job.engine != task.PEAK])
        results = {}
        for job in jobs:
            options = {"logits": 0.0, "shape": (2, 10), "slow": [1] * rounds, **setting.options.get(job.engine, {})}
            if "error" in options:
                results[job] = options["error"]
                continue
            if job.engine == task.PEAK:  # in GFLOP/s
                results[job] = Timing([], [[20.0 / slow, 20.2 / slow] for slow in options["slow"]])
                continue
            seconds = 0.4 if job.engine == "torch-channels-last" else 0.1
            turns = [
                [s * slow, s * slow * (1 + turn / 100)]
                for turn, (s, slow) in enumerate(zip([seconds] * rounds, options["slow"], strict=True), 1)
            ]
            results[job] = Timing([np.full(options["shape"], options["logits"])], turns)
        return results

    monkeypatch.setattr(task, "interleave", interleave)
    monkeypatch.setattr(task.native, "library", lambda: None)
    return setting


def run(**options):
    engines = ("torch-channels-last", "onnxruntime", "openvino")
    return bench(**{"variant": "fcvit_digits", "engines": engines, "batch_sizes": [2], "threads": [1], **options})


def test_only_compared_engines_are_loaded_together(fake):
    run(rounds=2, engines=["onnxruntime", "openvino"], batch_sizes=[1, 2], threads=[1, 2])
    assert fake.groups == [["onnxruntime", "openvino"]] * 4


def test_repeated_options_are_measured_once(fake):
    result = run(engines=["onnxruntime", "onnxruntime"], batch_sizes=[2, 2], precisions=["float32"] * 2, threads=[1, 1])
    assert len(result.speeds) == 1 and fake.groups == [["onnxruntime"]]


def test_figures_of_an_engine(fake):
    reference, fast, _ = run(rounds=2).speeds
    assert (reference.of_reference, fast.of_reference) == (1, pytest.approx(4))
    assert fast.images_per_second == pytest.approx(2 / 0.1005) and fast.calls == 4
    assert fast.rounds_ms == (pytest.approx(100.5), pytest.approx(101))
    assert fast.median_ms == pytest.approx(100.5)
    assert fast.gflops == pytest.approx(
        2 * multiply_accumulates(ModelSpec(DIGITS.variant, 1000), 32, 32) * 2 / 0.1005 / 1e9
    )
    assert fast.difference == 0 and not fast.wrong


def test_ratios_compare_measurements_of_the_same_round(fake):
    """All engines are ten times slower in the second of three rounds. The ratios do not change."""
    fake.options = {name: {"slow": [1, 10, 1]} for name in ("torch-channels-last", "onnxruntime", "openvino")}
    assert run(rounds=3).speeds[1].of_reference == pytest.approx(4)


def test_the_share_of_the_peak_compares_measurements_of_the_same_round(fake):
    """The machine is ten times slower in the second of three rounds, for the engine and the loop. The share stays."""
    fake.options = {"onnxruntime": {"slow": [1, 10, 1]}, task.PEAK: {"slow": [1, 10, 1]}}
    steady, varying = run(rounds=3, engines=["openvino", "onnxruntime"]).speeds
    assert steady.peak == varying.peak == pytest.approx(20.1) and steady.gflops > 0
    assert varying.of_peak == pytest.approx(steady.gflops / 20.1, rel=0.02)


def test_only_float32_has_a_share_of_the_peak(fake):
    result = run(precisions=["float32", "bfloat16"], engines=["torch", "openvino"])
    assert [speed.peak is None for speed in result.speeds] == [False, False, True, True]
    assert [speed.of_peak is None for speed in result.speeds] == [False, False, True, True]
    assert not result.skipped
    assert all(speed.of_peak is None for speed in run(precisions=["bfloat16"], engines=["openvino"]).speeds)


def test_without_a_compiler_the_share_of_the_peak_is_missing(fake, capsys):
    fake.options = {task.PEAK: {"error": MissingExtra("no C++ compiler")}}
    result = run(threads=[1, 2])
    assert len(result.speeds) == 6 and all(speed.of_peak is None for speed in result.speeds)
    assert result.skipped == ((task.PEAK, "no C++ compiler"),)
    assert all(row["of_peak"] == "" for row in csv.DictReader(io.StringIO(result.to_csv())))


def test_the_profile_of_the_native_engine(fake, monkeypatch, capsys):
    class Network:
        def __init__(self, weights, preprocessing, threads, part):
            assert (weights.spec.num_classes, threads, part) == (1000, 1, "")

        def profile(self, images, rounds):
            assert (images.dtype, images.shape, rounds) == (np.uint8, (1, 3, 32, 32), 1)
            return [("1x1 convolutions", 0.003, 0.12e9), ("norms", 0.001, 0.0)]

    monkeypatch.setattr(task, "NativeNetwork", Network)
    monkeypatch.setattr(task, "fma_peak", lambda threads: lambda: 80.0 * threads)
    line = ["bench", "--variant", "fcvit_digits", "--engine", "onnxruntime", "--batch-size", "1", "--threads", "2"]
    assert main([*line, "--profile"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1x1", "convolutions", "3.00", "75%", "40.0", "50%"] in table
    assert ["norms", "1.00", "25%", "-", "-"] in table and ["total", "4.00"] in table
    assert main([*line, "--profile", "--json"]) == 0
    first = {"kind": "1x1 convolutions", "ms": 3.0, "gflops": 40.0, "of_peak": 0.5}
    assert json.loads(capsys.readouterr().out)["profile"][0] == pytest.approx(first)
    monkeypatch.setattr(task, "unsupported", lambda spec: "it has 3 heads")
    assert run(profile=True).skipped == (("profile", "it has 3 heads"),)


@pytest.mark.slow
def test_the_loop_for_the_peak_counts_its_operations():
    """The rate is between that of one FMA of 4 floats and two of 16 floats per cycle, at 0.2 to 10 GHz."""
    try:
        measure = task.fma_peak(2)
    except MissingExtra as error:
        pytest.skip(str(error))
    assert 1 < measure() < 2 * 2 * 2 * 16 * 10


def test_a_failing_engine_is_skipped_and_listed(fake):
    fake.options = {name: {"error": UsageError("it broke")} for name in ("onnxruntime", "openvino")}
    result = run(rounds=3)
    assert [speed.contender.engine for speed in result.speeds] == ["torch-channels-last"]
    failed = ("onnxruntime", "openvino")
    assert result.skipped == tuple((f"{name}, batch 2, 1 thread(s)", "it broke") for name in failed)


def test_an_error_is_raised_if_no_engine_can_be_measured(fake, tmp_path):
    fake.options = {"onnxruntime": {"error": UsageError("it broke")}}
    with pytest.raises(UsageError, match=r"onnxruntime, batch 2.*it broke"):
        run(engines=["onnxruntime"], folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_wrong_outputs_are_marked(fake):
    fake.options = {"onnxruntime": {"logits": 0.02}, "openvino": {"logits": np.nan}}
    result = run()
    assert [speed.wrong for speed in result.speeds] == [False, True, True]
    assert [row["wrong"] for row in result.to_json()["speeds"]] == [False, True, True]
    assert [row["wrong"] for row in csv.DictReader(io.StringIO(result.to_csv()))] == ["0", "1", "1"]
    fake.options = {"onnxruntime": {"logits": 0.002}}
    assert not any(speed.wrong for speed in run().speeds)
    fake.options = {"onnxruntime": {"shape": (1, 10)}}
    assert [speed.wrong for speed in run().speeds] == [False, True, False]


@pytest.mark.parametrize(("off", "code"), [(0.002, 0), (0.02, 5), (np.nan, 5)])
def test_wrong_outputs_are_printed_and_set_the_exit_code(fake, capsys, tmp_path, off, code):
    fake.options = {"onnxruntime": {"logits": off}}
    line = ["bench", "--variant", "fcvit_digits", "--engine", "torch-channels-last,onnxruntime", "--batch-size", "2"]
    assert main([*line, "--threads", "1", "--csv", str(tmp_path / "x.csv")]) == code
    assert (" WRONG" in capsys.readouterr().out) == bool(code) and (tmp_path / "x.csv").is_file()
    assert main([*line, "--threads", "1", "--json"]) == code
    assert [row["wrong"] for row in json.loads(capsys.readouterr().out)["speeds"]] == [False, bool(code)]


def test_only_float32_outputs_can_be_wrong(fake):
    fake.options = {"openvino": {"logits": 0.02}}
    rows = run(precisions=["bfloat16", "float32"], engines=["torch-channels-last", "openvino"]).speeds
    assert [(row.contender.precision, row.wrong) for row in rows if row.contender.engine == "openvino"] == [
        ("bfloat16", False),
        ("float32", True),
    ]


def test_the_reference_can_be_chosen(fake, notes):
    result = run(reference="openvino")
    assert result.reference == "openvino" and result.speeds[0].of_reference == pytest.approx(0.25)
    fake.options = {"openvino": {"error": UsageError("it broke")}}
    assert run(reference="openvino").reference == "torch-channels-last"
    assert "openvino" in notes[-1] and "torch-channels-last" in notes[-1]
    assert run(engines=["onnxruntime"]).reference == "onnxruntime"


def test_engines_without_a_precision_are_skipped(fake):
    result = run(precisions=["float32", "bfloat16"])
    kinds = [(s.contender.engine, s.contender.precision) for s in result.speeds]
    assert kinds == [
        ("torch-channels-last", "float32"),
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
        ("torch-channels-last", "bfloat16"),
        ("openvino", "bfloat16"),
    ]
    assert result.skipped == (("onnxruntime bfloat16, batch 2, 1 thread(s)", "onnxruntime has no bfloat16 on a CPU"),)


def test_csv_and_json_files(fake, tmp_path):
    result = run(rounds=1, folder=tmp_path / "run")
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [row["engine"] for row in rows] == ["torch-channels-last", "onnxruntime", "openvino"]
    assert rows[1]["median_ms"] == "100.5" and rows[1]["batch_size"] == "2"
    assert set(rows[0]) == {
        *("engine", "precision", "batch_size", "threads", "part", "calls", "median_ms"),
        *("images_per_second", "gflops", "peak", "of_peak", "of_reference", "difference", "wrong"),
    }
    stored = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert stored["speeds"][1]["contender"]["engine"] == "onnxruntime" and json.dumps(result.to_json(), default=str)
    assert stored["speeds"][1]["rounds_ms"] == [pytest.approx(100.5)] and stored["versions"]["numpy"] == np.__version__
    assert (tmp_path / "run" / "bench.csv").read_text() == result.to_csv()


def test_a_folder_that_is_not_empty_is_rejected_before_any_measurement(fake, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UsageError, match="not empty"):
        run(folder=tmp_path)
    assert main(["bench", "--variant", "fcvit_digits", "--csv", str(tmp_path / "none" / "x.csv")]) == 2
    assert fake.groups == []


@pytest.mark.charts
def test_the_chart_shows_the_fastest_engine_first(fake, tmp_path):
    ((name, bars),) = run(rounds=2).bars()
    assert name == "batch 2, 1 thread"
    assert [bar.label for bar in bars] == ["onnxruntime", "openvino", "torch-channels-last"]
    assert [bar.reference for bar in bars] == [False, False, True]
    assert all(bar.low <= bar.rate <= bar.high and bar.low < bar.high for bar in bars)
    run(folder=tmp_path / "run")
    assert (tmp_path / "run" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        {"engines": ["tensorflow"]},
        {"rounds": 0},
        {"batch_sizes": [0]},
        {"batch_sizes": []},
        {"threads": [0]},
        {"size": 0},
        {"size": "800x"},
        {"reference": "paddle"},
        {"precisions": ["int8"]},
        {"precisions": ["bfloat16"], "engines": ["native", "onnxruntime"]},
        {"weights": "x.safetensors"},
    ],
)
def test_invalid_options_are_rejected(options, fake):
    with pytest.raises(UsageError):
        run(**options)
    assert fake.groups == []


@needs_torch
@pytest.mark.slow
def test_real_engines_with_several_outputs_are_measured(digits_pth, monkeypatch):
    """Measure real engines with a dense backbone, which has four outputs to compare."""
    monkeypatch.setattr(task, "interleave", functools.partial(interleave, seconds=0, pause=0))
    spec = ModelSpec(DIGITS.variant, head="backbone")
    weights = dataclasses.replace(read_weights(digits_pth), spec=spec, tensors=synthetic_tensors(spec))
    result = bench(weights, engines=["torch", "torch-channels-last"], batch_sizes=[2], threads=[1], rounds=1)
    assert [speed.contender.engine for speed in result.speeds] == ["torch", "torch-channels-last"]
    assert result.speeds[0].calls >= 3 and result.speeds[0].difference < 1e-4 and result.skipped == ()


@pytest.mark.slow
def test_a_detector_and_its_trunk_are_measured_at_the_largest_size(fake):
    result = run(task="detection", variant="fcvit_tiny", batch_sizes=None)
    kinds = [(s.contender.part, s.contender.engine, s.contender.batch_size) for s in result.speeds]
    engines = ("torch-channels-last", "onnxruntime", "openvino")
    assert kinds == [(part, engine, 1) for part in ("", "trunk") for engine in engines]
    assert result.size == (800, 1333) and [len(group) for group in fake.groups] == [3, 3]
    spec = ModelSpec(VARIANTS["fcvit_tiny"], 80, "mask_rcnn")
    assert result.gmac * 1e9 == multiply_accumulates(spec, 800, 1344)
    whole, trunk = result.speeds[1], result.speeds[4]
    assert trunk.gflops / whole.gflops == pytest.approx(
        multiply_accumulates(spec, 800, 1344, trunk=True) / 1e9 / result.gmac
    )
    assert [name for name, _ in result.bars()] == ["batch 1, 1 thread", "trunk, batch 1, 1 thread"]


@needs_torch
@pytest.mark.slow
def test_real_engines_detect_the_same_objects(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(task, "interleave", functools.partial(interleave, seconds=0, pause=0))
    given = synthetic_weights(ModelSpec(MINI, 3, "mask_rcnn", MaskRCNNOptions(8, 8, 16, 8)))
    result = bench(given, engines=["torch", "onnxruntime"], threads=[1], rounds=1, size="60x90", reference="torch")
    assert [(s.contender.engine, s.contender.part) for s in result.speeds] == [
        *(("torch", ""), ("onnxruntime", "")),
        *(("torch", "trunk"), ("onnxruntime", "trunk")),
    ]
    assert not any(speed.wrong for speed in result.speeds) and result.size == (60, 90)
    compiled = task.Contender("torch-compile", "float32", 1, 1)
    with pytest.raises(UsageError, match="torch-compile cannot compile the selection of boxes"):
        task._load(compiled, given, DIGITS.variant.preprocessing, (60, 90))


@needs_paddle
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.ci)])  # including Python's resource tracker
def test_ctrl_c_ends_all_processes(tmp_path, count):
    """All processes get the signal, as in a terminal, while one of them starts. Only the main process prints."""
    line = [sys.executable, "-m", "fcvit", "bench", "--variant", "fcvit_digits", "--rounds", "1000"]
    line += ["--engine", "paddle-inference,native", "--batch-size", "1", "-o", str(tmp_path / "run")]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            deadline = time.monotonic() + 60
            while len(started := children.read_text().split()) < count and time.monotonic() < deadline:
                time.sleep(0.001)
            os.killpg(process.pid, signal.SIGINT)
            error = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert len(started) >= count and process.returncode == 130
    assert error.splitlines()[-1] == "fcvit: interrupted" and "Traceback" not in error
    deadline = time.monotonic() + 10  # Python's resource tracker ends shortly after the others
    while left := [child for child in started if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnxruntime"])
def test_the_message_names_a_missing_package(tmp_path, package):
    """The processes cannot import the package. It is requested alone, and together with another engine."""
    pytest.importorskip("openvino")
    blocked = tmp_path / f"{package}.py"
    blocked.write_text(f"raise ImportError('hidden by the test', name={package!r})")
    setting = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    line = [sys.executable, "-m", "fcvit", "bench", "--variant", "fcvit_digits", "--rounds", "1", "--batch-size", "1"]
    one = subprocess.run([*line, "--engine", package], capture_output=True, text=True, timeout=60, env=setting)
    assert one.returncode == MissingExtra.exit_code and "pip install 'fcvit[onnx]'" in one.stderr
    both = [*line, "--engine", f"{package},openvino", "--json"]
    two = subprocess.run(both, capture_output=True, text=True, timeout=60, env=setting)
    result = json.loads(two.stdout)
    assert two.returncode == 0 and [row["contender"]["engine"] for row in result["speeds"]] == ["openvino"]
    assert "pip install" in result["skipped"][0][1]
