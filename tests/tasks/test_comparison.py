"""Tests of comparing two results on the same images, and of results that cannot be compared."""

import csv
import json
import shutil

import numpy as np
import pytest
import scipy.stats

from fcvit.commands.compare import compare
from fcvit.data.classes import ClassName
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.evaluation.protocols import protocols
from fcvit.metrics.classification import calibration, wilson
from fcvit.models.variants import VARIANTS
from fcvit.tasks.classification.results import Records, Result, class_figures, write_result

CLASSES = tuple(ClassName(f"n{i}", f"name {i}") for i in range(4))
DIGITS = VARIANTS["fcvit_digits"]


def write_run(folder, predicted, truth, *, digests=None, names=None, name="a-authors"):
    """Write a run with one result, as `fcvit eval` does, with the given predictions. Return its folder."""
    count = len(truth)
    truth, predicted = np.array(truth), np.array(predicted)
    top = np.stack([predicted, (predicted + 1) % 4], axis=1)
    probability = np.tile([0.7, 0.2], (count, 1))
    rank = np.where(predicted == truth, 0, 1)
    names = tuple(names or (f"{i:03d}.png" for i in range(count)))
    digests = tuple(digests or (f"{i:016x}" for i in range(count)))
    records = Records(names, digests, truth, rank, np.ones(count), top, probability, CLASSES)
    right = int((rank == 0).sum())
    (protocol,) = protocols("authors", DIGITS.preprocessing, DIGITS)
    result = Result(
        name=name,
        weights="x.pth",
        weights_sha256="0" * 64,
        network="x",
        engine="paddle",
        device="cpu",
        precision="float32",
        batch_size=1,
        protocol=protocol,
        images=count,
        unreadable=0,
        classes=4,
        top1=100 * right / count,
        top_k=100.0,
        k=2,
        top1_interval=wilson(right, count),
        top_k_interval=(0, 100),
        loss=1.0,
        calibration=calibration(probability[:, 0], rank == 0),
        real=None,
        published=None,
        per_class=class_figures(records, 2),
        fingerprint="f" * 64,
        seconds=1.0,
    )
    from PIL import Image

    folder.mkdir(parents=True)
    write_result(folder / name, result, records, {}, lambda _: Image.new("RGB", (4, 4)))
    return folder


