"""docs/laboratory.md and its charts, from the tables that are there: means, spread, every seed, and what failed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.learning.suites import ASKS
from benchmarks.learning.table import spread
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
RESULTS, PAGE, PICTURES = ROOT / "benchmarks/results", ROOT / "docs/laboratory.md", ROOT / "docs/img"

HEAD = """\
# The laboratory

What a setting is worth is measured on the embedded model (nano: a small real FLUX.2 Klein that draws six shapes), not felt. Every
cell is [the demo](demo.md)'s recipe with the cell's settings changed; 32 pictures of a new concept are learned beside 256 of what
the model knows. A program then judges fresh pictures: **new** is the share of the concept drawn right, **old** that of the old
vocabulary (what it lost was forgotten). **Validation** is the loss on 24 pictures held out, at fixed noise; most of them are old
vocabulary, so it mostly tells what was forgotten. ± is the sample standard deviation over seeds; a share of 64 pictures is itself
uncertain by up to 6 points, one of 96 by up to 5 (standard error), so differences below that say nothing, and one seed says
little. The learning rate is the demo's 4e-3 unless a cell says otherwise; each kind may have a better one. What holds on a
model of 1.6 M parameters need not hold on a released one.

Concepts: `zorp`, an outline (a heart); `duo`, a texture (a disc, its left half coloured, its right half white); `nook`, a layout
(a disc in the upper left quarter). Suites: `kinds`, `rates`, `timesteps`, `levels`, `base`, `batch_lr`, `precision`,
`techniques`; one without a section below has not been run.
The rivals are other libraries' adapters in our loop, and whole programs (diffusers' own
script, OneTrainer, musubi-tuner, ai-toolkit) where their checkouts were at hand; `benchmarks/learning/peers.py` says what they do
differently.

Seconds are those of the steps on a busy machine, and layers this small say nothing of time at real width: for that see
[adapters](adapters.md).

This page is written by `python -m benchmarks.learning.laboratory --write-docs` from `benchmarks/results/laboratory_*.json`.
"""
FIRST_STEP = """\
How far AdamW's first step moves the output of a square layer (rms), for inputs of rms 1 and a rate of 1. A rank adds up so many
numbers, a LoKr and a whole matrix as many as the layer is wide: at the width of these models (128) a LoKr moves about as far as
a LoRA, at FLUX.2 Klein's (3072) several times as far at the same rate. So the laboratory's rates, and its order of LoRA and LoKr
at one rate, do not carry over to released models; the presets' rates are those that are published for them.
"""
#: By hand, from the tables below it; look it over when they change.
FOLLOWS = """
## What follows from it

What a preset's rate, rank and factor are, its family's sources say (`whitetuner init PRESET` writes them beside each value): the
first step of an adapter hangs on the layers' width (below), so rates do not carry over from here. What does not hang on it:

