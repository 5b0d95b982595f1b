"""Test `fcvit similarity --run`: maps of the most confident mistakes and correct predictions of an evaluation."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from conftest import needs_paddle
from fcvit.commands import similarity as command
from fcvit.commands.evaluate import evaluate
from fcvit.commands.similarity import similarity
from fcvit.errors import BadImages, DoesNotFit, UnreadableFile

pytestmark = [needs_paddle, pytest.mark.charts]


@pytest.fixture
def run(digits_pth, tmp_path):
    """An evaluation of noise images, some of which are correct by chance."""
    generator = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "data" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    evaluate(digits_pth, tmp_path / "data", folder=tmp_path / "run", engines="paddle")
    return tmp_path / "run"


@pytest.fixture
def panels(monkeypatch):
    """The panels that would be drawn in the overview."""
    drawn = []
    monkeypatch.setattr(command, "overview", lambda panels, *_: drawn.extend(panels) or b"png")
    return drawn


@pytest.mark.slow
def test_the_most_confident_mistakes_and_correct_predictions_are_drawn(run, panels, notes):
    (metrics,) = run.glob("*/metrics.json")
    with (metrics.parent / "predictions.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["probability_1"]))
    wrong = [row for row in rows if row["truth"] != row["class_1"]][:2]
    right = [row for row in rows if row["truth"] == row["class_1"]][:2]
    drawn = similarity(run=run)
    assert [path for path, *_ in drawn.images] == [row["path"] for row in wrong + right] and drawn.exit_code == 0
    assert drawn.folder == metrics.parent and (metrics.parent / "maps.png").read_bytes() == b"png"
    assert [panel.title.partition(":")[0] for panel in panels] == ["wrong"] * len(wrong) + ["correct"] * len(right)
    assert wrong[0]["truth"] in panels[0].title and f"{100 * float(wrong[0]['probability_1']):.1f}%" in panels[0].title
    assert any("fcvit resume" in note for note in notes)
    other = similarity(run=metrics.parent, output=run.parent / "maps")
    assert (run.parent / "maps" / "maps.png").exists() and other.images == drawn.images


@pytest.mark.slow
def test_changed_images_are_skipped_and_changed_weights_are_rejected(run, panels, digits_pth):
    first = similarity(run=run).images[0][0]
    (run.parent / "data" / first).write_bytes(b"?")
    drawn = similarity(run=run)
    assert first not in [path for path, *_ in drawn.images] and drawn.exit_code == BadImages.exit_code
    (reason,) = drawn.unreadable
    assert reason.startswith(f"{first}: ") and "changed" in reason
    (metrics,) = run.glob("*/metrics.json")
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"weights_sha256": "0" * 64}))
    with pytest.raises(DoesNotFit, match=r"digits\.pth of .*changed"):
        similarity(run=run)


def test_a_folder_that_is_not_an_evaluation_is_rejected(tmp_path):
    with pytest.raises(UnreadableFile, match=r"fcvit eval"):
        similarity(run=tmp_path)
