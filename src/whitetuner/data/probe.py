"""What a picture file says of itself, from its header and its end: size, kind, damage. Pixels are decoded only on
suspicion.

Ten thousand files are looked at in seconds. A file whose end is missing is told without decoding; because some programs
leave a proper end away, a suspect is decoded before it is called damaged.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from whitetuner.data.media import MAX_PIXELS, naming, opened, orientation, read, sniff
from whitetuner.data.problems import Problem
from whitetuner.errors import UserError
from whitetuner.records import Size

#: PNG chunks behind the pixels that could carry an orientation; only with one of them is the file read to its end.
_LATE_METADATA = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")


@dataclass(frozen=True)
class Probe:
    """size: after EXIF rotation, None when the file cannot be read; kind: what it really is; traits: what is done to it;
    times: of a video's frames, in seconds from the first; of a frame folder their numbers 0, 1, 2, ...
    """

    size: Size | None
    kind: str = ""
    traits: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    problem: Problem | None = field(default=None, compare=False)


def probe(path: Path, deep: bool = False) -> Probe:
    """Size and soundness of one picture; never raises for a bad file. deep: decode all of it, whatever its ends say."""
    try:
        with naming(path), path.open("rb") as file:
            kind = sniff(file.read(64))
            whole, late_metadata = _ends_well(file, kind)
            told = _webp(file) if kind == "webp" and whole and not deep else None
        if told is not None:
            return told
        with opened(path) as image:
            if late_metadata:
                image.load()
            turn = orientation(image)
            width, height = image.size
            size = Size(height, width) if turn >= 5 else Size(width, height)
            traits = _traits(image, turn)
        if deep or not whole:
            read(path)
        return Probe(size, kind, traits)
    except UserError as error:
        return Probe(None, problem=Problem("unreadable", "error", path, error))


def _traits(image: Image.Image, turn: int) -> tuple[str, ...]:
    found = []
    if turn != 1:
        found.append("rotated")
    if image.has_transparency_data:
        found.append("transparent")
    if image.mode.startswith("I"):
        found.append("16-bit")
    if image.mode == "CMYK":
        found.append("cmyk")
    if image.mode in ("1", "L", "LA"):
        found.append("grey")
    profile = image.info.get("icc_profile") or b"sRGB"
    if b"sRGB" not in profile and "sRGB".encode("utf-16-be") not in profile:
        found.append("colour profile")
    if getattr(image, "n_frames", 1) > 1 and image.format in ("WEBP", "PNG", "AVIF"):
        found.append("animated")
    return tuple(found)


def _ends_well(file: BinaryIO, kind: str) -> tuple[bool, bool]:
    """Whether the file has the end its format prescribes, and whether a PNG keeps text or EXIF behind its pixels."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if kind == "png":
        return _png_ends(file, length)
    check = {
        "jpeg": _jpeg_ends,
        "webp": _riff_ends,
        "bmp": _bmp_ends,
        "avif": _boxes_end,
        "heic": _boxes_end,
    }.get(kind)
    return (check(file, length) if check else True), False


def _png_ends(file: BinaryIO, length: int) -> tuple[bool, bool]:
    """Walks the chunks by their lengths (PNG specification, 5.3)."""
    position, pixels, late = 8, False, False
    while position + 12 <= length:
        file.seek(position)
        size, name = struct.unpack(">I4s", file.read(8))
        position += size + 12
        if name == b"IEND":
            return position <= length, late
        pixels = pixels or name == b"IDAT"
        late = late or (pixels and name in _LATE_METADATA)
    return False, late


def _jpeg_ends(file: BinaryIO, length: int) -> bool:
    """An end-of-image marker follows the start of the scan; inside the scan FF is always followed by 00 (ITU T.81,
    B.1.1.5).

    Searched from the end, since phones append more than a megabyte behind it (motion photos). The thumbnail inside the
    header has an end marker of its own, which must not count.
    """
    file.seek(max(0, length - 2))
    if file.read(2) == b"\xff\xd9":
        return True
    scan = _scan_start(file, length)
    if scan is None:
        return False
    stop = length
    while stop > scan:
        start = max(scan, stop - 65536)
        file.seek(start)
        if b"\xff\xd9" in file.read(stop - start):
            return True
        stop = start + 1 if start > scan else scan
    return False


def _scan_start(file: BinaryIO, length: int) -> int | None:
    position = 2
    while position + 4 <= length:
        file.seek(position)
        marker, code, size = struct.unpack(">BBH", file.read(4))
        if marker != 0xFF:
            return None
        if code == 0xFF:  # fill byte
            position += 1
            continue
        if code == 0xDA:
            return position
        position += 2 + size
    return None


def _webp(file: BinaryIO) -> Probe | None:
    """Size, orientation and traits from the chunks (WebP container specification); None: let Pillow say what it thinks.

    Pillow unpacks the whole file to tell the size, ten times the time that all other kinds need.
    """
    size, traits, info = None, [], {}
    length = file.seek(0, os.SEEK_END)
    position = 12
    while position + 8 <= length:
        file.seek(position)
        name, count = struct.unpack("<4sI", file.read(8))
        if name == b"VP8X" and count >= 10:
            flags, head = file.read(4)[0], file.read(6)
            size = Size(1 + int.from_bytes(head[:3], "little"), 1 + int.from_bytes(head[3:], "little"))
            traits += [word for bit, word in ((0x10, "transparent"), (0x02, "animated")) if flags & bit]
        elif name == b"VP8 " and count >= 10 and size is None:
            head = file.read(10)
            width, height = struct.unpack("<HH", head[6:])
            size = Size(width & 0x3FFF, height & 0x3FFF) if head[3:6] == b"\x9d\x01\x2a" else None
        elif name == b"VP8L" and count >= 5 and size is None:
            mark, bits = struct.unpack("<BI", file.read(5))
            size = Size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)) if mark == 0x2F else None
            traits += ["transparent"] if bits >> 28 & 1 else []
        elif name in (b"EXIF", b"XMP ", b"ICCP"):
            info[{b"EXIF": "exif", b"XMP ": "xmp", b"ICCP": "icc_profile"}[name]] = file.read(count)
        position += 8 + count + count % 2
    if size is None or size.width * size.height > MAX_PIXELS or not size.width * size.height:
        return None
    plain = Image.new("RGB", (1, 1))
    plain.info.update(info)
    turn = orientation(plain)
    found = (*_traits(plain, turn), *traits)
    return Probe(Size(size.height, size.width) if turn >= 5 else size, "webp", found)


def _riff_ends(file: BinaryIO, length: int) -> bool:
    (size,) = struct.unpack("<I", file.read(8)[4:])
    return size + 8 <= length


def _bmp_ends(file: BinaryIO, length: int) -> bool:
    """Uncompressed rows must all be there; the file size in the header is often wrong and not looked at."""
    header = file.read(34)
    if len(header) < 34:
        return False
    offset, info, width, height = struct.unpack("<IIii", header[10:26])
    bits, compression = struct.unpack("<HI", header[28:34])
    if info < 40 or compression not in (0, 3):
        return True
    return offset + (abs(width) * bits + 31) // 32 * 4 * abs(height) <= length


def _boxes_end(file: BinaryIO, length: int) -> bool:
    """The top-level boxes fill the file (ISO/IEC 14496-12, 4.2)."""
    position = 0
    while position + 8 <= length:
        file.seek(position)
        size, _ = struct.unpack(">I4s", file.read(8))
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
        elif size == 0:
            return True
        if size < 8:
            return False
        position += size
    return position <= length
