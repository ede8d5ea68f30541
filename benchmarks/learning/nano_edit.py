"""Whether an edit run learns an edit: the embedded model, which never saw a reference, is taught "make the shape blue".

256 pairs: one flat shape on a flat background, and the same picture with the shape in blue. Then 48 pairs it has not seen
(other seed, other places and sizes) are edited, before and after, and a program (nano/check.py) says of each result whether
shape and background are those of the given picture and the colour is blue. The prompt is the same for all, so shape,
place and background can come from the reference alone.

    python -m benchmarks.learning.nano_edit [--steps 400] [--out FOLDER]     about nine minutes on two busy cores
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.paired import environment
from PIL import Image

from whitetuner import recipe
from whitetuner.adapters.attach import attach_state
from whitetuner.adapters.files import load_adapter
from whitetuner.config.load import load_config
from whitetuner.data.inputs import Inputs
from whitetuner.drawing import encode_prompts
from whitetuner.families import registry
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build
from whitetuner.models import model_folder
from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH, STEPS
from whitetuner.nano.check import judge
from whitetuner.nano.draw import PALETTE, Label, draw_set
from whitetuner.records import Size
from whitetuner.runs import events

RESULT = Path(__file__).parents[1] / "results" / "nano_edit.json"
COMMAND = (
    "python -m benchmarks.learning.nano_edit --steps {}"  # where the pictures are kept is nobody's matter
)
PROMPT = "make the shape blue"
PAIRS, UNSEEN = 256, 48

Pair = tuple[np.ndarray, np.ndarray, Label]


def pairs(count: int, seed: int) -> list[Pair]:
    """(given picture, the same with its shape in blue, what that shows); nothing in them is blue before."""
    found: list[Pair] = []
    for drawing in draw_set(4 * count, seed):
        label = drawing.label
        if "blue" in (label.colour, label.background):
            continue
        colour, ground = (np.array(PALETTE[name], float) for name in (label.colour, label.background))
        axis = colour - ground
        cover = np.clip((drawing.image - ground) @ axis / (axis @ axis), 0, 1)[..., None]
        blue = np.array(PALETTE["blue"]) * cover + ground * (1 - cover)
        target = Label(label.shape, "blue", label.background)
        found.append((drawing.image, np.rint(blue).astype(np.uint8), target))
    return found[:count]


def train(folder: Path, steps: int) -> recipe.Result:
    for name in ("target", "condition"):
        (folder / "data" / name).mkdir(parents=True)
    for index, (given, wanted, _) in enumerate(pairs(PAIRS, 5)):
        Image.fromarray(given).save(folder / "data" / "condition" / f"{index:03d}.png")
        Image.fromarray(wanted).save(folder / "data" / "target" / f"{index:03d}.png")
    values: Mapping[str, Any] = {
        "run.name": "blue",
        "run.output_dir": str(folder),
        "run.steps": steps,
        "model.family": "flux2-klein",
        "model.task": "edit",
        "model.path": "builtin:nano",
        "model.options.max_sequence_length": MAX_SEQUENCE_LENGTH,
        "data.target": str(folder / "data" / "target"),
        "data.conditions": [str(folder / "data" / "condition")],
        "data.prompt": PROMPT,
        "data.resolution": 64,
        "data.batch_size": 12,
        "data.caption_dropout": 0.1,
        "method.factor": 4,
        "noise.sigmoid_bias": 0.6,
        "optimizer.lr": 4e-3,
        "optimizer.betas": [0.9, 0.99],
        "optimizer.weight_decay": 0.0,
        "optimizer.warmup_steps": 20,
        "optimizer.schedule": "linear",
        "optimizer.min_lr_ratio": 0.05,
        "optimizer.ema": 0.98,
        "save.every": 0,
        "validation.every": max(1, steps // 4),
        "log.tensorboard": False,
    }
    return recipe.run(load_config(None, base=values))


def scores(folder: Path, adapter: Path) -> dict[str, dict[str, float]]:
    """Shares of right pictures without and with the adapter; before_NAME.png and after_NAME.png show given, drawn, wanted."""
    spec = registry.spec("flux2-klein")
    options = spec.options(max_sequence_length=MAX_SEQUENCE_LENGTH)
    family = registry.load("flux2-klein", options, ModelPaths(model_folder("builtin:nano")))
    build, unseen = Build(), pairs(UNSEEN, 99)
    asked = []
    for index, (given, _, _) in enumerate(unseen):
        Image.fromarray(given).save(folder / f"unseen_{index:02d}.png")
        asked.append(Inputs.prompt(PROMPT, [folder / f"unseen_{index:02d}.png"], 64, family.stride()))
    fields = encode_prompts(family, build, asked, "edit")
    modules, decoder = family.load(build), family.load_decoder(build)
    found = {}
    for name in ("before", "after"):
        if name == "after":
            attach_state(modules["transformer"], *load_adapter(adapter, family.keys))
        rows, verdicts, errors = [], [], []
        for index, (given, wanted, label) in enumerate(unseen):
            size = Size(64, 64)
            (drawn,) = family.generate(
                modules, decoder, fields[index], None, size=size, steps=STEPS, cfg=1.0, seed=index
            )
            verdicts.append(judge(drawn, label))
            errors.append(np.abs(np.asarray(drawn).astype(int) - wanted).mean())
            rows.append(np.concatenate([given, np.asarray(drawn), wanted], 1))
        Image.fromarray(np.concatenate(rows[:10])).save(folder / f"{name}.png")
        found[name] = {
            key: round(float(np.mean([getattr(one, key) for one in verdicts])), 3)
            for key in ("all", "shape", "background", "colour")
        }
        found[name]["mean_error_of_255"] = round(float(np.mean(errors)), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, help="keeps the run and the pictures there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        result = train(folder, given.steps)
        seen = events.read(result.folder / "events.jsonl")[0]
        document = {
            "what": f"{UNSEEN} unseen pictures edited, shares right; {given.steps} steps of 12",
            **scores(folder, result.final[1]),
            "validation": {e.step: round(e.loss, 4) for e in seen if isinstance(e, events.Validation)},
            "seconds": round(time.perf_counter() - began),
            "environment": {**environment("torch", "diffusers"), "command": COMMAND.format(given.steps)},
        }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
