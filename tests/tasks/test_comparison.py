"""Two results over the same images: what differs, and what may not be compared."""

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


def lane(folder, predicted, truth, *, digests=None, names=None, name="a-authors"):
    """A result as `fcvit eval` writes it, whose best classes are these."""
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


def test_a_comparison_by_hand(tmp_path):
    """Class 1 gains four images, class 0 loses two, one is wrong in another way."""
    found = compare(
        lane(tmp_path / "a", FIRST, TRUTH), lane(tmp_path / "b", SECOND, TRUTH) / "a-authors", folder=tmp_path / "out"
    )
    assert (found.images, found.top1) == (40, (87.5, 92.5))
    assert (found.difference, found.only_first, found.only_second) == (5, 2, 4)
    assert found.interval[0] < 5 < found.interval[1]
    assert found.p_value == pytest.approx(scipy.stats.binomtest(2, 6).pvalue)
    assert [(c.id, c.name, c.images, c.first, c.second, c.gained) for c in found.classes] == [
        ("n1", "name 1", 10, 60, 100, 4),
        ("n2", "name 2", 10, 100, 100, 0),
        ("n3", "name 3", 10, 90, 90, 0),
        ("n0", "name 0", 10, 100, 80, -2),
    ]
    assert [d.path for d in found.differing] == [f"{i:03d}.png" for i in (8, 9, 10, 11, 12, 13, 39)]
    with (tmp_path / "out" / "differing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {"truth_name": "name 3", "first_name": "name 0", "second_name": "name 1"}
    assert rows[-1] == {"path": "039.png", "truth": "n3", "first": "n0", "second": "n1"} | names
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["p_value"] == found.p_value and len(written["differing"]) == 7


def test_the_tables_begin_with_what_changed_most(tmp_path):
    second = [1] * 3 + [0] * 7 + [1] * 10 + [3] + [2] * 9 + [3] * 10
    tables = list(compare(lane(tmp_path / "a", FIRST, TRUTH), lane(tmp_path / "b", second, TRUTH)).tables())
    columns = {table.title: list(table.columns[0].cells) for table in tables}
    assert columns["classes that gained most"] == ["n1", "n3"]
    assert columns["classes that lost most"] == ["n0", "n2"]


def test_the_tables_show_texts_whole_and_classes_by_name(tmp_path):
    """Settings are not cut, and a class that is only ever predicted has its name too."""
    one, other = lane(tmp_path / "a", FIRST[:20], TRUTH[:20]), lane(tmp_path / "b", [3] * 20, TRUTH[:20])
    for folder, network in ((one, "fcvit_b12 with 4 classes and a long story"), (other, "fcvit_b12 with 4 classes")):
        path = folder / "a-authors" / "metrics.json"
        figures = json.loads(path.read_text()) | {"network": network, "weights_sha256": network[::-1] * 2}
        path.write_text(json.dumps(figures | {"predicted": {"n3": "name 3"}}))
    tables = list(compare(one, other).tables())
    cells = {table.title: [list(column.cells) for column in table.columns] for table in tables}
    assert cells["settings that differ"][1][1] == "fcvit_b12 with 4 classes and a long story"
    assert cells["settings that differ"][1][0] == 2 * "fcvit_b12 with 4 classes and a long story"[::-1]
    assert [column[0] for column in cells["images on which they differ"]] == [
        "000.png",
        "name 0 (n0)",
        "name 0 (n0)",
        "name 3 (n3)",
    ]


def test_other_settings_are_named_and_another_task_is_refused(tmp_path):
    one, other = lane(tmp_path / "a", FIRST, TRUTH), lane(tmp_path / "b", SECOND, TRUTH)
    path = other / "a-authors" / "metrics.json"
    figures = json.loads(path.read_text())
    protocol = figures["protocol"] | {"preprocessing": figures["protocol"]["preprocessing"] | {"crop_fraction": 0.7}}
    path.write_text(json.dumps(figures | {"batch_size": 7, "protocol": protocol | {"name": "custom"}}))
    named = {"protocol": ("authors", "custom"), "batch_size": ("1", "7"), "crop_fraction": ("1.0", "0.7")}
    assert compare(one, other).settings == named
    path.write_text(json.dumps(figures | {"classes": 3}))
    with pytest.raises(DoesNotFit, match=r"tells 4 classes apart and .* 3: not the same task"):
        compare(one, other)


def test_the_same_file_in_two_classes(tmp_path):
    """Duplicates are told apart by their class, also where a list names them in another order."""
    digests = ["0" * 16, "0" * 16]
    one = lane(tmp_path / "a", [0, 0], [0, 3], digests=digests, names=["a.png", "b.png"])
    other = lane(tmp_path / "b", [0, 0], [3, 0], digests=digests, names=["a.png", "b.png"])
    assert compare(one, other).differing == ()


def test_the_order_of_the_two_only_turns_the_sign(tmp_path):
    one, other = lane(tmp_path / "a", FIRST, TRUTH), lane(tmp_path / "b", SECOND, TRUTH)
    there, back = compare(one, other), compare(other, one)
    assert (there.difference, there.interval) == (-back.difference, (-back.interval[1], -back.interval[0]))
    assert there.p_value == back.p_value


def test_images_are_matched_by_content_not_by_name(tmp_path):
    """A tar and a folder of the same images, in another order; two of them are the same file twice."""
    digests = [f"{max(i, 1):016x}" for i in range(40)]
    turned = list(reversed(range(40)))
    one = lane(tmp_path / "a", FIRST, TRUTH, digests=digests)
    other = lane(
        tmp_path / "b",
        [FIRST[i] for i in turned],
        [TRUTH[i] for i in turned],
        digests=[digests[i] for i in turned],
        names=[f"val/{i}.png" for i in range(40)],
    )
    assert compare(one, other).differing == ()


def test_runs_over_different_images_are_refused(tmp_path):
    one = lane(tmp_path / "a", FIRST, TRUTH)
    fewer = lane(tmp_path / "b", FIRST[:39], TRUTH[:39])
    with pytest.raises(DoesNotFit, match=r"1 are only in the first, 0 only in the second, such as 039.png"):
        compare(one, fewer)
    others = lane(tmp_path / "c", FIRST, TRUTH, digests=[f"{i + 1:016x}" for i in range(40)])
    with pytest.raises(DoesNotFit, match="1 are only in the first, 1 only in the second"):
        compare(one, others)
    renamed = lane(tmp_path / "d", FIRST, [3, *TRUTH[1:]])
    with pytest.raises(DoesNotFit, match=r"000.png is n0 in .* and n3 in .*: other classes"):
        compare(one, renamed)


def test_what_is_no_result(tmp_path):
    one = lane(tmp_path / "a", FIRST, TRUTH)
    with pytest.raises(UnreadableFile, match="expected a finished run of fcvit eval"):
        compare(one, tmp_path)
    with pytest.raises(UsageError, match="expected two results"):
        compare(one, one / "a-authors")
    shutil.copytree(one / "a-authors", one / "b-authors")
    with pytest.raises(UsageError, match=r"holds several results; name one of them: .*a-authors, .*b-authors"):
        compare(one, tmp_path)


@pytest.mark.parametrize("name", ["metrics.json", "predictions.csv"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b'"path"\n1,2,3\n', b"[" * 100_000])
def test_damaged_results(tmp_path, name, content):
    one, other = lane(tmp_path / "a", FIRST, TRUTH), lane(tmp_path / "b", SECOND, TRUTH)
    (other / "a-authors" / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match="damaged"):
        compare(one, other)


def test_a_cut_table_is_noticed(tmp_path):
    one, other = lane(tmp_path / "a", FIRST, TRUTH), lane(tmp_path / "b", SECOND, TRUTH)
    path = other / "a-authors" / "predictions.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(UnreadableFile, match="37 rows for 40 images"):
        compare(one, other)
