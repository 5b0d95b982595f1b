"""Read images and labels from Parquet files, as Hugging Face's data sets store them.

An image is a row with the bytes of an image file. All rows look like one folder with a folder of images for each
label: `label/file name`. A split in the names of the files (`train-00000-of-00294.parquet`) becomes a folder around
them.

Parquet compresses rows in pages, and stores pages in row groups of 100 images and more. pyarrow reads whole row groups,
which is slow for images in random order. Pages of the usual encodings are therefore read here, and pyarrow reads the
row group otherwise. Each process decompresses a page once, and remembers where its images are. With Snappy, the usual
codec, and without compression, it then reads only the bytes of an image. The format of the files:
https://parquet.apache.org/docs/file-format/.
"""

import bisect
import functools
import io
import itertools
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fcvit.data.archives import Archive, Builder, label_folder
from fcvit.data.columns import LARGEST, encoded
from fcvit.data.folders import FORMATS, is_image, open_file
from fcvit.data.splits import role, split_folders
from fcvit.errors import MissingExtra, UnreadableFile, counted
from fcvit.text import one_line

MAGIC = b"PAR1"
_LABELS = ("label", "labels", "class", "cls", "target")
_HEADER = 1 << 14  # bytes that are read at once for the header of a page
_LARGEST_HEADER = 1 << 20
_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli", "LZ4_RAW": "lz4_raw"}
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # types of pages
_PLAIN, _DICTIONARIES = 0, (2, 8)  # encodings
_BLOCK = 1 << 16  # bytes that Snappy compresses independently of others


def import_parquet() -> Any:
    """Import `pyarrow.parquet`.

    Raises:
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtra("pyarrow is not installed; install it with: pip install 'fcvit[parquet]'") from error
    return parquet


class ParquetLocation(NamedTuple):
    """The location of an image in a Parquet file.

    Attributes:
        path: Path of the file.
        page: Position of the header of the page, or -1 - n for a row of row group n.
        row: Number of the row in the page or row group.
    """

    path: str
    page: int
    row: int

    def read(self) -> bytes:
        """Return the bytes of the image.

        Raises:
            OSError: The file cannot be read or is damaged, or the row contains no image.
        """
        try:
            if self.page < 0:
                content = _row_group(self.path, -1 - self.page)[self.row]
            else:
                content = _image(self.path, self.page, self.row)
        except Exception as error:  # damaged bytes can fail anywhere in pyarrow, which also has its own OSError
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise OSError(f"damaged Parquet data: {one_line(error)[:100]}") from error
        if content is None:
            raise OSError("the row contains no bytes of an image")
        return bytes(content)


class _Chunk(NamedTuple):
    """The images of a row group: first byte, end, rows, codec, and depth of the optional columns around them."""

    start: int
    end: int
    rows: int
    codec: str
    depth: int


class _Columns(NamedTuple):
    """The columns of a Parquet file that are read: names of leaf columns, and the index of the images' column."""

    image: str
    index: int
    name: str | None
    label: str | None
    classes: tuple[str, ...]


def read_parquet(root: Path, paths: Sequence[Path]) -> Archive:
    """Return the rows of Parquet files as one archive.

    Args:
        root: Path of the data, for messages.
        paths: Path of each file.

    Raises:
        UnreadableFile: A file is damaged, or has no column or several columns of images, or other columns than the
            first file.
        MissingExtra: pyarrow is not installed.
    """
    import_parquet()
    splits = split_folders(root, [_stem(root, path) for path in paths])
    columns: _Columns | None = None
    for numbered in (False, True):
        every, images, unlabeled = Builder(), 0, 0
        for path, split in zip(paths, splits, strict=True):
            file = _open(path)
            own = _columns(path, file)
            columns = columns or own
            if (own.image, own.label, own.classes) != (columns.image, columns.label, columns.classes):
                raise UnreadableFile(f"{path}: has other columns or classes than {paths[0].name}; pass it separately")
            number = every.paths.setdefault(str(path), len(every.paths))
            ending = _ending(path, file, own)
            for row, (name, label, page, place) in enumerate(_rows(path, file, own)):
                last = (name or "").replace("\\", "/").rpartition("/")[2].replace("\0", "")
                if numbered or not is_image(last):
                    stem = _stem(root, path).replace("/", "-")
                    last = f"{stem}-{row:06d}{os.path.splitext(last)[1] if is_image(last) else ending}"  # noqa: PTH122
                folder = f"{split}/" if split else ""
                if label is None:
                    unlabeled += 1
                else:
                    folder += f"{label}/"
                every.append(encoded(folder + last), number, page, place)
                images += 1
        assert columns is not None
        notes = [f"read as {counted(len(paths), 'Parquet file')} with {counted(images, 'image')}"]
        if unlabeled:
            notes.append(f"{counted(unlabeled, 'image')} without a label")
        if numbered:
            notes.append("file names in the data repeat, so images are named by their row")
        archive = every.build(
            kind=ParquetLocation,
            labeled=True,
            splits=tuple(dict.fromkeys(filter(None, splits))),
            classes=columns.classes,
            notes=tuple(f"{root}: {note}" for note in notes),
        )
        if len(archive.files) == images:
            break
    return archive


