"""Test the folders, lists, class lists and archives in docs/guides/data.md, with the results that the page shows."""

import re
import subprocess
from pathlib import Path

import pytest

from conftest import SMALL
from fcvit.commands.check_data import check_data
from fcvit.data.class_folders import read_dataset
from fcvit.data.class_indices import Assignment
from fcvit.data.classes import read_classes
from fcvit.data.folders import ENDINGS, SYSTEM
from fcvit.data.training_splits import find_splits
from fcvit.errors import FcvitError
from fcvit.tasks.classification.recipe import ClassificationRecipe

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "data.md").read_text("utf-8")
BLOCKS = {
    kind: [
        (match[1], match[2]) for match in re.finditer(rf"^```\w+ {kind}\n(.*?)((?:^→ [^\n]*\n)+)```", PAGE, re.M | re.S)
    ]
    for kind in ("tree", "list", "classes", "archive")
}


def make(root, names):
    """Create files that contain their own names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def read(command, data):
    """Return the result of a command in the notation of the page."""
    try:
        if command == "eval":
            images = read_dataset(data, None, None, 2)
        elif command == "finetune":
            splits = find_splits(ClassificationRecipe(**{**SMALL, "data": str(data)}), None)
            images, val = splits.train, splits.val
            validation = f" and {len(val)} validation" if val is not None else ""
            return f"{len(images)} training{validation} images of {', '.join(c.id for c in splits.classes)}"
        else:
            return "splits " + ", ".join(split.name for split in check_data(data, workers=0).splits)
    except FcvitError as error:
        return f"rejected: {error}"
    return f"{len(images)} images of {', '.join(images.mapping)}"


def check(expectations):
    for expectation in expectations.splitlines():
        command, data, expected = re.fullmatch(r"→ (\S+) (\S+): (.*)", expectation).groups()
        text = read(command, Path(data))
        if expected.startswith("rejected: "):
            assert text.startswith("rejected: ") and expected.removeprefix("rejected: ") in text
        else:
            assert text == expected


@pytest.fixture(autouse=True)
def any_number_of_classes(monkeypatch, tmp_path):
    """Accept any number of classes, because these tests do not use a model."""
    from fcvit.data import class_folders as dataset

    def assign(labels, classes, count, what):
        return Assignment({label: index for index, label in enumerate(labels)}, what)

    monkeypatch.setattr(dataset, "assign_classes", assign)
    monkeypatch.setattr(dataset, "assign_labels", lambda labels, *_: assign(labels, None, 0, ""))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("tree", "expectations"), BLOCKS["tree"])
def test_folders_give_the_documented_results(tree, expectations, tmp_path):
    make(tmp_path, tree.splitlines())
    check(expectations)


@pytest.mark.parametrize(("text", "expectations"), BLOCKS["list"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_lists_give_the_documented_labels(text, expectations, encoding, tmp_path):
    pairs = re.findall(r"→ (.*) is (.*)", expectations)
    make(tmp_path / "data", [name for name, _ in pairs])
    (tmp_path / "list").write_text(text, encoding)
    images = read_dataset(tmp_path / "data", tmp_path / "list", None, 1)
    assert dict(zip(images.names, images.labels, strict=True)) == {name: images.mapping[label] for name, label in pairs}


@pytest.mark.parametrize(("text", "expectations"), BLOCKS["classes"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_class_lists_give_the_documented_classes(text, expectations, encoding, tmp_path):
    (tmp_path / "classes").write_text(text, encoding)
    read = read_classes(tmp_path / "classes")
    lines = [f"→ {i} is {c.name}" + (f" ({c.id})" if c.id != c.name else "") for i, c in enumerate(read)]
    assert lines == expectations.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "expectations"), BLOCKS["archive"])
def test_archives_give_the_documented_results(command, expectations, tmp_path):
    make(tmp_path, [f"flowers/{name}" for name in ("rose/1.jpg", "rose/2.jpg", "tulip/3.png", "tulip/4.png")])
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    check(expectations)


def test_the_page_contains_all_examples_image_endings_and_system_names():
    assert [len(blocks) for blocks in BLOCKS.values()] == [5, 11, 9, 7]
    assert all(f"`{ending}`" in PAGE for ending in ENDINGS)
    assert all(f"`{name.strip()}`" in PAGE.lower() for name in SYSTEM)
