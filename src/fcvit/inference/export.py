"""Write a network in the file formats of inference runtimes.

| format   | files for the path NAME.EXT                                   | runtimes                   |
| -------- | ------------------------------------------------------------- | -------------------------- |
| onnx     | NAME.onnx                                                     | ONNX Runtime, OpenVINO ... |
| paddle   | NAME.json (program), NAME.pdiparams (weights), NAME.json.fcvit.json | Paddle Inference      |
| openvino | NAME.xml (network), NAME.bin (weights), NAME.xml.fcvit.json   | OpenVINO                   |

A detector has a graph for each part (see `fcvit.inference.detector`): NAME.EXT, NAME.boxes.EXT, NAME.masks.EXT.

Paddle 2 wrote NAME.pdmodel instead of NAME.json. A JSON description (variant, preprocessing, class names, input
and outputs) is stored under `fcvit` in the metadata of an ONNX file, and otherwise in NAME.EXT.fcvit.json.
"""

import hashlib
import importlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fcvit import __version__
from fcvit.data.classes import resolve_classes
from fcvit.errors import UsageError
from fcvit.frameworks import import_framework, on_paddle_device
from fcvit.inference.detector import BINS, BOX_HEAD, MASK_HEAD, TRUNK
from fcvit.inference.interface import Interface, input_shape, output_shapes
from fcvit.inference.runtimes import import_runtime
from fcvit.models.build import build_network
from fcvit.models.spec import ModelSpec
from fcvit.weights.header import Header
from fcvit.weights.reading import Weights

ENDINGS = {"onnx": (".onnx",), "paddle": (".pdiparams", ".json"), "openvino": (".bin", ".xml")}
"""Format -> extensions of its files. A runtime loads the file with the last extension."""
RUNTIME = {"onnx": "onnxruntime", "paddle": "paddle-inference", "openvino": "openvino"}
"""Format -> the runtime that checks an export."""
SIDECAR = ".fcvit.json"  # appended to the name of the file that the runtime loads
KEY = "fcvit"
_PART_NAMES = {"": "", TRUNK: "", BOX_HEAD: ".boxes", MASK_HEAD: ".masks"}


def part_path(path: Path, part: str) -> Path:
    """Return the path of a part: `path` for a network or a trunk, otherwise such as NAME.boxes.onnx."""
    return path.with_name(f"{path.stem}{_PART_NAMES[part]}{path.suffix}")


def files(path: Path, target: str) -> list[Path]:
    """Return the paths of all files of a graph. The last is `path`, the file that the runtime loads.

    Raises:
        UsageError: The format is unknown, or the extension of `path` does not match it.
    """
    if target not in ENDINGS:
        raise UsageError(f"--format {target!r}: expected {', '.join(ENDINGS)}")
    main = ENDINGS[target][-1]
    if path.suffix != main:
        raise UsageError(f"{path}: a file with --format {target} must end in {main}; change the name or --format")
    sidecars = [] if target == "onnx" else [path.with_name(path.name + SIDECAR)]
    return sidecars + [path.with_suffix(ending) for ending in ENDINGS[target]]


def infer_format(path: Path) -> str:
    """Return the format for the extension of a file.

    Raises:
        UsageError: The extension is unknown.
    """
    for target, endings in ENDINGS.items():
        if path.suffix.lower() == endings[-1]:
            return target
    known = ", ".join(f"{endings[-1]} ({target})" for target, endings in ENDINGS.items())
    raise UsageError(f"{path}: unknown file extension; expected {known}")


def require_writer(target: str) -> None:
    """Import the package that writes a format.

    Raises:
        MissingExtra: The package is not installed.
    """
    if target == "paddle":
        import_framework("paddle")
    else:
        importlib.import_module("fcvit.inference.onnx_graph")


