"""Read the files of `fcvit export`, so that they can be predicted with and evaluated like weights.

The description in the files (see `fcvit.inference.export`) defines the network, its preprocessing and its classes.
Nothing is unpickled, and no file outside of the export is read. `fcvit.inference.engines.FileEngine` runs the files.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fcvit.errors import DoesNotFit, FcvitError, UnreadableFile, UsageError
from fcvit.inference.detector import parts
from fcvit.inference.export import ENDINGS, KEY, RUNTIME, SIDECAR, files, files_sha256, part_path
from fcvit.inference.interface import Interface, input_shape, output_shapes
from fcvit.text import strict_json
from fcvit.weights.checkpoint import Checkpoint, read_file
from fcvit.weights.header import Header
from fcvit.weights.hub import MAX_JSON
from fcvit.weights.reading import Weights, read_weights

MAX_SIDE = 4096  # pixels
_QUANTIZED = "DequantizeLinear"  # operator of int8 files


class NoTensors(Mapping[str, np.ndarray]):
    """The tensors of an export, which has none with the names of the network. Every access raises `DoesNotFit`."""

    def __init__(self, path: Path):
        self.path = path

    def _refuse(self, *_: object) -> NoReturn:
        raise DoesNotFit(
            f"{self.path}: an export does not contain the network's named weights, which this needs; "
            "pass the checkpoint that it was exported from"
        )

    __getitem__ = __iter__ = __len__ = _refuse


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class ExportedWeights(Weights):
    """An export, in the place of weights. It has no tensors.

    Attributes:
        runtime: Runtime that runs the files.
        precision: float32 or int8.
        graphs: File and interface of each part (see `fcvit.inference.detector.parts`).
    """

    runtime: str
    precision: str
    graphs: Mapping[str, tuple[Path, Interface]]


@dataclasses.dataclass(frozen=True)
class _Graph:
    """One graph of an export.

    Attributes:
        contents: Its files, the one that the runtime loads last.
        header: Description of the network.
        interface: Its input and outputs.
        precision: float32 or int8.
    """

    contents: tuple[bytes, ...]
    header: Header
    interface: Interface
    precision: str


def read_network(path: str | os.PathLike[str], ema: bool | None = None) -> Weights:
    """Read a checkpoint of any format, or an export.

    Args:
        path: A checkpoint, or the file of an export that its runtime loads: .onnx, .xml, or .json of Paddle.
        ema: True selects the EMA weights and False the raw weights of a checkpoint that contains both.

    Raises:
        UnreadableFile, UsageError, DoesNotFit: See `read_weights` and `read_export`.
        MissingExtra: The package that reads an .onnx file is not installed.
    """
    target = export_format(path)
    if target is None:
        return read_weights(path, ema)
    if ema is not None:
        raise UsageError(f"{path}: an export contains one set of weights; omit --ema and --no-ema")
    return read_export(path, target)


def export_format(path: str | os.PathLike[str]) -> str | None:
    """Return the format of an export by its file name. A .json file without one of the others is not an export."""
    path = Path(path)
    for target, endings in ENDINGS.items():
        known = files(path, target) if path.suffix == endings[-1] else []
        if known and (target != "paddle" or any(file.is_file() for file in known[:-1])):
            return target
    return None


def read_export(path: str | os.PathLike[str], target: str) -> ExportedWeights:
    """Read the files of an export: one graph, or those of all parts of a detector.

    Args:
        path: The file that the runtime loads, for a detector that of its trunk.
        target: A key of `ENDINGS`.

    Raises:
        UnreadableFile: A file is missing, damaged, or was not written by `fcvit export`.
        DoesNotFit: The files belong to different exports.
        UsageError: The file is the head of a detector.
        MissingExtra: The package that reads an .onnx file is not installed.
    """
    path = Path(path)
    first = _read_graph(path, target)
    spec = first.header.spec
    trunk, *heads = parts(spec)
    if first.interface.part != trunk:
        raise UsageError(f"{path}: this is one part of a detector; pass the file without .boxes or .masks in its name")
    graphs = {trunk: first}
    for part in heads:
        graphs[part] = graph = _read_graph(part_path(path, part), target)
        same = dataclasses.replace(graph.header, weights_sha256=first.header.weights_sha256) == first.header
        if graph.interface.part != part or not same:
            raise DoesNotFit(f"{part_path(path, part)} and {path.name} are from different exports; export both again")
    *rest, main = [content for graph in reversed(graphs.values()) for content in graph.contents]
    others = tuple(Checkpoint(path, target, {}, None, content) for content in rest)
    preprocessing = first.header.preprocessing or spec.variant.preprocessing
    size = first.interface.size
    if size and size[0] == size[1]:
        preprocessing = dataclasses.replace(preprocessing, input_size=size[0])
    return ExportedWeights(
        spec=spec,
        tensors=NoTensors(path),
        source=Checkpoint(path, f"{target} export", {}, first.header, main, others),
        layout="torch",
        preprocessing=preprocessing,
        classes=first.header.classes,
        skipped=(),
        notes=(),
        palette=first.header.palette,
        runtime=RUNTIME[target],
        precision=first.precision,
        graphs={part: (part_path(path, part), graph.interface) for part, graph in graphs.items()},
    )


def _read_graph(path: Path, target: str) -> _Graph:
    """Read the files of one graph, and check them against their description."""
    contents = [_read(file) for file in files(path, target)]
    try:
        if target == "onnx":
            text, ends, precision = _read_onnx(contents[0])
        else:
            text, ends, precision = contents.pop(0), None, "float32"
        if len(text) > MAX_JSON:
            raise UnreadableFile(f"the description is over {MAX_JSON >> 20} MiB")
        fields = strict_json(text)
        if fields["format_version"] == 1:
            raise UnreadableFile("this is an export of an older version of fcvit; export the network again")
        header = Header.from_json(text if isinstance(text, str) else text.decode())
        interface = _interface(header, fields)
        if ends not in (None, _ends(header, interface)):
            raise UnreadableFile("its inputs and outputs differ from its description; export the network again")
    except FcvitError as error:
        raise UnreadableFile(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnreadableFile(f"{path}: the description of the export is damaged; export the network again") from error
    if target != "onnx" and files_sha256(contents) != header.weights_sha256:
        raise UnreadableFile(f"{path}: {path.name}{SIDECAR} describes other files; copy all files of one export")
    return _Graph(tuple(contents), header, interface, precision)


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        hint = "; copy it too" if path.name.endswith(SIDECAR) else ""
        raise UnreadableFile(f"{path}: cannot be opened: {error.strerror}{hint}") from error


def _interface(header: Header, fields: Mapping[str, Any]) -> Interface:
    """Return the interface in a description, or raise `ValueError`."""
    given = fields["input"]
    size = given["size"] if fields["part"] in parts(header.spec)[:1] else None
    if size is not None:
        height, width = size
        if not (type(height) is type(width) is int and min(size) >= 1 and max(size) <= MAX_SIDE):
            raise ValueError(f"the size {size!r:.40}")
        size = (height, width)
    if given["type"] not in ("uint8", "float32") or fields["part"] not in parts(header.spec):
        raise ValueError("the input")
    assert header.preprocessing is not None
    probabilities = fields["outputs"] == ["probabilities"]
    return Interface(size, given["type"] == "uint8", probabilities, header.preprocessing, fields["part"])


def _ends(header: Header, interface: Interface) -> tuple[list[str], list[str]]:
    """Return the names of the inputs and outputs."""
    return [input_shape(header.spec, interface)[0]], list(output_shapes(header.spec, interface))


def _read_onnx(content: bytes) -> tuple[str, tuple[list[str], list[str]], str]:
    """Return the description in an ONNX file, the names of its inputs and outputs, and its precision.

    Raises:
        UnreadableFile: The file is not ONNX, has no description, or contains what no export contains.
        MissingExtra: onnx is not installed.
    """
    from fcvit.inference.onnx_graph import onnx

    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # google.protobuf's DecodeError
        raise UnreadableFile("not an ONNX file, or damaged") from error
    about = {entry.key: entry.value for entry in model.metadata_props}
    if KEY not in about:
        raise UnreadableFile("this ONNX file was not written by fcvit export; pass an export or a checkpoint")
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    tensors = [*model.graph.initializer, *(attribute.t for attribute in attributes)]
    nested = model.functions or any(attribute.HasField("g") or attribute.graphs for attribute in attributes)
    if nested or any(tensor.external_data or tensor.data_location for tensor in tensors):
        raise UnreadableFile("the graph has nested graphs or data in other files, which no export has")
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    quantized = any(node.op_type == _QUANTIZED for node in model.graph.node)
    return about[KEY], names, "int8" if quantized else "float32"
