"""Describe a weights file without loading it into a model (`fcvit inspect` and `fcvit.inspect`)."""

from collections.abc import Iterator
from typing import Any

from fcvit.commands.options import Ema, File, Flag
from fcvit.errors import DoesNotFit
from fcvit.inference.exported import ExportedWeights, export_format, read_export
from fcvit.inference.interface import output_shapes
from fcvit.models.spec import ModelSpec, parameter_count
from fcvit.models.variants import Preprocessing, resolve_preprocessing
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.reading import Weights, WeightsDoNotFit, read_weights

_LABELS = {
    "form": "network",
    "described": "weights",
    "has_ema": "has EMA weights",
    "source_sha256": "source SHA-256",
    "long_side": "largest longer side",
    "short_side": "largest shorter side",
}


class Inspection(dict[str, Any]):
    """The description of a weights file, as a dictionary that can be stored as JSON."""

    @property
    def exit_code(self) -> int:
        return DoesNotFit.exit_code if self["problems"] else 0

    def tables(self) -> Iterator[Any]:
        """Yield a table of the description, and a table of the tensors if they are listed."""
        from fcvit.report.tables import SHOWN, lines, table

        listing = table()
        for name, value in self.items():
            if value in (None, [], "") or name == "entries":
                continue
            if isinstance(value, list):
                # A class whose id is its name is not written twice.
                parts = [
                    " ".join(dict.fromkeys(map(str, part))) if isinstance(part, list) else str(part) for part in value
                ]
                more = [f"... ({len(parts)})"] if len(parts) > SHOWN else []
                shown = parts[:SHOWN] + more
                value = lines(shown) if name == "problems" else ", ".join(shown)
            listing.add_row(_LABELS.get(name, name.replace("_", " ")), value if name == "problems" else str(value))
        yield listing
        if "entries" in self:
            rows = [(name, str(shape), dtype) for name, shape, dtype in self["entries"]]
            yield table("tensor", "shape", "type", rows=rows)


def inspect(path: File, *, ema: Ema = None, tensors: Flag = False, key: str | None = None) -> Inspection:
    """Describe a weights file. This needs no framework and executes nothing in the file.

    Args:
        path: A weights file, whose format is detected from the content, or an export.
        tensors: List every tensor.
        key: Name of the set of weights, if the file has several. For example teacher or model.state_dict.

    Raises:
        UsageError: The file has several sets of weights, and neither `ema` nor `key` selects one.
        UnreadableFile: The file cannot be read safely. A file that does not match an FCViT raises no error. Its
            description contains the `problems`.
    """
    if target := export_format(path):
        return _inspect_export(read_export(path, target))
    checkpoint = read_checkpoint(path)
    raw = any(not one.averaged for one in checkpoint.sets)
    chosen = ema if ema is not None or not checkpoint.has_ema else not raw
    named, skipped, _ = checkpoint.select(chosen, key)
    result = Inspection(
        {
            "file": str(checkpoint.path),
            "bytes": checkpoint.size,
            "sha256": checkpoint.sha256,
            "format": checkpoint.format,
            "tensors": len(named),
            "dtypes": sorted({tensor.dtype.name for tensor in named.values()}),
            "has_ema": checkpoint.has_ema,
            "described": _described(checkpoint.has_ema and raw, chosen, ema, key),
            "skipped": skipped,
            "variant": None,
            "problems": [],
        }
    )
    if tensors:
        result["entries"] = [[name, list(t.shape), t.dtype.name] for name, t in named.items()]
    try:
        weights = read_weights(path, chosen, key=key)
    except WeightsDoNotFit as error:
        result["problems"] = [str(problem) for problem in error.problems]
        return result
    except DoesNotFit as error:
        result["problems"] = [str(error)]
        return result
    header = checkpoint.header
    result |= _network(weights) | {
        "layout": weights.layout,
        "preprocessing_from": "file" if weights.preprocessing else "variant",
        "source_sha256": header.source_sha256 if header else None,
        "notes": list(weights.notes),
    }
    return result


def _inspect_export(weights: ExportedWeights) -> Inspection:
    """Describe the files of an export."""
    source, interface = weights.source, next(iter(weights.graphs.values()))[1]
    size = "any size" if interface.size is None else " x ".join(map(str, interface.size))
    return Inspection(
        {
            "file": str(source.path),
            "bytes": source.size,
            "sha256": source.sha256,
            "format": source.format,
            "runtime": weights.runtime,
            "precision": weights.precision,
            "images": f"{'uint8' if interface.uint8 else 'float32, normalized'}, {size}",
            "outputs": list(output_shapes(weights.spec, interface)),
            **_network(weights),
            "source_sha256": source.header.source_sha256 if source.header else None,
            "problems": [],
        }
    )


def _network(weights: Weights) -> dict[str, Any]:
    """Describe the network, its preprocessing and its classes."""
    spec, preprocessing = weights.spec, resolve_preprocessing(None, weights.preprocessing, weights.spec.variant)
    return {
        "variant": spec.variant.name,
        "form": str(spec),
        "num_classes": spec.num_classes,
        "parameters": parameter_count(spec),
        **_input(spec, preprocessing),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "classes": [list(c) for c in weights.classes] if weights.classes else None,
    }


def _input(spec: ModelSpec, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the size of the network's input: that of crops, or the largest sides of whole images."""
    if spec.short_side:
        return {"long_side": spec.options.long_side, "short_side": spec.short_side}
    return {name: getattr(preprocessing, name) for name in ("input_size", "crop_fraction", "interpolation")}


def _described(has_both: bool, chosen: bool | None, ema: bool | None, key: str | None) -> str:
    if key is not None:
        return key
    if has_both and ema is None:
        return "raw weights (use --ema for the EMA weights)"
    return "EMA weights" if chosen else "raw weights"
