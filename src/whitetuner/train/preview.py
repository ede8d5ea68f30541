"""Pictures drawn during training, always with the same seeds, so that two of them differ only by what was learned."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from whitetuner.family import Family
from whitetuner.records import Size
from whitetuner.runs.film import can_write, contact_sheet, write_film


@dataclass(frozen=True)
class Scene:
    """One preview: encoded prompt and negative (None: no guidance) and how to draw it. fps: of a clip, None: a picture."""

    text: str
    prompt: Mapping[str, torch.Tensor]
    negative: Mapping[str, torch.Tensor] | None
    size: Size
    seed: int
    steps: int
    cfg: float
    fps: float | None = None


@dataclass(frozen=True)
class Drawn:
    """files: pictures or clips, one a prompt; skipped: prompts left out since the time for previews was over."""

    files: list[Path]
    seconds: float
    skipped: int


def draw_previews(
    family: Family,
    modules: Mapping[str, torch.nn.Module],
    decoder: torch.nn.Module,
    scenes: Sequence[Scene],
    folder: Path,
    step: int,
    max_seconds: float,
    agreed: Callable[[bool], bool] = bool,
    numbers: Sequence[int] | None = None,
) -> Drawn:
    """Writes folder/step-000250/00.png ... (clips: a contact sheet, and 00.mp4 where PyAV is installed).

    Scenes that do not fit into max_seconds are left out and counted. agreed: whether all ranks that draw together stop, from
    whether this one would; numbers: only these scenes, for others draw the rest.

    A scene that has begun is finished: half-denoised pictures would look like a training fault.
    """
    began = time.perf_counter()
    target = folder / f"step-{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    longest = 0.0
    chosen = range(len(scenes)) if numbers is None else numbers
    for index in chosen:
        scene, spent = scenes[index], time.perf_counter() - began
        if files and agreed(spent + longest > max_seconds):
            return Drawn(files, spent, len(chosen) - len(files))
        with torch.no_grad():
            frames = family.generate(
                modules,
                decoder,
                scene.prompt,
                scene.negative,
                size=scene.size,
                steps=scene.steps,
                cfg=scene.cfg,
                seed=scene.seed,
            )
        longest = max(longest, time.perf_counter() - began - spent)
        path = target / f"{index:02d}.png"
        if scene.fps is None:
            frames[0].save(path)
        else:  # the sheet is what reports show; the clip lies beside it
            contact_sheet(frames).save(path)
            if can_write():
                write_film(frames, path.with_suffix(".mp4"), scene.fps)
        files.append(path)
    return Drawn(files, time.perf_counter() - began, 0)
