"""Test the included checkpoint, the recorded logits, and all steps of the quickstart."""

import importlib.resources
import json

import numpy as np
import pytest
from PIL import Image

from conftest import needs_paddle, needs_torch
from fcvit.commands import quickstart
from fcvit.data.transforms.preprocess import preprocess
from fcvit.frameworks import import_framework, installed
from fcvit.verification.equivalence import FLOAT64_LIMIT, RATIO_LIMIT, error_ratio, float64_difference
from fcvit.weights.reading import read_weights

ASSETS = importlib.resources.files("fcvit") / "assets"


@pytest.fixture
def held_out():
    with np.load(ASSETS / quickstart.HELD_OUT, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def test_included_files():
    nuclei = [ASSETS / name for name in (quickstart.SEGMENTER, quickstart.NUCLEI)]
    assert sum(path.stat().st_size for path in nuclei) <= 2 << 20
    assert read_weights(nuclei[0]).spec.task == "segmentation" and len(read_weights(nuclei[0]).palette) == 3
    path = ASSETS / quickstart.CHECKPOINT
    assert path.stat().st_size <= 2 << 20
    weights = read_weights(path)
    assert weights.spec.variant.name == "fcvit_digits" and weights.spec.num_classes == 10
    assert weights.skipped == ("epoch", "arch", "optimizer", "version", "args", "metric")


@pytest.mark.slow
@needs_torch
def test_the_recorded_logits_match_pytorch(held_out):
    weights = read_weights(ASSETS / quickstart.CHECKPOINT)
    batch = np.stack([preprocess(Image.fromarray(i), weights.spec.variant.preprocessing) for i in held_out["images"]])
    exact, single, side = quickstart.torch_logits(weights, batch, held_out)
    assert side == "computed now"
    assert float64_difference(held_out["logits_float64"], exact) <= FLOAT64_LIMIT
    # float32 results differ between processors, but not by more than PyTorch's rounding error.
    assert 1 / RATIO_LIMIT <= error_ratio(held_out["logits_float32"], single, exact) <= RATIO_LIMIT
    assert len(held_out["labels"]) == 360 and np.bincount(held_out["labels"]).min() > 30


@pytest.mark.slow
@needs_paddle
@pytest.mark.parametrize("live", [pytest.param(True, marks=needs_torch), pytest.param(False, marks=pytest.mark.ci)])
def test_all_steps_run(tmp_path, monkeypatch, live):
    if not live:
        for module in ("fcvit.commands.quickstart", "fcvit.commands.convert"):
            name = f"{module}.installed"
            monkeypatch.setattr(name, lambda framework: framework != "torch" and installed(framework))
    result = quickstart.quickstart(tmp_path / "run")
    assert result.torch_side == ("computed now" if live else "recorded")
    assert (result.conversion.verification is not None) == live
    assert result.passed and result.agreement == 100
    assert result.evaluation.results[0].top1 == pytest.approx(result.torch_top1) and result.torch_top1 >= 98
    assert 0 < result.mean_difference < result.max_difference < 1e-4
    assert result.segmentation.results[0].miou > 70 and result.segmentation.results[0].images == 11
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("digits.pth.tar", "fcvit_digits.safetensors", "held-out", "eval"),
        *("nuclei.safetensors", "nuclei.tar", "eval-segmentation", "segmentation.png"),
        *("predictions.png", "summary.json", "run.json"),
    }
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["float64_difference"] == result.float64_difference
    with Image.open(result.sheet) as sheet:
        assert sheet.width > 600 and sheet.height > 600


@pytest.mark.slow
@needs_paddle
def test_a_wrong_paddle_network_is_detected_without_pytorch(tmp_path, monkeypatch):
    """The planted error is a different epsilon of the similarity."""
    from fcvit.errors import NumbersDisagree
    from fcvit.models import backbone as model

    import_framework("paddle")
    for module in ("fcvit.commands.quickstart", "fcvit.commands.convert"):
        monkeypatch.setattr(f"{module}.installed", lambda framework: framework == "paddle")
    monkeypatch.setattr(model, "SIMILARITY_EPS", 1e-6)
    with pytest.raises(NumbersDisagree, match=r"float64 difference \d.*error ratio \d"):
        quickstart.quickstart(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
