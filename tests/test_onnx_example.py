"""The example of the serving guide gives the numbers of `fcvit predict`, and does not import this package."""

import dataclasses
import subprocess
import sys
import tarfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import fcvit
from conftest import DIGITS, image_by_rule, needs_torch
from fcvit.data.classes import imagenet
from fcvit.inference.export import description
from fcvit.inference.interface import Interface
from fcvit.models.spec import ModelSpec
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.reading import Weights

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "onnx_classify.py"
ALONE = """
import runpy, sys
sys.modules.update(fcvit=None, paddle=None)  # an import raises an error
del sys.argv[0]
runpy.run_path(sys.argv[0], None, "__main__")
"""


@needs_torch
@pytest.mark.slow
def test_the_example_prints_the_top_5_of_predict(tmp_path):
    """Images with odd sizes, where another rounding of the resized side or of the crop gives other pixels."""
    paths = [tmp_path / f"{width}x{height}.png" for width, height in ((63, 40), (37, 81), (33, 32), (35, 35))]
    for path in paths:
        image_by_rule(*map(int, path.stem.split("x"))).save(path)
    with (
        resources.as_file(resources.files("fcvit") / "assets" / "nuclei.tar") as name,
        tarfile.open(name) as archive,
    ):
        for member in [member for member in archive.getmembers() if member.name.startswith("images/val/")][:4]:
            paths.append(tmp_path / Path(member.name).name)
            paths[-1].write_bytes(archive.extractfile(member).read())
    with resources.as_file(resources.files("fcvit") / "assets" / "digits.pth.tar") as weights:
        expected = fcvit.load(weights, engine="torch", device="cpu").predict(paths)
        values = {"crop_fraction": 0.9, "interpolation": "bilinear", "mean": (0.4, 0.5, 0.6)}
        changed = dataclasses.replace(DIGITS.variant.preprocessing, **values)
        other = fcvit.load(weights, engine="torch", device="cpu", preprocessing=changed).predict(paths)
        fcvit.export(weights, tmp_path / "plain.onnx")
        fcvit.export(
            weights, tmp_path / "uint8.onnx", uint8=True, probabilities=True, dynamic=True, preprocessing=changed
        )
    for network, predictions in (("plain.onnx", expected), ("uint8.onnx", other)):
        words = [sys.executable, "-I", "-W", "error", "-c", ALONE, EXAMPLE, tmp_path / network, *paths]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        printed = [line.split("\t") for line in done.stdout.splitlines()]
        rows = [(path, row) for path, of_image in zip(paths, predictions, strict=True) for row in of_image]
        assert [(path, *names) for path, _, *names in printed] == [(str(p), row.id, row.name) for p, row in rows]
        assert np.allclose([float(line[1]) for line in printed], [row.probability for _, row in rows], 0, 1e-5)


@pytest.mark.parametrize("count", [1000, 3, 0])
def test_an_export_names_the_classes_that_predict_shows(count):
    spec = ModelSpec(DIGITS.variant, count)
    weights = Weights(spec, {}, Checkpoint(Path("x"), MEMORY, {}, None, b""), "torch", None, None, (), ())
    about = description(weights, Interface(None, False, False, spec.variant.preprocessing))
    numbered = [[str(index), f"class {index}"] for index in range(count)]
    assert about["classes"] == ([list(c) for c in imagenet()] if count == 1000 else numbered or None)