- **Noise levels.** An outline, a texture and a layout are learned where there is much noise: `sigmoid` with a bias of 1.2 draws
  79, 79 and 59 % of them right, `shift` 3 58, 77 and 57 %, a bias of 0.6 59, 64 and 29 %, no bias 35, 40 and 8 %, which is no
  more than `linear` (37, 52, 15 %), `lognorm_blend` 5, 17 and 4 %: its log-normal lies at little noise. So `init --goal
  character` and `object` take `shift` 3, which is also what Esser et al. 2024 (section 5.3.2) use at 1024 px (`shift` for
  videos and `composition`, by the model's own), and `style` `sigmoid` with a bias of 0.6. A model that draws 64 px has less to
  decide at little noise than one at 1024 px, so no goal takes the most. `sigma_sqrt` weighs up what has little noise and
  unlearns outlines; `cosmap` is no different from no weight within what the seeds tell.
- **Rates.** Each kind learns the word at a rate of its own: 91 % with LoKr 4 at 1.6e-2 (59 % at 4e-3), 85 % with LoKr 8 and 82
  % with LoKr 16 there, 84 % with LoRA 16 at 2e-3, 88 % with the whole model at 1e-3; none of them costs more of the old.
  **Warm-up** makes no difference (60 % without). A rate that is kept to the end draws more than one that falls to 0 (83 against
  59 %): it is twice as much in sum. An **alpha** of a quarter of the rank is a smaller rate (82 against 93 %), no more: presets
  leave it at the rank.
- **Precision of training.** bf16 weights with float32 masters, Kahan's sums or stochastic rounding draw 79 to 80 % right,
  float32 ones 80 %; a LoKr draws 59 % on frozen bf16 or fp32 weights.
- **Caption dropout** of a tenth costs: 59 % against 71 % without, and what was known is not kept better. It is off in the
  presets now; for long runs the line stands there as a comment.
- **Average of the weights (EMA)**: no difference after 200 steps (59 % with 0.98, 62 % without). Off by default.
- **min-SNR** loses (41 %). Off by default.
- **Old pictures beside the new (prior preservation)** are worth it: without them the word comes sooner and 93 % of what was
  known falls to a third. At a loss weight of 0.3 it is between the two. It needs pictures of yours, so no preset has it.
- **Masks** (what is not the shape counts a tenth) make the word come sooner and cost some of the old vocabulary. Off by
  default.
- **LoRA+** learns much faster at its rate, and no faster than plain LoRA at a rate of 4e-3 (93 %, table of kinds). Off by
  default.
- **Shuffled tags**: with four orders beside the written one the word is learned slower, and captions in another order are not
  drawn better after 200 steps. Off by default.
- **bf16, int8 and fp8** of the frozen weights cost nothing (58 to 59 % as in float32), nf4 4 points (55 %); swapping blocks
  changes no bit.
- **Batch and rate** go together: four times the rate is worth more than four times the batch.
- **Rivals.** PEFT's and lycoris-lora's layers in our loop learn what ours learn, to the digit where they start alike. Beside
  whole programs, LoRA 16 after 100 steps without an average: ours 60 % (16 seeds), diffusers' script 71 % (14), OneTrainer 75
  %, musubi-tuner 72 %, ai-toolkit 46 % (3 each; its noise levels and warm-up are not ours). **Between ours and the script that
  is the draws, not the learning**: given the script's batches, ours ends at its adapter, and its arithmetic at ours given ours,
  the numbers of their layers within 3e-6, each with the same pictures right. A run hangs on its draws by 12 points either way;
  when four runs exchanged their noise levels the score went with them, not with the program. Luck is what is left: between the
  two sets of draws lie 10 points with a standard error of 3.5, but no property was found in which they differ. The levels are
  distributed as they should be (300,000 of them against the normal: Kolmogorov-Smirnov 0.53 / sqrt n), noise, order and dropped
  captions of 16 recorded runs of each are alike, and fresh levels for our runs drew 62 to 69 % (6 to 9 seeds). The batches of
  the other three were not replayed.
- **Time and memory** at Klein's width on a processor: a step takes as long as in the four programs or up to 7 % less (0.93 to
  0.98 of their time, medians of two rounds that themselves differ by 10 %), in 0.96 to 1.00 of their memory. While it loads,
  ours holds 0.6 GB more than they at their peak: the file it reads is mapped beside the weights; those pages go when something
  else wants the place.

