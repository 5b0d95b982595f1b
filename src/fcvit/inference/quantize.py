"""int8: an ONNX file quantized statically, its scales found on the user's images.

By ONNX Runtime's own quantizer, which the field uses: weights per output channel, activations per tensor,
QuantizeLinear and DequantizeLinear around the convolutions and matrix products, so that any runtime can read it.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np

from fcvit.data.folders import images_below, sample_evenly
from fcvit.data.transforms.preprocess import normalize, preprocess
from fcvit.errors import UsageError
from fcvit.inference.interface import Interface
from fcvit.inference.runtimes import import_runtime
from fcvit.models.variants import Preprocessing

MAX_IMAGES = 64  # the scales hardly move beyond


def calibration_images(folder: Path, preprocessing: Preprocessing) -> np.ndarray:
    """Read up to `MAX_IMAGES` images of a folder and those below it, evenly sampled: uint8 (B, 3, S, S).

    Raises:
        UsageError: there are none.
        BadImages: one cannot be read.
    """
    paths = images_below(folder)
    if not paths:
        raise UsageError(f"{folder}: no images to calibrate int8 on")
    return np.stack([preprocess(path, preprocessing) for path in sample_evenly(paths, MAX_IMAGES)])


def quantize(path: Path, images: np.ndarray, interface: Interface) -> None:
    """Replace a float32 .onnx file by its int8 form.

    Args:
        path: the file.
        images: uint8 (B, 3, H, W) of the file's size.
        interface: how the file was made.

    Raises:
        UsageError: images of another size.
        MissingExtra: onnxruntime is not installed.
    """
    if interface.size is not None and images.shape[2:] != interface.size:
        raise UsageError(f"calibration images of {images.shape[2:]} pixels for a network of {interface.size}")
    package = import_runtime("onnxruntime.quantization")
    batches = iter(images[:, None] if interface.uint8 else normalize(images, interface.preprocessing)[:, None])

    class Reader(package.CalibrationDataReader):
        def get_next(self):  # noqa: ANN202 -- what the library calls
            batch = next(batches, None)
            return None if batch is None else {"images": batch}

    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it advises preprocessing that this graph does not need
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            quantized = Path(name) / path.name
            package.quantize_static(
                str(path),
                str(quantized),
                Reader(),
                quant_format=package.QuantFormat.QDQ,
                activation_type=package.QuantType.QUInt8,
                weight_type=package.QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            )
            quantized.replace(path)
    finally:
        logging.getLogger().setLevel(level)