def _stem(root: Path, path: Path) -> str:
    """Return the name that tells the split of a file: that of its folder below the root, or else its own."""
    inner = path.relative_to(root).with_suffix("").parts if path != root else (path.stem,)
    return inner[-2] if len(inner) > 1 and role(inner[-2]) else inner[-1]


def _open(path: Path) -> Any:
    try:
        return import_parquet().ParquetFile(path)
    except MissingExtra:
        raise
    except Exception as error:  # damaged bytes can fail anywhere in pyarrow
        raise UnreadableFile(f"{path}: not a readable Parquet file: {one_line(error)[:120]}") from error


def _columns(path: Path, file: Any) -> _Columns:
    """Find the columns of images, their names and labels, by Hugging Face's metadata or by their types."""
    import pyarrow

    schema = file.schema_arrow
    features: dict[str, Any] = {}
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass  # not written by Hugging Face's library

    def binary(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    images: dict[str, str | None] = {}
    for field in schema:
        inner = {part.name: part.type for part in field.type} if pyarrow.types.is_struct(field.type) else {}
        if "bytes" in inner and binary(inner["bytes"]):
            images[f"{field.name}.bytes"] = f"{field.name}.path" if "path" in inner else None
        elif binary(field.type):
            images[field.name] = None
    if len(images) != 1:
        listed = f"several columns of images ({', '.join(images)})" if images else "no column with the bytes of images"
        raise UnreadableFile(f"{path}: contains {listed}; expected one, as in Hugging Face's image data sets")
    ((image, name),) = images.items()
    labels = [field.name for field in schema if features.get(field.name, {}).get("_type") == "ClassLabel"]
    labels = labels or [field.name for field in schema if field.name.lower() in _LABELS]
    if len(labels) > 1:
        raise UnreadableFile(
            f"{path}: contains several columns of labels ({', '.join(labels)}); keep one of them in the file"
        )
    label = labels[0] if labels else None
    kind = schema.field(label).type if label else None
    if kind is not None and not (pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind)):
        raise UnreadableFile(f"{path}: the column {label} has the type {kind}; expected integers or text")
    names = features.get(label, {}).get("names") if label and pyarrow.types.is_integer(kind) else None
    classes: tuple[str, ...] = ()
    if isinstance(names, list) and names:
        classes = tuple(label_folder(str(text), f"{path}: class {index}") for index, text in enumerate(names))
        if len(set(classes)) < len(classes):
            raise UnreadableFile(f"{path}: two classes have the same name; rename one of them")
    leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    return _Columns(image, leaves.index(image), name, label, classes)


def _ending(path: Path, file: Any, columns: _Columns) -> str:
    """Return the ending of the first image for images without a file name."""
    for _, _, page, row in _rows(path, file, columns, 1):
        try:
            kind = Image.open(io.BytesIO(ParquetLocation(str(path), page, row).read())).format
        except Exception:  # any image can be damaged
            break
        return FORMATS.get(kind or "", (".jpg",))[0]
    return ".jpg"


