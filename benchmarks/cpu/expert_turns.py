"""What it costs that two experts take turns on one card: seconds at the beginning of a turn, as a share of the turn.

traffic: the real engines over tiny blocks, in turns, on the CPU backend: what the first step of a turn loads more than
         the others. At most what the card holds of a model: its residents and slots
plans:   the same from the plan's own numbers for WAN 2.2 at its usual settings and for single frames (the shortest steps);
         an expert that waits on disk is read at the speed of a SATA SSD. `turn_steps` is what a run of 2000 steps takes

  python -m benchmarks.cpu.expert_turns
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.paired import environment
from torch import nn

from whitetuner.companions import turn_steps_of
from whitetuner.config.load import load_config
from whitetuner.memory.beside import SHARE_OF_TURN, exchange_s
from whitetuner.memory.machine import GIB, typical_machine
from whitetuner.memory.plan import Plan
from whitetuner.memory.swap.backend import CpuBackend, Mark
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.records import Size
from whitetuner.released import plan_released

RESULT = Path(__file__).parents[1] / "results" / "expert_turns.json"
#: (card, host) in GB.
MACHINES = ((12, 64), (12, 36), (16, 64), (24, 64), (32, 64), (32, 48), (80, 128))
SIZES = (Size(832, 480, 81), Size(1024, 1024, 1), Size(512, 512, 1))
BLOCKS, WIDTH, TURN = 12, 64, 4


def main() -> None:
    found = {"traffic": [traffic(residents) for residents in (0, 4, 8, 12)], "plans": plans()}
    shares = [row["share"] for row in found["plans"] if "share" in row]
    result = {
        **found,
        "limit": SHARE_OF_TURN,
        "largest_share": max(shares),
        "ok": max(shares) <= SHARE_OF_TURN
        and all(row["residents"] <= row["more"] <= row["held"] for row in found["traffic"]),
        "predicted": "plans: speeds assumed for a usual card of each size; not measured on a GPU",
        "environment": environment("torch", "diffusers"),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)]
        ).requires_grad_(False)
        self.first = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.first
        for block in self.blocks:
            x = x + block(x)
        return x


class Counting(CpuBackend):
    """Blocks that were copied to the device, residents too."""

    blocks = 0

    def load(self, target: torch.Tensor, master: torch.Tensor, free: Mark | None) -> Mark:
        self.blocks += 1
        return super().load(target, master, free)


def traffic(residents: int) -> dict[str, Any]:
    """In blocks: of a step within a turn, of the first one of a turn, and what the card holds of one expert."""
    backends = [Counting(None) for _ in range(2)]
    engines = [
        SwapEngine(Expert(), ("blocks",), residents, backend, slots=2, smallest_bytes=0).attach()
        for backend in backends
    ]
    loads: list[int] = []
    for step in range(4 * TURN):
        turn = step // TURN % 2
        if step % TURN == 0:
            engines[1 - turn].evict()
        before = backends[turn].blocks
        engines[turn].module(torch.ones(1, WIDTH)).square().mean().backward()
        loads.append(backends[turn].blocks - before)
    within, first = loads[-1], loads[-TURN]
    held = residents + (2 if residents < BLOCKS else 0)
    return {"residents": residents, "within": within, "first": first, "more": first - within, "held": held}


def plans() -> list[dict[str, Any]]:
    config = load_config(
        None, base={"run.name": "x", "model.family": "wan", "model.task": "i2v", "run.steps": 2000}
    ).config
    rows = []
    for size in SIZES:
        machines = [typical_machine(*one) for one in MACHINES]
        for (card, host), (machine, plan) in zip(
            MACHINES, plan_released("wan", "i2v-2.2", machines, size).plans, strict=True
        ):
            row: dict[str, Any] = {
                "size": f"{size.width}x{size.height}x{size.frames}",
                "card_gb": card,
                "host_gb": host,
            }
            rows.append(row)
            if not isinstance(plan, Plan):
                row["refused"] = str(plan).partition("\n")[0]
                continue
            best, turn = plan.best, turn_steps_of(plan, config)
            filled = best.parts["resident blocks"] + best.parts["slots"]
            small = best.parts["other weights"] + best.parts["adapter and optimizer"]
            seconds = exchange_s(filled, small, best.disk_bytes // 2, machine.link_bytes_per_s)
            row |= {
                "base": best.base,
                "host_needed_gb": round(best.host_bytes / GIB, 1),
                "disk_gb": round(best.disk_bytes / GIB, 1),
                "step_s": round(best.seconds, 2),
                "exchange_s": round(seconds, 2),
                "turn_steps": turn,
                "share": round(seconds / (turn * best.seconds), 5),
            }
            print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()