All of this is one small model, and all but the noise levels one concept.
"""
DRAWS = """\
LoRA 16, as the script, after 100 steps. A row is whose batches (pictures, captions, noise, noise levels, start of the layers) are
learned from, a column who learns: the share of new pictures drawn right, and how far the two adapters end apart (the largest
relative distance of a layer's numbers, of all seeds).
"""
WIDTH = """\
FLUX.2 Klein's width (3072), one block of either kind, random weights, 32-bit, LoRA of rank 16, 12 pictures of 64 tokens a step,
one core of a processor; every program with the same layers and no checkpointing. Ours over theirs is of the same round: below 1
ours is faster or smaller. What holds on a processor need not hold on a card.
"""
NEW_COLOUR, OLD_COLOUR = "#2a7de1", "#e08600"
#: Of lines, each told from its neighbours: Tol's muted scheme (personal.sron.nl/~pault), and three more.
COLOURS = (
    "#332288",
    "#117733",
    "#cc6677",
    "#88ccee",
    "#999933",
    "#aa4499",
    "#44aa99",
    "#882255",
    "#ddaa33",
    "#555555",
    "#bb5522",
    "#2a7de1",
)


def tables() -> dict[Path, dict[str, Any]]:
    """In the order of ASKS; one for each concept."""
    found = [
        (path, json.loads(path.read_text(encoding="utf-8"))) for path in RESULTS.glob("laboratory_*.json")
    ]
    order = list(ASKS)
    return dict(sorted(found, key=lambda one: (order.index(one[1]["settings"]["suite"]), one[0].name)))


def page() -> str:
    sections = [section(path.stem, document) for path, document in tables().items()]
    return HEAD + FOLLOWS + "".join([*sections, draws(), real_width(), first_step()])


def section(name: str, document: Mapping[str, Any]) -> str:
    settings, before, cells = document["settings"], document["before"], document["cells"]
    rows, seeds = document["rows"], document["seeds"]
    wanted = len(cells) * len(seeds)
    lines = [
        f"\n## {ASKS[settings['suite']]} (`{settings['concept']}`)\n",
        f"{settings['steps']} steps of {settings['batch']} unless a cell says otherwise; {len(rows)} of {wanted} cells are there "
        f"({len(cells)} settings, {len(seeds)} seeds). Before: new {before['new']:.0%}, old {before['old']:.0%} of "
        f"{settings['judged_new']} and {settings['judged_old']} pictures.\n",
        f"`{document['environment']['command']}`\n",
        "| | new | old | validation (before) | seconds a step | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        lines.append(table_row(cell, [row for row in rows if row["cell"] == cell], len(seeds)))
    refused = [row for row in rows if "failed" in row]
    if refused:
        lines += ["", "What failed:", ""]
        lines += [f"- {row['cell']}, seed {row['seed']}: {row['failed'].splitlines()[0]}" for row in refused]
    lines += ["", f"![{settings['suite']}](img/{name}.png)", ""]
    return "\n".join([*lines, *curve_table(name, document)])


def curves(document: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """cell -> {step: mean share of new ones over the seeds}, of the cells that were judged on the way."""
    found: dict[str, dict[int, float]] = {}
    for cell in document["cells"]:
        rows = [row["curve"] for row in document["rows"] if row["cell"] == cell and "curve" in row]
        if rows:
            found[cell] = {int(step): spread(rows, step)[0] for step in rows[0]}
    return found


def curve_table(name: str, document: Mapping[str, Any]) -> list[str]:
    found = curves(document)
    if not found:
        return []
    steps = list(next(iter(found.values())))
    lines = [
        "New after so many steps, mean over the seeds:\n",
        "| | " + " | ".join(map(str, steps)) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for cell, shares in found.items():
        lines.append(f"| {cell} | " + " | ".join(f"{100 * share:.0f} %" for share in shares.values()) + " |")
    return [*lines, "", f"![curves](img/{name}_curves.png)", ""]


def draws() -> str:
    """Whose batches, whose loop."""
    document = json.loads((RESULTS / "draws.json").read_text(encoding="utf-8"))
    found = document["summary"]

    def right(key: str) -> str:
        mean, deviation = found[key]
        return f"{100 * mean:.0f} % ± {100 * deviation:.0f}"

    lines = [
        "\n## The script's batches in our loop, and ours in its arithmetic\n",
        DRAWS,
        f"`{document['environment']['command']}`, {len(document['rows'])} seeds\n",
        "| | learned by ours | by the script | apart |",
        "|---|---|---|---|",
    ]
    for whose, other in (("script's draws", "the script"), ("our draws", "the script's arithmetic")):
        cells = (right(f"{whose}: ours"), right(f"{whose}: {other}"), f"{found[f'{whose}: apart']:.1e}")
        lines.append(f"| {whose} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def real_width() -> str:
    """Time and memory beside other programs."""
    document = json.loads((RESULTS / "real_width.json").read_text(encoding="utf-8"))
    lines = [
        "\n## Time and memory of a step beside other programs, at real width\n",
        WIDTH,
        f"`{document['environment']['command']}`\n",
        "| | seconds a step | ours over theirs | GB while stepping | ours over theirs | GB at the peak | a short run, s |",
        "|---" * 7 + "|",
    ]
    for name, one in document["programs"].items():
        cells = (
            f"{one['step']:.1f}",
            f"{one['time']:.2f}",
            f"{one['steps_gb']:.1f}",
            f"{one['memory']:.2f}",
            f"{one['peak_gb']:.1f}",
            f"{one['short']:.0f}",
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def first_step() -> str:
    """What a learning rate of one kind is worth in another."""
    document = json.loads((RESULTS / "first_step.json").read_text(encoding="utf-8"))
    moved: dict[str, dict[str, float]] = document["moved"]
    columns = list(next(iter(moved.values())))
    lines = [
        "\n## What a learning rate is worth: the first step\n",
        FIRST_STEP,
        f"`{document['environment']['command']}`\n",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for kind, figures in moved.items():
        lines.append(f"| {kind} | " + " | ".join(f"{figures[column]:.1f}" for column in columns) + " |")
    return "\n".join([*lines, ""])


def table_row(cell: str, rows: Sequence[Mapping[str, Any]], seeds: int) -> str:
    done = [row for row in rows if "failed" not in row]
    if not done:
        return f"| {cell} | {'failed' if rows else 'not run'} | | | | 0 of {seeds} |"

    def share(key: str) -> str:
        mean, deviation = spread(done, key)
        return f"{100 * mean:.0f} %" + (f" ± {100 * deviation:.0f}" if len(done) > 1 else "")

    if "validation" not in done[0]:  # another trainer's loop does not measure it
        return f"| {cell} | {share('new')} | {share('old')} | | | {len(done)} of {seeds} |"
    loss, deviation = spread(done, "validation")
    told = f"{loss:.4f}" + (f" ± {deviation:.4f}" if len(done) > 1 else "")
    told += f" ({spread(done, 'validation_before')[0]:.4f})"
    pace = median(row["seconds_per_step"] for row in done)  # machines are busy at times
    return f"| {cell} | {share('new')} | {share('old')} | {told} | {pace:.2f} | {len(done)} of {seeds} |"


def chart(document: Mapping[str, Any]) -> Image.Image:
    """A bar for the mean of each cell, a dot for each seed; lines where the untaught model stands."""
    cells, height, left, width = list(document["cells"]), 34, 250, 760
    board = Image.new("RGB", (width, 40 + height * len(cells) + 26), "white")
    draw = ImageDraw.Draw(board)

    def at(share: float) -> float:
        return left + (width - left - 30) * share

    bottom = 36 + height * len(cells)
    draw.text((left, 10), "new", fill=NEW_COLOUR)
    draw.text((left + 40, 10), "old", fill=OLD_COLOUR)
    draw.text(
        (left + 80, 10), "share drawn right: mean (bar), seeds (dots), old before (line)", fill="#444444"
    )
    for part in range(5):
        draw.line([(at(part / 4), 30), (at(part / 4), bottom)], fill="#e5e5e5")
        draw.text((at(part / 4) - 8, bottom + 6), f"{25 * part} %", fill="#666666")
    for number, cell in enumerate(cells):
        top = 34 + height * number
        draw.text((8, top + 8), cell, fill="#222222")
        rows = [row for row in document["rows"] if row["cell"] == cell and "failed" not in row]
        if not rows:
            failed = any(row["cell"] == cell for row in document["rows"])
            draw.text((left + 6, top + 8), "failed" if failed else "not run", fill="#c0392b")
            continue
        for offset, key, colour in ((2, "new", NEW_COLOUR), (15, "old", OLD_COLOUR)):
            mean = spread(rows, key)[0]
            draw.rectangle([left, top + offset, max(left + 1, at(mean)), top + offset + 11], fill=colour)
            for row in rows:
                x, y = at(row[key]), top + offset + 5.5
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill="white", outline="#222222")
    before = at(document["before"]["old"])
    draw.line([(before, 30), (before, bottom)], fill="#8a5200")
    return board


def curve_chart(document: Mapping[str, Any]) -> Image.Image:
    """A line for each cell: share of new ones against steps."""
    found = curves(document)
    left, top, width, height, names = 50, 20, 520, 360, 250
    board = Image.new("RGB", (left + width + names, top + height + 40), "white")
    draw = ImageDraw.Draw(board)
    most = max(max(shares) for shares in found.values())

    def at(step: int, share: float) -> tuple[float, float]:
        return left + width * step / most, top + height * (1 - share)

    for part in range(5):
        draw.line([at(0, part / 4), at(most, part / 4)], fill="#e5e5e5")
        draw.text((8, at(0, part / 4)[1] - 6), f"{25 * part} %", fill="#666666")
    for step in next(iter(found.values())):
        draw.text((at(step, 0)[0] - 8, top + height + 6), str(step), fill="#666666")
    draw.text((left + width // 2, top + height + 22), "steps", fill="#666666")
    # names at the ends of their lines, moved apart where lines end close together
    ends, free = sorted(found, key=lambda cell: -list(found[cell].values())[-1]), 0.0
    for cell in ends:
        colour = COLOURS[list(found).index(cell) % len(COLOURS)]
        points = [at(0, document["before"]["new"]), *(at(*one) for one in found[cell].items())]
        draw.line(points, fill=colour, width=2)
        for x, y in points[1:]:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        free = max(free, points[-1][1] - 6)
        draw.text((left + width + 12, free), cell, fill=colour)
        free += 14
    return board


def write() -> None:
    for path, document in tables().items():
        chart(document).save(PICTURES / f"{path.stem}.png", optimize=True)
        if curves(document):
            curve_chart(document).save(PICTURES / f"{path.stem}_curves.png", optimize=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
