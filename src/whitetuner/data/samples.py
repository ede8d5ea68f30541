"""Small data sets in the formats that users have, drawn from a seed: for `whitetuner testdata`, demos and tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from PIL import Image

from whitetuner.data.scenery import Scene, paint, portrait_of, scenes
from whitetuner.errors import UserError

Kind = Literal["t2i", "edit", "video"]

#: Width, height, ending of the t2i pictures, in turn: shapes and formats as they come in real folders.
_PICTURES = (
    (640, 480, "jpg"),
    (480, 640, "jpg"),
    (512, 512, "png"),
    (768, 432, "webp"),
    (360, 640, "jpg"),
    (320, 240, "bmp"),
    (720, 480, "jpg"),
    (400, 400, "webp"),
)
#: Width, height, frames a second, frames of the clips, in turn.
_CLIPS = ((320, 192, 16, 33), (192, 320, 24, 61), (256, 256, 30, 75))

#: The picture that cameras store turned, with EXIF telling so (index into the set).
_TURNED = 1


def make_testdata(kind: Kind, folder: Path, count: int = 8, seed: int = 0) -> list[Path]:
    """Writes a data set and returns its files. The same kind, count and seed give the same pictures
    everywhere.

    t2i: pictures with captions beside, in `folder`: several shapes and formats, the second turned by EXIF
    edit: folder/target with captions, folder/condition_1 (the same without the thing), folder/condition_2
    (the thing alone);
          the last item has two such pictures, with the suffixes _1 and _2
    video: clips of different size, rate and length, with captions (needs PyAV)
    Raises UserError when a file of one of these names but other content is there already.
    """
    if count < 1:
        raise UserError("a set needs at least one item", where="--count", mend="give 1 or more")
    makers: Mapping[str, Callable[[list[Scene]], dict[str, bytes]]] = {
        "t2i": _t2i,
        "edit": _edit,
        "video": _video,
    }
    if kind not in makers:
        raise UserError("there is no test data of kind {kind}", mend="one of: t2i, edit, video", kind=kind)
    files = {folder / name: content for name, content in makers[kind](scenes(count, seed)).items()}
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content:
            raise UserError(
                "a file of this name is there already", where=str(path), mend="name an empty folder"
            )
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(files)


def _t2i(drawn: list[Scene]) -> dict[str, bytes]:
    files = {}
    for number, scene in enumerate(drawn):
        width, height, ending = _PICTURES[number % len(_PICTURES)]
        image = paint(scene, width, height, grain=4.0 if ending in ("jpg", "webp") else 0.0)
        name = f"{number + 1:02}_{scene.thing.replace(' ', '_')}"
        files[f"{name}.{ending}"] = _encoded(image, ending, turned=number % len(_PICTURES) == _TURNED)
        files[f"{name}.txt"] = _text(scene.caption)
    return files


def _edit(drawn: list[Scene]) -> dict[str, bytes]:
    files = {}
    for number, scene in enumerate(drawn):
        name = f"{number + 1:02}"
        width, height, _ = _PICTURES[number % len(_PICTURES)]
        width, height = width * 3 // 4, height * 3 // 4
        side = "left" if scene.x < 0.5 else "right"
        files[f"target/{name}.jpg"] = _encoded(paint(scene, width, height), "jpg")
        files[f"target/{name}.txt"] = _text(f"put the {scene.thing} on the {side}")
        files[f"condition_1/{name}.jpg"] = _encoded(paint(scene, width, height, thing=False), "jpg")
        if number == len(drawn) - 1:
            files[f"condition_2/{name}_1.png"] = _encoded(portrait_of(scene, 256), "png")
            files[f"condition_2/{name}_2.png"] = _encoded(portrait_of(scene, 192, close=True), "png")
        else:
            files[f"condition_2/{name}.png"] = _encoded(portrait_of(scene, 256), "png")
    return files


def _video(drawn: list[Scene]) -> dict[str, bytes]:
    files = {}
    for number, scene in enumerate(drawn):
        width, height, rate, count = _CLIPS[number % len(_CLIPS)]
        frames = [
            paint(replace(scene, x=0.15 + 0.7 * frame / (count - 1)), width, height, grain=0.0)
            for frame in range(count)
        ]
        name = f"{number + 1:02}_{scene.thing.replace(' ', '_')}"
        files[f"{name}.mp4"] = _clip(frames, rate)
        files[f"{name}.txt"] = _text(f"a {scene.thing} moves to the right on {scene.land} {scene.sky}")
    return files


def _clip(frames: list[Image.Image], rate: int) -> bytes:
    try:
        import av
    except ImportError:
        raise UserError(
            "videos need one more package (PyAV)",
            where="testdata video",
            mend='pip install "whitetuner[video]"',
            code=3,
        ) from None
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("libx264", rate=rate, options={"crf": "23", "threads": "1"})
        track.width, track.height, track.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_image(frame)))
        container.mux(track.encode(None))
    return stream.getvalue()


def _encoded(image: Image.Image, ending: str, turned: bool = False) -> bytes:
    stream = io.BytesIO()
    if ending == "jpg":
        exif = Image.Exif()
        if turned:
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
        image.save(stream, "jpeg", quality=88, exif=exif)
    elif ending == "webp":
        image.save(stream, "webp", quality=85)
    else:
        image.save(stream, ending)
    return stream.getvalue()


def _text(caption: str) -> bytes:
    return (caption + "\n").encode("utf-8")
