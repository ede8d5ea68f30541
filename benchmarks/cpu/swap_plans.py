"""What the plan says for every released model on cards of 8 to 32 GB, from shapes alone: no weights, no GPU.

    python -m benchmarks.cpu.swap_plans [FAMILY ...] [--out docs/plans.md]

Speeds are those assumed for a usual card of each size (memory/machine.py): predictions, not measurements. The adapter and all
else are the family's own settings. A model appears when its released config stands in its family's sketch.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.paired import environment

from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.memory.machine import GIB, typical_machine
from whitetuner.memory.plan import in_seconds
from whitetuner.records import Size
from whitetuner.released import plan_released

RESULT = Path(__file__).parents[1] / "results" / "swap_plans.json"
CARDS_GB = (8, 12, 16, 24, 32)
HOST_GB = 64
SIDES_PX = (512, 768, 1024)


def sizes(name: str) -> list[Size]:
    """Squares for pictures; the family's own size for videos."""
    spec = registry.spec(name)
    return [spec.default_size] if spec.frames else [Size(side, side) for side in SIDES_PX]


def rows(name: str, variant: str, task: str) -> list[dict[str, Any]]:
    machines = [typical_machine(card, HOST_GB) for card in CARDS_GB]
    found = []
    for size in sizes(name):
        made = plan_released(name, variant, machines, size, task)
        for card, (_, plan) in zip(CARDS_GB, made.plans, strict=True):
            row = {"model": made.title, "shape": str(made.shape), "vram_gb": card}
            if isinstance(plan, UserError):
                row["refused"] = str(plan)
            else:
                row |= {"sentence": plan.best.sentence(), "best": plan.to_json()["choices"][0]}
            found.append(row)
            print(f"{row['model']:<44} {row['shape']:<24} {card:>2} GB  {_cell(row)}", flush=True)
    return found


def _cell(row: dict[str, Any]) -> str:
    """One cell of the table: base, streamed blocks, peak and seconds."""
    if "refused" in row:
        return "-"
    best = row["best"]
    streamed = best["blocks"] - len(best["residents"])
    where = f"{streamed}/{best['blocks']} streamed" if streamed else "all on the card"
    return f"{best['base']}, {where}, {best['peak_bytes'] / GIB:.1f} GB, {in_seconds(best['seconds'])}"


def table(found: list[dict[str, Any]]) -> str:
    cards = " | ".join(f"{card} GB" for card in CARDS_GB)
    lines = [
        "# Plans",
        "",
        "What `whitetuner plan` predicts for the released models, adapter training at the family's own settings, batch 1, 64 GB",
        "on the host, for a card that is usually sold with that much memory (RTX 4060, 4070, 4080, 4090, 5090). Each cell: base,",
        "blocks that are streamed, peak on the card, seconds a step. Computed from shapes; **not measured on a GPU yet**.",
        "`-`: does not fit. Made by `python -m benchmarks.cpu.swap_plans --out docs/plans.md`.",
        "",
        f"| model | size | {cards} |",
        "|---|---|" + "---|" * len(CARDS_GB),
    ]
    for start in range(0, len(found), len(CARDS_GB)):
        group = found[start : start + len(CARDS_GB)]
        cells = " | ".join(_cell(row) for row in group)
        lines.append(f"| {group[0]['model']} | {group[0]['shape'].removesuffix(', batch 1')} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in arguments.families or registry.FAMILIES:
        spec, released = registry.spec(name), registry.sketch(name).RELEASED
        seen = []
        for variant, configs in released.items():
            for task in spec.tasks_of(variant):
                if (configs, task) not in seen:  # variants that differ in their weights alone fit alike
                    seen.append((configs, task))
                    found += rows(name, variant, task)
    if not arguments.families:
        head = {
            "command": "python -m benchmarks.cpu.swap_plans",
            "environment": environment("torch", "diffusers"),
        }
        RESULT.write_text(
            json.dumps({**head, "predicted": True, "rows": found}, indent=1) + "\n", encoding="utf-8"
        )
    if arguments.out is not None:
        arguments.out.write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
