"""Test the command line: output, error messages in one line, and documented exit codes."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

from conftest import DIGITS, needs_paddle, needs_torch, training_checkpoint, write_detector, write_pth
from fcvit import frameworks
from fcvit.analysis.similarity import MapChoice
from fcvit.cli import USAGE, app, main
from fcvit.errors import MissingExtra, counted
from fcvit.text import printable
from fcvit.weights.synthetic import synthetic_tensors


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """A function that runs a command in an empty folder and returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fcvit", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )


def test_help_lists_the_commands_and_loads_nothing_heavy():
    code = (
        "import sys; from fcvit.cli import main; main(['--help']);"
        "print([m for m in ('numpy', 'paddle', 'torch', 'PIL', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in USAGE:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", USAGE)
def test_every_option_has_a_help_text(name):
    command = app[name]
    assert command.help
    arguments = command.assemble_argument_collection(parse_docstring=True)
    assert not [argument.name for argument in arguments if not argument.parameter.help]


def test_models(run):
    code, out, _ = run("models")
    assert code == 0
    assert "51,477,032" in out and "49.1M" in out and "83.6" in out and "32 x 32" in out
    assert "https://drive.google.com/drive/folders/16joP1cQwbx4oICL-WbPC1SqGNoc4-NZm" in out
    listed = json.loads(run("models", "--json")[1])
    assert listed["fcvit_b12"]["published"]["top1"] == 80.9 and listed["fcvit_digits"]["published"] is None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["convrt"], 2, 'Did you mean "convert"'),
        (["evaluate"], 2, 'Did you mean "eval"'),
        (["check_data", "x"], 2, 'Did you mean "check-data"'),
        (["eval", "--weight", "w", "--data", "d"], 2, "Did you mean --weights?"),
        (["--weights", "x", "predict", "a b.jpg"], 2, "must come first: fcvit predict --weights x 'a b.jpg'"),
        (["doctor", "x"], 2, "doctor: unexpected argument: x (fcvit doctor --help"),
        (["export", "x.pth", "-o", "m.pb"], 2, "expected .onnx"),
        (["predict", "x" * 5000, "--weights", "x.pth"], 3, "x ... x"),
        (["convert", "x.pth"], 2, "--output"),
        (["convert", "x.pth", "-o", "y.pth", "--dtype", "int8"], 2, "int8"),
        (["convert", "x.pth", "-o", "y.pth", "--emma"], 2, "--ema"),
        (["convert", "x.pth", "-o", "y.safetensors"], 3, "No such file"),
        (["inspect", "."], 3, "directory"),
        (["predict", "--weights", "x.pth"], 2, "at least one image"),
        (["predict", "none.png", "--weights", "x.pth"], 3, "none.png: "),
        (["eval", "--weights", "x.pth", "--data", "nowhere"], 3, "x.pth"),
        (["bench", "--batch-size", "many"], 2, "many"),
    ],
)
def test_errors_are_printed_in_one_line_with_an_exit_code(run, words, code, message):
    returned, out, err = run(*words)
    assert (returned, out) == (code, "")
    assert len(err.splitlines()) == 1 and err.startswith("fcvit: ") and message in err


@pytest.mark.parametrize(
    ("given", "reason", "corrected"),
    [
        ("eval w data", "unexpected argument: w data", "eval --weights w --data data"),
        ("eval data w.pth --seed 3", "unexpected argument: ", "eval --weights w.pth --data data --seed 3"),
        ("eval w --data data", "unexpected argument: w", "eval --weights w --data data"),
        ("eval --weights w --data", "--data has no value", "eval --weights w --data FOLDER"),
        ("eval --weights w --engine", "--engine has no value", "eval --data FOLDER --weights w --engine VALUE"),
        ("train digits --lr", "--lr has no value", "train digits --lr VALUE"),
        ("predict", "--weights is missing", "predict IMAGE... --weights FILE"),
        ("predict a.jpg b.jpg", "--weights is missing", "predict a.jpg b.jpg --weights FILE"),
        ("predict w.safetensors data", "--weights is missing", "predict data --weights w.safetensors"),
        ("faithfulness data --weights", "--weights has no value", "faithfulness data --weights FILE"),
        ("convert", "SOURCE is missing", "convert SOURCE -o FILE"),
        ("compare a", "SECOND is missing", "compare a SECOND"),
        ("compare a b c", "unexpected argument: c", "compare a b"),
        ("demo w.pth", "unexpected argument: w.pth", "demo --weights w.pth"),
    ],
)
def test_the_message_shows_the_corrected_command_line(run, tmp_path, given, reason, corrected):
    (tmp_path / "data").mkdir()
    (tmp_path / "w").touch()
    code, out, err = run(*given.split())
    assert (code, out) == (2, "") and err.startswith(f"fcvit: {given.split()[0]}: ") and err.count("\n") == 1
    assert reason in err and f": fcvit {corrected} (fcvit {given.split()[0]} --help" in err


