"""How close the swap engine's schedule comes to the bound, on a simulated link and clock; no GPU, no waiting.

The real engine runs real (tiny) blocks; the backend keeps two clocks, one of the computing and one of the
link, in units of a small block's forward. Lists of blocks are those of the families; a budget of memory is
`residents` + two slots of the largest block, spent as the plan spends it (three slots and one resident less
where there is one to spare). A step's time is compared to

    bound        max(T_f, V/B) + max(T_b, V/B), V what a pass must load with this budget
    order bound  the same with the time in which no load can begin, whatever the schedule: at each turn of a pass
                 the budget is full of what is needed next, until the outermost block is done with. No order of
                 whole blocks is faster.

Also simulated: the same schedule with every load paid twice, as by engines that copy each block back (exchange).

    python -m benchmarks.cpu.swap_schedule
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.paired import environment
from torch import nn

from whitetuner.memory.plan import SLOTS
from whitetuner.memory.recompute import checkpoint_blocks
from whitetuner.memory.swap.backend import CpuBackend, Mark
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.layout import spread

RESULT = Path(__file__).parents[1] / "results" / "swap_schedule.json"
WIDTH = 8


class Clock(CpuBackend):
    """A backend with two clocks. per_load: time of the link for a block of `unit` bytes."""

    def __init__(self, per_load: float, unit: int) -> None:
        super().__init__(seed=None, poison=False)
        self.now, self.link = 0.0, 0.0
        self._per_byte = per_load / unit

    def compute(self, seconds: float) -> None:
        self.now += seconds

    def load(self, target: torch.Tensor, master: torch.Tensor, free: Mark | None) -> Mark:
        target.copy_(master)
        self.link = max(self.link, free or 0.0) + master.numel() * self._per_byte
        return self.link

    def mark(self) -> Mark:
        return self.now

    def wait(self, mark: Mark) -> None:
        self.now = max(self.now, mark)

    def drain(self) -> None:
        self.now = max(self.now, self.link)


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Clock, seconds: float) -> torch.Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        clock.compute(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.clock.compute(ctx.seconds)
        return grad, None, None


class Block(nn.Module):
    """`size` units of frozen weights; a forward takes `size` units of time, and so does the gradient of its
    input.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size * WIDTH, WIDTH), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.size, self.clock = float(size), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.clock is not None
        return _Work.apply(x, self.clock, self.size) * self.scale


@dataclass(frozen=True)
class Bounds:
    """plain: max(T_f, V/B) + max(T_b, V/B);  order: with the time in which the link must rest at the turns."""

    plain: float
    order: float


def bounds(sizes: Sequence[int], budget: int, per_load: float, recompute: bool) -> Bounds:
    """Of a step with `budget` units of memory for blocks, in units of a small block's forward."""
    total, outer = sum(sizes), sizes[0] + sizes[-1]
    link = max(0, total - budget) * per_load
    plain = order = 0.0
    for again in (1, 2 if recompute else 1):
        plain += max(total * again, link)
        order += max(total * again, link + outer * again if link else 0.0)
    return Bounds(plain, order)


def way(sizes: Sequence[int], budget: int, slots: int | None = None) -> tuple[frozenset[int], int]:
    """(residents, slots) as the plan spends a budget of at least two of the largest blocks."""
    largest = max(sizes)
    slots = slots or (SLOTS if budget >= SLOTS * largest else 2)
    return spread(sizes, budget - slots * largest), slots


