"""The benchmark: what its figures mean, who is left out, and that nothing is asserted about time."""

import csv
import dataclasses
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
from fcvit.cli import main
from fcvit.commands import bench as task
from fcvit.commands.bench import Contender, _Loaded, _Turn, as_csv, as_json_ready, bench, percentile, rows_of_chart
from fcvit.errors import DoesNotFit, MissingExtra, UsageError
from fcvit.models.spec import ModelSpec, multiply_accumulates
from fcvit.models.variants import VARIANTS, published
from fcvit.weights.synthetic import synthetic_tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_accumulates_are_those_counted_in_the_authors_code(name):
    counted = multiply_accumulates(ModelSpec(VARIANTS[name], 1000), 224, 224)
    assert round(counted / 1e9, 3) == published(VARIANTS[name]).gmac


def test_multiply_accumulates_follow_the_size():
    spec = ModelSpec(VARIANTS["fcvit_tiny"], 1000)
    per_image = sum(multiply_accumulates(spec, side, side) for side in (32, 64))
    assert multiply_accumulates(spec, 64, 64) > 3.5 * multiply_accumulates(spec, 32, 32) and per_image > 0
    assert multiply_accumulates(spec, 33, 32) == multiply_accumulates(spec, 36, 32) > multiply_accumulates(spec, 32, 32)


def test_a_percentile_needs_samples_to_say_anything():
    samples = [index / 1000 for index in range(1, 101)]
    assert [percentile(samples, rank) for rank in (50, 90, 99)] == [pytest.approx(v) for v in (50.5, 90, 99)]
    assert [percentile(samples[:99], rank) is None for rank in (50, 90, 99)] == [False, False, True]
    assert [percentile(samples[:9], rank) is None for rank in (50, 90, 99)] == [False, True, True]
    assert percentile([0.2], 50) == 200


class Pipe:
    """A contender that answers as told, without a process; turn 0 is loading."""

    def __init__(self, job, log, fails_in=None, dies_before=None, logits=0.0, shape=(2, 10), notes=()):
        self.job, self.log, self.turns, self.notes = job, log, -1, notes
        self.fails_in, self.dies_before = fails_in, dies_before
        self.logits = np.full(shape, logits)
        log.append(("started", job))

    def send(self, _):
        if self.turns + 1 == self.dies_before:
            raise BrokenPipeError
        self.log.append(self.job)

    def recv(self):
        self.turns += 1
        if self.turns == self.fails_in:
            return UsageError("it broke")
        if not self.turns:
            return _Loaded(0.5, 1 << 20, self.notes, self.logits)
        times = {"torch-channels-last": 0.4}
        seconds = times.get(self.job.engine, 0.1) if isinstance(self.job, Contender) else 0.1
        return _Turn([seconds, seconds * (1 + self.turns / 100)], (1 + self.turns) << 20)

    def close(self):
        self.log.append(("stopped", self.job))


@pytest.fixture
def fake(monkeypatch):
    """Contenders without processes: `fake.log` has who started, whose turn it was and who was stopped, in order."""

    class Setting:
        def __init__(self):
            self.log, self.options = [], {}

        @property
        def turns(self):
            jobs = [job for job in self.log if not isinstance(job, tuple)]
            return [job if isinstance(job, int) else job.engine for job in jobs]

        def of(self, what):
            return sorted(str(job[1]) for job in self.log if isinstance(job, tuple) and job[0] == what)

    setting = Setting()

    class Process:
        exitcode = -9

        def terminate(self):
            pass

        def join(self, timeout=None):
            pass

        def kill(self):
            pass

    def start(job, _weights, _pixels):
        options = setting.options.get(job if isinstance(job, int) else job.engine, {})
        if callable(options):
            options = options()
        return Process(), Pipe(job, setting.log, **options)

    monkeypatch.setattr(task, "_start", start)
    monkeypatch.setattr(task, "_PAUSE", 0)
    return setting


def run(**options):
    engines = ("torch-channels-last", "onnxruntime", "openvino")
    return bench(**{"variant": "fcvit_digits", "engines": engines, "batch_sizes": [2], "threads": [1], **options})


def test_everybody_has_a_turn_in_each_round(fake):
    run(rounds=3)
    assert fake.turns == [1, "torch-channels-last", "onnxruntime", "openvino"] * 3
    assert fake.of("stopped") == fake.of("started") and len(fake.of("started")) == 4


