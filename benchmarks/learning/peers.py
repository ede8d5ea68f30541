"""Other trainers' own programs over the embedded model, as cells of the rivals: their loops, layers, data loaders and files.

A trainer is a cell where an environment variable names its checkout. It runs in a process of its own (peers_inside.py), by the
Python that its other variable names (ours otherwise), which must have what it needs; for torchvision our stand-in will do:

    ONETRAINER_DIR, ONETRAINER_PYTHON   seen with OneTrainer 23df383, and mgds 3a6994a in its Python
    MUSUBI_DIR, MUSUBI_PYTHON           musubi-tuner 30c658c
    AITOOLKIT_DIR, AITOOLKIT_PYTHON     ai-toolkit 27a03a9

Told: our rank, alpha, layers, rate, optimizer, batch, steps, warm-up to a linear end, noise levels and caption dropout, and both
sets in equal parts. What differs from "as the script" of ours:

    all of them    other starts of the layers, other orders of the pictures
    OneTrainer     noise and order are those of its own fixed seed, so ours changes the layers' start alone; the first step's rate
                   is 0; a caption is dropped as its only tag
    musubi-tuner   one adapter on q, k and v together; reads the latents and embeddings that we encode, one file for each picture
                   of the run, captions dropped beforehand (it has no caption dropout)
    ai-toolkit     one adapter on q, k and v together; its logit-normal noise levels have no bias, its linear schedule no warm-up,
                   its AdamW an eps of 1e-6; the smaller set lies repeated in one folder, else a batch would be of one set; each
                   epoch ends with what is left of it; the VAE is ours, for its own class has the released one's sizes
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.learning.teach import Lesson, judged
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH, builtin_path
from whitetuner.nano.score import load_pipeline

ROOT = Path(__file__).parents[2]
#: What each writes, in its folder.
ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class Peer:
    """word: of its environment variables and in peers_inside.py; prepare: writes what it reads beside the pictures."""

    name: str
    word: str
    prepare: Callable[[dict[str, Any]], None] = lambda told: None

    @property
    def cell(self) -> str:
        return f"LoRA 16: {self.name}"

    @property
    def folder(self) -> str | None:
        return os.environ.get(f"{self.word}_DIR")


def told(lesson: Lesson, seed: int, ours: dict[str, Any], layers: list[str], out: Path) -> dict[str, Any]:
    """Our settings, as peers_inside.py reads them."""
    config = lesson.config("rival", seed, ours).config
    noise, optimizer = config.noise, config.optimizer
    return {
        "model": str(lesson.model or builtin_path()),
        "data": [str(lesson.folder / "data" / name) for name in ("new", "old")],
        "out": str(out),
        "adapter": str(out / ADAPTER),
        "layers": layers,
        "rank": config.method.rank,
        "seed": seed,
        "steps": lesson.steps,
        "batch": lesson.batch,
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "warmup": optimizer.warmup_steps,
        "max_grad_norm": optimizer.max_grad_norm,
        "noise_mean": noise.sigmoid_bias,
        "noise_scale": noise.sigmoid_scale,
        "caption_dropout": config.data.caption_dropout,
        "tokens": MAX_SEQUENCE_LENGTH,
        "text_layers": list(config.model_options().text_encoder_out_layers),  # type: ignore[attr-defined]
    }


def original_transformer(given: dict[str, Any], file: str) -> dict[str, Any]:
    """Writes the transformer by its original names to out, and tells its dimensions in the original's words."""
    transformer = load_pipeline(Path(given["model"])).transformer
    state = registry.keys("flux2-klein").to_original(transformer.state_dict())
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        Path(given["out"]) / file,
    )
    config = transformer.config
    return {
        "in_channels": config.in_channels,
        "context_in_dim": config.joint_attention_dim,
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "num_heads": config.num_attention_heads,
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "axes_dim": list(config.axes_dims_rope),
        "theta": config.rope_theta,
        "mlp_ratio": config.mlp_ratio,
        "use_guidance_embed": config.guidance_embeds,
    }


def drawn(given: dict[str, Any]) -> list[tuple[Path, bool]]:
    """Pictures of a whole run, as many of each set and each of a set as often as another, and whether a caption is kept."""
    lot = random.Random(given["seed"])
    found = []
    share = given["steps"] * given["batch"] // len(given["data"])
    for folder in given["data"]:
        files = sorted(Path(folder).glob("*.png"))
        lot.shuffle(files)
        found += [(files[n % len(files)], lot.random() >= given["caption_dropout"]) for n in range(share)]
    return found


