"""Pictures of similarity maps for an evaluation: its most confident mistakes and right answers."""

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
    """An evaluation of noise, in which some are right by chance."""
    generator = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "data" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    evaluate(digits_pth, tmp_path / "data", folder=tmp_path / "run", engines="paddle")
    return tmp_path / "run"


@pytest.fixture
def panels(monkeypatch):
    """What the overview was asked to draw."""
    drawn = []
    monkeypatch.setattr(command, "overview", lambda panels, *_: drawn.extend(panels) or b"png")
    return drawn


@pytest.mark.slow
def test_the_most_confident_mistakes_and_right_answers_are_drawn(run, panels, notes):
    (metrics,) = run.glob("*/metrics.json")
    with (metrics.parent / "predictions.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["probability_1"]))
    wrong = [row for row in rows if row["truth"] != row["class_1"]][:2]
    right = [row for row in rows if row["truth"] == row["class_1"]][:2]
    drawn = similarity(run=run)
    assert [path for path, *_ in drawn.images] == [row["path"] for row in wrong + right] and drawn.exit_code == 0
    assert drawn.folder == metrics.parent and (metrics.parent / "maps.png").read_bytes() == b"png"
    assert [panel.title.partition(":")[0] for panel in panels] == ["wrong"] * len(wrong) + ["right"] * len(right)
    assert wrong[0]["truth"] in panels[0].title and f"{100 * float(wrong[0]['probability_1']):.1f} %" in panels[0].title
    assert any("fcvit eval --resume" in note for note in notes)
    elsewhere = similarity(run=metrics.parent, output=run.parent / "maps")
    assert (run.parent / "maps" / "maps.png").exists() and elsewhere.images == drawn.images


@pytest.mark.slow
def test_an_image_that_changed_is_left_out_and_weights_that_changed_are_refused(run, panels, digits_pth):
    first = similarity(run=run).images[0][0]
    (run.parent / "data" / first).write_bytes(b"?")
    drawn = similarity(run=run)
    assert first not in [path for path, *_ in drawn.images] and drawn.exit_code == BadImages.exit_code
    assert drawn.unreadable == (f"{first}: no longer the image that was evaluated",)
    (metrics,) = run.glob("*/metrics.json")
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"weights_sha256": "0" * 64}))
    with pytest.raises(DoesNotFit, match="no longer the file that was evaluated"):
        similarity(run=run)


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(UnreadableFile, match=r"metrics.json .*finished run of fcvit eval"):
        similarity(run=tmp_path)
