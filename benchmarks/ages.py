"""Which figures are older than the code that they measure: python -m benchmarks.ages [--write]

A figure is older when something of what it measures was committed that the commit of its result does not hold. That does not
make it wrong: it says what was not measured again. The marks stand in benchmarks/README.md; `--write` renews them, and a slow
test fails where one is missing. `python -m benchmarks.all --older` measures the marked ones again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = Path("benchmarks/README.md")
#: The embedded model that draws, what judges it, and what it is taught by.
_NANO = ("nano/model", "nano/draw.py", "nano/check.py", "nano/score.py", "train/step.py")
#: Result -> what of src/whitetuner its figures hang on; the program that measures is added to each.
MEASURES: dict[str, tuple[str, ...]] = {
    "adapter_layer.json": ("adapters/deltas.py", "adapters/shapes.py"),
    "adapter_sizes.json": ("adapters/attach.py", "adapters/choose.py", "adapters/shapes.py", "released.py"),
    "caching.json": ("data/cache.py", "data/media.py", "data/scan.py"),
    "caching_video.json": ("data/cache.py", "data/video.py", "data/video_clips.py", "data/video_stream.py"),
    "check.json": ("data/check.py", "data/check_page.py", "data/probe.py", "data/scan.py", "data/survey.py"),
    "expert_turns.json": ("companions.py", "memory/beside.py", "memory/swap"),
    "ranks.json": ("train/distributed.py", "train/joining.py", "train/optim.py", "train/step.py"),
    "shared_arena.json": ("memory/swap/arena.py", "memory/swap/host.py", "memory/fit.py", "memory/build.py"),
    "shared_arena_trained.json": ("memory/swap/arena.py", "memory/swap/host.py", "memory/swap/masters.py"),
    "step.json": ("recipe.py", "train/loop.py", "train/step.py", "train/optim.py", "adapters/deltas.py"),
    "swap_plans.json": (
        "memory/plan.py",
        "memory/machine.py",
        "memory/weigh.py",
        "planning.py",
        "released.py",
    ),
    "swap_schedule.json": ("memory/plan.py", "memory/recompute.py", "memory/swap"),
    "full_precision.json": ("train/precision.py", "train/whole.py", "train/block_optimizer.py"),
    "nano_edit.json": ("nano/model", "nano/draw.py", "train/step.py", "families/flux2_klein/model.py"),
    "small_edit.json": (
        "nano/edit",
        "nano/edits.py",
        "nano/check.py",
        "train/step.py",
        "families/flux2_klein/model.py",
    ),
    "small_edit_swap.json": (
        "nano/edit",
        "nano/edits.py",
        "nano/check.py",
        "train/step.py",
        "families/flux2_klein/model.py",
    ),
    "small_zimage.json": (
        "nano/zimage",
        "nano/draw.py",
        "nano/check.py",
        "train/step.py",
        "families/zimage/model.py",
    ),
    "small_wan.json": (
        "nano/wan",
        "nano/motions.py",
        "nano/check.py",
        "train/step.py",
        "families/wan/model.py",
    ),
    "laboratory_kinds.json": ("adapters/deltas.py", *_NANO, "train/whole.py"),
    "laboratory_batch_lr.json": ("adapters/deltas.py", *_NANO),
    "laboratory_timesteps.json": ("diffusion/sigmas.py", "diffusion/loss.py", *_NANO),
    "laboratory_levels.json": ("diffusion/sigmas.py", *_NANO),
    "laboratory_levels_duo.json": ("diffusion/sigmas.py", *_NANO),
    "laboratory_levels_nook.json": ("diffusion/sigmas.py", *_NANO),
    "laboratory_base.json": ("memory/quantize.py", "memory/swap", *_NANO),
    "laboratory_precision.json": ("train/precision.py", "train/whole.py", *_NANO),
    "laboratory_rates.json": ("adapters/deltas.py", "train/optim.py", *_NANO),
    "laboratory_techniques.json": ("adapters/deltas.py", "train/ema.py", "data/masks.py", *_NANO),
    "laboratory_rivals.json": ("adapters/deltas.py", *_NANO),
    "draws.json": ("adapters/deltas.py", "train/optim.py", *_NANO),
    "real_width.json": ("adapters/deltas.py", "train/loop.py", "train/step.py"),
    "first_step.json": ("adapters/deltas.py",),
    "chaos_disk.json": ("checkpoint/store.py", "recipe.py", "runs/files.py"),
    "chaos_kills.json": (
        "checkpoint/store.py",
        "recipe.py",
        "resuming.py",
        "runs/events.py",
        "runs/folder.py",
    ),
    "chaos_long.json": ("recipe.py", "runs/board.py", "runs/events.py", "train/loop.py"),
}
BEGIN, END = "<!-- made by: python -m benchmarks.ages --write -->", "<!-- end -->"
OLDER = "**older than the code**"


def rows() -> list[tuple[str, str]]:
    """(result, the command that makes it), as the table of the README says."""
    text = (ROOT / README).read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z_]+\.json)` \| `([^`]+)` \|", text, re.MULTILINE)


def program(command: str) -> str:
    """The file or folder that a command runs, from the root."""
    name = next(word for word in command.split()[1:] if word != "-m")
    return name if "/" in name else name.replace(".", "/") + ".py"


def sources(name: str) -> list[str]:
    """What a result measures, as paths from the root."""
    return [program(dict(rows())[name]), *(f"src/whitetuner/{one}" for one in MEASURES[name])]


def git(*words: str) -> str:
    """What git says. Raises CalledProcessError where there is no history."""
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    return done.stdout.strip()


def measured(name: str) -> tuple[str, str]:
    """(commit, day) of a result."""
    commit, day = git("log", "-1", "--format=%H %cs", "--", f"benchmarks/results/{name}").split()
    return commit, day


def is_older(name: str) -> bool:
    """Whether what it measures has changed since."""
    return bool(git("log", "-1", "--format=%H", f"{measured(name)[0]}..HEAD", "--", *sources(name)))


def table() -> str:
    """The marks as they are now."""
    lines = ["| result | measured | of `src/whitetuner` it measures | |", "|---|---|---|---|"]
    for name in MEASURES:
        of = ", ".join(f"`{one}`" for one in MEASURES[name])
        lines.append(f"| `{name}` | {measured(name)[1]} | {of} | {OLDER if is_older(name) else ''} |")
    return "\n".join(lines)


def marked() -> set[str]:
    """The results that the README marks as older."""
    text = (ROOT / README).read_text(encoding="utf-8")
    return {
        found[1]
        for line in text.split("\n")
        if OLDER in line and (found := re.match(r"\| `([a-z_]+\.json)` \| \d{4}", line))
    }


def with_table(text: str, made: str) -> str:
    """The README with the table between its two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="renew the marks in benchmarks/README.md")
    given = parser.parse_args()
    older = [name for name in MEASURES if is_older(name)]
    if given.write:
        text = (ROOT / README).read_text(encoding="utf-8")
        (ROOT / README).write_text(with_table(text, table()), encoding="utf-8")
    unmarked = sorted(set(older) - marked())
    print(f"{len(older)} of {len(MEASURES)} results are older than the code: {', '.join(older) or 'none'}")
    if unmarked:
        print(f"not marked: {', '.join(unmarked)}\n  -> python -m benchmarks.ages --write")
    return 1 if unmarked else 0


if __name__ == "__main__":
    sys.exit(main())