@torch.no_grad()
def musubi_files(given: dict[str, Any]) -> None:
    """The transformer in its original layout, and out/cache, as musubi-tuner's own caching of FLUX.2 Klein 4B names things."""
    given["params"] = original_transformer(given, "dit.safetensors")
    pipeline, cache = load_pipeline(Path(given["model"])), Path(given["out"]) / "cache"
    cache.mkdir()

    def embedded(caption: str) -> Tensor:
        layers = tuple(given["text_layers"])
        return pipeline.encode_prompt(
            caption, max_sequence_length=given["tokens"], text_encoder_out_layers=layers
        )[0][0]

    nothing = embedded("")
    known: dict[Path, tuple[Tensor, Tensor]] = {}
    for number, (file, kept) in enumerate(drawn(given)):
        if file not in known:
            pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
            latents = pipeline._encode_vae_image(pixels[None].float() / 127.5 - 1, generator=None)[0]
            known[file] = latents, embedded(file.with_suffix(".txt").read_text(encoding="utf-8").strip())
        latents, words = known[file]
        size = "{}x{}".format(*latents.shape[1:])
        height, width = np.array(Image.open(file)).shape[:2]
        save_file(
            {f"latents_{size}_float32": latents.contiguous()},
            cache / f"{number:05d}_{width:04d}x{height:04d}_f2k4b.safetensors",
        )
        save_file(
            {"ctx_vec_float32": (words if kept else nothing).contiguous()},
            cache / f"{number:05d}_f2k4b_te.safetensors",
        )


def aitoolkit_files(given: dict[str, Any]) -> None:
    """The transformer in its original layout, the text encoder with its tokenizer in one folder, and out/pictures: both sets,
    the smaller repeated."""
    out, model = Path(given["out"]), Path(given["model"])
    given["params"] = original_transformer(given, "flux-2-klein-base-4b.safetensors")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(model / part, out / "words", dirs_exist_ok=True)
    sets = [sorted(Path(folder).glob("*.png")) for folder in given["data"]]
    most = max(map(len, sets))
    pictures = out / "pictures"
    pictures.mkdir()
    for number, file in enumerate(file for files in sets for file in files * (most // len(files))):
        for ending in (".png", ".txt"):
            shutil.copy(file.with_suffix(ending), pictures / f"{number:04d}{ending}")


PEERS = {
    peer.cell: peer
    for peer in (
        Peer("OneTrainer", "ONETRAINER"),
        Peer("musubi-tuner", "MUSUBI", musubi_files),
        Peer("ai-toolkit", "AITOOLKIT", aitoolkit_files),
    )
}


def cells(ours: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        cell: {**ours, "adapter": f"{peer.name}'s own program"} for cell, peer in PEERS.items() if peer.folder
    }


def finished(words: list[str], who: str, made: Path) -> None:
    """Runs a program to its end. Raises UserError with its last line where it fails or leaves nothing at `made`."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode or not made.exists():
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError("{who} failed: {last}", who=who, last=last)


def prepared(
    lesson: Lesson, cell: str, seed: int, ours: dict[str, Any], layers: list[str], out: Path
) -> list[str]:
    """The command that lets it learn and write out/ADAPTER, with all that it reads. Raises UserError without a checkout."""
    peer = PEERS[cell]
    checkout = Path(peer.folder or "").resolve()
    if not peer.folder or not checkout.is_dir():
        raise UserError("there is no checkout of {peer} at {folder}", peer=peer.name, folder=peer.folder)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    given = told(lesson, seed, ours, layers, out)
    peer.prepare(given)
    (out / "told.json").write_text(json.dumps(given), encoding="utf-8")
    python = os.environ.get(f"{peer.word}_PYTHON", sys.executable)
    inside = "benchmarks.learning.peers_inside"
    return [python, "-m", inside, peer.word, str(checkout), str(out / "told.json")]


def taught(lesson: Lesson, cell: str, seed: int, ours: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """Lets it learn and judges the file that it wrote. Raises UserError with its last line where it fails."""
    out = lesson.folder / "peer"
    began = time.perf_counter()
    words = prepared(lesson, cell, seed, ours, layers, out)
    finished(words, PEERS[cell].name, out / ADAPTER)
    seconds = time.perf_counter() - began
    row = judged(lesson, lambda pipeline: pipeline.load_lora_weights(str(out), weight_name=ADAPTER))
    shutil.rmtree(out)
    return {**row, "seconds_whole": round(seconds, 1)}
