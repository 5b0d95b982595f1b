"""Test decoding, preprocessing and normalization, with hashes of the authors' pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import golden_json, image_by_rule, sha256
from fcvit.data.transforms.preprocess import as_rgb, crop, decode, normalize, preprocess
from fcvit.errors import BadImages
from fcvit.models.variants import RESIZE256_BILINEAR, VARIANTS, Preprocessing

GOLDEN = golden_json("preprocess_synthetic.json")["images"]
PROTOCOLS = {
    "0.9 bicubic": VARIANTS["fcvit_tiny"].preprocessing,
    "0.95 bicubic": VARIANTS["fcvit_b48"].preprocessing,
    "resize256-bilinear": RESIZE256_BILINEAR,
}


@pytest.mark.slow
@pytest.mark.parametrize("size", GOLDEN)
def test_pixels_equal_the_authors(size):
    image = image_by_rule(*map(int, size.split("x")))
    golden = GOLDEN[size]
    assert sha256(np.asarray(image)) == golden["decoded_sha256"]
    for name, preprocessing in PROTOCOLS.items():
        result = crop(image, preprocessing)
        assert result.shape == (3, 224, 224) and result.dtype == np.uint8
        assert sha256(result.transpose(1, 2, 0)) == golden[name], name


@pytest.mark.parametrize(
    "wrong",
    [
        Preprocessing(crop_fraction=0.9, interpolation="bilinear"),
        Preprocessing(crop_fraction=0.91),
        Preprocessing(input_size=223, crop_fraction=0.9),
    ],
)
def test_the_hashes_detect_wrong_preprocessing(wrong):
    result = crop(image_by_rule(500, 375), wrong)
    assert sha256(result.transpose(1, 2, 0)) != GOLDEN["500x375"]["0.9 bicubic"]


def test_normalization_equals_a_manual_computation():
    """The values (x / 255 - mean) / std per RGB channel in float32, for black and white."""
    pixels = np.zeros((2, 3, 4, 5), np.uint8)
    pixels[1] = 255
    result = normalize(pixels, Preprocessing())
    assert result.dtype == np.float32 and result.shape == (2, 3, 4, 5)
    np.testing.assert_allclose(result[0, :, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6)
    np.testing.assert_allclose(result[1, :, 3, 4], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rtol=1e-6)
    assert not pixels[0].any()  # the input is not modified


@given(width=st.integers(1, 400), height=st.integers(1, 400), size=st.integers(1, 64), fraction=st.floats(0.2, 1))
@settings(derandomize=True, max_examples=80, deadline=None)
def test_an_image_of_any_size_is_cropped_and_keeps_its_color(width, height, size, fraction):
    image = Image.new("RGB", (width, height), (200, 100, 50))
    result = preprocess(image, Preprocessing(input_size=size, crop_fraction=fraction))
    assert result.shape == (3, size, size)
    assert (result == np.array([200, 100, 50])[:, None, None]).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16"])
def test_other_color_modes_are_converted(tmp_path, mode):
    ending = "jpg" if mode == "CMYK" else "png"
    if mode == "I;16":
        Image.fromarray(np.full((40, 50), 1000, np.uint16)).save(tmp_path / f"x.{ending}")
    else:
        Image.new("L", (50, 40), 180).convert(mode).save(tmp_path / f"x.{ending}")
    assert preprocess(tmp_path / f"x.{ending}", Preprocessing(input_size=32)).shape == (3, 32, 32)


DEEP = np.linspace(0, 65535, 48 * 40, dtype=np.uint16).reshape(40, 48)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_gray_is_converted_to_its_upper_8_bits(tmp_path, ending):
    """Pillow decodes 16-bit color in this way. `Image.convert` would clip gray values at 255."""
    path = tmp_path / f"x.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 48 40 65535\n" + DEEP.astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP).save(path)
    for result in (decode(path), as_rgb(Image.open(path))):
        assert result.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(result), np.repeat((DEEP >> 8)[..., None], 3, axis=2))
    Image.fromarray(DEEP // 257).save(tmp_path / "low.png")  # 8-bit values in 16 bits
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "low.png"))[..., 0], DEEP // 257)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bit_images_with_8_bit_values_are_read(tmp_path, kind):
    Image.fromarray((DEEP // 257).astype(kind)).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "x.tif"))[..., 1], DEEP // 257)


@pytest.mark.parametrize("values", [DEEP.astype(np.int32), -DEEP.astype(np.float32), (DEEP / 65535).astype(np.float32)])
def test_32_bit_images_of_unknown_range_are_rejected(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(BadImages, match=r"x\.tif: (32-bit integers|floats) from .* save with 8 or 16 bits"):
        decode(tmp_path / "x.tif")
    if values.dtype == np.float32:
        with pytest.raises(BadImages, match="image: floats from"):
            preprocess(Image.fromarray(values), Preprocessing())


def test_orientation_tags_are_not_applied(tmp_path):
    """The top of the stored pixels stays at the top, as in the authors' pipeline."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "x.png", exif=exif)
    result = preprocess(tmp_path / "x.png", Preprocessing(input_size=32, crop_fraction=1))
    assert result[:, :8].max() == 0 and result[:, -8:].min() == 255


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a readable image: an empty file"),
        (b"hello", "not a readable image: a text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, .* git lfs pull"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "a JPEG image that is damaged or cut off"),
        (b"\x01\x02\x03\xfe", "an unknown file format"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, ""),
        (None, "No such file"),
    ],
)
def test_the_message_for_an_unreadable_image_contains_the_reason(tmp_path, content, reason):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImages, match=f"x.png: .*{reason}"):
        decode(path)