def _rows(
    path: Path, file: Any, columns: _Columns, row_groups: int | None = None
) -> Iterator[tuple[str | None, str | None, int, int]]:
    """Yield the file name, the folder of the label, and the page and row of each image."""
    wanted = [name for name in (columns.name, columns.label) if name]
    try:
        for group in range(file.num_row_groups if row_groups is None else min(row_groups, file.num_row_groups)):
            count = file.metadata.row_group(group).num_rows
            if not 0 <= count <= path.stat().st_size:
                raise ValueError("damaged number of rows")
            table = file.read_row_group(group, columns=wanted).to_pydict() if wanted else {}
            names: list[Any] = [None] * count
            if columns.name:
                outer, _, inner = columns.name.rpartition(".")
                names = [row and row[inner] for row in table[outer]]
            labels = table[columns.label] if columns.label else [None] * count
            places = _places(path, file, columns, group) or ((-1 - group, row) for row in range(count))
            for name, label, place in zip(names, labels, places, strict=True):
                yield name, _folder(path, label, columns.classes), *place
    except UnreadableFile:
        raise
    except Exception as error:  # damaged bytes can fail anywhere in pyarrow
        raise UnreadableFile(f"{path}: not a readable Parquet file: {one_line(error)[:120]}") from error


def _folder(path: Path, label: Any, classes: Sequence[str]) -> str | None:
    """Return the folder of a label, or None for a row without a label, which is null or -1."""
    if label is None or label == -1:
        return None
    if not classes:
        return label_folder(str(label), str(path))
    if not 0 <= label < len(classes):
        raise UnreadableFile(f"{path}: label {label}, but the file names {len(classes)} classes")
    return classes[label]


def _places(path: Path, file: Any, columns: _Columns, group: int) -> list[tuple[int, int]] | None:
    """Return the page and the row in it of each row of a row group, or None if the pages cannot be read one by one."""
    try:
        chunk = _chunk(file, columns.index, group)
        if chunk is None:
            return None
        places: list[tuple[int, int]] = []
        with open_file(path) as content:
            position = chunk.start
            while position < chunk.end:
                header, data = _page_header(content.fileno(), position)
                if header[1] == _DATA and header[5][2] in (_PLAIN, *_DICTIONARIES):
                    count = header[5][1]
                elif header[1] == _DATA_V2 and header[8][4] in (_PLAIN, *_DICTIONARIES):
                    count = header[8][1]
                elif header[1] == _DICTIONARY:
                    count = 0
                else:
                    return None
                if not 0 <= count <= chunk.rows - len(places):
                    return None
                places += ((position, row) for row in range(count))
                position = data + header[3]
        return places if len(places) == chunk.rows else None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):
        return None


def _chunk(file: Any, index: int, group: int) -> _Chunk | None:
    """Return the images of a row group, or None if only pyarrow can read them."""
    leaf, about = file.schema.column(index), file.metadata.row_group(group).column(index)
    codec = "" if about.compression == "UNCOMPRESSED" else _CODECS.get(about.compression)
    if not hasattr(os, "pread") or codec is None or leaf.max_repetition_level or leaf.physical_type != "BYTE_ARRAY":
        return None
    start = min(filter(None, (about.dictionary_page_offset, about.data_page_offset)))
    rows = file.metadata.row_group(group).num_rows
    return _Chunk(start, start + about.total_compressed_size, rows, codec, leaf.max_definition_level)


@functools.lru_cache(4096)
def _chunks(path: str) -> list[_Chunk]:
    """Return the images of all row groups of a file."""
    file = import_parquet().ParquetFile(path)
    index = _columns(Path(path), file).index
    return [chunk for group in range(file.num_row_groups) if (chunk := _chunk(file, index, group))]


@functools.lru_cache(2)
def _row_group(path: str, group: int) -> list[Any]:
    """Return the images of a row group. Several images of one row group often follow each other."""
    file = import_parquet().ParquetFile(path)
    columns = _columns(Path(path), file)
    (column,) = file.read_row_group(group, columns=[columns.image]).columns
    if "." in columns.image:
        column = column.combine_chunks().field("bytes") if column.num_chunks else column
    return [value.as_py() for value in column]


