"""Test the pictures with annotated and detected objects side by side."""

import numpy as np
from PIL import Image

from fcvit.report.image_grid import RIGHT, WRONG
from fcvit.report.object_grid import ObjectRow, Objects, object_grid


def test_errors_are_vermilion_and_the_marked_one_has_a_white_frame():
    boxes, right = np.array([[10, 10, 40, 40], [60, 60, 90, 90]]), np.array([True, False])
    pixels = []
    for marked in (None, 1):
        objects = Objects(boxes, right, None, marked)
        row = ObjectRow("caption", Image.new("RGB", (100, 100), "gray"), objects, objects)
        pixels.append(np.asarray(object_grid([row], "title")))
    rgb = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (RIGHT, WRONG)]
    white = []
    for picture in pixels:
        image = picture[108:508, 16:416]  # below title, heading and caption
        assert image[40, 40].tolist() == rgb[0] and image[240, 240].tolist() == rgb[1]
        white.append((image == 255).all(2).sum())
    assert white[0] == 0 and white[1] > 100
