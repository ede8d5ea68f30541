"""Drawn clips as files: an .mp4 that every player and browser shows, and a contact sheet for places that show pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from PIL import Image, ImageDraw

#: Pictures on a contact sheet at most, and the longer side of each in pixels.
SHEET_PICTURES, SHEET_PX = 12, 240


def can_write() -> bool:
    """Whether PyAV (the extra `video`) is installed."""
    return importlib.util.find_spec("av") is not None


def write_film(frames: Sequence[Image.Image], path: Path, fps: float) -> Path:
    """Writes frames of equal size as H.264 (4:2:0); an odd side loses its last pixel. Returns the path. Needs PyAV."""
    import av

    width, height = (side // 2 * 2 for side in frames[0].size)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        track = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        track.options = {"crf": "16", "preset": "medium"}
        for frame in frames:
            picture = frame.convert("RGB").crop((0, 0, width, height))
            container.mux(track.encode(av.VideoFrame.from_image(picture)))
        container.mux(track.encode(None))
    return path


def contact_sheet(frames: Sequence[Image.Image], numbers: Sequence[int] | None = None) -> Image.Image:
    """Frames spread over the clip, side by side, each with its number. numbers: of the frames; None: counted from 0."""
    count = min(len(frames), SHEET_PICTURES)
    chosen = [round(index * (len(frames) - 1) / max(1, count - 1)) for index in range(count)]
    scale = min(1.0, SHEET_PX / max(frames[0].size))
    width, height = (max(1, round(side * scale)) for side in frames[0].size)
    columns = min(count, 4)
    rows = -(-count // columns)
    label, gap = 14, 4
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + label + gap) + gap), "white")
    for place, index in enumerate(chosen):
        left = gap + place % columns * (width + gap)
        top = gap + place // columns * (height + label + gap)
        sheet.paste(frames[index].convert("RGB").resize((width, height)), (left, top + label))
        number = index if numbers is None else numbers[index]
        ImageDraw.Draw(sheet).text((left, top), str(number), fill="black")
    return sheet