class _Page(NamedTuple):
    """What is needed to read single images of a page without decompressing all of it.

    Attributes:
        data, size: Position and number of the compressed bytes.
        total: Number of uncompressed bytes.
        codec: Name of the codec, or "".
        rows: Number of the image in each row, or -1 for a row without an image, int32.
        starts: Uncompressed position of the length before each image, and the end. Empty if the images are in the
            dictionary.
        blocks: Position of each block of `_BLOCK` uncompressed bytes in the compressed bytes, and the end. Empty if the
            codec has no such blocks.
    """

    data: int
    size: int
    total: int
    codec: str
    rows: "array[int]"
    starts: "array[int]"
    blocks: "array[int]"


def _image(path: str, position: int, row: int) -> bytes | None:
    """Return the image in a row of the page at a position, or None if the row has none."""
    chunks = _chunks(path)
    chunk = chunks[bisect.bisect_right(chunks, position, key=lambda chunk: chunk.start) - 1]
    page = _page(path, position, chunk)
    number = page.rows[row]
    if number < 0:
        return None
    if not page.starts:  # the rows are numbers of images in the dictionary, which is the first page
        position = chunk.start
        page = _page(path, position, chunk)
    start, end = page.starts[number] + 4, page.starts[number + 1]
    with open_file(path) as file:
        if not page.codec:
            return os.pread(file.fileno(), end - start, page.data + start)
        if not page.blocks or end == start:
            return _whole(path, *page[:4])[start:end]
        first, last = start // _BLOCK, (end - 1) // _BLOCK
        content = os.pread(file.fileno(), page.blocks[last + 1] - page.blocks[first], page.data + page.blocks[first])
    size = min((last + 1) * _BLOCK, page.total) - first * _BLOCK
    content = _decompress(_as_varint(size) + content, size, page.codec)
    return content[start - first * _BLOCK : end - first * _BLOCK]


@functools.lru_cache(2)
def _whole(path: str, data: int, size: int, total: int, codec: str) -> bytes:
    """Return the uncompressed bytes of a page. Several images of one page often follow each other."""
    with open_file(path) as file:
        return _decompress(os.pread(file.fileno(), size, data), total, codec)


@functools.lru_cache(1 << 16)
def _page(path: str, position: int, chunk: _Chunk) -> _Page:
    """Decompress a page once and return where its images are: about 2 kB for 100 images of 100 kB."""
    with open_file(path) as file:
        header, data = _page_header(file.fileno(), position)
        total, size = header[2], header[3]
        if not 0 <= size <= chunk.end - position or not 0 <= total <= 2 * LARGEST:
            raise ValueError("size of a page")
        compressed = os.pread(file.fileno(), size, data)
    codec, count, encoding, about = chunk.codec, 0, _PLAIN, {}
    if header[1] != _DICTIONARY:
        about = header[8 if header[1] == _DATA_V2 else 5]
        count, encoding = about[1], about[4 if header[1] == _DATA_V2 else 2]
    if not 0 <= count <= chunk.rows:
        raise ValueError("number of rows")
    if header[1] == _DATA_V2:  # the levels are not compressed
        start = about[5] + about[6]
        levels = _hybrid(compressed[about[6] : start], chunk.depth.bit_length(), count)
        data, size, total, compressed = data + start, size - start, total - start, compressed[start:]
        codec = codec if about.get(7, True) else ""
        content, first = _decompress(compressed, total, codec), 0
    else:
        content, first = _decompress(compressed, total, codec), 0
        levels = [0] * count
        if chunk.depth and count:
            first = 4 + int.from_bytes(content[:4], "little")
            levels = _hybrid(content[4:first], chunk.depth.bit_length(), count)
    if len(content) != total or len(compressed) != size:
        raise ValueError("truncated page")
    present = [level == chunk.depth for level in levels]
    if encoding != _PLAIN:
        numbers = iter(_hybrid(content[first + 1 :], content[first], sum(present)))
        rows = array("i", [next(numbers) if exists else -1 for exists in present])
        return _Page(data, size, total, codec, rows, array("q"), array("q"))
    starts = array("q", [first])
    while starts[-1] < total and len(starts) <= chunk.rows:
        starts.append(starts[-1] + 4 + int.from_bytes(content[starts[-1] : starts[-1] + 4], "little"))
    if starts[-1] != total:
        raise ValueError("damaged values")
    order = itertools.count()
    rows = array("i", [next(order) if exists else -1 for exists in present])
    blocks = _snappy_blocks(compressed, total) if codec == "snappy" else array("q")
    return _Page(data, size, total, codec, rows, starts, blocks)


