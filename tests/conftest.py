"""What several test files share: goldens, synthetic weights, small files, missing extras."""

import hashlib
import json
import logging
import math
import os
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcvit.frameworks import installed
from fcvit.models.spec import ModelSpec, is_counter
from fcvit.models.variants import VARIANTS
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.weights import pdparams, torch_file
from fcvit.weights.synthetic import synthetic_tensors

# The networks here are small and the tests run side by side: threads would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has Ctrl-C ignored, and so have what they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Exports for engines and compiled operators, under keys that change with their sources; not the user's own.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "home")

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = ("fcvit_tiny", "fcvit_b12", "fcvit_b24", "fcvit_b48")
DIGITS = ModelSpec(VARIANTS["fcvit_digits"], 10)

needs_paddle = pytest.mark.skipif(not installed("paddle"), reason="PaddlePaddle is not installed")
needs_torch = pytest.mark.skipif(not installed("torch"), reason="PyTorch is not installed")


def pytest_collection_modifyitems(items):
    if os.environ.get("CI") == "true" or os.environ.get("FCVIT_ALL_TESTS") == "1":
        return
    for item in items:
        if item.get_closest_marker("ci"):
            item.add_marker(pytest.mark.skip(reason="takes long: runs where CI=true or FCVIT_ALL_TESTS=1"))


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """A test that leaves a handler changes what a signal does in the tests after it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def notes():
    """What the package logs for people, in order."""
    logger, texts = logging.getLogger("fcvit"), []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield texts
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def no_charts(monkeypatch):
    """As if the extra `report` were not installed: charts take a second for each result."""
    hide_charts(monkeypatch)


def hide_charts(monkeypatch):
    from fcvit.errors import MissingExtra
    from fcvit.report import page

    def missing():
        raise MissingExtra("matplotlib is not installed; install it with: pip install 'fcvit[report]'")

    monkeypatch.setattr(page, "require_report", missing)


def golden_json(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text("utf-8"))


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def image_by_rule(width: int, height: int) -> Image.Image:
    """The rule that preprocess_synthetic.json states."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"image/{width}x{height}".encode())))
    blocks = generator.integers(0, 256, (math.ceil(height / 8), math.ceil(width / 8), 3), np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width].copy())


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.fixture(scope="session")
def digits_tensors() -> dict[str, np.ndarray]:
    """Lively weights of the small variant: authors' names, PyTorch's layout."""
    return synthetic_tensors(DIGITS)


@pytest.fixture
def digits_pth(tmp_path: Path, digits_tensors) -> Path:
    """The same as a PyTorch file."""
    return write_pth(tmp_path / "digits.pth", digits_tensors)


def write_pth(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    with path.open("wb") as file:
        torch_file.write_zip(file, tensors)
    return path


def write_pdparams(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    with path.open("wb") as file:
        pdparams.write(file, tensors)
    return path


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


def training_checkpoint(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """`state_dict` and `state_dict_ema` (every number one higher) in one file, beside epoch and args."""
    averaged = {name: t if is_counter(name) else t + np.float32(1) for name, t in tensors.items()}
    args = b"cargparse\nNamespace\n)\x81}" + _text("lr") + b"G" + struct.pack(">d", 1e-3) + b"sb"
    entries = {
        "epoch": b"K\x09",
        "state_dict": torch_file.state_dict_opcodes(tensors),
        "state_dict_ema": torch_file.state_dict_opcodes(averaged, first=len(tensors)),
        "args": args,
    }
    pickle = b"\x80\x02}(" + b"".join(_text(name) + value for name, value in entries.items()) + b"u."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        for index, tensor in enumerate([*tensors.values(), *averaged.values()]):
            archive.writestr(f"archive/data/{index}", tensor.tobytes())
    return path


def classifier_loss(outputs, targets):
    import paddle

    from fcvit.tasks.classification.training import soft_cross_entropy

    return {"loss": soft_cross_entropy(outputs, paddle.to_tensor(targets))}


# A network and a recipe that train in a second.
SMALL = {
    "variant": "fcvit_digits",
    "options": {"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "mlp_ratios": [1, 1, 1, 1]},
    "epochs": 3,
    "warmup_epochs": 1,
    "cooldown_epochs": 0,
    "lr": 5e-3,
    "lr_batch": 0,
    "batch_size": 8,
    "lr_update": "step",
}


def write_squares(folder: Path, classes: dict[str, int], size: int = 36) -> Path:
    """Noise with a bright square, its place told by the class; as many images of each class as stated."""
    generator = np.random.default_rng(len(classes))
    for place, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 90, (size, size, 3), np.uint8)
            pixels[place * 8 : place * 8 + 10, place * 8 : place * 8 + 10] += 160
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.png")
    return folder


@pytest.fixture
def squares(tmp_path):
    """20 training and 6 validation images of two classes."""
    write_squares(tmp_path / "images" / "train", {"left": 11, "right": 9})
    write_squares(tmp_path / "images" / "val", {"left": 3, "right": 3})
    return tmp_path / "images"


@pytest.fixture
def curves():
    """Draw curves, which takes longer than the small network trains."""


@pytest.fixture
def small(squares, request, monkeypatch):
    """A recipe that trains in a second."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("fcvit.training.log.training_curves", lambda *_: b"")

    def build(**fields) -> ClassificationRecipe:
        return ClassificationRecipe(**{**SMALL, "data": str(squares), **fields})

    return build
