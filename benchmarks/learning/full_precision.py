"""What each precision of full training makes of the same half-trained model: validation loss over 500 steps.

The embedded model's architecture, from random weights, learns its vocabulary of shapes for some hundred steps in float32; its
weights, rounded to bf16, are where all begin. From there every precision goes on with the same pictures, noise and settings
at a learning rate for fine-tuning. "bf16" rounds to the nearest, as training in plain bf16 does; no config can ask for it.
The loss is that of 48 held-out pictures at fixed noise, so that only learning moves it.

    python -m benchmarks.learning.full_precision [--before 200] [--steps 500] [--out FOLDER]     half an hour on a busy core
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.paired import environment
from diffusers import Flux2Transformer2DModel
from PIL import Image, ImageDraw

from whitetuner import recipe, resolve
from whitetuner.config.load import load_config
from whitetuner.demo import draw_folder
from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH, builtin_path
from whitetuner.runs import events

ROOT = Path(__file__).parents[2]
RESULT, PLOT = ROOT / "benchmarks/results/full_precision.json", ROOT / "docs/img/full_precision.png"
PICTURES, LR = 480, 1e-4
MODES = ("fp32", "bf16_stochastic", "bf16", "fp32_master", "kahan")
COLOURS = dict(zip(MODES, ("#111111", "#e08600", "#c0392b", "#2a7de1", "#1f9d55"), strict=True))


def config(folder: Path, transformer: Path, name: str, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "run.name": name,
        "run.output_dir": str(folder),
        "run.steps": steps,
        "model.family": "flux2-klein",
        "model.path": "builtin:nano",
        "model.transformer": str(transformer),
        "model.options.max_sequence_length": MAX_SEQUENCE_LENGTH,
        "data.images": str(folder / "data"),
        "data.cache_dir": str(folder / "cache"),
        "data.resolution": 64,
        "data.batch_size": 8,
        "method.kind": "full",
        "optimizer.name": "adamw",
        "optimizer.lr": LR,
        "optimizer.weight_decay": 0.0,
        "save.every": 0,
        "preview.every": 0,
        "validation.every": 50,
        "validation.share": 0.2,
        "validation.items": 48,
        "log.tensorboard": False,
        **more,
    }


def learned(values: Mapping[str, Any], precision: str) -> tuple[Path, list[tuple[int, float]]]:
    """(run folder, validation losses by step)."""
    before = resolve.precision_of
    if precision == "bf16":
        resolve.precision_of = lambda config, dtype: "bf16"
        values = {**values, "memory.dtype": "bf16"}
    else:
        values = {**values, "method.precision": precision}
    try:
        result = recipe.run(load_config(None, base=values))
    finally:
        resolve.precision_of = before
    told, _ = events.read(result.folder / "events.jsonl")
    return result.folder, [(e.step, e.loss) for e in told if isinstance(e, events.Validation)]


def begin(folder: Path) -> Path:
    """The architecture with random weights."""
    torch.manual_seed(0)
    settings = Flux2Transformer2DModel.load_config(builtin_path() / "transformer")
    path = folder / "random"
    Flux2Transformer2DModel.from_config(settings).save_pretrained(path)
    return path


def plot(curves: Mapping[str, list[tuple[int, float]]], path: Path) -> None:
    width, height, left, bottom = 720, 380, 70, 340
    board = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(board)
    values = [loss for curve in curves.values() for _, loss in curve]
    low, high, last = min(values) * 0.995, max(values) * 1.005, max(s for c in curves.values() for s, _ in c)

    def at(step: int, loss: float) -> tuple[float, float]:
        return left + (width - left - 20) * step / last, bottom - (bottom - 30) * (loss - low) / (high - low)

    for part in range(5):
        value = low + (high - low) * part / 4
        y = at(0, value)[1]
        draw.line([(left, y), (width - 20, y)], fill="#e5e5e5")
        draw.text((8, y - 6), f"{value:.4f}", fill="#666666")
        step = last * part // 4
        draw.text((at(step, low)[0] - 8, bottom + 8), str(step), fill="#666666")
    for number, (name, curve) in enumerate(curves.items()):
        draw.line([at(*point) for point in curve], fill=COLOURS[name], width=3 if name == "fp32" else 2)
        y = 34 + 16 * number
        draw.line([(width - 190, y + 6), (width - 165, y + 6)], fill=COLOURS[name], width=3)
        draw.text((width - 158, y), f"{name}  {curve[-1][1]:.4f}", fill="#222222")
    draw.text((left, 8), "validation loss over steps, from the same half-trained weights", fill="#222222")
    board.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--modes", nargs="+", default=MODES[:3], choices=MODES, help="fp32 first")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.out or Path(tempfile.mkdtemp(prefix="full-precision-"))
    draw_folder(folder / "data", PICTURES, 5)
    half, _ = learned(
        config(folder, begin(folder), "half", given.before, **{"optimizer.lr": 1e-3, "save.dtype": "bf16"}),
        "fp32",
    )
    curves = {}
    for mode in given.modes:
        values = config(folder, half / "final" / "transformer", mode, given.steps)
        _, curves[mode] = learned(values, mode)
        print(mode, curves[mode][0], curves[mode][-1], flush=True)
        report(given.before, given.steps, curves)


def report(before: int, steps: int, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    """Of the modes that are through."""
    last = {mode: curve[-1][1] for mode, curve in curves.items()}
    RESULT.write_text(
        json.dumps(
            {
                "command": f"python -m benchmarks.learning.full_precision --before {before} --steps {steps}",
                # where the pictures are kept is nobody's matter
                "environment": {k: v for k, v in environment().items() if k != "command"},
                "learning_rate": LR,
                "final": last,
                "relative_to_fp32": {mode: loss / last["fp32"] - 1 for mode, loss in last.items()},
                "curves": curves,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    plot(curves, PLOT)


if __name__ == "__main__":
    main()
