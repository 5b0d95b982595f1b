"""Say what a weights file is, without loading it into a model."""

import os

from fcvit.errors import DoesNotFit
from fcvit.models.spec import parameter_count
from fcvit.models.variants import resolve_preprocessing
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.reading import WeightsDoNotFit, read_weights


def inspect(
    path: str | os.PathLike[str], ema: bool | None = None, tensors: bool = False, key: str | None = None
) -> dict[str, object]:
    """What is in a file, as a dictionary that JSON can hold.

    Args:
        path: any format; told by content.
        ema: which weights to describe where there are two sets; None: the raw ones, said in the result.
        tensors: list every tensor with its shape and type.
        key: which of several sets of weights, as in `fcvit.weights.reading.read_weights`.

    Raises:
        UsageError: the file has several sets of weights, and neither `ema` nor `key` tells which.
        UnreadableFile: it cannot be read safely. A file that fits no FCViT is described, with its `problems`.
    """
    checkpoint = read_checkpoint(path)
    raw = any(not one.averaged for one in checkpoint.sets)
    chosen = ema if ema is not None or not checkpoint.has_ema else not raw
    named, skipped, _ = checkpoint.select(chosen, key)
    result: dict[str, object] = {
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
    spec = weights.spec
    preprocessing = resolve_preprocessing(None, weights.preprocessing, spec.variant)
    header = checkpoint.header
    return result | {
        "variant": spec.variant.name,
        "form": str(spec),
        "num_classes": spec.num_classes,
        "parameters": parameter_count(spec),
        "layout": weights.layout,
        "input_size": preprocessing.input_size,
        "crop_fraction": preprocessing.crop_fraction,
        "interpolation": preprocessing.interpolation,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "preprocessing_from": "file" if weights.preprocessing else "variant",
        "classes": [list(c) for c in weights.classes] if weights.classes else None,
        "source_sha256": header.source_sha256 if header else None,
        "notes": list(weights.notes),
    }


def _described(has_both: bool, chosen: bool | None, ema: bool | None, key: str | None) -> str:
    if key is not None:
        return key
    if has_both and ema is None:
        return "raw weights; the averaged ones with --ema"
    return "averaged weights" if chosen else "raw weights"