def test_the_usage_line_has_enough_words_for_the_required_arguments():
    import inspect

    for name, usage in USAGE.items():
        function = app[name].default_command
        required = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        assert len(required) <= len(usage.replace("IMAGE...", "").split()), name


def test_all_problems_of_a_weights_file_are_listed(run, tmp_path, digits_tensors):
    broken = {name: tensor for name, tensor in digits_tensors.items() if not name.startswith("head.")}
    broken["surprise"] = np.ones(1, np.float32)
    path = write_pth(tmp_path / "x.pth", broken)
    code, out, err = run("convert", path, "-o", "y.safetensors", "--variant", "fcvit_tiny")
    assert code == 4 and not out
    first, *rest = err.splitlines()
    assert "fcvit_tiny" in first
    assert "remedy" in err and "surprise" not in first and len(rest) > 5


def test_convert_inspect_and_convert_back(run, digits_pth, tmp_path):
    code, out, err = run("convert", digits_pth, "-o", "out/x.safetensors", "--no-verify")
    assert code == 0 and not err
    assert "212, float32, paddle layout" in out and "NOT compared" in out
    code, out, _ = run("inspect", "out/x.safetensors")
    assert code == 0
    assert "fcvit_digits" in out and "128422" in out
    report = json.loads(run("inspect", "out/x.safetensors", "--json", "--tensors")[1])
    assert report["layout"] == "paddle" and report["num_classes"] == 10 and len(report["entries"]) == 208
    assert report["source_sha256"] == json.loads(run("inspect", digits_pth, "--json")[1])["sha256"]
    done = json.loads(run("convert", "out/x.safetensors", "-o", "x.pth", "--no-verify", "--json")[1])
    assert done["layout"] == "torch" and done["verification"] is None
    assert run("convert", digits_pth, "-o", "out/x.safetensors", "--no-verify")[0] == 2  # already exists


@pytest.mark.slow
def test_preprocessing_can_be_stored(run, digits_pth):
    words = ["--input-size", 48, "--crop-fraction", 0.8, "--interpolation", "bilinear"]
    assert run("convert", digits_pth, "-o", "x.safetensors", "--no-verify", *words)[0] == 0
    report = json.loads(run("inspect", "x.safetensors", "--json")[1])
    assert (report["input_size"], report["crop_fraction"], report["interpolation"]) == (48, 0.8, "bilinear")
    assert run("convert", digits_pth, "-o", "y.safetensors", "--crop-fraction", 2)[0] == 2


def test_inspecting_a_different_network(run, tmp_path):
    path = write_pth(tmp_path / "x.pth", {"conv.weight": np.ones((2, 2), np.float32)})
    code, out, _ = run("inspect", path)
    assert code == 4 and "not an FCViT" in out and "pytorch (zip)" in out


@needs_paddle
@needs_torch
@pytest.mark.slow
def test_verify(run, digits_pth, digits_tensors, tmp_path):
    assert run("convert", digits_pth, "-o", "x.safetensors")[0] == 0
    code, out, err = run("verify", "x.safetensors", "--against", digits_pth)
    assert code == 0 and not err
    assert "float64 difference" in out and "network.6" in out and "network.6.0" not in out and "FAIL" not in out
    assert "network.6.0" in run("verify", "x.safetensors", "--against", digits_pth, "--blocks")[1]
    other = write_pth(tmp_path / "other.pth", {**digits_tensors, "head.bias": digits_tensors["head.bias"] + 1})
    code, out, err = run("verify", "x.safetensors", "--against", other)
    assert code == 5 and "FAIL" in out and err.count("\n") == 1 and "head.bias" in err
    verification = json.loads(run("verify", "x.safetensors", "--against", other, "--json")[1])
    assert not verification["passed"] and verification["different"] == ["head.bias"]


