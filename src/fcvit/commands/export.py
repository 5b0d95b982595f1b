"""Export a network for a runtime; reported only after the runtime computed the right numbers with it."""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from cyclopts import Parameter

from fcvit.commands.options import Ema, File, Flag, Output
from fcvit.data.folders import find_images
from fcvit.data.transforms.preprocess import preprocess
from fcvit.errors import NumbersDisagree, UsageError, counted
from fcvit.inference.check import Check, check_export, pixels, sample_images
from fcvit.inference.export import ENDINGS, RUNTIME, files, infer_format, write_export
from fcvit.inference.interface import Interface, output_names
from fcvit.inference.quantize import calibration_images, quantize
from fcvit.inference.runtimes import RUNTIMES
from fcvit.machine import available_threads
from fcvit.models.variants import resolve_preprocessing
from fcvit.run_folder import staged_files
from fcvit.verification.equivalence import RATIO_LIMIT
from fcvit.weights.reading import Weights, read_weights
from fcvit.weights.synthetic import has_near_zero_scale, synthetic_tensors

logger = logging.getLogger("fcvit")

Precision = Literal["float32", "int8"]


@dataclasses.dataclass(frozen=True)
class Export:
    """An export, and its check.

    Attributes:
        network: in words.
        files: the one for the runtime is the last.
        bytes: of all files.
        input: type and shape; None: free.
        outputs: their names.
        runtime: what it was run with; version in `fcvit doctor`.
        checks: float32 error ratio of the weights themselves, at each size; of int8 before it was quantized.
        synthetic: the same of an export of synthetic weights, where the file's own hide the blocks; else empty.
        seconds: to write, without the checks.
    """

    network: str
    format: str
    files: tuple[str, ...]
    bytes: int
    input: dict[str, Any]
    outputs: tuple[str, ...]
    runtime: str
    precision: str
    checks: tuple[Check, ...]
    synthetic: tuple[Check, ...]
    seconds: float

    def __repr__(self) -> str:
        return f"<Export {self.files[-1]}: {self.network}>"

    def tables(self) -> Iterator[Any]:
        """Show what was written, and how near its numbers are to exact ones."""
        from fcvit.report.tables import table, verdict

        shape = " x ".join("any" if side is None else str(side) for side in self.input["shape"])
        rows: list[Sequence[Any]] = [
            *(("written", path) for path in self.files),
            ("size", f"{self.bytes / 2**20:.1f} MiB, in {self.seconds:.1f} s"),
            ("takes", f"{self.input['type']}, {shape}"),
            ("gives", ", ".join(self.outputs)),
        ]
        for what, checks in (("", self.checks), ("synthetic weights, ", self.synthetic)):
            for check in checks:
                count, height, width = check.images
                where = f"{what}{counted(count, 'image')} of {height} x {width}, run by {self.runtime}"
                rows.append((f"error ratio ({check.yardstick})", verdict(check.passed, f"{RATIO_LIMIT}")))
                rows.append(("", f"{check.ratio:.2f}, largest difference {check.largest:.1e}; {where}"))
        if self.precision == "int8":
            note = "checked before it was quantized; fcvit eval --precision int8 measures what it costs"
            rows.append(("int8", note))
        yield table(rows=rows, title=f"{self.network} exported as {self.format}, {self.precision}")


def _size(value: Any) -> tuple[int, int] | None:
    """Return height and width from 224, "240x320" or a pair.

    Raises:
        UsageError: it is something else.
    """
    if value is None or isinstance(value, tuple):
        return value
    sides = str(value).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 1 <= int(side) <= 4096 for side in sides):
        raise UsageError(f"--size {value}: expected pixels from 1 to 4096, as in 224 or 240x320 (height x width)")
    return int(sides[0]), int(sides[-1])


