"""What the cache costs on top of encoding: `build_cache` into an empty folder against a bare loop over the
same pictures.

The bare loop makes the model, decodes, cuts and encodes one picture after the other, and keeps nothing; ours
also checks every file's content, writes every entry whole and checksummed, and would survive a kill.
Photographs of scikit-image; a FLUX.2 VAE (AutoencoderKLFlux2) with random weights, as narrow as the embedded
model's: a real one takes far longer for a picture, which would hide what is measured.

  encoding dominates: photographs of about half a megapixel, encoded at 256 px
  decoding dominates: 12-megapixel PNGs, encoded at 64 px
  all there: the same again, nothing left to do (not a ratio: seconds for a start that finds everything)

Threads that decode ahead need a core that is free: with other programs on all cores they gain nothing (and cost nothing).

    python -m benchmarks.cpu.caching [--pairs 40] [--only decoding]
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from benchmarks.paired import environment, paired
from diffusers import AutoencoderKLFlux2
from PIL import Image

from whitetuner.data.cache import build_cache
from whitetuner.data.media import picture
from whitetuner.data.scan import SetOptions, scan
from whitetuner.family import BuildFn, Layout, Reads
from whitetuner.records import EncodeInput, Item

RESULT = Path(__file__).parents[1] / "results" / "caching.json"
AT_MOST = 1.05


class Vae:
    name = "vae"
    fields: Mapping[str, Layout] = {"latent": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})

    def __init__(self, width: int) -> None:
        self.width = width

    def fingerprint(self) -> str:
        return str(self.width)

    def load(self, build: BuildFn) -> None:
        torch.manual_seed(0)
        self.model = AutoencoderKLFlux2(
            block_out_channels=(self.width, self.width, 2 * self.width, 2 * self.width),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
        ).eval()

    def free(self) -> None:
        del self.model

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
        return {"latent": self.latent(given.target[0])}

    def latent(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        return self.model.encode(pixels).latent_dist.mode()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument(
        "--only", choices=("encoding", "decoding"), help="measure one part anew, keep the rest of the file"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="caching-"))
    try:
        photos(folder / "photos")
        large(folder / "large")
        figures = json.loads(RESULT.read_text(encoding="utf-8")) if given.only else {}
        if given.only != "decoding":
            figures["encoding dominates"] = compare(folder, folder / "photos", 256, Vae(32), given.pairs)
            figures["all there"] = found_again(folder, folder / "photos")
        if given.only != "encoding":
            figures["decoding dominates"] = compare(folder, folder / "large", 64, Vae(8), given.pairs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures["limit"] = AT_MOST
    figures["ok"] = (
        figures["encoding dominates"]["workers auto"]["median_ratio"] <= AT_MOST
        and figures["decoding dominates"]["workers auto"]["high"] < 1
    )
    RESULT.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


def compare(
    folder: Path, pictures: Path, resolution: int, vae: Vae, pairs: int
) -> dict[str, dict[str, float]]:
    """Caching over bare loop, with decoding threads as they are by default and with none."""
    items = scan([SetOptions(images=pictures, resolution=resolution, default_caption="")], 16).items
    numbers = itertools.count()

    def cache(workers: int | None) -> None:
        build_cache(items, [vae], _build, folder / f"cache-{next(numbers)}", workers=workers)

    return {
        "workers auto": paired(lambda: cache(None), lambda: bare(items, vae), pairs),
        "workers 0": paired(lambda: cache(0), lambda: bare(items, vae), pairs),
        "environment": environment("torch", "diffusers", "pillow", "safetensors"),
    }


@torch.no_grad()
def bare(items: tuple[Item, ...], vae: Vae) -> None:
    vae.load(_build)
    for item in items:
        vae.latent(picture(item.target, item.size))
    vae.free()


def found_again(folder: Path, pictures: Path) -> dict[str, float]:
    """Seconds of a start that finds every entry and verifies its checksum."""
    items = scan([SetOptions(images=pictures, resolution=256, default_caption="")], 16).items
    build_cache(items, [Vae(8)], _build, folder / "again")
    times = []
    for _ in range(20):
        began = time.perf_counter()
        build_cache(items, [Vae(8)], _build, folder / "again")
        times.append(time.perf_counter() - began)
    return {"pictures": len(items), "seconds": round(sorted(times)[10], 4)}


def photos(folder: Path) -> None:
    """Photographs as they come with scikit-image, twelve of them."""
    from skimage import data

    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field"):
        image = Image.fromarray(getattr(data, name)()).convert("RGB")
        image.thumbnail((900, 900))
        image.save(folder / f"{name}.jpg", quality=92)
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / f"{name} mirrored.png")


def large(folder: Path) -> None:
    """The same photographs at 12 megapixels, as PNG: nothing but decoding all of it helps."""
    from skimage import data

    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(data, name)()).convert("RGB").resize((4000, 3000)).save(
            folder / f"{name}.png", compress_level=3
        )


def _build(cls: type, path: Path, *, keep_precise: object = ()) -> None:
    raise AssertionError("the encoder of this benchmark makes its own model")


if __name__ == "__main__":
    main()
