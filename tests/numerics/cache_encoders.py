"""Encoders small enough for the tests of the cache, and a folder for them to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from whitetuner.data.cache import Cached, build_cache
from whitetuner.data.scan import SetOptions, scan
from whitetuner.family import BuildFn, Layout, Reads
from whitetuner.records import EncodeInput, Item


def build(cls: type, folder: Path, *, keep_precise: object = ()) -> torch.nn.Module:
    torch.manual_seed(5)
    return cls(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


class Counted:
    """What every encoder of these tests does besides its work: remember what it was asked."""

    def __init__(self, version: str = "1") -> None:
        self.version, self.loads, self.frees = version, 0, 0
        self.asked: list[EncodeInput] = []

    def fingerprint(self) -> str:
        return self.version

    def load(self, build: BuildFn) -> None:
        self.loads += 1

    def free(self) -> None:
        self.frees += 1


class Vae(Counted):
    """A real AutoencoderKL, made tiny."""

    name = "vae"
    fields: Mapping[str, Layout] = {"latent": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})
    dtype = torch.float32

    def load(self, build: BuildFn) -> None:
        super().load(build)
        self.vae = build(AutoencoderKL, Path()).to(self.dtype)

    def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
        self.asked.append(given)
        pixels = torch.from_numpy(np.array(given.target[0])).permute(2, 0, 1)[None].to(self.dtype) / 127.5 - 1
        with torch.no_grad():
            return {"latent": self.vae.encode(pixels).latent_dist.mode()[0]}

    def free(self) -> None:
        super().free()
        del self.vae


class Text(Counted):
    """Bytes of the caption as rows: ragged, in bfloat16."""

    name = "text"
    fields: Mapping[str, Layout] = {"prompt": "ragged"}
    reads: frozenset[Reads] = frozenset({"caption"})

    def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
        self.asked.append(given)
        assert not given.target and given.size is None, "an encoder is handed only what it reads"
        rows = torch.tensor(list(given.caption.encode()) or [0], dtype=torch.bfloat16)
        return {"prompt": rows[:, None].expand(-1, 3)}


class Pair(Counted):
    """Reads the caption and the conditions, as the vision-language encoders of edit models do."""

    name = "pair"
    fields: Mapping[str, Layout] = {"pair": "ragged", "size": "ragged"}
    reads: frozenset[Reads] = frozenset({"caption", "conditions"})

    def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
        self.asked.append(given)
        assert not given.target
        values = [float(np.asarray(image).mean()) for image in given.conditions]
        sizes = [list(image.size) for image in given.originals]
        return {"pair": torch.tensor([float(len(given.caption)), *values]), "size": torch.tensor(sizes)}


def draw(path: Path, seed: int, size: tuple[int, int] = (96, 64)) -> Path:
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def make_folder(tmp_path: Path) -> Path:
    """Three pictures of noise with captions."""
    place = tmp_path / "set"
    place.mkdir()
    for number in range(3):
        draw(place / f"{number}.png", number)
        (place / f"{number}.txt").write_text(f"caption {number}", encoding="utf-8")
    return place


def items_of(folder: Path, resolution: int = 64) -> tuple[Item, ...]:
    return scan([SetOptions(images=folder, resolution=resolution)], 16).items


def run(folder: Path, items: tuple[Item, ...], *encoders: object, **options: object) -> Cached:
    return build_cache(items, encoders, build, folder.parent / "cache", **options)  # type: ignore[arg-type]


def asked(*encoders: Counted) -> tuple[int, ...]:
    return tuple(len(encoder.asked) for encoder in encoders)
