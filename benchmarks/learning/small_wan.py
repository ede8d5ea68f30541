"""The embedded WAN for small_models: clips of a motion that it was never trained on, beside those of what it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from whitetuner.models import folder_paths
from whitetuner.nano.motions import NEW_KIND, SIDE_PX, Clip, clips, frames, right_clip
from whitetuner.nano.pretrain_wan import animate

NEW, OLD = 256, 256
JUDGED_NEW, JUDGED_OLD = 64, 96
SHOWN = {"new": 6, "old": 4}
GAP_PX = 4


class WanModel:
    """`builtin:nano-wan`, by the pipeline's parts."""

    family, task, path, steps = "wan", "i2v", "builtin:nano-wan", 700

    def __init__(self) -> None:
        folder = folder_paths(self.path).folder
        self.pipeline = WanImageToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self.asked = {"new": clips(JUDGED_NEW, 31, (NEW_KIND,)), "old": clips(JUDGED_OLD, 77)}

    def data(self, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True)
        for number, clip in enumerate([*clips(NEW, 21, (NEW_KIND,)), *clips(OLD, 22)]):
            save_clip(clip, folder / f"{number:03d}.mkv")
        return {
            "data.videos": str(folder),
            "data.num_frames": len(clip.scenes),
            "data.resolution": SIDE_PX,
            "noise.timesteps": "shift",
            "noise.sigmoid_bias": 0.0,
        }

    def draw(self, what: str) -> tuple[list[list[Image.Image]], list[bool]]:
        asked = self.asked[what]
        drawn = animate(self.pipeline, asked, 31)
        return drawn, [right_clip(film, clip) for film, clip in zip(drawn, asked, strict=True)]

    def show(self, drawn: dict[str, dict[str, Any]]) -> Image.Image:
        """A clip a row: the frame given, then the others as they were before, are after, and should be."""
        rows = []
        for what, count in SHOWN.items():
            for number, clip in enumerate(self.asked[what][:count]):
                wanted = frames([clip])[0]
                films = [*(one[what][0][number] for one in drawn.values()), wanted]
                strips = [np.concatenate([np.asarray(one) for one in film[1:]], 1) for film in films]
                gap = np.full((SIDE_PX, GAP_PX, 3), 255, np.uint8)
                parts = [wanted[0], *(part for strip in strips for part in (gap, strip))]
                rows += [np.concatenate(parts, 1)]
                rows += [np.full((GAP_PX, rows[0].shape[1], 3), 255, np.uint8)]
        sheet = np.concatenate(rows[:-1])
        return Image.fromarray(sheet).resize((sheet.shape[1] * 3 // 2, sheet.shape[0] * 3 // 2))


def save_clip(clip: Clip, file: Path) -> None:
    """Without loss, 16 frames a second, its caption beside it."""
    with av.open(str(file), "w") as container:
        track = container.add_stream("libx264rgb", rate=16, options={"qp": "0"})
        track.width = track.height = SIDE_PX
        track.pix_fmt = "rgb24"
        for frame in frames([clip])[0]:
            container.mux(track.encode(av.VideoFrame.from_image(Image.fromarray(frame))))
        container.mux(track.encode(None))
    file.with_suffix(".txt").write_text(clip.caption, encoding="utf-8")
