"""The code blocks of the documentation run, its command lines are valid, and its messages are the real ones."""

import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import needs_paddle, needs_torch, training_checkpoint
from detection_goldens import synthetic_weights
from fcvit.cli import app, main
from fcvit.commands.quickstart import write_images
from fcvit.errors import INTERRUPTED, FcvitError
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.weights.writing import write_weights

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*/*.md"))]}
DIGITS = ROOT / "src" / "fcvit" / "assets" / "digits.pth.tar"

# Options that make the commands of the pages short and repeatable. They replace the same options of a page.
SHORT = {
    "convert": {"--overwrite": ""},
    "export": {"--overwrite": ""},
    "train": {"--epochs": "1", "--warmup-epochs": "0", "--workers": "0", "--batch-size": "10"},
    "finetune": {"--epochs": "1", "--workers": "0"},
    "bench": {"--rounds": "1", "--engine": "onnxruntime", "--batch-size": "1"},
    "head-stats": {"--max-images": "2"},
    "faithfulness": {"--max-images": "10"},
}
SHORT_STREETS = {"--scale": "32,32", "--neck-channels": "8", "--head-channels": "8"}
SHORT_RECIPES = {"--variant": "fcvit_digits", "--input-size": "32", "--precision": "float32"}


# Pages whose blocks take more than 10 seconds of a core. They run in CI.
LONG = {"README", "similarity", "export", "evaluate", "detection", "train"}


def marked(page):
    return pytest.param(page, marks=[pytest.mark.ci] if page in LONG else [])


def blocks(page, language):
    """Return the contents of a page's blocks in this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


def command_lines(text, prompt=""):
    """Return the words of each `fcvit` command in a block. A backslash continues a line."""
    lines = text.replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith(f"{prompt}fcvit "):
            yield shlex.split(line.removeprefix(f"{prompt}fcvit "), comments=True)


def shortened(words):
    """Return a command line with the options of `SHORT`."""
    options = dict(SHORT.get(words[0], {}))
    if words[0] == "train" and len(words) > 1 and words[1].startswith("fcvit_"):
        options |= SHORT_RECIPES
    if words[0] == "train" and {"--resume", "--preview"} & {*words}:
        options = {}
    if words[0] == "finetune" and "streets" in words:
        options |= SHORT_STREETS
    for name, value in options.items():
        if name in words and value:
            words[words.index(name) + 1] = value
        elif name not in words:
            words += [name, value] if value else [name]
    return words


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files that the pages name. All weights are those of the small digits network."""
    with np.load(DIGITS.with_name("digits_held_out.npz"), allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    order = np.argsort(labels, kind="stable")
    val, train = (order[np.isin(np.arange(len(order)) % 36, range(count))] for count in (3, 6))
    write_images(images[val], labels[val], tmp_path / "imagenet" / "val")
    write_images(images[train], labels[train], tmp_path / "imagenet" / "train")
    few = train[labels[train] < 2]
    write_images(images[few], np.array(["rose", "tulip"])[labels[few]], tmp_path / "flowers")
    photos = [*(tmp_path / "imagenet" / "val").glob("*/*.png")][:4]
    for root in ("ADEChallengeData2016", "streets"):
        for split in ("training", "validation"):
            for kind, pixels in (("images", images[0]), ("annotations", 1 + (images[0] > 99))):
                (tmp_path / root / kind / split).mkdir(parents=True)
                for name in ("1.png", "2.png"):
                    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / root / kind / split / name)
    colors = "index,name,red,green,blue\n0,road,128,64,128\n1,car,0,0,142\n"
    (tmp_path / "streets" / "classes.csv").write_text(colors)
    (tmp_path / "photos").mkdir()
    for path in photos:
        shutil.copy(path, tmp_path / "photos")
    Image.open(photos[0]).save(tmp_path / "cat.jpg")
    lines = [
        f"{path.relative_to(tmp_path / 'imagenet' / 'val').as_posix()} {path.parent.name}"
        for path in sorted((tmp_path / "imagenet" / "val").glob("*/*.png"))
    ]
    (tmp_path / "val_list.txt").write_text("\n".join(lines))
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(tmp_path / "imagenet" / "val", ".")
    monkeypatch.chdir(tmp_path)
    for name in ("fcvit_b12.pth.tar", "detector.pth"):
        shutil.copy(DIGITS, tmp_path / name)
    assert main(["convert", "fcvit_b12.pth.tar", "-o", "fcvit_b12.safetensors", "--no-verify", "-q"]) == 0
    options = MaskRCNNOptions(neck=8, rpn=8, box_channels=16, mask_channels=8)
    detector = synthetic_weights(ModelSpec(VARIANTS["fcvit_digits"], 3, "mask_rcnn", options))
    write_weights(tmp_path / "det.safetensors", detector)
    for name in ("a", "b"):
        shutil.copy("fcvit_b12.safetensors", f"{name}.safetensors")
    return tmp_path