def simulate(
    sizes: Sequence[int],
    per_load: float,
    budget: int,
    *,
    recompute: bool = True,
    slots: int | None = None,
    exchange: bool = False,
) -> dict[str, float]:
    """Time of a step in the steady state, its bounds, and loads."""
    residents, slots = way(sizes, budget, slots)
    model = nn.Module()
    model.blocks = nn.ModuleList(Block(size) for size in sizes)
    unit = WIDTH * WIDTH * 4
    clock = Clock(per_load * (2 if exchange else 1), unit)
    for block in model.blocks:
        block.clock = clock
    checkpoint_blocks(model, ("blocks",), "all" if recompute else "none")
    swap = SwapEngine(model, ("blocks",), residents, clock, slots=slots, smallest_bytes=0).attach()
    assert swap.placement.device_bytes <= budget * unit
    x = torch.zeros(1, requires_grad=True)
    for step in range(4):
        start = clock.now
        y = x
        for block in model.blocks:
            y = block(y)
        y.sum().backward()
        counters = swap.step_end()
        took = clock.now - start
        assert step == 0 or counters.copies_back == 0
    best = bounds(sizes, budget, per_load, recompute)
    return {
        "slots": slots,
        "time": took,
        "bound": best.plain,
        "over_bound": took / best.plain,
        "over_order_bound": took / best.order,
        "over_resident": took / (sum(sizes) * (3 if recompute else 2)),
        "loads": counters.loads,
        "units_loaded": counters.bytes_up / unit,
        "demanded": counters.demanded,
    }


#: Bytes and computing of each block, in units of the smallest.
MODELS: dict[str, list[int]] = {
    "Qwen-Image: 60 equal": [1] * 60,
    "WAN 14B: 40 equal": [1] * 40,
    "Z-Image: 2 + 2 + 30 equal": [1] * 34,
    "Klein 4B: 5 double + 20 single": [2] * 5 + [1] * 20,
    "Klein 9B: 8 double + 24 single": [2] * 8 + [1] * 24,
}


def budgets(sizes: Sequence[int]) -> list[int]:
    """Two slots and no resident, one small block more, every tenth of the model, all but one block."""
    least, most = 2 * max(sizes), sum(sizes) - 1
    tenths = (least + (most - least) * k // 10 for k in range(11))
    return sorted({*tenths, least + 1})


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, float]]]]:
    for name, sizes in MODELS.items():
        for per_load in (0.5, 1.0, 1.25, 1.5, 2.0, 3.0):
            for budget in budgets(sizes):
                for recompute in (True, False):
                    told = {"model": name, "load": per_load, "budget": budget, "recompute": recompute}
                    yield (
                        told,
                        lambda s=sizes, p=per_load, r=budget, c=recompute: simulate(s, p, r, recompute=c),
                    )


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model, with and without recomputation: the worst row over either bound."""
    found = []
    for name in MODELS:
        for recompute in (True, False):
            some = [row for row in rows if row["model"] == name and row["recompute"] == recompute]
            worst = max(some, key=lambda row: row["over_bound"])
            found.append(
                {
                    "model": name,
                    "recompute": recompute,
                    "worst_over_bound": worst["over_bound"],
                    "at": {"load": worst["load"], "budget": worst["budget"]},
                    "order_bound_there": worst["over_bound"] / worst["over_order_bound"],
                    "share_above_1.05": sum(row["over_bound"] > 1.05 for row in some) / len(some),
                    "worst_over_order_bound": max(row["over_order_bound"] for row in some),
                    "demanded": sum(row["demanded"] for row in some),
                }
            )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [{**told, **run()} for told, run in cases()]
    others = [
        {"engine": name, "load": load, **simulate(MODELS["Qwen-Image: 60 equal"], load, 30, **how)}
        for load in (0.5, 1.0, 2.0, 3.0)
        for name, how in (
            ("ours", {}),
            ("two slots", {"slots": 2}),
            ("exchange", {"exchange": True}),
        )
    ]
    result = {
        "command": "python -m benchmarks.cpu.swap_schedule",
        "environment": environment("torch"),
        "simulated": True,
        "worst_over_bound": max(row["over_bound"] for row in rows),
        "worst_over_order_bound": max(row["over_order_bound"] for row in rows),
        "summary": summary(rows),
        "rows": rows,
        "others": others,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["summary"]:
        print(
            f"{row['model']:32} {'recomputed' if row['recompute'] else 'plain':10} worst {row['worst_over_bound']:.3f} x "
            f"bound (no order of loads below {row['order_bound_there']:.3f}; at {row['at']}), "
            f"{row['share_above_1.05']:.0%} above 1.05; worst {row['worst_over_order_bound']:.3f} x order bound"
        )
    for row in others:
        print(
            f"load {row['load']}: {row['engine']:12} {row['over_bound']:.2f} x bound, {row['loads']:.0f} loads"
        )


if __name__ == "__main__":
    main()