TRUTH = [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
FIRST = [0] * 10 + [0] * 4 + [1] * 6 + [2] * 10 + [3] * 9 + [0]
SECOND = [0] * 8 + [1] * 2 + [1] * 10 + [2] * 10 + [3] * 9 + [1]


def test_a_comparison_with_known_values(tmp_path):
    """Class 1 gains four images, class 0 loses two, and one image is wrong with another class."""
    comparison = compare(
        write_run(tmp_path / "a", FIRST, TRUTH),
        write_run(tmp_path / "b", SECOND, TRUTH) / "a-authors",
        folder=tmp_path / "out",
    )
    assert (comparison.images, comparison.top1) == (40, (87.5, 92.5))
    assert (comparison.difference, comparison.only_first, comparison.only_second) == (5, 2, 4)
    assert comparison.interval[0] < 5 < comparison.interval[1]
    assert comparison.p_value == pytest.approx(scipy.stats.binomtest(2, 6).pvalue)
    assert [(c.id, c.name, c.images, c.first, c.second, c.gained) for c in comparison.classes] == [
        ("n1", "name 1", 10, 60, 100, 4),
        ("n2", "name 2", 10, 100, 100, 0),
        ("n3", "name 3", 10, 90, 90, 0),
        ("n0", "name 0", 10, 100, 80, -2),
    ]
    assert [d.path for d in comparison.differing] == [f"{i:03d}.png" for i in (8, 9, 10, 11, 12, 13, 39)]
    with (tmp_path / "out" / "differing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {"truth_name": "name 3", "first_name": "name 0", "second_name": "name 1"}
    assert rows[-1] == {"path": "039.png", "truth": "n3", "first": "n0", "second": "n1"} | names
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["p_value"] == comparison.p_value and len(written["differing"]) == 7


def test_the_class_tables_are_sorted_by_change(tmp_path):
    second = [1] * 3 + [0] * 7 + [1] * 10 + [3] + [2] * 9 + [3] * 10
    tables = list(compare(write_run(tmp_path / "a", FIRST, TRUTH), write_run(tmp_path / "b", second, TRUTH)).tables())
    columns = {table.title: list(table.columns[0].cells) for table in tables}
    assert columns["classes with the largest gains"] == ["n1", "n3"]
    assert columns["classes with the largest losses"] == ["n0", "n2"]


def test_the_tables_show_full_settings_and_class_names(tmp_path):
    """Settings are not shortened, and a class that is predicted but has no images has a name."""
    one, other = write_run(tmp_path / "a", FIRST[:20], TRUTH[:20]), write_run(tmp_path / "b", [3] * 20, TRUTH[:20])
    for folder, network in ((one, "fcvit_b12 with 4 classes and a long story"), (other, "fcvit_b12 with 4 classes")):
        path = folder / "a-authors" / "metrics.json"
        figures = json.loads(path.read_text()) | {"network": network, "weights_sha256": network[::-1] * 2}
        path.write_text(json.dumps(figures | {"predicted": {"n3": "name 3"}}))
    tables = list(compare(one, other).tables())
    cells = {table.title: [list(column.cells) for column in table.columns] for table in tables}
    assert cells["settings that differ"][1][1] == "fcvit_b12 with 4 classes and a long story"
    assert cells["settings that differ"][1][0] == 2 * "fcvit_b12 with 4 classes and a long story"[::-1]
    assert [column[0] for column in cells["images with different top-1 predictions"]] == [
        "000.png",
        "name 0 (n0)",
        "name 0 (n0)",
        "name 3 (n3)",
    ]


def test_different_settings_are_listed_and_different_classes_rejected(tmp_path):
    one, other = write_run(tmp_path / "a", FIRST, TRUTH), write_run(tmp_path / "b", SECOND, TRUTH)
    path = other / "a-authors" / "metrics.json"
    figures = json.loads(path.read_text())
    protocol = figures["protocol"] | {"preprocessing": figures["protocol"]["preprocessing"] | {"crop_fraction": 0.7}}
    path.write_text(json.dumps(figures | {"batch_size": 7, "protocol": protocol | {"name": "custom"}}))
    expected = {"protocol": ("authors", "custom"), "batch_size": ("1", "7"), "crop_fraction": ("1.0", "0.7")}
    assert compare(one, other).settings == expected
    path.write_text(json.dumps(figures | {"classes": 3}))
    with pytest.raises(DoesNotFit, match=r" 4 classes and .* 3; "):
        compare(one, other)


def test_duplicate_images_in_different_classes(tmp_path):
    """Duplicates are distinguished by their class, even if they are listed in a different order."""
    digests = ["0" * 16, "0" * 16]
    one = write_run(tmp_path / "a", [0, 0], [0, 3], digests=digests, names=["a.png", "b.png"])
    other = write_run(tmp_path / "b", [0, 0], [3, 0], digests=digests, names=["a.png", "b.png"])
    assert compare(one, other).differing == ()


def test_swapping_the_results_only_changes_the_sign(tmp_path):
    one, other = write_run(tmp_path / "a", FIRST, TRUTH), write_run(tmp_path / "b", SECOND, TRUTH)
    forward, backward = compare(one, other), compare(other, one)
    assert (forward.difference, forward.interval) == (
        -backward.difference,
        (-backward.interval[1], -backward.interval[0]),
    )
    assert forward.p_value == backward.p_value


def test_images_are_matched_by_content_not_by_name(tmp_path):
    """Names and order differ, as between a tar and a folder. Two of the images are duplicates."""
    digests = [f"{max(i, 1):016x}" for i in range(40)]
    order = list(reversed(range(40)))
    one = write_run(tmp_path / "a", FIRST, TRUTH, digests=digests)
    other = write_run(
        tmp_path / "b",
        [FIRST[i] for i in order],
        [TRUTH[i] for i in order],
        digests=[digests[i] for i in order],
        names=[f"val/{i}.png" for i in range(40)],
    )
    assert compare(one, other).differing == ()


def test_results_on_different_images_are_rejected(tmp_path):
    one = write_run(tmp_path / "a", FIRST, TRUTH)
    fewer = write_run(tmp_path / "b", FIRST[:39], TRUTH[:39])
    with pytest.raises(DoesNotFit, match=r" 1 .* first .* 0 .* second.* 039.png"):
        compare(one, fewer)
    others = write_run(tmp_path / "c", FIRST, TRUTH, digests=[f"{i + 1:016x}" for i in range(40)])
    with pytest.raises(DoesNotFit, match=r" 1 .* first .* 1 .* second"):
        compare(one, others)
    renamed = write_run(tmp_path / "d", FIRST, [3, *TRUTH[1:]])
    with pytest.raises(DoesNotFit, match=r"000.png: .* n0 in .* n3 in "):
        compare(one, renamed)


def test_arguments_that_are_not_two_results_are_rejected(tmp_path):
    one = write_run(tmp_path / "a", FIRST, TRUTH)
    with pytest.raises(UnreadableFile, match=r"metrics.json .*finished run of fcvit eval"):
        compare(one, tmp_path)
    with pytest.raises(UsageError, match=r"a-authors: .*two different results"):
        compare(one, one / "a-authors")
    shutil.copytree(one / "a-authors", one / "b-authors")
    with pytest.raises(UsageError, match=r"several results; .*a-authors, .*b-authors"):
        compare(one, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.json", "predictions.csv"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b'"path"\n1,2,3\n', b"[" * 100_000])
def test_damaged_results_are_rejected(tmp_path, name, content):
    one, other = write_run(tmp_path / "a", FIRST, TRUTH), write_run(tmp_path / "b", SECOND, TRUTH)
    (other / "a-authors" / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match="damaged"):
        compare(one, other)


def test_truncated_predictions_are_rejected(tmp_path):
    one, other = write_run(tmp_path / "a", FIRST, TRUTH), write_run(tmp_path / "b", SECOND, TRUTH)
    path = other / "a-authors" / "predictions.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(UnreadableFile, match="37 rows for 40 images"):
        compare(one, other)
