"""Convert, verify, evaluate and predict with small included checkpoints and real images, without internet access.

`scripts/make_digits_checkpoint.py` trained the classifier on scikit-learn's handwritten digits and wrote it in the
format of the authors' training script. The logits of PyTorch were recorded at the same time. If PyTorch is installed,
they are computed again. `scripts/make_nuclei_checkpoint.py` trained the segmentation network on microscope images.
"""

import dataclasses
import importlib.resources
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from fcvit import run_folder as runs
from fcvit.commands.convert import Conversion, convert
from fcvit.commands.evaluate import evaluate
from fcvit.commands.options import Output
from fcvit.data.classes import digits
from fcvit.data.transforms.preprocess import decode, normalize, preprocess
from fcvit.errors import NumbersDisagree
from fcvit.evaluation.results import Evaluation
from fcvit.frameworks import INSTALL, import_framework, installed
from fcvit.inference.check import compute
from fcvit.inference.engines import PaddleEngine
from fcvit.models.variants import resolve_preprocessing
from fcvit.report.image_grid import Tile, image_grid, png
from fcvit.tasks.classification.prediction import Prediction, rank
from fcvit.verification.equivalence import FLOAT64_LIMIT, RATIO_LIMIT, error_ratio, float64_difference
from fcvit.weights.reading import Weights, read_weights

CHECKPOINT, HELD_OUT = "digits.pth.tar", "digits_held_out.npz"
SEGMENTER, NUCLEI = "nuclei.safetensors", "nuclei.tar"
SEGMENTATION = "segmentation.png"
_PARTS = ("conversion", "evaluation", "segmentation")  # written to summary.json with their own fields
_TILES = 24  # images in the picture


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """The result of a quickstart. All figures of the classifier refer to the same held-out images.

    Attributes:
        conversion: The conversion of the included checkpoint, with a verification if PyTorch is installed.
        evaluation: The evaluation with Paddle.
        torch_side: Source of the PyTorch logits: "computed now" or "recorded".
        torch_top1: Top-1 accuracy of PyTorch in percent.
        agreement: Images with the same top-1 class in both frameworks, in percent.
        max_difference: Largest absolute difference of the float32 logits.
        mean_difference: Mean absolute difference of the float32 logits.
        float64_difference: Largest difference of the float64 logits, divided by their standard deviation.
        error_ratio: float32 error ratio of Paddle to PyTorch.
        predictions: The three best classes of every held-out image.
        segmentation: The evaluation of the segmentation network with Paddle, or None if OpenCV is not installed.
        sheet: Path of the picture with predictions.
        folder: Folder with all files.
        seconds: Total time.
    """

    conversion: Conversion
    evaluation: Evaluation
    torch_side: str
    torch_top1: float
    agreement: float
    max_difference: float
    mean_difference: float
    float64_difference: float
    error_ratio: float
    predictions: tuple[tuple[Path, list[Prediction]], ...]
    segmentation: Evaluation | None
    sheet: Path
    folder: Path
    seconds: float

    def __repr__(self) -> str:
        return f"<Quickstart in {self.folder}>"

    def tables(self) -> Iterator[Any]:
        """Yield tables of the conversion, of Paddle compared with PyTorch, and of some predictions."""
        from fcvit.report.tables import predictions, table, verdict

        yield from itertools.islice(self.conversion.tables(), 2)
        ours = self.evaluation.results[0]
        right = ("PyTorch", "Paddle")
        close = verdict(self.float64_difference <= FLOAT64_LIMIT, f"{FLOAT64_LIMIT:.0e}")
        near = verdict(self.error_ratio <= RATIO_LIMIT, f"{RATIO_LIMIT:.0f}")
        source = f"PyTorch logits: {self.torch_side}"
        rows = [
            ("top-1 accuracy", f"{self.torch_top1:.2f}%", f"{ours.top1:.2f}%", source),
            ("same prediction", "", f"{self.agreement:.2f}%"),
            ("largest logit difference, float32", "", f"{self.max_difference:.2e}"),
            ("mean logit difference, float32", "", f"{self.mean_difference:.2e}"),
            ("largest float64 difference / std", "", f"{self.float64_difference:.1e}", close),
            ("float32 error ratio", "", f"{self.error_ratio:.2f}", near),
        ]
        yield table("", *right, "", rows=rows, title=f"the same {ours.images} held-out images", right=right)
        yield predictions([(path, [dataclasses.asdict(row) for row in rows]) for path, rows in self.predictions[:3]])
        if self.segmentation is None:
            yield f"Segmentation is not shown, because OpenCV is not installed: {INSTALL['cv2']}"
        else:
            yield from itertools.islice(self.segmentation.tables(), 1)
        yield "The small networks were trained on handwritten digits and nuclei. They only show that all steps work."
        yield f"Pictures: {self.sheet}"
        if self.segmentation is not None:
            yield f"          {self.folder / SEGMENTATION}"
        yield f"All files: {self.folder}   ({self.seconds:.0f} s)"

    @property
    def passed(self) -> bool:
        return self.float64_difference <= FLOAT64_LIMIT and self.error_ratio <= RATIO_LIMIT