def test_only_those_that_are_compared_live_at_the_same_time(fake):
    run(rounds=2, engines=["onnxruntime", "openvino"], batch_sizes=[1, 2])
    assert fake.turns == [1, "onnxruntime", "openvino"] * 4
    places = [place for place, job in enumerate(fake.log) if isinstance(job, tuple)]
    assert [fake.log[place][0] for place in places] == ["started"] * 3 + ["stopped"] * 3 + ["started"] * 3 + [
        "stopped"
    ] * 3


def test_what_is_asked_for_twice_is_measured_once(fake):
    found = run(engines=["onnxruntime", "onnxruntime"], batch_sizes=[2, 2], precisions=["float32"] * 2, threads=[1, 1])
    assert len(found.speeds) == 1 and fake.of("stopped") == fake.of("started")


def test_figures_of_a_contender(fake):
    reference, fast, _ = run(rounds=2).speeds
    assert (reference.of_reference, fast.of_reference) == (1, pytest.approx(4))
    assert fast.images_per_second == pytest.approx(2 / 0.1005) and fast.calls == 4
    assert fast.rounds == (pytest.approx(100.5), pytest.approx(101))
    assert (fast.memory, fast.memory_before) == (3 << 20, 1 << 20)
    assert fast.gflops == pytest.approx(
        2 * multiply_accumulates(ModelSpec(DIGITS.variant, 1000), 32, 32) * 2 / 0.1005 / 1e9
    )
    assert fast.of_peak == pytest.approx(fast.gflops * 1e9 / (2 * task._SIDE**3 / 0.1))
    assert fast.difference == 0 and not fast.wrong and fast.export_seconds is None


def test_ratios_are_those_of_neighbors(fake, monkeypatch):
    """The machine gets ten times slower in the second of three rounds, and with it everybody."""
    kept = Pipe.recv

    def recv(pipe):
        answer = kept(pipe)
        slow = 10 if pipe.turns == 2 else 1
        return answer if isinstance(answer, _Loaded) else _Turn([s * slow for s in answer.samples], answer.memory)

    monkeypatch.setattr(Pipe, "recv", recv)
    assert run(rounds=3).speeds[1].of_reference == pytest.approx(4)


def test_an_export_is_made_by_another_process_than_is_measured(fake, notes):
    first = iter([("exporting",), ()])
    fake.options = {"onnxruntime": lambda: {"notes": next(first)}}
    told = notes
    speeds = run().speeds
    assert [speed.export_seconds for speed in speeds] == [None, 0.5, None]
    assert fake.of("started").count("onnxruntime, batch 2, 1 thread(s)") == 2 and "exporting" in told
    assert fake.of("stopped") == fake.of("started")


def test_one_that_breaks_is_named_and_the_others_go_on(fake):
    fake.options = {"onnxruntime": {"fails_in": 2}, "openvino": {"fails_in": 0}}
    found = run(rounds=3)
    assert [speed.contender.engine for speed in found.speeds] == ["torch-channels-last"]
    assert sorted(found.skipped) == [
        ("onnxruntime, batch 2, 1 thread(s)", "it broke"),
        ("openvino, batch 2, 1 thread(s)", "it broke"),
    ]
    assert fake.turns == [1, "torch-channels-last", "onnxruntime"] * 2 + [1, "torch-channels-last"]


def test_one_that_dies_while_it_waits_is_named_too(fake):
    fake.options = {"onnxruntime": {"dies_before": 2}}
    found = run(rounds=3)
    assert [speed.contender.engine for speed in found.speeds] == ["torch-channels-last", "openvino"]
    assert found.skipped == (("onnxruntime, batch 2, 1 thread(s)", "its process ended by SIGKILL; out of memory?"),)


def test_without_a_peak_there_is_no_share_of_it(fake):
    fake.options = {1: {"fails_in": 1}}
    found = run()
    assert found.peak == {} and [speed.of_peak for speed in found.speeds] == [None] * 3
    assert found.skipped == (("matrix product, 1 thread(s)", "it broke"),)


