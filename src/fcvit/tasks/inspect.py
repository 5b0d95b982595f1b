"""Say what a weights file is, without loading it into a model."""

import os

from fcvit.errors import DoesNotFit
from fcvit.variants import resolve_preprocessing
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.names import parameter_count
from fcvit.weights.reading import WeightsDoNotFit, read_weights


def inspect(path: str | os.PathLike[str], ema: bool | None = None, tensors: bool = False) -> dict[str, object]:
    """What is in a file, as a dictionary that JSON can hold.

    Args:
        path: any format; told by content.
        ema: which weights to describe where there are two sets; None: the raw ones, said in the result.
        tensors: list every tensor with its shape and type.

    Raises:
        UnreadableFile: it cannot be read safely. A file that fits no FCViT is described, with its `problems`.
    """
    checkpoint = read_checkpoint(path)
    chosen = ema if ema is not None else (False if checkpoint.has_ema else None)
    named, skipped = checkpoint.select(chosen)
    result: dict[str, object] = {
        "file": str(checkpoint.path),
        "bytes": len(checkpoint.data),
        "sha256": checkpoint.sha256,
        "format": checkpoint.format,
        "tensors": len(named),
        "dtypes": sorted({tensor.dtype.name for tensor in named.values()}),
        "has_ema": checkpoint.has_ema,
        "described": _described(checkpoint.has_ema, ema),
        "skipped": skipped,
        "variant": None,
        "problems": [],
    }
    if tensors:
        result["entries"] = [[name, list(t.shape), t.dtype.name] for name, t in named.items()]
    try:
        weights = read_weights(path, chosen)
    except WeightsDoNotFit as error:
        result["problems"] = [str(problem) for problem in error.problems]
        return result
    except DoesNotFit as error:
        result["problems"] = [str(error)]
        return result
    form = weights.form
    preprocessing = resolve_preprocessing(None, weights.preprocessing, form.variant)
    header = checkpoint.header
    return result | {
        "variant": form.variant.name,
        "form": str(form),
        "num_classes": form.num_classes,
        "parameters": parameter_count(form),
        "layout": weights.layout,
        "input_size": preprocessing.input_size,
        "crop_fraction": preprocessing.crop_fraction,
        "interpolation": preprocessing.interpolation,
        "preprocessing_from": "file" if weights.preprocessing else "variant",
        "classes": [list(c) for c in weights.classes] if weights.classes else None,
        "source_sha256": header.source_sha256 if header else None,
        "notes": list(weights.notes),
    }


def _described(has_both: bool, ema: bool | None) -> str:
    if has_both and ema is None:
        return "raw weights; the averaged ones with --ema"
    return "averaged weights" if ema else "raw weights"
