"""Every kind of picture file comes out as the upright RGB pixels that a viewer shows; broken ones are named."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from whitetuner.data.media import MAX_PIXELS, crop_box, cut, picture, read
from whitetuner.data.probe import probe
from whitetuner.errors import UserError
from whitetuner.records import Size


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: tells every rotation and shift."""
    across = np.linspace(0, 255, width).astype(np.uint8)
    down = np.linspace(0, 255, height).astype(np.uint8)
    red, green = np.meshgrid(across, down)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 40)], -1), "RGB")


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_rotation_gives_the_upright_picture_and_size(
    tmp_path: Path, ending: str, orientation: int
) -> None:
    upright = gradient(96, 64)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    path = tmp_path / f"a.{ending}"
    lossless = (
        {"quality": 100, "subsampling": 0}
        if ending == "jpg"
        else {"lossless": True}
        if ending == "webp"
        else {}
    )
    stored.save(path, exif=exif(orientation), **lossless)
    assert probe(path).size == Size(96, 64)
    assert ("rotated" in probe(path).traits) == (orientation != 1)
    assert np.abs(np.asarray(read(path)).astype(int) - np.asarray(upright)).max() <= 6


def test_png_orientation_behind_the_pixels_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "late.png"
    gradient(96, 64).save(path, exif=exif(6))
    raw = path.read_bytes()
    start = raw.index(b"eXIf") - 4
    length = struct.unpack(">I", raw[start : start + 4])[0] + 12
    chunk, rest = raw[start : start + length], raw[:start] + raw[start + length :]
    end = rest.index(b"IEND") - 4
    path.write_bytes(rest[:end] + chunk + rest[end:])
    assert probe(path).size == Size(64, 96)
    assert read(path).size == (64, 96)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("extra", ["plain", "exif", "profile", "animated"])
def test_webp_headers_say_what_decoding_finds(tmp_path: Path, lossless: bool, mode: str, extra: str) -> None:
    image = gradient(33, 21).convert(mode)
    if mode == "RGBA":
        image.putpixel((3, 3), (0, 0, 0, 0))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {
        "plain": {},
        "exif": {"exif": exif(8)},
        "profile": {"icc_profile": srgb},
        "animated": {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]},
    }[extra]
    image.save(tmp_path / "a.webp", lossless=lossless, **options)  # type: ignore[arg-type]
    found = probe(tmp_path / "a.webp")
    assert found.size is not None and found.size[:2] == read(tmp_path / "a.webp").size
    if extra != "animated":  # there the flag only says that frames may be
        assert ("transparent" in found.traits) == (mode == "RGBA")
    assert ("animated" in found.traits) == (extra == "animated")
    assert ("rotated" in found.traits) == (extra == "exif") and "colour profile" not in found.traits


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_hide_a_good_picture(tmp_path: Path) -> None:
    for number, data in enumerate(
        (b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    ):
        path = tmp_path / f"{number}.jpg"
        gradient(32, 16).save(path, exif=data)
        assert probe(path).size == Size(32, 16) and read(path).size == (32, 16)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.putpixel((0, 0), (200, 10, 10, 255))
    half = Image.new("LA", (8, 8), (0, 128))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 10, 200, 10])
    palette.putpixel((0, 0), 1)
    keyed = Image.new("RGB", (8, 8), (1, 2, 3))
    keyed.putpixel((0, 0), (9, 9, 9))
    for name, image, extra, corner, rest in (
        ("rgba", clear, {}, (200, 10, 10), (255, 255, 255)),
        ("la", half, {}, (127, 127, 127), (127, 127, 127)),
        ("p", palette, {"transparency": 0}, (10, 200, 10), (255, 255, 255)),
        ("trns", keyed, {"transparency": (1, 2, 3)}, (9, 9, 9), (255, 255, 255)),
    ):
        path = tmp_path / f"{name}.png"
        image.save(path, **extra)
        seen = read(path)
        assert seen.mode == "RGB"
        assert seen.getpixel((0, 0)) == corner, name
        assert seen.getpixel((5, 5)) == rest, name
        assert "transparent" in probe(path).traits, name