def test_with_nothing_left_there_is_nothing_to_report(fake, tmp_path):
    fake.options = {1: {"fails_in": 0}, "onnxruntime": {"fails_in": 0}}
    with pytest.raises(UsageError, match=r"no engine could be measured; onnxruntime, batch 2.*it broke"):
        run(engines=["onnxruntime"], folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_wrong_numbers_are_seen(fake):
    fake.options = {"onnxruntime": {"logits": 0.02}, "openvino": {"logits": np.nan}}
    found = run()
    assert [speed.wrong for speed in found.speeds] == [False, True, True]
    assert [row["wrong"] for row in as_json_ready(found)["speeds"]] == [False, True, True]
    assert [row["wrong"] for row in csv.DictReader(io.StringIO(as_csv(found)))] == ["0", "1", "1"]
    fake.options = {"onnxruntime": {"logits": 0.002}}
    assert not any(speed.wrong for speed in run().speeds)
    fake.options = {"onnxruntime": {"shape": (1, 10)}}
    assert [speed.wrong for speed in run().speeds] == [False, True, False]


@pytest.mark.parametrize(("off", "code"), [(0.002, 0), (0.02, 5), (np.nan, 5)])
def test_wrong_numbers_are_printed_and_end_with_their_code(fake, capsys, tmp_path, off, code):
    fake.options = {"onnxruntime": {"logits": off}}
    line = ["bench", "--variant", "fcvit_digits", "--engine", "torch-channels-last,onnxruntime", "--batch-size", "2"]
    assert main([*line, "--threads", "1", "--csv", str(tmp_path / "x.csv")]) == code
    assert (" WRONG" in capsys.readouterr().out) == bool(code) and (tmp_path / "x.csv").is_file()
    assert main([*line, "--threads", "1", "--json"]) == code
    assert [row["wrong"] for row in json.loads(capsys.readouterr().out)["speeds"]] == [False, bool(code)]


def test_wrong_numbers_are_for_float32_to_have(fake):
    fake.options = {"openvino": {"logits": 0.02}}
    rows = run(precisions=["bfloat16", "float32"], engines=["torch-channels-last", "openvino"]).speeds
    assert [(row.contender.precision, row.wrong) for row in rows if row.contender.engine == "openvino"] == [
        ("bfloat16", False),
        ("float32", True),
    ]


def test_another_reference(fake, notes):
    found = run(reference="openvino")
    assert found.reference == "openvino" and found.speeds[0].of_reference == pytest.approx(0.25)
    fake.options, told = {"openvino": {"fails_in": 0}}, notes
    assert run(reference="openvino").reference == "torch-channels-last"
    assert told[-1] == "openvino could not be measured: ratios are to torch-channels-last"
    assert run(engines=["onnxruntime"]).reference == "onnxruntime"


def test_a_precision_is_measured_where_there_is_one(fake):
    found = run(precisions=["float32", "bfloat16"])
    kinds = [(s.contender.engine, s.contender.precision) for s in found.speeds]
    assert kinds == [
        ("torch-channels-last", "float32"),
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
        ("torch-channels-last", "bfloat16"),
        ("openvino", "bfloat16"),
    ]
    assert found.skipped == (("onnxruntime bfloat16, batch 2, 1 thread(s)", "onnxruntime has no bfloat16 on a CPU"),)


def test_tables_for_programs(fake, tmp_path):
    found = run(rounds=1, folder=tmp_path / "run")
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["engine"] for row in rows] == ["torch-channels-last", "onnxruntime", "openvino"]
    assert rows[1]["p50_ms"] == "100.5" and rows[1]["p99_ms"] == "" and rows[1]["batch_size"] == "2"
    assert set(rows[0]) == {
        *("engine", "precision", "batch_size", "threads", "calls", "p25_ms", "p50_ms", "p75_ms", "p90_ms", "p99_ms"),
        *("images_per_second", "gflops", "of_reference", "of_peak", "load_seconds", "export_seconds", "memory"),
        *("memory_before", "difference", "wrong"),
    }
    kept = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert kept["speeds"][1]["contender"]["engine"] == "onnxruntime" and json.dumps(as_json_ready(found), default=str)
    assert kept["speeds"][1]["rounds"] == [pytest.approx(100.5)] and kept["versions"]["numpy"] == np.__version__
    assert (tmp_path / "run" / "bench.csv").read_text() == as_csv(found)


def test_a_folder_that_is_taken_is_refused_before_anything_is_measured(fake, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UsageError, match="not empty"):
        run(folder=tmp_path)
    assert main(["bench", "--variant", "fcvit_digits", "--csv", str(tmp_path / "none" / "x.csv")]) == 2
    assert fake.log == []


@pytest.mark.charts
def test_the_picture_has_the_fastest_first(fake, tmp_path):
    ((name, bars),) = rows_of_chart(run(rounds=2))
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
        {"reference": "paddle"},
        {"precisions": ["int8"]},
        {"precisions": ["bfloat16"], "engines": ["native", "onnxruntime"]},
        {"weights": "x.safetensors"},
    ],
)
def test_requests_that_cannot_be(options, fake):
    with pytest.raises(UsageError):
        run(**options)
    assert fake.log == []


