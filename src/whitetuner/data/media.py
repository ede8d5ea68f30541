"""A picture file becomes upright RGB pixels, and those are cut to a size: scaled to cover, centre-cropped, never stretched.

Traps that are handled here (measured on real files): EXIF rotation; transparency, which PIL's convert would drop onto
whatever colour lies underneath; 16-bit greys, which convert would clip to white; palettes, CMYK and colour profiles.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

from whitetuner.errors import UserError
from whitetuner.records import Size

#: Endings that are looked at as pictures, in small letters.
PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".heic", ".heif", ".avif")

#: Pictures that are not read: several frames, layers, or no decoder with Pillow. `check` names them.
OTHER_PICTURES = (
    ".gif",
    ".tif",
    ".tiff",
    ".jxl",
    ".jp2",
    ".psd",
    ".svg",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".tga",
    ".ico",
)

#: A 200-megapixel phone photo passes; a file that would unpack into gigabytes does not.
MAX_PIXELS = 256_000_000

#: Part of the cache key: raised whenever `read` or `cut` gives other pixels for the same file.
CUT_VERSION = 1

#: What Pillow and its decoders raise on broken files (seen by flipping bytes; RuntimeError comes from AVIF).
BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error, zlib.error)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own guard warns from 89 megapixels on, which real phones exceed, and raises at 179. `opened` has the limit above.
Image.MAX_IMAGE_PIXELS = None


def read(path: Path, cover: Size | None = None, data: bytes | None = None) -> Image.Image:
    """Upright RGB picture: rotated by EXIF, transparency over white, 16 bits scaled to 8, colour profile turned to sRGB.

    cover: what it will be cut to; a JPEG at least twice as large is then decoded at a fraction by its DCT (a third of the
    time for 12 megapixels, 48.7 dB from the full decode).
    data: the file's content where it was read already
    Raises UserError when the file is missing, not a picture, damaged or too large.
    """
    with opened(path, data) as image:
        if cover is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, _at_least(image.size, cover, turned=orientation(image) >= 5))
        return _rgb(_upright(image))


def read_mask(path: Path, alpha: bool, data: bytes | None = None) -> Image.Image:
    """Upright greys ("L"), 255 where a picture counts: a mask's brightness (what is transparent in it is black), or, alpha, how
    opaque the picture is.

    Raises UserError as `read` does, and for a picture without an alpha channel.
    """
    with opened(path, data) as image:
        image = _upright(image)
        if alpha:
            if not image.has_transparency_data:
                raise no_alpha(path)
            return image.convert("RGBA").getchannel("A")
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, "black")
            image = Image.alpha_composite(black, image.convert("RGBA"))
        return _rgb(image).convert("L")


def no_alpha(path: Path) -> UserError:
    return UserError(
        "the picture has no alpha channel to take a mask from",
        where=str(path),
        mend="save it as png or webp with transparency, or name a folder of masks (mask_dir)",
    )


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # PNG may keep its EXIF behind the pixels
    turn = orientation(image)
    return image.transpose(_TURNS[turn]) if turn != 1 else image


def crop_box(source: Size, size: Size) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is kept, in the picture's own pixels: the largest centred part of the shape."""
    scale = max(size.width / source.width, size.height / source.height)
    width, height = min(source.width, size.width / scale), min(source.height, size.height / scale)
    left, top = (source.width - width) / 2, (source.height - height) / 2
    if scale == 1.0:  # pixels stay what they are: half a pixel of offset would blur
        left, top = math.floor(left), math.floor(top)
    return left, top, left + width, top + height


def cut(image: Image.Image, size: Size) -> Image.Image:
    """Scales with one factor so that the picture covers `size`, then keeps the middle: one Lanczos pass for both."""
    box = crop_box(Size(*image.size), size)
    return image.resize((size.width, size.height), Image.Resampling.LANCZOS, box=box)


