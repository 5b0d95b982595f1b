"""Draw images with objects: boxes, masks, names and scores."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fcvit.data.class_colors import bright_colors
from fcvit.data.painting import Palette, paint_masks
from fcvit.report.image_grid import shorten
from fcvit.text import printable

OPACITY = 0.4
_LONG_SIDE = 720  # pixels: smaller images are enlarged to at least this
_COVERED = 0.5  # largest sum of the shares of objects that a label hides
_LABELED = 0.12  # largest share of the picture for labels, by which their font shrinks
_WIDEST = 0.3  # largest width of a label, as a share of the picture's longer side


def enlarged(image: Image.Image) -> Image.Image:
    """Enlarge a small image by a whole factor, without smoothing, so that lines and text on it are legible."""
    factor = _factor(image)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _factor(image: Image.Image) -> int:
    return max(1, -(-_LONG_SIDE // max(image.size)))


def instance_colors(labels: np.ndarray, palette: Palette) -> Palette:
    """Return the color of each object: that of its class, or different ones if there is only one class."""
    return bright_colors(len(labels)) if len(palette) == 1 else [palette[label] for label in labels]


def draw_instances(
    image: Image.Image,
    boxes: np.ndarray,
    colors: Palette,
    names: Sequence[str] = (),
    scores: Sequence[float] = (),
    masks: Iterable[np.ndarray] | None = None,
    opacity: float = OPACITY,
) -> Image.Image:
    """Draw objects on an image. Small images are enlarged (see `enlarged`).

    Lines and text have sizes in proportion to the picture. Lines of small objects are thinner, and text is smaller if
    there are many objects. A label is placed where it hides the least, inside the picture and over no other label. If
    there is no room for a name, only the score is written, and if there is none for the score, nothing. The name of
    many objects of one class is not written.

    Args:
        image: RGB image.
        boxes: x1, y1, x2, y2 of each object in pixels of the image, (N, 4). The most important object is the first: it
            is drawn over the others, and its label is placed before theirs.
        colors: Color of each object.
        names: Name of each object, or nothing for boxes without labels.
        scores: Score of each object, or nothing.
        masks: Mask of each object, bool (H, W) at the size of the image, or None. One is in memory at a time.
        opacity: Weight of the colors in the masks, from 0 to 1.
    """
    factor = _factor(image)
    picture = enlarged(image)
    longer = max(picture.size)
    corners = np.clip(factor * np.asarray(boxes, np.float64).reshape(-1, 4), 0, picture.size * 2)
    sides = (corners[:, 2:] - corners[:, :2]).min(1)
    widths = np.clip(sides / 12, max(1, longer // 800), max(2, longer // 400)).astype(int).tolist()
    if masks is not None:
        large = (mask.repeat(factor, 0).repeat(factor, 1) if factor > 1 else mask for mask in masks)
        picture = Image.fromarray(paint_masks(np.asarray(picture), large, colors, opacity, widths))
    draw = ImageDraw.Draw(picture)
    for box, color, width in reversed(list(zip(corners.tolist(), colors, widths, strict=True))):
        x1, y1, x2, y2 = (round(value) for value in box)
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=tuple(color), width=width)
    if names:
        texts = [printable(name) for name in names]
        _draw_labels(draw, picture.size, corners, colors, texts, [f"{score:.2f}" for score in scores])
    return picture


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    boxes: np.ndarray,
    colors: Palette,
    names: Sequence[str],
    scores: Sequence[str],
) -> None:
    longer = max(size)
    texts = [" ".join(parts) for parts in itertools.zip_longest(names, scores, fillvalue="")]
    usual = max(12, longer / 60)
    smallest = max(11, longer / 90)
    area = sum(map(ImageFont.load_default(usual).getlength, texts)) * 1.2 * usual
    fitting = usual * min(1, (_LABELED * size[0] * size[1] / max(area, 1)) ** 0.5)
    if fitting < smallest and scores and len({*names}) == 1:
        names = [""] * len(names)
    font = ImageFont.load_default(max(smallest, fitting))
    assert isinstance(font, ImageFont.FreeTypeFont)
    height, margin = sum(font.getmetrics()), max(1, round(font.size / 6))
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1)
    placed = np.zeros((0, 4))
    for index, box in enumerate(boxes):
        name = shorten(names[index], font, _WIDEST * longer)
        short = scores[index] if scores else ""
        for text in (f"{name} {short}".strip(), short):
            width = int(font.getlength(text)) + 2 * margin + 1
            spots = np.array(list(_spots(box, width, height, size)))
            hidden = (_common_areas(spots, boxes) / areas).sum(1)
            hidden[_common_areas(spots, placed).any(1)] = np.inf
            best = int(hidden.argmin())
            if text and hidden[best] <= _COVERED:
                x, y = spots[best, :2].tolist()
                color = tuple(colors[index])
                draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
                draw.text((x + margin, y), text, _ink(color), font)
                placed = np.concatenate([placed, spots[best : best + 1]])
                break


def _spots(box: np.ndarray, width: int, height: int, size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield the rectangles inside the picture in which the label of a box can be written, the usual one first."""
    (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int).tolist(), np.ceil(box[2:]).astype(int).tolist()
    corners = [(x1, y1 - height), (x2 - width, y1 - height), (x1, y2), (x2 - width, y2)]  # above and below
    corners += [(x1, y1), (x2 - width, y1), (x1, y2 - height), (x2 - width, y2 - height)]  # inside
    corners += [(x2, y1), (x1 - width, y1), (x2, y2 - height), (x1 - width, y2 - height)]  # beside
    for x, y in corners:
        x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        yield x, y, x + width, y + height


def _common_areas(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the area that each of the boxes (N, 4) has in common with each of the others (M, 4), as (N, M)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.maximum(high - low, 0).prod(2)


def _ink(color: Sequence[int]) -> str:
    """Return black or white, whichever has the higher contrast to a color (WCAG 2's relative luminance)."""
    channels = np.array(color) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"
