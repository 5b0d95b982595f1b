"""Test the drawing of objects: lines, masks, and where labels are placed."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from fcvit.data.class_colors import bright_colors
from fcvit.report import instances
from fcvit.report.instances import draw_instances, enlarged, instance_colors

GRAY = (90, 90, 90)
pytest.importorskip("cv2")


def gray(width, height):
    return Image.new("RGB", (width, height), GRAY)


def crowd(count, size, seed=0):
    generator = np.random.default_rng(seed)
    low = generator.uniform(0, 0.95, (count, 2)) * size
    return np.concatenate([low, low + generator.uniform(0.01, 0.1, (count, 2)) * size], 1)


def labels_of(monkeypatch, *arguments, **options):
    """Draw, and return the rectangles and the texts of the labels, and the picture."""
    texts, rectangles = [], []
    real = instances.ImageDraw.ImageDraw

    class Recorder(real):
        def rectangle(self, xy, fill=None, outline=None, width=1):
            if fill is not None:
                rectangles.append(xy)
            super().rectangle(xy, fill=fill, outline=outline, width=width)

        def text(self, xy, text, *rest, **more):
            box = self.textbbox(xy, text, rest[1])
            assert rectangles[-1][0] <= box[0] and box[2] <= rectangles[-1][2] + 1, "the text is on its rectangle"
            assert rectangles[-1][1] <= box[1] and box[3] <= rectangles[-1][3] + 1
            texts.append(text)
            super().text(xy, text, *rest, **more)

    monkeypatch.setattr(instances.ImageDraw, "Draw", Recorder)
    picture = draw_instances(*arguments, **options)
    return np.array(rectangles).reshape(-1, 4), texts, picture


@pytest.mark.parametrize(("count", "size"), [(1, 256), (10, 640), (50, 256), (50, 4000), (150, 1000)])
def test_labels_do_not_overlap_or_leave_the_picture(count, size, monkeypatch):
    names = [f"name {index % 7}" for index in range(count)]
    scores = np.linspace(1, 0.3, count)
    image = gray(size, size * 3 // 4)
    rectangles, texts, picture = labels_of(
        monkeypatch, image, crowd(count, size * 3 // 4), bright_colors(count), names, scores
    )
    assert len(rectangles) == len(texts) >= 0.6 * count and texts[0] == "name 0 1.00"
    assert rectangles.min() >= 0 and (rectangles[:, 2:] < picture.size).all()
    x1, y1, x2, y2 = rectangles.T
    apart = (x1[:, None] > x2) | (x2[:, None] < x1) | (y1[:, None] > y2) | (y2[:, None] < y1)
    assert (apart | np.eye(len(rectangles), dtype=bool)).all()
    heights = y2 - y1
    assert heights.min() >= max(12, max(picture.size) / 90), "the text is legible"


def test_lines_and_text_follow_the_size_of_the_image(monkeypatch):
    heights, widths = [], []
    for size in (800, 4000):
        box = np.array([[0.3, 0.3, 0.6, 0.6]]) * size
        rectangles, _, picture = labels_of(monkeypatch, gray(size, size), box, [(255, 0, 0)], ["x"], [0.5])
        heights.append(rectangles[0, 3] - rectangles[0, 1])
        row = np.asarray(picture)[size // 2]
        widths.append(np.count_nonzero((row == (255, 0, 0)).all(1)) / 2)
    assert heights[1] / heights[0] == pytest.approx(5, rel=0.15) and widths == [2, 10]


def test_small_images_are_enlarged_by_whole_factors():
    for size, factor in (((256, 200), 3), ((8, 8), 90), ((719, 100), 2), ((720, 1), 1), ((4000, 3000), 1)):
        assert enlarged(Image.new("RGB", size)).size == (factor * size[0], factor * size[1])
    mask = np.zeros((20, 24), bool)
    mask[5:10, 5:15] = True
    drawn = np.asarray(draw_instances(gray(24, 20), np.array([[4, 4, 16, 11]]), [(255, 0, 0)], masks=[mask]))
    factor = drawn.shape[1] // 24
    changed = (drawn != GRAY).any(2)
    tint = (drawn[factor * 7, factor * 10]).tolist()
    assert tint == [156, 54, 54], "0.4 of the color over the image"
    assert changed[factor * 5 : factor * 10, factor * 5 : factor * 15].all()
    assert not changed[: 4 * factor].any() and changed[4 * factor, 4 * factor : 16 * factor].all()


def test_the_first_of_overlapping_masks_is_on_top_and_the_image_stays_visible():
    masks = [np.zeros((900, 900), bool) for _ in range(30)]
    for mask in masks:
        mask[100:800, 100:800] = True
    colors = [(255, 0, 0)] + [(0, 255, 0)] * 29
    boxes = np.tile([90.0, 90, 810, 810], (30, 1))
    drawn = np.asarray(draw_instances(gray(900, 900), boxes, colors, masks=masks))
    assert drawn[400, 400].tolist() == [156, 54, 54]
    assert drawn[100, 400].tolist() == drawn[400, 100].tolist() == [255, 0, 0], "its outline, too"
    assert drawn[90, 400].tolist() == [255, 0, 0], "its box, too"
    small = np.zeros((900, 900), bool)
    small[300:400, 300:400] = True
    drawn = np.asarray(
        draw_instances(gray(900, 900), np.array([[100, 100, 800, 800], [290, 290, 410, 410]]), colors[:2],
                       masks=[masks[0], small])
    )  # fmt: skip
    assert drawn[300, 350].tolist() == [0, 255, 0], "the outline of a hidden mask is visible"
    empty = np.zeros((900, 900), bool)
    assert (np.asarray(draw_instances(gray(900, 900), np.zeros((0, 4)), [], masks=[])) == 90).all()
    draw_instances(gray(900, 900), boxes[:1], colors[:1], masks=[empty])


def test_labels_of_many_objects_of_one_class_are_scores(monkeypatch):
    boxes, scores = crowd(150, 240), np.linspace(1, 0.3, 150)
    _, texts, _ = labels_of(monkeypatch, gray(256, 256), boxes, bright_colors(150), ["nucleus"] * 150, scores)
    assert texts[0] == "1.00" and not any("nucleus" in text for text in texts)
    _, texts, _ = labels_of(monkeypatch, gray(256, 256), boxes[:9], bright_colors(9), ["nucleus"] * 9, scores)
    assert "nucleus 1.00" in texts


def test_a_label_is_readable_on_every_color(monkeypatch):
    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for color in (*bright_colors(60), (0, 0, 0), (255, 255, 255), (128, 128, 128), (128, 0, 0)):
        ink = luminance((0, 0, 0) if instances._ink(color) == "black" else (255, 255, 255))
        low, high = sorted((ink, luminance(color)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, color


def test_hostile_names_and_boxes_are_drawn(monkeypatch):
    names = ["", "x" * 5000, "two\nlines\x1b[0m", "\udc80", "name"]
    boxes = np.array(
        [[-50, -50, 2000, 2000], [10, 10, 10, 10], [799, 599, 800, 600], [5, 5, 8, 900], [1e9, 1e9, 2e9, 2e9]]
    )
    rectangles, texts, picture = labels_of(monkeypatch, gray(800, 600), boxes, bright_colors(5), names, [0.5] * 5)
    assert rectangles.min() >= 0 and (rectangles[:, 2:] < picture.size).all()
    assert any(text.endswith("... 0.50") for text in texts) and not any("\n" in text for text in texts)


def test_colors_are_those_of_classes_or_differ_if_there_is_one_class():
    labels = np.array([1, 0, 1])
    assert instance_colors(labels, ((1, 2, 3), (4, 5, 6))) == [(4, 5, 6), (1, 2, 3), (4, 5, 6)]
    assert len({*instance_colors(np.zeros(100, int), ((1, 2, 3),))}) == 100
    colors = bright_colors(200)
    assert len({*colors}) == 200 and min(max(color) for color in colors) > 200
    hues = np.array([colorsys.rgb_to_hsv(*color)[0] for color in colors])
    steps = np.abs(np.diff(hues))
    assert np.minimum(steps, 1 - steps).min() > 0.3, "neighbors differ"
