"""Time of a step and peak of memory, ours beside other whole programs, over layers as wide as FLUX.2 Klein's, on one core.

laboratory.py's layers are too small for these. The model is the embedded one with another transformer: width 3072 in 24 heads
(Klein 4B's), one block of either kind, random weights; all programs' numbers are 32-bit, without checkpointing. Each learns a
LoRA of rank 16 over the same layers from the same pictures, 12 at a time (1104 rows of tokens), as in rivals.py, and is one
process from start to file. The time of a step is what more steps cost: the whole of a long run less the whole of a short one,
so that imports, loading and encoding are not in it; that of a short one is told beside. Memory is what the process holds
(resident, ten looks a second): at its peak, files that it has mapped included (a page of those goes when another program
wants the place), and at the peak of the steps, which is where the long run is longer than the short one.

    DIFFUSERS_DIR=... MUSUBI_DIR=... python -m benchmarks.learning.real_width [--steps 2 8] [--rounds 2] [--only NAME ...]

Rounds run one program after another. What is asked of a checkout is said in rivals.py and peers.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from benchmarks.learning import peers
from benchmarks.learning.rivals import OUR_LORA, PLAIN, SCRIPT, learning_layers, script_command
from benchmarks.learning.teach import Lesson
from benchmarks.paired import environment
from diffusers import Flux2Transformer2DModel

from whitetuner import recipe
from whitetuner.errors import UserError
from whitetuner.nano.builtin import builtin_path

RESULT = Path(__file__).parents[1] / "results" / "real_width.json"
HEADS, HEAD, SEED, BATCH = 24, 128, 42, 12
OURS = "White Tuner"
OURS_PLAIN = {**OUR_LORA, **PLAIN, "memory.dtype": "fp32", "memory.gradient_checkpointing": False}


def make_model(folder: Path) -> None:
    """The embedded pipeline's files, and a wide transformer that takes its latents and embeddings."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(builtin_path(), folder, ignore=shutil.ignore_patterns("transformer"))
    small = Flux2Transformer2DModel.load_config(builtin_path() / "transformer")
    torch.manual_seed(0)
    wide = Flux2Transformer2DModel.from_config(
        {
            **small,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD,
            "axes_dims_rope": [HEAD // 4] * 4,
        }
    )
    wide.save_pretrained(folder / "transformer")


def ours_inside(folder: Path, model: Path, steps: int) -> None:
    """One whole run of ours, in a process of its own."""
    torch.set_num_threads(1)
    lesson = replace(_lesson(folder, model), steps=steps)
    with recipe.Session.open(lesson.config("ours", SEED, OURS_PLAIN)) as session:
        session.prepare()
        session.run()


def _lesson(folder: Path, model: Path) -> Lesson:
    return Lesson(folder / "zorp", "zorp", 1, BATCH, 0, 0, model=model)


def programs(folder: Path, model: Path) -> dict[str, Callable[[int], list[str]]]:
    """name -> what prepares a run of so many steps and gives its command; the checkouts that are named."""
    lesson = _lesson(folder, model)
    lesson.prepare()

    def ours(steps: int) -> list[str]:
        shutil.rmtree(lesson.folder / "ours", ignore_errors=True)
        inside = ["--inside", str(folder), str(model), str(steps)]
        return [sys.executable, "-m", "benchmarks.learning.real_width", *inside]

    def script(steps: int) -> list[str]:
        shutil.rmtree(lesson.folder / "script", ignore_errors=True)
        return script_command(replace(lesson, steps=steps), SEED, lesson.folder / "script")

    def peer(cell: str) -> Callable[[int], list[str]]:
        layers = learning_layers(model)
        given = lesson.folder / "peer"
        return lambda steps: peers.prepared(replace(lesson, steps=steps), cell, SEED, OUR_LORA, layers, given)

    found: dict[str, Callable[[int], list[str]]] = {OURS: ours}
    if "DIFFUSERS_DIR" in os.environ:
        found[SCRIPT.split(": ")[1]] = script
    return found | {peers.PEERS[cell].name: peer(cell) for cell in peers.cells({})}


def whole(words: list[str]) -> tuple[float, list[tuple[float, float]]]:
    """(seconds, (second, GB it then has) all along) of a process. Raises UserError with its last line when it fails."""
    log = Path("output/real_width.log")
    log.parent.mkdir(exist_ok=True)
    held: list[tuple[float, float]] = []
    with log.open("w+", encoding="utf-8", errors="replace") as told:
        began = time.perf_counter()
        running = psutil.Popen(words, cwd=peers.ROOT, stdout=told, stderr=subprocess.STDOUT)
        while running.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                held.append((time.perf_counter() - began, running.memory_info().rss / 1e9))
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        if running.returncode:
            told.seek(0)
            last = (told.read().strip().splitlines() or ["no word"])[-1]
            raise UserError("a program failed: {last}", where=words[2], last=last)
    return seconds, held


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """name -> medians over the rounds; "time" and "memory" (at the steps) are ours over theirs of the same round."""
    found = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["round"]: row for row in rows if row["name"] == name}
        mine = {row["round"]: row for row in rows if row["name"] == OURS}
        both = sorted({*own} & {*mine})
        figures = {
            key: median(row[key] for row in own.values()) for key in ("step", "short", "peak_gb", "steps_gb")
        }
        if both:
            figures["time"] = median(mine[one]["step"] / own[one]["step"] for one in both)
            figures["memory"] = median(mine[one]["steps_gb"] / own[one]["steps_gb"] for one in both)
        found[name] = {key: round(value, 3) for key, value in figures.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 8), metavar=("SHORT", "LONG"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="programs, by name")
    parser.add_argument("--folder", type=Path, default=Path("output/real_width"))
    parser.add_argument("--inside", nargs=3, metavar=("FOLDER", "MODEL", "STEPS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        ours_inside(Path(given.inside[0]), Path(given.inside[1]), int(given.inside[2]))
        return
    torch.set_num_threads(1)
    folder = given.folder.resolve()
    model = folder / "model"
    make_model(model)
    rows: list[dict[str, Any]] = []
    all_programs = programs(folder, model)
    for number in range(given.rounds):
        for name in given.only or all_programs:
            short, _ = whole(all_programs[name](given.steps[0]))
            long, held = whole(all_programs[name](given.steps[1]))
            row = {"name": name, "round": number, "short": short}
            row["step"] = (long - short) / (given.steps[1] - given.steps[0])
            row["peak_gb"] = max(gb for _, gb in held)
            row["steps_gb"] = max(gb for second, gb in held if second > short)
            rows.append(row)
            print(rows[-1], flush=True)
            write(rows, given)
    shutil.rmtree(folder)


def write(rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    command = "python -m benchmarks.learning.real_width --steps {} {} ".format(*given.steps)
    document = {
        "environment": {
            **environment("torch", "diffusers", "peft"),
            "command": f"{command}--rounds {given.rounds}",
        },
        "width": HEADS * HEAD,
        "programs": summary(rows),
        "rounds": [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
