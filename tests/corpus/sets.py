"""Wrong pictures and captions."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from case import Case, Place, Typed, pictures
from PIL import Image

AREA = "data"


def png_bomb(width: int, height: int) -> bytes:
    """A picture of a few bytes that says that it is huge."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(9999)))
        + chunk(b"IEND", b"")
    )


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[2000:2100] = bytes(100)
    path.write_bytes(raw)


def _set(fault: str, break_it: Callable[[Path], object], *says: str, deep: bool = False) -> Case:
    """Three pictures, broken: told by check and train alike. deep: only decoding shows it."""

    def make(place: Place) -> list[Typed]:
        folder = pictures(place.folder / "set", 3)
        break_it(folder)
        config = place.config("d", **{"data.images": str(folder)})
        return [["check", config, "--no-model", *(["--deep"] if deep else [])], ["train", config]]

    return Case(AREA, fault, make, says)


def _edit(fault: str, break_it: Callable[[Path], object], *says: str) -> Case:
    def make(place: Place) -> list[Typed]:
        base = place.folder / "edit"
        for name in ("target", "condition_1"):
            pictures(base / name, 2)
        break_it(base)
        more = {"model.task": "edit", "data.images": None, "data.target": str(base / "target")}
        config = place.config("d", **more, **{"data.conditions": [str(base / "condition_1")]})
        return [["check", config, "--no-model"], ["train", config]]

    return Case(AREA, fault, make, says)


CASES = [
    _set("an empty folder", lambda d: [path.unlink() for path in d.iterdir()], "no pictures"),
    _set(
        "a caption is missing",
        lambda d: (d / "1.txt").unlink(),
        "1.png",
        "no caption file",
        "default_caption",
    ),
    _set(
        "a caption in GBK",
        lambda d: (d / "1.txt").write_bytes("红色的狗坐在草地上".encode("gbk")),
        "1.txt",
        "--convert-captions",
    ),
    _set("a caption in UTF-16", lambda d: (d / "1.txt").write_bytes("a dog".encode("utf-16")), "1.txt"),
    _set("a caption of noise", lambda d: (d / "1.txt").write_bytes(bytes(range(128, 250))), "1.txt"),
    _set(
        "a folder in place of a caption", lambda d: ((d / "1.txt").unlink(), (d / "1.txt").mkdir()), "1.png"
    ),
    _set("a picture of zero bytes", lambda d: (d / "1.png").write_bytes(b""), "1.png", "0 bytes"),
    _set("a picture cut in half", lambda d: half(d / "1.png"), "1.png", "cut off"),
    _set(
        "a web page saved as a picture",
        lambda d: (d / "1.png").write_bytes(b"<html>404"),
        "1.png",
        "web page",
    ),
    _set(
        "noise saved as a picture",
        lambda d: (d / "1.png").write_bytes(bytes(range(250))),
        "1.png",
        "unknown format",
    ),
    _set(
        "a picture that says it is 60000 pixels wide",
        lambda d: (d / "1.png").write_bytes(png_bomb(60000, 60000)),
        "1.png",
        "60000 x 60000",
        "megapixels",
    ),
    _set(
        "two pictures with one name",
        lambda d: Image.open(d / "1.png").save(d / "1.jpg"),
        "1.jpg",
        "1.png",
        "same name",
    ),
    _set(
        "a picture of 3 pixels",
        lambda d: Image.new("RGB", (3, 3)).save(d / "1.png"),
        "1.png",
        "3 x 3",
        "upscale",
    ),
    _set("damage inside a picture", lambda d: _flip(d / "1.png"), "1.png", "damaged", deep=True),
    _set("a picture of 1 x 2000", lambda d: Image.new("RGB", (1, 2000)).save(d / "1.png"), "1.png"),
    Case(
        AREA,
        "the folder is not there",
        lambda p: [[w, p.config("d", **{"data.images": str(p.folder / "nope")})] for w in ("check", "train")],
        ("nope", "no such folder"),
    ),
    Case(
        AREA,
        "a file in place of the folder",
        lambda p: [
            [w, p.config("d", **{"data.images": str(p.folder / "data" / "0.png")})]
            for w in ("check", "train")
        ],
        ("0.png", "not a folder"),
    ),
    Case(
        AREA,
        "one picture, and batches of two",
        lambda p: [
            [w, p.config("d", **{"data.images": str(pictures(p.folder / w, 1))})] for w in ("check", "train")
        ],
        ("data.batch_size", "at most 1"),
    ),
    Case(
        AREA,
        "a folder of an edit set for text to image",
        lambda p: [
            [
                "check",
                p.config("d", **{"data.images": None, "data.target": str(p.folder / "data")}),
                "--no-model",
            ]
        ],
        ("0.png", "condition folder"),
    ),
    Case(
        AREA,
        "a set weighed with nothing",
        lambda p: [["check", p.config("d"), "--set", "data.sets=[{images='x', weight=0}]"]],
        ("data.sets[0].weight",),
    ),
    Case(AREA, "`check` of a folder that is not there", lambda p: [["check", p.folder / "nope"]], ("nope",)),
    Case(
        AREA,
        "`check` of an empty folder",
        lambda p: [["check", p.file("e/x.md", "").parent]],
        ("no pictures",),
    ),
    _edit(
        "a target without its given picture",
        lambda b: (b / "condition_1" / "1.png").unlink(),
        "1.png",
        "condition_1",
    ),
    _edit(
        "the folder of given pictures is not there",
        lambda b: shutil.rmtree(b / "condition_1"),
        "condition_1",
    ),
    _edit("a given picture cut in half", lambda b: half(b / "condition_1" / "1.png"), "condition_1", "1.png"),
    _edit("an edit set whose instruction is missing", lambda b: (b / "target" / "1.txt").unlink(), "1.png"),
]
