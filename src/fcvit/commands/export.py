"""Export a network for a runtime. The export is kept only if the runtime computes the correct outputs with it."""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from cyclopts import Parameter

from fcvit.commands.options import Ema, File, Flag, Output, parse_size
from fcvit.data.folders import find_images
from fcvit.data.transforms.preprocess import preprocess
from fcvit.errors import NumbersDisagree, UsageError, counted
from fcvit.inference.check import Check, check_export, pixels, sample_images, sample_inputs
from fcvit.inference.detector import BINS, parts
from fcvit.inference.export import ENDINGS, RUNTIME, files, infer_format, part_path, write_export
from fcvit.inference.interface import Interface, output_shapes
from fcvit.inference.quantize import calibration_images, quantize
from fcvit.inference.runtimes import RUNTIMES
from fcvit.machine import available_threads
from fcvit.models.spec import HEADS
from fcvit.models.variants import resolve_preprocessing
from fcvit.run_folder import staged_files
from fcvit.verification.equivalence import RATIO_LIMIT
from fcvit.weights.reading import Weights, read_weights
from fcvit.weights.synthetic import has_near_zero_scale, synthetic_tensors

logger = logging.getLogger("fcvit")

Precision = Literal["float32", "int8"]


@dataclasses.dataclass(frozen=True)
class Export:
    """An export with the results of its checks.

    Attributes:
        network: Description of the network.
        format: Format of the export: onnx, paddle or openvino.
        files: Paths of the written files. The last one is the file that the runtime loads, for a detector its trunk.
        bytes: Size of all files together.
        input: Type and shape of the input. None in the shape means any size.
        outputs: Names of the outputs, for a detector those of its trunk.
        runtime: The runtime that checked the export. `fcvit doctor` shows its version.
        precision: float32 or int8.
        checks: float32 error ratio of the exported weights at each checked size, and of each part of a detector. For
            int8, before quantization.
        synthetic: The same checks on an export of synthetic weights, if the weights have a near-zero layer scale that
            hides errors in the blocks. Otherwise empty.
        seconds: Time to write the files, without the checks.
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
        """Yield a table of the written files, the inputs and outputs, and the results of the checks."""
        from fcvit.report.tables import table, verdict

        shape = " x ".join("any" if side is None else str(side) for side in self.input["shape"])
        rows: list[Sequence[Any]] = [
            *(("written", path) for path in self.files),
            ("size", f"{self.bytes / 2**20:.1f} MiB, in {self.seconds:.1f} s"),
            ("input", f"{self.input['type']}, {shape}"),
            ("outputs", ", ".join(self.outputs)),
        ]
        for what, checks in (("", self.checks), ("synthetic weights, ", self.synthetic)):
            for check in checks:
                count, height, width = check.images
                inputs = f"{check.part}: {count} RoIs" if check.part in BINS else counted(count, "image")
                where = f"{what}{inputs} of {height} x {width}, run by {self.runtime}"
                rows.append((f"error ratio ({check.yardstick})", verdict(check.passed, f"{RATIO_LIMIT}")))
                rows.append(("", f"{check.ratio:.2f}, largest difference {check.largest:.1e}; {where}"))
        if self.precision == "int8":
            note = "checked before quantization; use fcvit eval --precision int8 to measure the loss of accuracy"
            rows.append(("int8", note))
        yield table(rows=rows, title=f"{self.network} exported as {self.format}, {self.precision}")


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
    """Export a network to ONNX, Paddle Inference or OpenVINO, and check its outputs in the runtime.

    Args:
        weights: A checkpoint of any format (in Python also a `Weights` object).
        output: Output file: .onnx, .json (paddle, also writes .pdiparams) or .xml (openvino, also writes .bin). The
            heads of a detector are written beside it, for example NAME.boxes.onnx and NAME.masks.onnx.
        format: onnx, paddle or openvino (default: by the extension of the output).
        size: Image size, for example 224 or 240x320 (height x width; default: the input size of a classifier or
            backbone, and otherwise any size, with paddle 224).
        dynamic: Accept images of any size (onnx, openvino).
        uint8: Accept uint8 RGB images and normalize them in the exported network.
        probabilities: Return probabilities instead of logits.
        precision: float32 (default), or int8 with --calibrate (onnx).
        calibration: Folder of images to calibrate int8 with, for example training images.
        images: Image, folder or pattern to check the export with. Can be repeated (default: included digits).
        preprocessing: Preprocessing to use instead of that of the weights.
        overwrite: Replace the output if it already exists.

    Raises:
        UnreadableFile, UsageError, DoesNotFit: A file or an option is invalid.
        MissingExtra: A package that writes or runs the format is not installed.
        BadImages: An image cannot be read.
        NumbersDisagree: The outputs of the runtime are wrong. Nothing is written.
    """
    size, paths = parse_size(size), find_images(images) if images else ()
    path = Path(output)
    target: str = format or infer_format(path)
    if precision not in get_args(Precision) or (precision == "int8" and target != "onnx"):
        raise UsageError(f"--precision {precision}: expected float32, or int8 with --format onnx")
    if (precision == "int8") != (calibration is not None):
        raise UsageError("--precision int8 and --calibrate FOLDER require each other; pass both or neither")
    if dynamic and size is not None:
        raise UsageError("--dynamic accepts any image size; leave out --size")
    if dynamic and precision == "int8":
        raise UsageError("--precision int8 is calibrated for one image size; leave out --dynamic")
    files(path, target)  # reports a wrong name before the weights are read
    read = weights if isinstance(weights, Weights) else read_weights(weights, ema)
    if read.spec.task == "detection":
        _require_plain(uint8, probabilities, precision)
    dynamic = dynamic or (HEADS[read.spec.head].any_size and size is None and target != "paddle" and not calibration)
    chosen = resolve_preprocessing(preprocessing, read.preprocessing, read.spec.variant)
    size = size or (chosen.input_size, chosen.input_size)
    first, *heads = parts(read.spec)
    interface = Interface(None if dynamic else size, uint8, probabilities, chosen, first)
    shapes = output_shapes(read.spec, interface)
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
    interfaces = [*(dataclasses.replace(interface, part=head) for head in heads), interface]
    names = [name for one in interfaces for name in files(part_path(path, one.part), target)]
    with staged_files(names, overwrite) as folder:
        seconds, checks = 0.0, []
        for one in interfaces:
            written = folder / part_path(path, one.part).name
            began = time.perf_counter()
            write_export(read, one, target, written)
            seconds += time.perf_counter() - began
            logger.info(f"checking {written.name} with {RUNTIME[target]}")
            checks += _checks(read, one, target, written, batch)
        synthetic_checks: list[Check] = []
        if has_near_zero_scale(read.tensors):
            logger.info(
                "the near-zero layer scale of the weights hides errors in the blocks: also checking synthetic weights"
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
                raise NumbersDisagree(f"{path.name}: the int8 network returns values that are not finite")
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
        outputs=tuple(shapes),
        runtime=RUNTIME[target],
        precision=precision,
        checks=tuple(checks),
        synthetic=tuple(synthetic_checks),
        seconds=seconds,
    )


def _require_plain(uint8: bool, probabilities: bool, precision: str) -> None:
    """Report options that an export of a detector does not have."""
    if uint8:
        reason = "the padding of its images must be 0 after the normalization"
        raise UsageError(f"--uint8 is not available for detectors: {reason}; leave it out and normalize the images")
    if probabilities or precision != "float32":
        option = "--probabilities" if probabilities else f"--precision {precision}"
        raise UsageError(f"{option} is not available for detectors; leave it out")


def _checks(weights: Weights, interface: Interface, target: str, path: Path, images: np.ndarray) -> list[Check]:
    """Check the export at its image size. A dynamic export is also checked at a smaller, odd and non-square size.

    A head of a detector is checked with features.
    """
    network = RUNTIMES[RUNTIME[target]](path, available_threads())
    if interface.part in BINS:
        batches = sample_inputs(weights.spec, interface)
        return [check_export(network, weights, interface, batch, path.name) for batch in batches]
    height, width = images.shape[2:]
    smaller = [images[:, :, : (height * 3 // 4) | 1, : (width // 2) | 1]] if interface.size is None else []
    return [check_export(network, weights, interface, batch, path.name) for batch in (images, *smaller)]