def picture(path: Path, size: Size, data: bytes | None = None) -> Image.Image:
    """The pixels that training sees of a file, RGB, `size.width` x `size.height`."""
    return cut(read(path, size, data), size)


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 from what of the file was read so far; 5 and up swap width and height.

    PNG: its `getexif` would decode all of it to look behind the pixels, so the base class is asked.
    Broken EXIF counts as none, as in viewers.
    """
    try:
        value = Image.Image.getexif(image).get(0x0112, 1)
    except (*BROKEN, KeyError, IndexError, TypeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@contextmanager
def opened(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """The file as Pillow sees it, pixels not decoded yet; whatever breaks inside becomes a UserError that names the file."""
    with naming(path), io.BytesIO(data) if data is not None else path.open("rb") as file:
        kind = sniff(file.read(64))
        file.seek(0)
        with Image.open(file, formats=_formats(path, kind)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise too_large(path, Size(*image.size))
            yield image


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever breaks while a picture file is looked at becomes a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            "the file is gone", where=str(path), mend="put it back, or start again without it"
        ) from error
    except PermissionError as error:
        raise UserError(
            "the file may not be read",
            where=str(path),
            mend="give yourself the right to read it ({reason})",
            reason=error,
        ) from error
    except (UnidentifiedImageError, *BROKEN) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> UserError:
    """What to say of a file that the decoder gave up on."""
    if path.stat().st_size == 0:
        return UserError(
            "the file is empty (0 bytes)", where=str(path), mend="copy or download it again, or delete it"
        )
    reason = (
        "unknown format" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
    )
    return UserError(
        "the picture is damaged or cut off ({reason})",
        where=str(path),
        mend="copy or download it again, or delete it",
        reason=reason,
    )


def too_large(path: Path, size: Size) -> UserError:
    """What is told of a picture with more pixels than are decoded."""
    return UserError(
        "{width} x {height} pixels are more than the {limit} megapixels that are decoded",
        where=str(path),
        mend="make it smaller (training sees far fewer pixels), or delete it if you do not know it",
        width=size.width,
        height=size.height,
        limit=MAX_PIXELS // 1_000_000,
    )


def sniff(head: bytes) -> str:
    """What a file really is, by its first 64 bytes, whatever its name says; "" when unknown."""
    if head[4:8] == b"ftyp":
        brands = head[8:64]
        if b"avif" in brands or b"avis" in brands:
            return "avif"
        if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"heif", b"mif1", b"msf1")):
            return "heic"
        return "video"
    if head[:4] == b"RIFF":
        return "webp" if head[8:12] == b"WEBP" else "video" if head[8:12] == b"AVI " else ""
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    return "web page" if head.lstrip()[:1] == b"<" else ""


_STARTS = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"BM", "bmp"),
    (b"GIF8", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"8BPS", "psd"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL ", "jxl"),
    (b"\0\0\0\x0cjP  ", "jp2"),
    (b"version https://git-lfs", "git-lfs pointer"),
    (b"%PDF", "pdf"),
    (b"PK\x03\x04", "zip"),
)


def _formats(path: Path, kind: str) -> list[str]:
    """Pillow's name of the decoder. Raises UserError for what is not read, naming what it really is."""
    if kind in ("jpeg", "png", "webp", "bmp"):
        return [kind.upper()]
    if kind == "avif" and features.check("avif"):
        return ["AVIF"]
    if kind == "heic":
        try:
            import pillow_heif
        except ImportError:
            raise UserError(
                "HEIC pictures need one more package",
                where=str(path),
                mend='pip install "whitetuner[heic]", or convert the picture to jpg or png',
            ) from None
        pillow_heif.register_heif_opener()
        return ["HEIF"]
    if kind == "git-lfs pointer":
        raise UserError(
            "only a Git LFS pointer, not the picture",
            where=str(path),
            mend="fetch the real files: git lfs pull",
        )
    if kind in ("web page", "pdf", "zip", "video"):
        raise UserError(
            "a {kind}, not a picture",
            where=str(path),
            mend="download the picture itself, or delete it",
            kind=kind,
        )
    if kind:
        raise UserError(
            "{kind} pictures are not read",
            where=str(path),
            mend="convert it to png, jpg or webp",
            kind=kind.upper(),
        )
    return ["JPEG", "PNG", "WEBP", "BMP"]  # unknown start: Pillow says what it thinks of it


def _at_least(source: tuple[int, int], cover: Size, turned: bool) -> tuple[int, int]:
    """Size before rotation that a JPEG must keep so that cutting to `cover` never enlarges. At most the source itself."""
    width, height = (cover.height, cover.width) if turned else (cover.width, cover.height)
    scale = min(1.0, max(width / source[0], height / source[1]))
    return math.ceil(source[0] * scale), math.ceil(source[1] * scale)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 0..65535 -> 0..255 (65535 / 257 = 255); convert("RGB") clips everything above 255 to white
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8), "L").convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, with_alpha).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        image = _to_srgb(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours as viewers show them (phones store Display P3, print files CMYK); a broken profile counts as none."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted if converted is not None else image