def export(
    weights: Annotated[Any, Parameter()],
    output: Annotated[File, Output],
    format: Annotated[str | None, Parameter(name="--format", choices=tuple(ENDINGS))] = None,
    *,
    size: Annotated[Any, Parameter()] = None,
    dynamic: Flag = False,
    uint8: Flag = False,
    probabilities: Flag = False,
    precision: Precision = "float32",
    calibration: Annotated[File | None, Parameter(name="--calibrate")] = None,
    images: Annotated[list[str] | None, Parameter(negative=())] = None,
    preprocessing: Annotated[Any, Parameter(parse=False)] = None,
    ema: Ema = None,
    overwrite: Flag = False,
) -> Export:
    """Export a network for ONNX Runtime, Paddle Inference or OpenVINO, run there and checked before it is kept.

    Args:
        weights: A checkpoint of any format (in Python also weights in memory).
        output: The file for the runtime: .onnx, .json (paddle, with .pdiparams beside) or .xml (openvino, with .bin).
        format: onnx, paddle or openvino (default: by the output's ending).
        size: Image size, as in 224 or 240x320 (height x width; default: the weights' own).
        dynamic: Take images of any size (onnx, openvino).
        uint8: Take uint8 RGB images and normalize them inside.
        probabilities: Give probabilities instead of logits.
        precision: float32 (default), or int8 with --calibrate (onnx).
        calibration: Folder of images that int8 takes its scales from, such as training images.
        images: Image, folder or pattern to check with; may be given several times (default: digits of the package).
        preprocessing: another one than the weights'.
        overwrite: Replace the output if it already exists.

    Raises:
        UnreadableFile, UsageError, DoesNotFit: a file or an option.
        MissingExtra: a package that writes or runs the format is not installed.
        BadImages: an image cannot be read.
        NumbersDisagree: the runtime computes other numbers than the weights say; nothing is written.
    """
    size, paths = _size(size), find_images(images) if images else ()
    path = Path(output)
    target: str = format or infer_format(path)
    names = files(path, target)
    if precision not in get_args(Precision) or (precision == "int8" and target != "onnx"):
        raise UsageError(f"--precision {precision}: expected float32, or int8 with --format onnx")
    if (precision == "int8") != (calibration is not None):
        raise UsageError("--precision int8 and --calibrate FOLDER go together: its scales come from your images")
    if dynamic and size is not None:
        raise UsageError("--dynamic takes any size; leave out --size")
    if dynamic and precision == "int8":
        raise UsageError("--precision int8 is calibrated for one size; leave out --dynamic")
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    chosen = resolve_preprocessing(preprocessing, read.preprocessing, read.spec.variant)
    size = size or (chosen.input_size, chosen.input_size)
    interface = Interface(None if dynamic else size, uint8, probabilities, chosen)
    output_names(read.spec, probabilities)
    if paths:
        square = dataclasses.replace(chosen, input_size=max(size))
        batch = np.stack([preprocess(image, square) for image in paths])[:, :, : size[0], : size[1]]
    else:
        batch = sample_images(read.spec, size)
    if precision == "int8" and size[0] != size[1]:
        raise UsageError("--precision int8 is calibrated on square images; leave out --size or give one number")
    scales = None
    if calibration is not None:
        scales = calibration_images(Path(calibration), dataclasses.replace(chosen, input_size=size[0]))
    with staged_files(names, overwrite) as folder:
        began = time.perf_counter()
        write_export(read, interface, target, folder / path.name)
        seconds = time.perf_counter() - began
        logger.info(f"checking {path.name} with {RUNTIME[target]}")
        checks = _checks(read, interface, target, folder / path.name, batch)
        synthetic_checks: tuple[Check, ...] = ()
        if has_near_zero_scale(read.tensors):
            logger.info(
                "the weights are nearly untrained and hide their blocks: synthetic weights are exported and checked too"
            )
            synthetic = dataclasses.replace(read, tensors=synthetic_tensors(read.spec))
            with tempfile.TemporaryDirectory(dir=folder) as name:
                write_export(synthetic, interface, target, Path(name) / path.name)
                synthetic_checks = _checks(synthetic, interface, target, Path(name) / path.name, batch)
        if scales is not None:
            began = time.perf_counter()
            quantize(folder / path.name, scales, interface)
            seconds += time.perf_counter() - began
            network = RUNTIMES[RUNTIME[target]](folder / path.name, available_threads(), "int8")
            if not all(np.isfinite(output).all() for output in network(pixels(batch, interface))):
                raise NumbersDisagree(f"{path.name}: int8 gives numbers that are not finite")
        size_in_bytes = sum((folder / name.name).stat().st_size for name in names)
    return Export(
        network=str(read.spec),
        format=target,
        files=tuple(map(str, names)),
        bytes=size_in_bytes,
        input={
            "type": "uint8" if uint8 else "float32, normalized",
            "shape": [None, 3, *((None, None) if dynamic else size)],
        },
        outputs=tuple(output_names(read.spec, probabilities)),
        runtime=RUNTIME[target],
        precision=precision,
        checks=checks,
        synthetic=synthetic_checks,
        seconds=seconds,
    )


def _checks(weights: Weights, interface: Interface, target: str, path: Path, images: np.ndarray) -> tuple[Check, ...]:
    """Check at the size; where any will do, at a smaller one as well that is odd and not square."""
    network = RUNTIMES[RUNTIME[target]](path, available_threads())
    height, width = images.shape[2:]
    smaller = [images[:, :, : (height * 3 // 4) | 1, : (width // 2) | 1]] if interface.size is None else []
    return tuple(check_export(network, weights, interface, batch, path.name) for batch in (images, *smaller))