def test_sixteen_bit_greys_keep_their_brightness(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    seen = np.asarray(read(tmp_path / "grey16.png"))
    assert seen.shape == (4, 256, 3)
    assert (seen[0, :, 0] == np.arange(256)).all()
    assert "16-bit" in probe(tmp_path / "grey16.png").traits


def test_sixteen_bit_colours_keep_their_brightness(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + struct.pack(">3H", 257 * 200, 257 * 100, 257 * 10)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    (tmp_path / "rgb16.png").write_bytes(raw + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    assert read(tmp_path / "rgb16.png").getpixel((0, 0)) == (200, 100, 10)


def test_cmyk_grey_and_one_bit_files_become_rgb(tmp_path: Path) -> None:
    gradient(16, 16).convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    Image.new("L", (4, 4), 77).save(tmp_path / "l.bmp")
    Image.new("1", (4, 4), 1).save(tmp_path / "one.png")
    assert np.abs(np.asarray(read(tmp_path / "c.jpg")).astype(int) - np.asarray(gradient(16, 16))).max() < 12
    assert read(tmp_path / "l.bmp").getpixel((1, 1)) == (77, 77, 77)
    assert read(tmp_path / "one.png").getpixel((1, 1)) == (255, 255, 255)


def test_colour_profiles_are_turned_to_srgb_and_broken_ones_ignored(tmp_path: Path) -> None:
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = Image.new("RGB", (4, 4), (90, 120, 150))
    for name, profile in (("srgb", srgb), ("broken", b"nonsense"), ("wrong", lab_like)):
        grey.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert read(tmp_path / f"{name}.png").getpixel((0, 0)) == (90, 120, 150), name


def test_a_profile_with_other_primaries_changes_the_numbers(tmp_path: Path) -> None:
    """sRGB with red and green exchanged: what the file calls red is shown, and so learned, as green."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    head = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    swapped = bytearray(srgb)
    for place, name in zip(head, (b"gXYZ", b"rXYZ"), strict=True):
        swapped[place : place + 4] = name
    named = bytes(swapped).replace("sRGB".encode("utf-16-be"), "xxxx".encode("utf-16-be"))
    Image.new("RGB", (4, 4), (220, 30, 30)).save(tmp_path / "a.png", icc_profile=named)
    red, green, blue = read(tmp_path / "a.png").getpixel((0, 0))
    assert green > 200 and red < 60 and blue < 60
    assert "colour profile" in probe(tmp_path / "a.png").traits


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    gradient(1600, 1200).save(path, quality=95, exif=exif(6))
    quick, whole = picture(path, Size(301, 400)), cut(read(path), Size(301, 400))
    assert read(path, Size(300, 400)).size == (300, 400)
    assert read(path, Size(301, 400)).size == (600, 800)  # a quarter would have to be enlarged
    assert np.abs(np.asarray(quick).astype(int) - np.asarray(whole)).mean() < 1.0


@settings(max_examples=150, deadline=None)
@given(*(st.integers(1, 5000) for _ in range(4)))
def test_a_cut_keeps_the_largest_centred_part_of_the_wanted_shape(w: int, h: int, tw: int, th: int) -> None:
    left, top, right, bottom = crop_box(Size(w, h), Size(tw, th))
    assert 0 <= left <= right <= w + 1e-9 and 0 <= top <= bottom <= h + 1e-9
    assert (right - left) / tw == pytest.approx(
        (bottom - top) / th
    )  # one scale for both directions: never stretched
    assert right - left == pytest.approx(w) or bottom - top == pytest.approx(
        h
    )  # nothing more is cut than the shape asks
    assert abs((left + right) / 2 - w / 2) <= 0.5 and abs((top + bottom) / 2 - h / 2) <= 0.5


def test_a_cut_without_scaling_leaves_pixels_alone() -> None:
    image = gradient(101, 60)
    assert (np.asarray(cut(image, Size(96, 60))) == np.asarray(image)[:, 2:98]).all()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp"])
def test_truncated_files_are_told_without_decoding_and_when_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8))
    noise.save(path)
    assert probe(path).problem is None
    path.write_bytes(path.read_bytes()[:-200])
    problem = probe(path).problem
    assert problem is not None and problem.level == "error"
    assert str(path) in str(problem.error) and problem.error.mend
    with pytest.raises(UserError, match=r"damaged or cut off|unknown format"):
        read(path)


def test_a_jpeg_thumbnail_does_not_hide_a_missing_end_nor_an_appended_film_a_good_one(tmp_path: Path) -> None:
    thumbnail = io.BytesIO()
    gradient(16, 16).save(thumbnail, "JPEG")
    path = tmp_path / "phone.jpg"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (99, 99, 3), np.uint8)).save(path, quality=95)
    raw = path.read_bytes()
    header = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail.getvalue())) + thumbnail.getvalue()
    with_thumbnail = raw[:2] + header + raw[2:]
    path.write_bytes(with_thumbnail[:-500])
    assert probe(path).problem is not None
    path.write_bytes(with_thumbnail + b"\0\0\0 ftypmp42" + bytes(300_000))
    assert probe(path).problem is None and read(path).size == (99, 99)


def test_a_missing_end_marker_alone_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    gradient(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:-2] + bytes(64))
    assert probe(path).problem is None and read(path).size == (64, 64)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    for name, content, words in (
        ("empty.jpg", b"", "0 bytes"),
        ("page.jpg", b"<!DOCTYPE html><html></html>", "web page"),
        ("pointer.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        ("film.jpg", b"\0\0\0\x18ftypisom\0\0\0\0isomiso2", "video"),
        ("anim.jpg", b"GIF89a" + bytes(40), "GIF"),
        ("noise.png", bytes(range(1, 200)), "unknown format"),
    ):
        (tmp_path / name).write_bytes(content)
        problem = probe(tmp_path / name).problem
        assert problem is not None and words in problem.error.what, name
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert words in caught.value.what and name in caught.value.where and caught.value.mend
    gone = probe(tmp_path / "gone.jpg").problem
    assert gone is not None and "gone" in gone.error.what


def test_a_wrong_ending_does_not_matter(tmp_path: Path) -> None:
    gradient(32, 16).save(tmp_path / "a.webp", "PNG")
    assert probe(tmp_path / "a.webp").kind == "png" and read(tmp_path / "a.webp").size == (32, 16)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    raw = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    path = tmp_path / "bomb.png"
    path.write_bytes(raw)
    problem = probe(path).problem
    assert (
        problem is not None
        and "60000 x 60000" in problem.error.what
        and str(MAX_PIXELS // 1_000_000) in problem.error.what
    )
    with pytest.raises(UserError, match="megapixels"):
        read(path)


def test_one_pixel_and_very_long_pictures_can_be_cut(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (4000, 2), "blue").save(tmp_path / "line.png")
    assert picture(tmp_path / "dot.png", Size(64, 64)).getpixel((60, 60)) == (255, 0, 0)
    assert picture(tmp_path / "line.png", Size(64, 64)).size == (64, 64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp"])
def test_random_damage_gives_a_picture_or_a_message_and_nothing_else(tmp_path: Path, kind: str) -> None:
    stream = io.BytesIO()
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (24, 24, 3), np.uint8))
    noise.save(stream, kind, **({"exif": exif(6)} if kind != "bmp" else {}))
    whole, source, path = stream.getvalue(), random.Random(0), tmp_path / "a"
    read_well = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(source.choice((1, 3, 20))):
            damaged[source.randrange(source.choice((64, len(damaged))))] = source.randrange(256)
        path.write_bytes(damaged[: source.choice((len(damaged), source.randrange(1, len(damaged))))])
        probe(path)
        try:
            assert read(path).mode == "RGB"
            read_well += 1
        except UserError as error:
            assert error.where == str(path) and error.mend
    assert read_well < 300