@pytest.mark.slow
@needs_paddle
def test_predict(run, digits_pth, image, tmp_path):
    code, out, err = run("predict", image, "--weights", digits_pth, "--top-k", 2)
    assert code == 0 and "image.png" in out and len(re.findall(r"class \d", out)) == 2
    report = json.loads(run("predict", image, "--weights", digits_pth, "--json")[1])
    assert len(report["predictions"][str(image)]) == 5
    rows = list(csv.DictReader(io.StringIO(run("predict", image, "--weights", digits_pth, "--csv")[1])))
    assert [row["place"] for row in rows] == ["1", "2", "3", "4", "5"]
    (tmp_path / "bad.png").write_bytes(b"?")
    code, out, err = run("predict", image, "bad.png", "--weights", digits_pth)
    assert code == 6 and "image.png" in out and "bad.png: " in err
    assert run("predict", image, "--weights", digits_pth, "--json", "--csv")[0] == 2


@needs_paddle
@pytest.mark.slow
def test_eval_resume_and_compare(run, digits_pth, image, no_charts):
    for label in range(10):
        (image.parent / "data" / str(label)).mkdir(parents=True)
        (image.parent / "data" / str(label) / "x.png").write_bytes(image.read_bytes())
    code, out, err = run("eval", "--weights", digits_pth, "--data", "data")
    assert code == 0 and "10.00" in out and "50.00" in out and "written to runs/eval\n" in out
    assert "sorted order" in err
    assert "written to runs/eval-2" in run("eval", "--weights", digits_pth, "--data", "data")[1]
    code, _, err = run("eval", "--weights", digits_pth, "--data", "data", "-o", "runs/eval")
    assert code == 2 and "runs/eval is not empty" in err
    report = json.loads(
        run("eval", "--weights", digits_pth, "--data", "data", "--json", "--input-size", 64, "--engine", "paddle")[1]
    )
    assert report["results"][0]["protocol"]["changed"] == {"input_size": [32, 64]}
    assert "digits-authors" in run("eval", "--resume", "runs/eval")[1]
    assert "digits-authors" in run("resume", "runs/eval")[1]
    (image.parent / "data").rename(image.parent / "moved")
    code, out, err = run("resume", "runs/eval", "--data", "moved", "--weights", digits_pth)
    assert code == 0 and "digits-authors" in out, err
    (image.parent / "moved").rename(image.parent / "data")
    code, out, _ = run("compare", "runs/eval", "runs/eval-3", "-o", "compared")
    assert code == 0 and "p = " in out and "written to compared" in out
    assert json.loads(run("compare", "runs/eval", "runs/eval-3", "--json")[1])["images"] == 10
    (image.parent / "data" / "4" / "bad.png").touch()
    assert run("eval", "--weights", digits_pth, "--data", "data", "--engine", "paddle")[0] == 6


@pytest.mark.slow
def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0 and "numpy" in out
    report = json.loads(run("doctor", "--json")[1])
    assert set(report["devices"]) | set(report["missing"]) == {"paddle", "torch"}