@needs_paddle
@needs_torch
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fcvit.errors.FreshWeights")  # a backbone from a classifier
@pytest.mark.filterwarnings("ignore:No ccache found")  # a page imports Paddle before the package does
@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page, "bash") or blocks(page, "python")])
def test_the_code_blocks_of_a_page_run_in_order(page, workplace, monkeypatch, capsys):
    monkeypatch.setattr("fcvit.training.log.training_curves", lambda *_: b"")
    if "runs/quickstart" in PAGES[page]:
        assert main(["quickstart"]) == 0
    if "runs/eval" in PAGES[page]:
        assert main(shlex.split("eval --weights fcvit_b12.safetensors --data imagenet/val -o runs/eval")) == 0
    if "runs/train" in PAGES[page]:
        line = "train digits --data imagenet --epochs 1 --warmup-epochs 0 --batch-size 10 --workers 0 -o runs/train"
        assert main(shlex.split(line)) == 0
    names = {"__name__": "__main__"}
    for language, text in re.findall(r"^```(bash|python)\n(.*?)^```", PAGES[page], re.M | re.S):
        if language == "python":
            exec(compile(text.replace('"fcvit_b12"', '"fcvit_digits"'), f"{page}.md", "exec"), names)
            continue
        other = [line for line in text.splitlines() if line.strip() and not line.startswith(("fcvit ", "#", " "))]
        assert not other, "a bash block has only fcvit commands"
        for words in command_lines(text):
            assert main(shortened(words)) == 0, (words, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "troubleshooting"])
def test_the_command_lines_in_examples_of_output_are_valid(page):
    for text in blocks(page, "console"):
        for words in command_lines(text, "$ "):
            app.parse_args(words, exit_on_error=False, print_error=False)


@needs_paddle
@needs_torch
@pytest.mark.slow
def test_the_messages_in_troubleshooting_are_those_of_the_program(workplace, capsys, digits_tensors):
    training_checkpoint(workplace / "with_ema.pth.tar", digits_tensors)
    examples = re.findall(r"^\$ fcvit (.*)\n(fcvit: .*)\n", "".join(blocks("troubleshooting", "console")), re.M)
    assert len(examples) >= 10
    for line, message in examples:
        capsys.readouterr()
        assert main(shlex.split(line)) not in (0, FcvitError.exit_code)
        assert message in capsys.readouterr().err.replace(str(workplace), "/home/me").splitlines()


def test_the_exit_codes_in_troubleshooting_are_those_of_the_program():
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES["troubleshooting"], re.M)}
    own = {kind.exit_code for kind in [FcvitError, *FcvitError.__subclasses__()]}
    assert documented == own | {0, INTERRUPTED}


def test_every_environment_variable_that_the_code_reads_is_documented():
    pattern = re.compile(r"environ(?:\.get|\.setdefault)?[(\[]\"(\w+)\"")
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    read = {name for path in sources for name in pattern.findall(path.read_text("utf-8"))}
    missing = {name for name in read if f"`{name}`" not in PAGES["environment"]}
    assert len(read) > 8 and not missing


def test_every_public_name_is_in_the_api_reference():
    import fcvit

    listed = {*re.findall(r"(?:auto\w+|data):: (\w+)$", PAGES["api"], re.M)}
    from_errors = {"FcvitError", "FreshWeights"}  # automodule:: fcvit.errors
    assert listed | from_errors == {*fcvit.__all__}


@needs_paddle
@pytest.mark.ci
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its stored outputs are looked at by people; here it must run, and show pictures and no error."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
