"""Metadata of converted weights, stored in the header of a safetensors file, or in a JSON file next to other formats.

With this metadata, a weights file is sufficient to rebuild the network, preprocess its inputs and name its outputs. The
metadata contains all fields of the variant, the preprocessing, the class list, the layout, PyTorch's counters and the
hash of the source.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from fcvit.data.classes import Classes, ClassName, Palette, check_classes, check_palette
from fcvit.errors import FcvitError, UnreadableFile
from fcvit.models.spec import HEADS, ModelSpec
from fcvit.models.variants import VARIANTS, Preprocessing, Variant
from fcvit.text import strict_json
from fcvit.weights.hub import MAX_JSON

FORMAT_VERSION = 2
KEY = "fcvit"  # name of the text entry in a safetensors header
LAYOUTS = ("paddle", "torch")
_FIRST_HEADS = {True: "backbone", False: "classifier"}  # values of the flag `dense` in format version 1
EXAMPLE = VARIANTS["fcvit_tiny"]  # defines the type of each field


@dataclasses.dataclass(frozen=True)
class Header:
    """All information about weights except the tensors.

    Attributes:
        spec: Variant, number of classes and head.
        layout: Naming and Linear layout of the tensors: "paddle" or "torch".
        preprocessing: Preprocessing that the weights were trained with, or None for the variant's.
        classes: Ordered class list, or None if unknown.
        counters: PyTorch's `num_batches_tracked` by the authors' tensor names.
        source_sha256: SHA-256 of the file that was converted.
        weights_sha256: SHA-256 of the weights file, if the header is stored in a separate file.
        palette: Color of each class, or None.
    """

    spec: ModelSpec
    layout: str
    preprocessing: Preprocessing | None = None
    classes: Classes | None = None
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    source_sha256: str = ""
    weights_sha256: str = ""
    palette: Palette | None = None

    def to_json(self) -> str:
        """Serialize the header to one JSON object, with the fields of the variant by name."""
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "variant": dataclasses.asdict(self.spec.variant),
                "num_classes": self.spec.num_classes,
                "task": self.spec.task,
                "head": self.spec.head,
                "head_options": dataclasses.asdict(self.spec.options),
                "layout": self.layout,
                "preprocessing": self.preprocessing and dataclasses.asdict(self.preprocessing),
                "classes": self.classes and [list(c) for c in self.classes],
                "palette": self.palette and [list(color) for color in self.palette],
                "counters": dict(self.counters),
                "source_sha256": self.source_sha256,
                "weights_sha256": self.weights_sha256,
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> "Header":
        """Parse the output of `to_json`.

        Raises:
            UnreadableFile: If the text is not a valid header, or its version is newer than `FORMAT_VERSION`.
        """
        try:
            fields = strict_json(text)
            json.dumps(fields, ensure_ascii=False).encode()  # lone surrogates could not be written to a file
            version = fields["format_version"]
            if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
                raise UnreadableFile(
                    f"header has format version {version!r}, expected at most {FORMAT_VERSION}; update fcvit"
                )
            variant = dict(fields["variant"])
            variant["preprocessing"] = Preprocessing(**_tuples(variant["preprocessing"]))
            head = _FIRST_HEADS[fields["dense"]] if version == 1 else fields["head"]
            if not isinstance(head, str) or head not in HEADS:
                raise UnreadableFile(f"header has the unknown head {str(head)[:40]!r}; update fcvit")
            options = HEADS[head].options(**_tuples(fields.get("head_options") or {}))
            spec = ModelSpec(Variant(**_tuples(variant)), _whole(fields["num_classes"]), head, options)
            preprocessing = fields["preprocessing"] and Preprocessing(**_tuples(fields["preprocessing"]))
            _check_kinds("variant", spec.variant, EXAMPLE)
            _check_kinds("head_options", options, HEADS[head].options())
            _check_kinds("preprocessing", preprocessing or EXAMPLE.preprocessing, EXAMPLE.preprocessing)
            classes = fields["classes"]
            if classes is not None:
                classes = check_classes(tuple(ClassName(str(i), str(n)) for i, n in classes), "header")
                if len(classes) != spec.num_classes:
                    raise UnreadableFile(f"header has {len(classes)} classes for {spec.num_classes} outputs")
            palette = fields.get("palette")
            if palette is not None:
                palette = check_palette(palette)
                if len(palette) != spec.num_classes:
                    raise UnreadableFile(f"header has {len(palette)} colors for {spec.num_classes} outputs")
            if fields["layout"] not in LAYOUTS:
                raise UnreadableFile(f"header has the unknown layout {str(fields['layout'])[:40]!r}")
            return cls(
                spec,
                fields["layout"],
                preprocessing,
                classes,
                {str(name): _whole(value) for name, value in fields["counters"].items()},
                str(fields["source_sha256"]),
                str(fields["weights_sha256"]),
                palette,
            )
        except UnreadableFile:
            raise
        except (FcvitError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UnreadableFile(f"header is damaged ({type(error).__name__}: {str(error)[:80]})") from error


def sidecar(path: Path) -> Path:
    """Return the path of the separate header file, FILE.json, for formats that cannot store a header."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path, sha256: str) -> Header:
    """Read the JSON header of the weights file at `path`, which has the given SHA-256.

    Raises:
        UnreadableFile: If the header cannot be read, or describes other weights.
    """
    file = sidecar(path)
    try:
        if file.stat().st_size > MAX_JSON:
            raise UnreadableFile(f"{file.name} is over {MAX_JSON >> 20} MiB, too large for a header")
        header = Header.from_json(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"{file.name} cannot be read ({error}); repair or remove it") from error
    if header.weights_sha256 != sha256:
        raise UnreadableFile(
            f"{file.name} describes other weights (the SHA-256 differs); delete it, or restore the weights file that "
            "it belongs to"
        )
    return header


def _tuples(fields: Mapping[str, object]) -> dict:
    """Convert JSON lists to the tuples that the dataclasses expect."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _check_kinds(name: str, value: object, example: object) -> None:
    """Check the types of all fields. The dataclasses check only sizes and assume correct types."""
    if dataclasses.is_dataclass(example):
        for field in dataclasses.fields(example):
            _check_kinds(field.name, getattr(value, field.name), getattr(example, field.name))
    elif isinstance(example, tuple) and isinstance(value, tuple):
        if len(value) != len(example):
            raise ValueError(f"{name} has {len(value)} values, expected {len(example)}")
        for item in value:
            _check_kinds(name, item, example[0])
    elif isinstance(example, float) and isinstance(value, int | float):
        if not 1e-12 < abs(value) < 1e9 and value != 0:  # a standard deviation near 0 would make every input infinite
            raise ValueError(f"{name} is {value!r:.40}, expected 0 or a magnitude from 1e-12 to 1e9")
    elif isinstance(example, str) and isinstance(value, str):
        if not value.isprintable() or len(value) > 100:
            raise ValueError(f"{name} is not printable text of at most 100 characters")
    elif type(value) is not type(example) and not (name == "layer_scale" and value is None):
        raise ValueError(f"{name} has type {type(value).__name__}, expected {type(example).__name__}")


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.40} is not an integer from 0 to 2^63 - 1")
    return value