def test_doctor_reports_and_compiles_the_native_engine(monkeypatch):
    from fcvit.commands.doctor import doctor, native

    def without_gpu(name):
        cuda = types.SimpleNamespace(is_available=lambda: False)
        return types.SimpleNamespace(cuda=cuda, is_compiled_with_cuda=lambda: False)

    built = []
    monkeypatch.setattr("fcvit.commands.doctor.import_framework", without_gpu)
    monkeypatch.setattr(native, "find_compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(native, "levels", lambda: ("x86-64-v3",))
    monkeypatch.setattr(native, "is_built", lambda: bool(built))
    monkeypatch.setattr(native, "library", lambda: built.append(1))
    state = doctor()
    assert state["native engine"] == "x86-64-v3: not compiled; compile it with: fcvit doctor --build" and not built
    state = doctor(build=True)
    assert (state["compiler"], state["native engine"], len(built)) == ("/usr/bin/g++", "x86-64-v3: compiled", 1)

    def missing():
        raise MissingExtra("no C++ compiler found")

    monkeypatch.setattr(native, "find_compiler", missing)
    monkeypatch.setattr(native, "library", missing)
    assert (doctor()["compiler"], doctor()["native engine"]) == ("none", "no C++ compiler found")
    with pytest.raises(MissingExtra, match="no C"):
        doctor(build=True)


@pytest.mark.parametrize("words", [["predict", "x.png"], ["eval", "--data", "."]])
def test_the_message_names_the_command_that_installs_a_missing_package(run, digits_pth, image, monkeypatch, words):
    import_module = frameworks.importlib.import_module

    def without_paddle(name, *rest):
        if name == "paddle":
            raise ModuleNotFoundError("No module named 'paddle'", name="paddle")
        return import_module(name, *rest)

    monkeypatch.setattr(frameworks.importlib, "import_module", without_paddle)
    for label in range(10):
        (image.parent / str(label)).mkdir()
    image.rename(image.parent / "0" / "x.png")
    (image.parent / "x.png").write_bytes((image.parent / "0" / "x.png").read_bytes())
    code, _, err = run(*words, "--weights", digits_pth, "--engine", "paddle")
    assert code == 7 and "paddle is not installed" in err and "pip install paddlepaddle" in err


@needs_paddle
def test_without_pytorch_a_note_says_that_outputs_were_not_compared(run, digits_pth, monkeypatch):
    find = frameworks.importlib.util.find_spec
    monkeypatch.setattr(frameworks.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    code, out, _ = run("convert", digits_pth, "-o", "x.safetensors")
    assert code == 0 and "NOT compared: torch is not installed (pip install torch)" in out


def test_internal_errors_and_interruptions(run, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a line\nand another")

    monkeypatch.setattr("fcvit.commands.doctor.read_cache", broken)
    code, _, err = run("doctor")
    assert code == 1 and err.count("\n") == 1 and "internal error: ZeroDivisionError: a line and another" in err
    code, _, err = run("doctor", "--debug")
    assert code == 1 and "Traceback" in err and 'raise ZeroDivisionError("a line' in err
    assert run("inspect", "nowhere", "--debug")[0] == 3

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fcvit.commands.doctor.read_cache", interrupted)
    assert run("doctor")[0] == 130

    def became_another_error(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise MissingExtra("install paddlepaddle") from error

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("fcvit.commands.doctor.read_cache", became_another_error)
    code, _, err = run("doctor")
    assert (code, err) == (130, "fcvit: interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_signals_at_the_same_time_count_as_one(run, monkeypatch):
    """A launcher forwards signals that the terminal already sent. The second signal must not interrupt the cleanup."""
    cleaned = []

    def twice(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(1)

    monkeypatch.setattr("fcvit.commands.doctor.read_cache", twice)
    assert run("doctor")[0] == 130 and cleaned


def test_counts_with_singular_and_plural_nouns():
    given = [(0, "image"), (1, "image"), (1, "class"), (2, "class"), (1000, "epoch")]
    assert [counted(*each) for each in given] == ["0 images", "1 image", "1 class", "2 classes", "1,000 epochs"]


@needs_paddle
@pytest.mark.slow
def test_messages_of_paddle_are_hidden(digits_pth, image):
    done = command("predict", image, "--weights", digits_pth)
    notes = [line for line in done.stderr.splitlines() if "exporting" not in line]  # printed only the first time
    assert done.returncode == 0 and len(notes) == 1 and notes[0].startswith("fcvit: note: engine: ")
    assert "\x1b" not in done.stdout  # no colors or progress bar in a pipe


@pytest.mark.parametrize("words", ["models", "inspect --tensors {}", "inspect --tensors --json {}"])
@pytest.mark.slow
def test_a_closed_pipe_is_not_an_error(digits_pth, words):
    """The reader closes the pipe before the first line is written."""
    script = f"{sys.executable} -m fcvit {words.format(digits_pth)} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_convert_requires_a_choice_between_ema_and_raw_weights(run, tmp_path, digits_tensors):
    path = training_checkpoint(tmp_path / "x.pth.tar", digits_tensors)
    code, _, err = run("convert", path, "-o", "x.safetensors", "--no-verify")
    assert code == 2 and "--ema or --no-ema" in err
    assert run("convert", path, "-o", "x.safetensors", "--no-verify", "--ema")[0] == 0
    assert run("inspect", path)[0] == 0


def test_python_dash_m():
    assert command("--version").stdout.strip() == __import__("fcvit").__version__


def test_inspecting_a_detector(run, tmp_path):
    path = write_detector(tmp_path / "shapes.safetensors")
    out = " ".join(run("inspect", path)[1].split())
    assert "largest longer side 64" in out and "largest shorter side 48" in out and "classes disc, square" in out
    assert "crop fraction" not in out and "input size" not in out


def test_inspecting_a_dense_backbone(run, tmp_path):
    import dataclasses

    path = write_pth(tmp_path / "d.pth", synthetic_tensors(dataclasses.replace(DIGITS, num_classes=0, head="backbone")))
    report = json.loads(run("inspect", path, "--json")[1])
    assert report["form"] == "fcvit_digits (dense-prediction backbone)" and report["num_classes"] == 0


@needs_paddle
@pytest.mark.parametrize("command_line", ["eval", "quickstart"])
@pytest.mark.slow
def test_a_full_disk_during_a_run(tmp_path, digits_pth, image, command_line):
    """The command runs in a child process that may not write files larger than 4 kB."""
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for index in range(6):
            (tmp_path / "data" / str(label) / f"{index}.png").write_bytes(image.read_bytes())
    words = [command_line]
    if command_line == "eval":
        words += ["--weights", str(digits_pth), "--data", str(tmp_path / "data")]
    script = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
from fcvit.cli import main
sys.exit(main({words!r} + ["-o", "run"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3 and "File too large" in done.stderr, done.stderr
    if command_line == "eval":
        assert re.search("run/journals/0-0.journal: File too large.*fcvit resume run", done.stderr)
    assert len([line for line in done.stderr.splitlines() if "note:" not in line]) == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert not list((tmp_path / "run").glob("*.csv"))


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


@pytest.mark.slow
@needs_paddle
def test_names_from_files_cannot_control_the_terminal(run, digits_pth, image):
    """Names of classes, images and weights are escaped in tables, JSON, CSV, notes, errors and tracebacks."""
    classes = image.parent / "classes.json"
    classes.write_text(json.dumps([f"{ESCAPES}one\ntwo", "=1+1", *(f"{ESCAPES}{i}" for i in range(8))]))
    weights = image.parent / f"w{ESCAPES}.safetensors"
    try:
        strange = image.rename(image.parent / f"{ESCAPES}.png")
    except OSError:
        pytest.skip("this file system does not allow control characters in names")
    bad = image.parent / f"bad{ESCAPES}.png"
    bad.touch()
    shown = [
        run("convert", digits_pth, "-o", weights, "--classes", classes, "--no-verify"),
        run("convert", digits_pth, "-o", weights, "--no-verify"),
        run("inspect", weights),
        run("inspect", weights, "--json"),
        run("predict", strange, bad, "--weights", weights, "--top-k", 10),
        run("predict", strange, bad, "--weights", weights, "--top-k", 10, "--csv"),
        run("predict", strange, bad, "--weights", weights, "--json"),
        run("predict", image.parent / f"none{ESCAPES}.png", "--weights", weights),
        run("inspect", image.parent / f"none{ESCAPES}", "--debug"),
    ]
    assert [code for code, _, _ in shown] == [0, 2, 0, 0, 6, 6, 6, 3, 3]
    for _, out, err in shown:
        assert printable(out + err, keep="\n") == out + err
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202eone\ntwo" in shown[5][1]
    rows = list(csv.DictReader(io.StringIO(shown[5][1])))
    assert "'=1+1" in {row["name"] for row in rows}
    assert list(json.loads(shown[6][1])["predictions"]) == [str(strange)]  # the parsed value is not changed


STRANGE = ("[/b]", "[red]x", "dog:dog:", "a[b]c", "\\[/]")


@needs_paddle
@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.slow
def test_markup_in_texts_from_files_is_not_interpreted(run, digits_pth, digits_tensors, image, text):
    """Class names, tensor names and paths are not interpreted as markup or emoji codes."""
    name = text.replace("/", "-")
    classes = image.parent / "classes.txt"
    classes.write_text("".join(f"{text} {i}\n" for i in range(10)))
    assert run("convert", digits_pth, "-o", f"{name}.safetensors", "--classes", classes, "--no-verify")[0] == 0
    code, out, _ = run("inspect", f"{name}.safetensors")
    assert code == 0 and f"{name}.safetensors" in out and f"{text} 9" in out
    strange_image = image.rename(image.parent / f"{name}.png")
    code, out, _ = run("predict", strange_image, "--weights", f"{name}.safetensors")
    assert code == 0 and f"{text} " in out
    write_pth(
        image.parent / "x.pth", {**digits_tensors, f"extra.{text}": np.ones(1, np.float32), "y": np.ones(1, np.float32)}
    )
    code, _, err = run("convert", "x.pth", "-o", "y.safetensors")
    assert code == 4 and f"extra.{text}" in err and "Traceback" not in err
    code, out, _ = run("inspect", "x.pth")
    assert code == 4 and f"extra.{text}" in out


@needs_paddle
@needs_torch
@pytest.mark.slow
def test_eval_compares_two_engines(run, digits_pth, image, no_charts):
    for label in range(10):
        (image.parent / "data" / str(label)).mkdir(parents=True)
        (image.parent / "data" / str(label) / "x.png").write_bytes(image.read_bytes())
    code, out, _ = run("eval", "--weights", digits_pth, "--data", "data", "--engine", "paddle,torch")
    assert code == 0 and "paddle (cpu)" in out and "torch (cpu)" in out
    assert "same top-1" in out and "largest logit difference" in out


@needs_paddle
def test_contradicting_options_are_rejected(run, digits_pth, image):
    (image.parent / "data" / "0").mkdir(parents=True)
    words = ["eval", "--weights", digits_pth, "--data", "data", "--protocol", "resize256-bilinear"]
    code, _, err = run(*words, "--crop-fraction", 0.5)
    assert code == 2 and "resize256-bilinear" in err
    words = ["eval", "--resume", "runs/eval"]
    for more in (["--protocol", "both"], ["--batch-size", 4], ["--no-ema"], ["--seed", 0]):
        code, _, err = run(*words, *more)
        assert code == 2 and "--resume keeps the options of the run" in err
    assert "expected --weights FILE and --data FOLDER" in run("eval", "--data", "data")[2]
    assert "--subset" in run("eval", "--weights", digits_pth, "--data", "data", "--seed", 1)[2]


def test_preprocessing_of_ema_weights_can_be_stored(run, tmp_path, digits_tensors):
    path = training_checkpoint(tmp_path / "x.pth.tar", digits_tensors)
    words = ["convert", path, "-o", "x.safetensors", "--no-verify", "--crop-fraction", 0.5]
    assert run(*words)[0] == 2
    assert run(*words, "--ema")[0] == 0
    assert json.loads(run("inspect", "x.safetensors", "--json")[1])["crop_fraction"] == 0.5


@pytest.mark.parametrize("mean", [["0.5", "0.4", "0.3"], ["0.5,0.4,0.3"]])
def test_mean_and_std_can_be_stored(run, digits_pth, mean):
    words = ["convert", digits_pth, "-o", "x.safetensors", "--no-verify", "--mean", *mean, "--std", "0.5"]
    assert run(*words)[0] == 0
    report = json.loads(run("inspect", "x.safetensors", "--json")[1])
    assert (report["mean"], report["std"]) == ([0.5, 0.4, 0.3], [0.5, 0.5, 0.5])
    code, _, err = run(*words, "--overwrite", "--mean", "123.7", "116.3", "103.5")
    assert code == 2 and "from 0 to 1" in err


def test_a_set_of_weights_is_selected_by_key(run, tmp_path, digits_tensors):
    import pickle

    (tmp_path / "x.pdparams").write_bytes(pickle.dumps({"student": digits_tensors, "teacher": dict(digits_tensors)}, 4))
    code, _, err = run("inspect", tmp_path / "x.pdparams")
    assert code == 2 and "student, teacher" in err
    code, out, _ = run("inspect", tmp_path / "x.pdparams", "--key", "teacher")
    assert code == 0 and "teacher" in out
    words = ["convert", tmp_path / "x.pdparams", "-o", "y.safetensors", "--no-verify"]
    assert run(*words)[0] == 2
    assert run(*words, "--key", "student")[0] == 0


@needs_paddle
@needs_torch
@pytest.mark.slow
def test_verify_against_a_file_with_ema_and_raw_weights(run, tmp_path, digits_tensors):
    path = training_checkpoint(tmp_path / "x.pth.tar", digits_tensors)
    assert run("convert", path, "-o", "x.safetensors", "--ema")[0] == 0
    assert run("verify", "x.safetensors", "--against", path)[0] == 2
    assert run("verify", "x.safetensors", "--against", path, "--ema")[0] == 0
    assert run("verify", path, "--against", "x.safetensors", "--ema")[0] == 0
    assert run("verify", "x.safetensors", "--against", path, "--no-ema")[0] == 5
    assert run("verify", "x.safetensors", "--against", "x.safetensors", "--ema")[0] == 2


def test_progress_on_a_terminal(monkeypatch):
    """A terminal shows a bar with the rate and the time left."""
    from rich.console import Console

    from fcvit.report import progress as module

    drawn = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=drawn, force_terminal=True, width=120))
    with module.progress("evaluating", 3) as advance:
        advance(2)
        time.sleep(0.2)
        advance(1)
    assert "evaluating" in drawn.getvalue() and "3/3" in drawn.getvalue() and "images/s" in drawn.getvalue()
    assert "0:00:00" in drawn.getvalue()


def test_progress_in_a_log(capsys, monkeypatch):
    """A log contains lines with the rate and the time left, but none for short work."""
    from fcvit.report.progress import progress

    with progress("evaluating", 3, every=0) as advance:
        advance(1)
        time.sleep(0.01)
        advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"evaluating: 1 of 3 images, [0-9.]+ images/s, \d:\d\d:\d\d left", lines[0]), lines
    assert lines[1].startswith("evaluating: 3 of 3 images") and lines[1].endswith("0:00:00 left")
    monkeypatch.setattr("fcvit.report.progress.time.monotonic", iter((0, 100, 101)).__next__)
    with progress("evaluating", 3000) as advance:
        advance(1000)
    assert capsys.readouterr().err == "evaluating: 1000 of 3000 images, 10.0 images/s, 0:03:20 left\n"
    monkeypatch.undo()
    with progress("evaluating", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


@needs_paddle
@pytest.mark.slow
def test_export(run, digits_pth, tmp_path):
    pytest.importorskip("onnxruntime")
    code, out, err = run("export", digits_pth, "-o", "a.onnx", "--size", "40x32", "--uint8", "--probabilities")
    assert code == 0 and "error ratio" in out and "any x 3 x 40 x 32" in out and "checking a.onnx" in err
    report = json.loads(run("export", digits_pth, "-o", "b.onnx", "--dynamic", "--json")[1])
    assert report["files"] == ["b.onnx"] and report["checks"][0]["ratio"] < 3
    assert run("export", digits_pth, "-o", "a.onnx")[0] == 2
    for size in ("x", "0", "32x32x32", "9999"):
        assert run("export", digits_pth, "-o", "c.onnx", "--size", size)[0] == 2
    assert not (tmp_path / "c.onnx").exists()


@pytest.fixture
def images(tmp_path):
    """A folder with ten images, and a file with an image extension that is not an image."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(generator.integers(0, 256, (33, 40, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"?")
    return folder


@needs_paddle
@pytest.mark.charts
@pytest.mark.slow
def test_similarity_lists_drawn_and_unreadable_images(run, digits_pth, images, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("fcvit.commands.similarity.picture", lambda *given: drawn.append(given[3:]) or b"png")
    monkeypatch.setattr("fcvit.commands.similarity.depth_picture", lambda *_: b"png")
    monkeypatch.setattr("fcvit.commands.similarity.overview", lambda *_: b"png")
    options = {"stage": 3, "block": 1, "context": 1, "heads": "mean", "values": "rescaled", "top-k": 1, "scale": "head"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    code, out, err = run("similarity", images, "--weights", digits_pth, "-o", "maps", *words)
    assert code == 6 and "written to maps" in out and "9.png" in out and "class" in out
    assert "1 image excluded" in err and "bad.png" in err
    assert drawn == [((3, 1, 1), MapChoice("mean", "rescaled", "head"))] * 10
    code, out, err = run("similarity", images / "0.png", "--weights", digits_pth, "--json", "-o", "one")
    (path, files, best) = json.loads(out)["images"][0]
    assert (
        code == 0 and path.endswith("0.png") and files == ["0.png", "0-depth.png", "0.npz"] and best["probability"] > 0
    )
    code, out, err = run("similarity", images / "0.png", "--weights", digits_pth)
    assert code == 0 and "written to runs/similarity" in out
    code, out, err = run("similarity", images, "--weights", digits_pth, "-o", images / "maps")
    assert code == 2 and "is inside" in err and "choose another -o" in err and not (images / "maps").exists()
    code, out, err = run("similarity", "--weights", digits_pth)
    assert code == 2 and err.startswith("fcvit: similarity: ") and "at least one image" in err


@needs_paddle
@pytest.mark.slow
def test_head_stats_and_faithfulness_as_tables_and_as_json(run, digits_pth, images, no_charts, monkeypatch):
    from fcvit.analysis import faithfulness as measuring

    for name, few in (("STEPS", 2), ("RANDOM", 1), ("PATCHES", 1)):
        monkeypatch.setattr(measuring, name, few)
    # The maps are real, but the predictions are not. tests/analysis tests real predictions, which take many passes.
    engines = []

    def create_engine(name, *_):
        engines.append(name)
        return lambda batch: batch.reshape(len(batch), -1)[:, :10] / np.float32(255)

    monkeypatch.setattr("fcvit.commands.faithfulness.create_engine", create_engine)
    code, out, err = run("head-stats", images, "--weights", digits_pth, "-o", "heads")
    assert code == 6 and "bad.png" in err and "corr." in out and "3.2.2" in out and "written to heads" in out
    (images / "bad.png").unlink()
    code, out, err = run("head-stats", images, "--weights", digits_pth, "--json", "--most", "4")
    stats = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code == 0 and stats["images"] == 4 and stats["networks"][0]["layers"][-1]["entropy"] is None
    engine = "--engine", "paddle"
    code, out, err = run("faithfulness", images, "--weights", digits_pth, *engine, "--heads", "3", "--absolute")
    assert code == 0 and "1.1.1, head 3" in out and "absolute maps" in out and "another image" in out
    code, out, err = run("faithfulness", images, "--weights", digits_pth, *engine, "--json", "-o", "t")
    curves = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code == 0 and len(curves["curves"]) == 7 and curves["folder"] == "t" and engines == ["paddle"] * 2
    code, out, err = run("faithfulness", images, "--weights", digits_pth, "--max-images", "9")
    assert code == 2 and "9 images: expected at least 10" in err


def test_ctrl_c_during_the_import_of_the_command_line():
    code = """
import signal, sys
class Interrupting:
    @staticmethod
    def find_spec(name, *_):
        if name == "cyclopts":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
from fcvit.__main__ import main
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "fcvit: interrupted\n")


@pytest.mark.slow
@needs_paddle
def test_predictions_are_written_to_a_file_or_drawn(run, digits_pth, image):
    words = ("predict", image, "--weights", digits_pth, "--engine", "paddle", "-o")
    assert [run(*words, name)[0] for name in ("p.csv", "p.jsonl", "pictures")] == [0, 0, 0]
    with open("p.csv", newline="") as file:  # noqa: PTH123
        rows = list(csv.DictReader(file))
    with open("p.jsonl") as file:  # noqa: PTH123
        (line,) = map(json.loads, file)
    assert len(rows) == 5 and line["path"] == str(image)
    assert [row["id"] for row in rows] == [one["id"] for one in line["predictions"]]
    with Image.open("pictures/predictions-001.png") as picture:
        assert min(picture.size) > 100
    code, _, err = run(*words, "p.csv")
    assert code == 2 and "already exists" in err
    assert run(*words, "p.xlsx")[0] == 2


def test_recipes_are_listed_and_printed(run):
    code, out, _ = run("recipes")
    assert code == 0 and "fcvit_b48" in out and "finetune" in out
    assert 'variant = "fcvit_digits"' in run("recipes", "digits")[1]
    assert run("recipes", "nothing")[0] == 2


def test_the_cache_is_listed_limited_and_emptied(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for number, name in enumerate(("engines/a", "engines/b", "native/c")):
        folder = tmp_path / "home" / "fcvit" / name
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(bytes(1000))
        os.utime(folder, (number, number))
    assert "engines/a" in run("cache")[1]
    assert json.loads(run("cache", "--limit", "2k", "--json")[1])["removed"] == ["engines/a"]
    assert run("cache", "--limit", "much")[0] == 2
    assert run("cache", "--clear")[0] == 0 and not list((tmp_path / "home" / "fcvit").glob("*/*"))


@needs_paddle
def test_old_command_names_and_the_flags_of_all_commands(run, digits_pth, image, monkeypatch):
    words = ("predict", image, "--weights", digits_pth, "--engine", "auto")
    default, quiet = run(*words), run(*words, "-q")
    assert default[:2] == quiet[:2] and "note: engine" in default[2] and not quiet[2]
    assert f"note: read {digits_pth}" in run(*words, "-v")[2] and "note: read" not in default[2]
    assert run("recipes", "-v", "digits")[0] == 0
    code, _, err = run("heads")
    note, problem = err.splitlines()
    assert code == 2 and "fcvit heads" in note and "fcvit head-stats" in note
    assert problem.startswith("fcvit: head-stats: ")
