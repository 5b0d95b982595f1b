"""Classify images with a file that `fcvit export` wrote. This needs only ONNX Runtime, Pillow and NumPy.

Run:  python onnx_classify.py NETWORK.onnx IMAGE...
"""

import json
import math
import sys

import numpy as np
import onnxruntime
from PIL import Image


def preprocess(path, about):
    """Return an image as the network's input (3, S, S), with the same pixels as in `fcvit predict`."""
    values, side = about["preprocessing"], about["preprocessing"]["input_size"]
    shorter = math.floor(side / values["crop_fraction"])
    image = Image.open(path).convert("RGB")  # 16-bit gray images must be converted to 8 bits before
    if min(image.size) != shorter:
        size = tuple(int(shorter * length / min(image.size)) for length in image.size)  # rounded down
        image = image.resize(size, Image.Resampling[values["interpolation"].upper()])
    left, top = (round((length - side) / 2) for length in image.size)  # half to even
    pixels = np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
    if about["input"]["type"] == "uint8":
        return pixels
    mean, std = (np.array(values[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def main(network, *paths):
    session = onnxruntime.InferenceSession(network)
    about = json.loads(session.get_modelmeta().custom_metadata_map["fcvit"])
    images = np.stack([preprocess(path, about) for path in paths])
    (rows,) = session.run(None, {"images": images})
    if about["outputs"] == ["logits"]:
        rows = np.exp(rows - rows.max(axis=1, keepdims=True))
        rows /= rows.sum(axis=1, keepdims=True)
    for path, probabilities in zip(paths, rows, strict=True):
        for index in np.argsort(-probabilities, kind="stable")[:5]:
            print(path, f"{probabilities[index]:.6f}", *about["classes"][index], sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