def _snappy_blocks(content: bytes, total: int) -> "array[int]":
    """Return where each block of `_BLOCK` uncompressed bytes begins in Snappy's format, and the end.

    Snappy's compressors compress such blocks independently. This is checked. The result is empty if it is not so, or if
    the content is small or compressible, so that it is not worth the time. Image files are hardly compressible.
    The format: https://github.com/google/snappy/blob/main/format_description.txt.
    """
    none: array[int] = array("q")
    if total < 4 * _BLOCK or len(content) < 0.9 * total:
        return none
    blocks: array[int] = array("q")
    _, position = _varint(content, 0)
    done, end = 0, len(content)
    while position < end:
        inside = done % _BLOCK
        if not inside:
            blocks.append(position)
        tag = content[position]
        kind, length = tag & 3, (tag >> 2) + 1
        position += 1
        if not kind:  # a literal
            if length > 60:
                extra = length - 60
                length = int.from_bytes(content[position : position + extra], "little") + 1
                position += extra
            position += length
        else:  # a copy of bytes before
            extra = (1, 2, 4)[kind - 1]
            offset = int.from_bytes(content[position : position + extra], "little")
            position += extra
            if kind == 1:
                length, offset = 4 + ((tag >> 2) & 7), offset | (tag >> 5) << 8
            if offset > inside:
                return none
        if inside + length > _BLOCK:
            return none
        done += length
    blocks.append(position)
    return blocks if done == total and position == end else none


def _as_varint(number: int) -> bytes:
    content = bytearray()
    while number > 127:
        content.append(number & 127 | 128)
        number >>= 7
    return bytes((*content, number))


def _decompress(content: bytes, size: int, codec: str) -> bytes:
    if not codec or not size:
        return content
    import pyarrow

    return pyarrow.Codec(codec).decompress(content, size, asbytes=True)


def _hybrid(content: bytes, width: int, count: int) -> list[int]:
    """Decode integers of a bit width from Parquet's hybrid of run lengths and packed bits."""
    if not 0 <= count <= LARGEST or width > 32:
        raise ValueError("damaged page")
    values: list[int] = []
    position = 0
    while len(values) < count and width:
        run, position = _varint(content, position)
        if run & 1:
            size = (run >> 1) * width
            bits = int.from_bytes(content[position : position + size], "little")
            number = min((run >> 1) * 8, count - len(values))
            values += [(bits >> (index * width)) & ((1 << width) - 1) for index in range(number)]
        else:
            size = -(-width // 8)
            values += [int.from_bytes(content[position : position + size], "little")] * min(
                run >> 1, count - len(values)
            )
            if not run:
                raise ValueError("damaged page")
        position += size
    return values or [0] * count


def _page_header(descriptor: int, position: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the header of a page, and the position after it."""
    for size in (_HEADER, _LARGEST_HEADER):
        content = os.pread(descriptor, size, position)
        try:
            fields, end = _struct(content, 0)
            return fields, position + end
        except IndexError:
            if len(content) < size:
                break
    raise ValueError("damaged header of a page")


def _struct(content: bytes, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Decode a structure of Thrift's compact protocol: number of a field -> value."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := content[position]:
        position += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, position = _zigzag(content, position)
        kind &= 15
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            fields[number], position = _zigzag(content, position)
        elif kind == 8:
            size, position = _varint(content, position)
            position += size
        elif kind == 12 and depth < 4:
            fields[number], position = _struct(content, position, depth + 1)
        else:
            raise ValueError("unknown field in the header of a page")
    return fields, position + 1


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("damaged number")


def _zigzag(content: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(content, position)
    return (value >> 1) ^ -(value & 1), position
