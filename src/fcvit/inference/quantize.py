"""Quantize an ONNX file statically to int8, with scales calibrated on the user's images.

ONNX Runtime's quantizer scales weights per output channel and activations per tensor. It puts QuantizeLinear and
DequantizeLinear nodes around the convolutions and matrix products, so any runtime can read the file.
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

MAX_IMAGES = 64  # more images hardly change the scales


def calibration_images(folder: Path, preprocessing: Preprocessing) -> np.ndarray:
    """Read up to `MAX_IMAGES` evenly sampled images from a folder and its subfolders: uint8 (B, 3, S, S).

    Raises:
        UsageError: The folder contains no images.
        BadImages: An image cannot be read.
    """
    paths = images_below(folder)
    if not paths:
        raise UsageError(f"{folder}: contains no images; pass a folder of images to --calibrate")
    return np.stack([preprocess(path, preprocessing) for path in sample_evenly(paths, MAX_IMAGES)])


def quantize(path: Path, images: np.ndarray, interface: Interface) -> None:
    """Replace a float32 .onnx file by its int8 version.

    Args:
        path: The .onnx file.
        images: uint8 calibration images (B, 3, H, W) of the network's image size.
        interface: Interface of the export.

    Raises:
        UsageError: The images have another size.
        MissingExtra: onnxruntime is not installed.
    """
    if interface.size is not None and images.shape[2:] != interface.size:
        raise UsageError(f"calibration images have size {images.shape[2:]}; the network takes {interface.size}")
    package = import_runtime("onnxruntime.quantization")
    batches = iter(images[:, None] if interface.uint8 else normalize(images, interface.preprocessing)[:, None])

    class Reader(package.CalibrationDataReader):
        def get_next(self):  # noqa: ANN202 -- called by the library
            batch = next(batches, None)
            return None if batch is None else {"images": batch}

    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends preprocessing that this graph does not need
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