def test_a_truncated_image_is_rejected(tmp_path):
    image_by_rule(200, 150).save(tmp_path / "complete.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "complete.jpg").read_bytes()[:-400])
    with pytest.raises(BadImages, match=r"x\.jpg: .*truncated"):
        decode(tmp_path / "x.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_over_pillows_limit_for_a_warning_are_read(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    assert decode(tmp_path / "x.png").size == (300, 300)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_over_the_pixel_limit_are_rejected(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(BadImages, match=r"80,000 pixels; .*MAX_IMAGE_PIXELS"):
        decode(tmp_path / "x.png")
    thin = Image.new("RGB", (1, 3000))
    with pytest.raises(BadImages, match="1 x 3000 pixels would be resized to"):
        crop(thin, Preprocessing())
    Image.new("1", (1, 3000)).save(tmp_path / "thin.png")
    with pytest.raises(BadImages, match=r"thin\.png: 1 x 3000 pixels would be .* limit of 80,000 pixels; crop"):
        preprocess(tmp_path / "thin.png", Preprocessing())


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"DDS |\0\0\0", b"\0\0\0 ftypavif"]
)
def test_unsafe_and_unsupported_formats_are_rejected(tmp_path, start):
    (tmp_path / "x.png").write_bytes(start + bytes(200))
    with pytest.raises(BadImages, match=r"x\.png: not a readable image"):
        decode(tmp_path / "x.png")


def test_any_error_of_pillow_is_reported_as_an_unreadable_image(tmp_path, monkeypatch):
    image_by_rule(20, 20).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(RuntimeError("unexpected")))
    with pytest.raises(BadImages, match=r"x\.png: unexpected"):
        decode(tmp_path / "x.png")


@given(st.integers(0, 2**32 - 1))
@settings(derandomize=True, max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged images
def test_modified_images_are_read_or_rejected(tmp_path_factory, seed):
    generator = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("mutated")
    ending = ("jpg", "png", "bmp", "gif", "tif", "webp", "ppm")[seed % 7]
    image_by_rule(40, 30).save(folder / f"x.{ending}")
    content = bytearray((folder / f"x.{ending}").read_bytes())
    for position in generator.integers(0, len(content), 8):
        content[position] = generator.integers(0, 256)
    (folder / f"x.{ending}").write_bytes(content[: generator.integers(1, len(content) + 1)])
    try:
        assert preprocess(folder / f"x.{ending}", Preprocessing(input_size=16)).shape == (3, 16, 16)
    except BadImages as error:
        assert f"x.{ending}" in str(error)
