"""Detect the type of an unsupported file from its first bytes, for helpful error messages."""

KIND_BYTES = 512  # number of bytes that `foreign_kind` needs
TEXT = "a text file"
TAR = "a tar archive; extract it first"
_WEB_PAGE = "a web page or XML, probably a warning or error page saved by a download; download the actual file"
_VIDEO = "a video"
# Offset, bytes at the offset, and description. The first match wins.
_KINDS = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the actual file; run git lfs pull"),
    (0, b"<", _WEB_PAGE),
    (0, b"%PDF", "a PDF document; save its images as PNG or JPEG"),
    (0, b"%!PS", "a PostScript document; save it as PNG"),
    (0, b"PK\x03\x04", "a ZIP archive or an office document; extract it first"),
    (0, b"\x1f\x8b", "gzip-compressed; decompress it first"),
    (0, b"BZh", "bzip2-compressed; decompress it first"),
    (0, b"\xfd7zXZ\0", "xz-compressed; decompress it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed; decompress it first"),
    (0, b"7z\xbc\xaf", "a 7z archive; extract it first"),
    (0, b"Rar!", "a RAR archive; extract it first"),
    (257, b"ustar", TAR),
    (0, b"\x89HDF", "an HDF5 file (Keras?), which is not supported"),
    (0, b"\x93NUMPY", "a single NumPy array"),
    (0, b"\xff\x0a", "a JPEG XL image, which is not supported; save it as JPEG or PNG"),
    (4, b"JXL ", "a JPEG XL image, which is not supported; save it as JPEG or PNG"),
    (4, b"jP  ", "a JPEG 2000 image, which is not supported; save it as JPEG or PNG"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image, which is not supported; save it as JPEG or PNG"),
    (0, b"8BPS", "a Photoshop document; save it as PNG"),
    (0, b"DDS ", "a DDS texture, which is not supported; save it as PNG"),
    (0, b"\0\0\x01\0", "an icon (ICO), which is not supported; save it as PNG"),
    (128, b"DICM", "a DICOM image, which is not supported; save it as PNG"),
    (8, b"AVI ", _VIDEO),
    (0, b"\x1aE\xdf\xa3", _VIDEO),
    (4, b"moov", _VIDEO),
    (0, b"\0\x05\x16\x07", "macOS metadata of a file (AppleDouble), not the actual file"),
    (0, b"\xd0\xcf\x11\xe0", "an office document or a Windows Thumbs.db file"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"\x80\x04", "a Python pickle"),
)
_IMAGES = (
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"II*\0", "a TIFF or raw image"),
    (0, b"MM\0*", "a TIFF or raw image"),
)
IMAGE_KINDS = frozenset(what for _, _, what in _IMAGES)  # supported, so an unreadable one is damaged
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def foreign_kind(head: bytes) -> str | None:
    """Return the type of a file and a remedy, or None if the type is unknown.

    Args:
        head: The first `KIND_BYTES` bytes of the file, or all bytes of a shorter file.
    """
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        brands = {head[start : start + 4] for start in (8, *range(16, min(len(head), int.from_bytes(head[:4])), 4))}
        if brands & {b"avif", b"avis"}:
            return "an AVIF image, damaged or not supported by the installed Pillow; save it as JPEG or PNG"
        return "an HEIF (HEIC) image, which is not supported; save it as JPEG or PNG" if brands & {*_HEIF} else _VIDEO
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] == b"<" and b"<svg" in start:
        return "an SVG drawing; save it as PNG"
    for offset, magic, what in (*_KINDS, *_IMAGES):
        if head.startswith(magic, offset) or (not offset and magic.isascii() and start.startswith(magic)):
            return what
    if not any(head):
        return "zeros only, probably from an interrupted copy or download"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut off.
        text = head[: error.start].decode("utf-8") if error.start > len(head) - 4 else "\0"
    return TEXT if all(c.isprintable() or c.isspace() for c in text) else None