def test_a_backbone_has_no_logits(fake):
    spec = ModelSpec(DIGITS.variant, head="backbone")
    weights = dataclasses.replace(task.synthetic_weights(DIGITS.variant), spec=spec, tensors=synthetic_tensors(spec))
    with pytest.raises(DoesNotFit, match="logits of a classifier"):
        bench(weights)


@needs_torch
@pytest.mark.slow
def test_processes_of_their_own(digits_pth, monkeypatch):
    """For real."""
    monkeypatch.setattr(task, "_SECONDS", 0)
    found = bench(digits_pth, engines=["torch", "torch-channels-last"], batch_sizes=[2], threads=[1], rounds=1)
    assert [speed.contender.engine for speed in found.speeds] == ["torch", "torch-channels-last"]
    assert found.speeds[0].calls >= 3 and found.peak[1] > 0 and found.speeds[0].memory > 50 << 20
    assert found.speeds[0].difference < 1e-4 and found.skipped == ()


@pytest.mark.slow
@pytest.mark.parametrize("error", ["SystemError('a library\\nand its story')", "os.kill(os.getpid(), 9)"])
def test_a_crash_of_a_contender_is_one_line(tmp_path, error):
    """For real: one raises what nobody expected or dies in its second turn, the others go on, and none is left."""
    script = tmp_path / "crash.py"
    script.write_text(f"""
import multiprocessing, os
from fcvit.commands import bench as task

class Engine:
    def __init__(self, name):
        self.name, self.calls = name, 0
    def __call__(self, images):
        self.calls += 1
        if self.name == "native" and self.calls == 6:
            error = {error}
            raise error
        return images[:, 0, 0, :10].astype("float32")

task._engine = lambda job, weights, pixels: Engine(job.engine)
task._SECONDS = task._PAUSE = 0

if __name__ == "__main__":
    engines = ["native", "paddle"]
    found = task.bench(variant="fcvit_digits", engines=engines, batch_sizes=[1], threads=[1], rounds=3)
    print([speed.contender.engine for speed in found.speeds], found.skipped, multiprocessing.active_children())
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    reason = "SystemError: a library" if "System" in error else "its process ended by SIGKILL; out of memory?"
    assert done.stdout.strip() == f"['paddle'] (('native, batch 1, 1 thread(s)', '{reason}'),) []"
    assert [line for line in done.stderr.splitlines() if not line.startswith("measuring: ")] == []


@needs_paddle
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("many", [2, 4])  # processes; one is Python's own
def test_ctrl_c_ends_everybody(tmp_path, many):
    """As in a terminal, all of the processes get the signal: one speaks. It comes in the very moment of a start."""
    line = [sys.executable, "-m", "fcvit", "bench", "--variant", "fcvit_digits", "--rounds", "1000"]
    line += ["--engine", "paddle-inference,native", "--batch-size", "1", "-o", str(tmp_path / "run")]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            deadline = time.monotonic() + 60
            while len(started := children.read_text().split()) < many and time.monotonic() < deadline:
                time.sleep(0.001)
            os.killpg(process.pid, signal.SIGINT)
            error = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert len(started) >= many and process.returncode == 130
    assert error.splitlines()[-1] == "fcvit: interrupted" and "Traceback" not in error
    deadline = time.monotonic() + 10  # Python's own goes a moment after the others
    while left := [child for child in started if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnxruntime"])
def test_a_package_that_is_missing_is_named(tmp_path, package):
    """For real, in processes that cannot import it: beside another engine, and alone."""
    pytest.importorskip("openvino")
    blocked = tmp_path / f"{package}.py"
    blocked.write_text(f"raise ImportError('hidden by the test', name={package!r})")
    setting = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    line = [sys.executable, "-m", "fcvit", "bench", "--variant", "fcvit_digits", "--rounds", "1", "--batch-size", "1"]
    one = subprocess.run([*line, "--engine", package], capture_output=True, text=True, timeout=60, env=setting)
    assert one.returncode == MissingExtra.exit_code and "pip install 'fcvit[onnx]'" in one.stderr
    both = [*line, "--engine", f"{package},openvino", "--json"]
    two = subprocess.run(both, capture_output=True, text=True, timeout=60, env=setting)
    found = json.loads(two.stdout)
    assert two.returncode == 0 and [row["contender"]["engine"] for row in found["speeds"]] == ["openvino"]
    assert "pip install" in found["skipped"][0][1]
