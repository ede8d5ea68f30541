"""What caching videos costs on top of decoding and encoding: `build_cache` over 20 clips into an empty folder against a bare loop
of PyAV and the VAE over the same frames.

The bare loop decodes a clip from its start, cuts its frames, hands the whole clip to the VAE and keeps nothing. Ours looks for
every frame by its time, checks every file's content, decodes ahead, encodes slice by slice, and writes every entry whole and
checksummed. WAN's own encoder around an AutoencoderKLWan with random weights; a real one takes far longer for a frame, which
would hide what is measured.

  encoding dominates: 20 clips of 9 frames, 320 x 192 on disk, encoded at an area of 64 x 64
  decoding dominates: the same at 854 x 480, the VAE half as wide
  memory: the most that one clip adds to a process that encodes it, of 17 and of 241 frames (median of three processes)

A thread that decodes ahead needs a core that is free.

    python -m benchmarks.cpu.caching_video [--pairs 40]
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import psutil
import torch
from benchmarks.paired import environment, paired
from diffusers import AutoencoderKLWan
from PIL import Image

from whitetuner.data.cache import build_cache
from whitetuner.data.media import cut
from whitetuner.data.scan import Films, SetOptions, scan
from whitetuner.families.wan.encoders import LatentEncoder
from whitetuner.family import BuildFn, ModelPaths
from whitetuner.records import Item

RESULT = Path(__file__).parents[1] / "results" / "caching_video.json"
AT_MOST = 1.05
CLIPS, FRAMES = 20, 9
#: Frames of the clips whose memory is compared, and by how much it may differ: that of a process does by 30 MB from one time to
#: the next; the pictures of the longer clip alone are 67 MB, as numbers 270.
SHORT, LONG = 17, 241
MOST_GROWTH_MB, MEMORY_RESOLUTION, TIMES = 40, 320, 3


class Encoder(LatentEncoder):
    """WAN's own, with a VAE of its own making."""

    def __init__(self, width: int) -> None:
        super().__init__(ModelPaths(None))
        self.width = width

    def fingerprint(self) -> str:
        return str(self.width)

    def load(self, build: BuildFn) -> None:
        torch.manual_seed(0)
        self._vae = AutoencoderKLWan(base_dim=self.width, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument(
        "--peak", nargs=2, metavar=("CLIP", "FRAMES"), help="print the megabytes that one clip adds"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print(peak_mb(Path(given.peak[0]), int(given.peak[1])))
        return
    folder = Path(tempfile.mkdtemp(prefix="caching-video-"))
    try:
        clips(folder / "small", CLIPS, FRAMES, 320, 192)
        clips(folder / "large", CLIPS, FRAMES, 854, 480)
        clips(folder / "long", 1, LONG, 640, 384)
        figures: dict[str, Any] = {
            "encoding dominates": compare(folder, folder / "small", 64, Encoder(8), given.pairs),
            "decoding dominates": compare(folder, folder / "large", 48, Encoder(4), given.pairs),
            "memory": {
                f"{count} frames": growth(folder / "long" / "00.mp4", count) for count in (SHORT, LONG)
            },
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    more = figures["memory"][f"{LONG} frames"]["mb"] - figures["memory"][f"{SHORT} frames"]["mb"]
    figures |= {
        "limit": AT_MOST,
        "growth_mb": round(more, 1),
        "most_growth_mb": MOST_GROWTH_MB,
        "ok": all(
            figures[part]["median_ratio"] <= AT_MOST for part in ("encoding dominates", "decoding dominates")
        )
        and more <= MOST_GROWTH_MB,
        "environment": environment("torch", "diffusers", "av", "pillow", "safetensors"),
    }
    RESULT.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


def items_of(folder: Path, resolution: int, frames: int = FRAMES) -> tuple[Item, ...]:
    options = SetOptions(videos=folder, resolution=resolution, num_frames=frames, default_caption="")
    return scan([options], 16, min_size_px=32, films=Films(4, 16.0, frames)).items


def compare(folder: Path, videos: Path, resolution: int, encoder: Encoder, pairs: int) -> dict[str, Any]:
    items, numbers = items_of(videos, resolution), itertools.count()
    assert len(items) == CLIPS and items[0].clips[0] == tuple(range(FRAMES))

    def cache() -> None:
        build_cache(items, [encoder], _build, folder / f"cache-{videos.name}-{next(numbers)}")

    found: dict[str, Any] = paired(cache, lambda: bare(items, encoder), pairs)
    size = items[0].size
    return {**found, "clips": CLIPS, "size": f"{size.width}x{size.height}x{size.frames}"}


@torch.no_grad()
def bare(items: tuple[Item, ...], encoder: Encoder) -> None:
    """As one would write it."""
    encoder.load(_build)
    vae: Any = encoder._vae
    for item in items:
        frames = []
        with av.open(str(item.target)) as container:
            for frame in itertools.islice(container.decode(video=0), item.size.frames):
                frames.append(np.asarray(cut(frame.to_image(), item.size)))
        pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        vae.encode(pixels).latent_dist.mode()
    encoder.free()


def growth(clip: Path, frames: int) -> dict[str, float]:
    """{"mb": the most that one clip of so many frames adds}, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu.caching_video", "--peak", str(clip), str(frames)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(TIMES)]
    return {"mb": median(float(run.stdout.split()[-1]) for run in runs)}


def peak_mb(clip: Path, frames: int) -> float:
    """After a clip of 9 frames has brought in all code and kernels."""
    encoder, process, base = Encoder(4), psutil.Process(), Path(tempfile.mkdtemp(prefix="peak-"))
    try:
        build_cache(items_of(clip.parent, MEMORY_RESOLUTION, 9), [encoder], _build, base / "warm")
        items = items_of(clip.parent, MEMORY_RESOLUTION, frames)
        before, most, done = process.memory_info().rss, 0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, process.memory_info().rss)
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        build_cache(items, [encoder], _build, base / "cold")
        done.set()
        watcher.join()
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return (most - before) / 1e6


def clips(folder: Path, count: int, frames: int, width: int, height: int) -> None:
    """H.264 at 16 frames a second with B-frames: a photograph that moves, as it comes with scikit-image."""
    from skimage import data

    photo = Image.fromarray(data.coffee()).resize((width + 2 * frames, height + count))
    folder.mkdir()
    for number in range(count):
        with av.open(str(folder / f"{number:02d}.mp4"), "w") as container:
            track = container.add_stream(
                "libx264", rate=16, options={"crf": "18", "bf": "2", "preset": "fast"}
            )
            track.width, track.height, track.pix_fmt = width, height, "yuv420p"
            for at in range(frames):
                shown = photo.crop((2 * at, number, 2 * at + width, number + height))
                container.mux(track.encode(av.VideoFrame.from_image(shown)))
            container.mux(track.encode(None))


def _build(cls: type, path: Path, *, keep_precise: object = ()) -> None:
    raise AssertionError("the encoder of this benchmark makes its own model")


if __name__ == "__main__":
    main()