def write_export(weights: Weights, interface: Interface, target: str, path: Path) -> None:
    """Write the files of a format. The caller checks them and makes the write atomic.

    Args:
        weights: Weights of any network.
        interface: Input and outputs of the export.
        target: A key of `ENDINGS`.
        path: Path of the file that the runtime loads, in an existing folder.

    Raises:
        UsageError: The format does not support the interface, or the extension of `path` does not match the format.
        MissingExtra: A package is not installed.
    """
    written = files(path, target)
    about = description(weights, interface)
    if target == "paddle":
        _write_paddle(weights, interface, path)
    else:
        from fcvit.inference.onnx_graph import onnx_model

        model = onnx_model(
            weights, interface, {KEY: json.dumps(about, ensure_ascii=False)} if target == "onnx" else None
        )
        if target == "onnx":
            path.write_bytes(model.SerializeToString(deterministic=True))
        else:
            openvino = import_runtime("openvino")
            openvino.save_model(openvino.Core().read_model(model.SerializeToString()), path, compress_to_fp16=False)
    if target != "onnx":
        about["weights_sha256"] = files_sha256([file.read_bytes() for file in written[1:]])
        written[0].write_text(json.dumps(about, ensure_ascii=False), "utf-8")


def files_sha256(contents: Sequence[bytes]) -> str:
    """Return the SHA-256 of the files of a graph, in the order of `ENDINGS`."""
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


def description(weights: Weights, interface: Interface) -> dict[str, Any]:
    """Describe the network, its input and its outputs, for storage with an export.

    These are the fields of a `Header` and more. `weights_sha256` is the hash of the files next to a separate
    description (see `files_sha256`).
    """
    classes = weights.classes
    if weights.spec.head == "classifier":  # if the weights have no names, those that `fcvit predict` shows
        classes = resolve_classes(None, classes, weights.spec.num_classes) or None
    header = Header(
        weights.spec,
        "torch",
        interface.preprocessing,
        classes,
        source_sha256=weights.source.sha256,
        palette=weights.palette,
    )
    return {
        **json.loads(header.to_json()),
        "fcvit": __version__,
        "part": interface.part,
        "input": _input(weights.spec, interface),
        "outputs": list(output_shapes(weights.spec, interface)),
    }


def _input(spec: ModelSpec, interface: Interface) -> dict[str, Any]:
    if interface.part in BINS:
        _, (_, *size) = input_shape(spec, interface)
        layout, values = "region, channel, row, column", "RoIAlign of the maps"
    else:
        size = interface.size and list(interface.size)
        layout, values = "batch, RGB, height, width", "0 to 255" if interface.uint8 else "(pixel / 255 - mean) / std"
    return {"layout": layout, "type": "uint8" if interface.uint8 else "float32", "values": values, "size": size}


def _write_paddle(weights: Weights, interface: Interface, path: Path) -> None:
    if interface.part:
        raise UsageError("--format paddle does not support detectors; use --format onnx or openvino")
    if interface.size is None:
        raise UsageError("--format paddle supports only a fixed image size; omit --dynamic or use --format onnx")
    paddle = import_framework("paddle")

    class ExportedNetwork(paddle.nn.Layer):
        """The network with the normalization and softmax that the interface requests."""

        def __init__(self):
            super().__init__()
            self.network = build_network(weights)
            preprocessing = interface.preprocessing
            self.mean = paddle.to_tensor([255 * mean for mean in preprocessing.mean]).reshape([1, 3, 1, 1])
            self.std = paddle.to_tensor([255 * std for std in preprocessing.std]).reshape([1, 3, 1, 1])

        def forward(self, images):  # noqa: ANN001, ANN202 -- traced
            if interface.uint8:
                images = (images.astype("float32") - self.mean) / self.std
            outputs = self.network(images)
            return paddle.nn.functional.softmax(outputs, axis=1) if interface.probabilities else outputs

    with on_paddle_device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about its own code
        model = ExportedNetwork()
        model.eval()
        spec = paddle.static.InputSpec([None, 3, *interface.size], "uint8" if interface.uint8 else "float32", "images")
        paddle.jit.save(model, str(path.with_suffix("")), input_spec=[spec])
