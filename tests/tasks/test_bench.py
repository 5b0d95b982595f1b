"""The benchmark: what its figures mean, who is left out, and that nothing is asserted about time."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from conftest import DIGITS, PUBLISHED, needs_torch
from fcvit.errors import MissingExtra, UsageError
from fcvit.tasks import bench as task
from fcvit.tasks.bench import Contender, as_csv, as_json_ready, bench, percentile, rows_of_chart
from fcvit.variants import VARIANTS, published
from fcvit.weights.names import Form, multiply_accumulates


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_accumulates_are_those_counted_in_the_authors_code(name):
    counted = multiply_accumulates(Form(VARIANTS[name], 1000), 224, 224)
    assert round(counted / 1e9, 3) == published(VARIANTS[name]).gmac


def test_multiply_accumulates_follow_the_size():
    form = Form(VARIANTS["fcvit_tiny"], 1000)
    per_image = sum(multiply_accumulates(form, side, side) for side in (32, 64))
    assert multiply_accumulates(form, 64, 64) > 3.5 * multiply_accumulates(form, 32, 32) and per_image > 0
    assert multiply_accumulates(form, 33, 32) == multiply_accumulates(form, 36, 32) > multiply_accumulates(form, 32, 32)


def test_a_percentile_needs_samples_to_say_anything():
    samples = [index / 1000 for index in range(1, 101)]
    assert [percentile(samples, rank) for rank in (50, 90, 99)] == [pytest.approx(v) for v in (50.5, 90, 99)]
    assert [percentile(samples[:99], rank) is None for rank in (50, 90, 99)] == [False, False, True]
    assert [percentile(samples[:9], rank) is None for rank in (50, 90, 99)] == [False, True, True]
    assert percentile([0.2], 50) == 200


class Pipe:
    """A contender that answers as told, without a process."""

    def __init__(self, job, log, fails_in=None, logits=0.0):
        self.job, self.log, self.fails_in, self.turns = job, log, fails_in, -1
        self.logits = np.full((2, 10), logits)

    def send(self, _):
        self.log.append(self.job)

    def recv(self):
        self.turns += 1
        if self.turns == self.fails_in:
            return "it broke"
        if not self.turns:
            return ((0.5, 1 << 20), self.logits) if isinstance(self.job, Contender) else None
        if not isinstance(self.job, Contender):
            return [0.1, 0.2]
        return [0.4, 0.4] if self.job.engine == "torch-channels-last" else [0.1, 0.1]

    def close(self):
        self.log.append(("stopped", self.job))


@pytest.fixture
def fake(monkeypatch):
    """Contenders without processes: `fake.log` has whose turn it was, in order."""

    class Setting:
        log: list = []  # noqa: RUF012
        options: dict = {}  # noqa: RUF012

    setting = Setting()
    setting.log, setting.options = [], {}

    class Process:
        exitcode = 0

        def terminate(self):
            pass

        def join(self):
            pass

    def start(_context, job, _weights, _pixels):
        options = setting.options.get(getattr(job, "engine", None), {})
        return Process(), Pipe(job, setting.log, **options)

    monkeypatch.setattr(task, "_start", start)
    monkeypatch.setattr(task, "_PAUSE", 0)
    return setting


def run(**options):
    engines = ("torch-channels-last", "onnxruntime", "openvino")
    return bench(**{"variant": "fcvit_digits", "engines": engines, "batch_sizes": [2], "threads": [1], **options})


def test_everybody_has_a_turn_in_each_round(fake):
    found = run(rounds=3)
    turns = [job if isinstance(job, int) else job.engine for job in fake.log if not isinstance(job, tuple)]
    assert turns == [1, "torch-channels-last", "onnxruntime", "openvino"] * 3
    assert {job for what, job in (j for j in fake.log if isinstance(j, tuple))} == {
        1,
        *(s.contender for s in found.speeds),
    }


def test_figures_of_a_contender(fake):
    reference, fast, _ = run(rounds=2).speeds
    assert (reference.of_reference, fast.of_reference) == (1, pytest.approx(4))
    assert fast.images_per_second == pytest.approx(20) and fast.calls == 4 and fast.memory == 1 << 20
    peak = 2 * task._SIDE**3 / 0.1
    expected = 2 * multiply_accumulates(Form(DIGITS.variant, 1000), 32, 32) * 20 / peak
    assert fast.of_peak == pytest.approx(expected) and fast.difference == 0 and not fast.wrong


def test_one_that_breaks_is_named_and_the_others_go_on(fake):
    fake.options = {"onnxruntime": {"fails_in": 2}, "openvino": {"fails_in": 0}}
    found = run(rounds=3)
    assert [speed.contender.engine for speed in found.speeds] == ["torch-channels-last"]
    assert sorted(found.skipped) == [
        ("onnxruntime, batch 2, 1 thread(s)", "it broke"),
        ("openvino, batch 2, 1 thread(s)", "it broke"),
    ]


def test_with_nothing_left_there_is_nothing_to_report(fake):
    fake.options = {"onnxruntime": {"fails_in": 0}}
    with pytest.raises(MissingExtra, match=r"onnxruntime, batch 2.*it broke"):
        run(engines=["onnxruntime"])


def test_wrong_numbers_are_seen(fake):
    fake.options = {"onnxruntime": {"logits": 0.02}, "openvino": {"logits": np.nan}}
    assert [speed.wrong for speed in run().speeds] == [False, True, True]
    fake.options = {"onnxruntime": {"logits": 0.002}}
    assert not any(speed.wrong for speed in run().speeds)


def test_another_reference(fake):
    found = run(reference="openvino")
    assert found.reference == "openvino" and found.speeds[0].of_reference == pytest.approx(0.25)


def test_a_precision_is_measured_where_there_is_one(fake):
    found = run(precisions=["float32", "bfloat16"])
    kinds = [(s.contender.engine, s.contender.precision) for s in found.speeds]
    assert kinds == [
        ("torch-channels-last", "float32"),
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
        ("openvino", "bfloat16"),
    ]


def test_tables_for_programs(fake, tmp_path):
    found = run(rounds=1, folder=tmp_path / "run")
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["engine"] for row in rows] == ["torch-channels-last", "onnxruntime", "openvino"]
    assert rows[1]["images_per_second"] == "20.0" and rows[1]["p99_ms"] == "" and rows[1]["batch_size"] == "2"
    kept = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert kept["speeds"][1]["contender"]["engine"] == "onnxruntime" and json.dumps(as_json_ready(found), default=str)
    assert (tmp_path / "run" / "bench.csv").read_text() == as_csv(found)


@pytest.mark.charts
def test_the_picture_has_the_fastest_first(fake, tmp_path):
    groups = rows_of_chart(run())
    assert groups[0][0] == "batch 2, 1 thread"
    assert [rate for _, rate, _ in groups[0][1]] == sorted((rate for _, rate, _ in groups[0][1]), reverse=True)
    assert [is_reference for name, _, is_reference in groups[0][1] if name == "torch-channels-last"] == [True]
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
    ],
)
def test_requests_that_cannot_be(options, fake):
    with pytest.raises(UsageError):
        run(**options)


@needs_torch
@pytest.mark.slow
def test_processes_of_their_own(digits_pth, monkeypatch):
    """For real: one that is there, and one that is not installed under that name."""
    monkeypatch.setattr(task, "_SECONDS", 0)
    found = bench(digits_pth, engines=["torch", "torch-channels-last"], batch_sizes=[2], threads=[1], rounds=1)
    assert [speed.contender.engine for speed in found.speeds] == ["torch", "torch-channels-last"]
    assert found.speeds[0].calls >= 3 and found.peak[1] > 0 and found.speeds[0].memory > 50 << 20
    assert found.speeds[0].difference < 1e-4 and found.skipped == ()


@needs_torch
@pytest.mark.slow
def test_a_crash_of_a_contender_is_one_line(digits_pth, monkeypatch):
    weights = task._by_rule(DIGITS.variant, lambda _: None)
    with pytest.raises(MissingExtra, match=r"openvino bfloat16|its process ended|torch"):
        bench(dataclasses.replace(weights, tensors={}), engines=["torch"], batch_sizes=[1], threads=[1], rounds=1)