def quickstart(folder: Annotated[Path | None, Output] = None) -> Quickstart:
    """Convert, verify, evaluate and predict with small included networks and real images. Needs no internet access.

    Args:
        folder: Folder of the run (default: runs/quickstart, or the first free one of runs/quickstart-2, ...).

    Raises:
        NumbersDisagree: Paddle and PyTorch compute different outputs.
        MissingExtra: Paddle is not installed.
    """
    began = time.perf_counter()
    import_framework("paddle")
    with runs.run_folder(folder, "quickstart") as folder:
        source = folder / CHECKPOINT
        with importlib.resources.as_file(importlib.resources.files("fcvit") / "assets") as assets:
            shutil.copyfile(assets / CHECKPOINT, source)
            with np.load(assets / HELD_OUT, allow_pickle=False) as archive:
                held_out = {name: archive[name] for name in archive.files}
        paths = write_images(held_out["images"], held_out["labels"], folder / "held-out")
        converted = folder / "fcvit_digits.safetensors"
        conversion = convert(source, converted, classes=digits())
        if conversion.verification is None:
            note = "PyTorch is not installed: the outputs are compared with its recorded logits below"
            conversion = dataclasses.replace(conversion, notes=(note,))
        weights = read_weights(converted)
        evaluation = evaluate(
            converted, folder / "held-out", engines="paddle", batch_size=60, device="cpu", folder=folder / "eval"
        )
        preprocessing = resolve_preprocessing(None, weights.preprocessing, weights.spec.variant)
        batch = np.stack([preprocess(path, preprocessing) for path in paths])
        logits = PaddleEngine(weights, preprocessing, "cpu")(batch)
        predictions = tuple(zip(paths, rank(logits, digits(), 3), strict=True))
        exact, torch_32, torch_side = torch_logits(read_weights(source), batch, held_out)
        (ours_64,) = compute("paddle", weights, normalize(batch, preprocessing).astype(np.float64))
        difference = np.abs(logits.astype(np.float64) - torch_32)
        result = Quickstart(
            conversion,
            evaluation,
            torch_side,
            100 * float((torch_32.argmax(1) == held_out["labels"]).mean()),
            100 * float((torch_32.argmax(1) == logits.argmax(1)).mean()),
            float(difference.max()),
            float(difference.mean()),
            float64_difference(ours_64, exact),
            error_ratio(logits, torch_32, exact),
            predictions,
            segment(folder) if installed("cv2") else None,
            folder / "predictions.png",
            folder,
            time.perf_counter() - began,
        )
        _draw(predictions, held_out["labels"], result.sheet)
        fields = {name: value for name, value in vars(result).items() if name not in _PARTS}
        second = result.segmentation.to_json() if result.segmentation else None
        parts = {
            "conversion": dataclasses.asdict(conversion),
            "evaluation": evaluation.to_json(),
            "segmentation": second,
        }
        table = {"predictions": f"eval/{evaluation.results[0].name}/predictions.csv"}
        runs.write_json(folder / "summary.json", fields | parts | table)
        if not result.passed:
            raise NumbersDisagree(
                f"Paddle and PyTorch differ on the held-out digits: "
                f"float64 difference {result.float64_difference:.1e}, float32 error ratio {result.error_ratio:.2f}"
            )
    return dataclasses.replace(result, seconds=time.perf_counter() - began)


def segment(folder: Path) -> Evaluation:
    """Evaluate the included segmentation network on its held-out images in a folder, and draw all of them."""
    with importlib.resources.as_file(importlib.resources.files("fcvit") / "assets") as assets:
        for name in (SEGMENTER, NUCLEI):
            shutil.copyfile(assets / name, folder / name)
    run = folder / "eval-segmentation"
    evaluation = evaluate(folder / SEGMENTER, folder / NUCLEI, engines="paddle", device="cpu", folder=run)
    shutil.copyfile(run / evaluation.results[0].name / "worst.png", folder / SEGMENTATION)
    return evaluation


def write_images(images: np.ndarray, labels: np.ndarray, folder: Path) -> list[Path]:
    """Write gray images (N, 8, 8) as PNG files into class folders, and return their paths in the same order."""
    paths = []
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        paths.append(path)
    return paths


def torch_logits(
    source: Weights, batch: np.ndarray, record: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return PyTorch's logits for uint8 images in float64 and float32, and "computed now" or "recorded"."""
    if not installed("torch"):
        return record["logits_float64"], record["logits_float32"], "recorded"
    images = normalize(batch, resolve_preprocessing(None, source.preprocessing, source.spec.variant))
    exact, single = (compute("torch", source, images.astype(dtype))[0] for dtype in ("float64", "float32"))
    return exact, single, "computed now"


def _draw(predictions: Sequence[tuple[Path, list[Prediction]]], labels: np.ndarray, sheet: Path) -> None:
    """Draw a grid of predictions: first the mistakes, then correct predictions."""
    rows = [(path, ranked[0], str(truth)) for (path, ranked), truth in zip(predictions, labels, strict=True)]
    rows.sort(key=lambda row: row[1].id == row[2])
    wrong = sum(best.id != truth for _, best, truth in rows)
    tiles = [Tile(decode(path), best.id, best.probability, truth) for path, best, truth in rows[:_TILES]]
    title = f"fcvit_digits on held-out handwritten digits: {wrong} of {len(labels)} wrong (shown first)"
    runs.write_bytes(sheet, png(image_grid(tiles, title)))
