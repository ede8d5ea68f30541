"""How close the swap engine's schedule comes to the bound, on a simulated link and clock; no GPU, no waiting.

The real engine runs real (tiny) blocks; the backend keeps two clocks, one of the computing and one of the
link, in units of a block's forward. A step's time is compared to max(T_f, V/B) + max(T_b, V/B) with V the
blocks that a pass must load. Also simulated: the same schedule with every load paid twice, as by engines
that copy each block back (exchange).

    python -m benchmarks.cpu.swap_schedule
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.paired import environment
from torch import nn

from whitetuner.memory.recompute import checkpoint_blocks
from whitetuner.memory.swap.backend import CpuBackend, Mark
from whitetuner.memory.swap.engine import SwapEngine

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


def simulate(
    sizes: Iterable[int],
    per_load: float,
    residents: int,
    *,
    recompute: bool = True,
    slots: int = 2,
    exchange: bool = False,
) -> dict[str, float]:
    """Time of a step in the steady state, its bound, and loads."""
    model = nn.Module()
    model.blocks = nn.ModuleList(Block(size) for size in sizes)
    unit = WIDTH * WIDTH * 4
    clock = Clock(per_load * (2 if exchange else 1), unit)
    for block in model.blocks:
        block.clock = clock
    checkpoint_blocks(model, ("blocks",), "all" if recompute else "none")
    swap = SwapEngine(model, ("blocks",), residents, clock, slots=slots, smallest_bytes=0).attach()
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
    compute = sum(block.size for block in model.blocks)
    groups = swap.placement.groups
    streamed = sum(model.blocks[i].size for group in groups for i in group)
    first = sum(model.blocks[i].size for group in groups[:slots] for i in group)
    last = sum(model.blocks[i].size for group in groups[-slots:] for i in group) if groups else 0
    forward = max(compute, (streamed - first) * per_load)
    backward = max(compute * (2 if recompute else 1), (streamed - last) * per_load)
    return {
        "time": took,
        "bound": forward + backward,
        "over_bound": took / (forward + backward),
        "over_resident": took / (compute * (3 if recompute else 2)),
        "loads": counters.loads,
        "demanded": counters.demanded,
    }


MODELS: dict[str, list[int]] = {"60 equal blocks": [1] * 60, "5 double + 20 single": [2] * 5 + [1] * 20}


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, float]]]]:
    for name, sizes in MODELS.items():
        for per_load in (0.5, 1.0, 1.5, 2.0, 3.0):
            for share in (0.0, 0.25, 0.5, 0.75):
                residents = round(len(sizes) * share)
                for recompute in (True, False):
                    told = {"model": name, "load": per_load, "residents": residents, "recompute": recompute}
                    yield (
                        told,
                        lambda s=sizes, p=per_load, r=residents, c=recompute: simulate(s, p, r, recompute=c),
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{**told, **run()} for told, run in cases()]
    others = [
        {"engine": name, "load": load, **simulate(MODELS["60 equal blocks"], load, 28, **how)}
        for load in (0.5, 1.0, 2.0, 3.0)
        for name, how in (
            ("ours", {}),
            ("three slots", {"slots": 3}),
            ("exchange", {"exchange": True}),
        )
    ]
    worst = max(rows, key=lambda row: row["over_bound"])
    result = {
        "command": "python -m benchmarks.cpu.swap_schedule",
        "environment": environment("torch"),
        "simulated": True,
        "worst_over_bound": worst["over_bound"],
        "rows": rows,
        "others": others,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"worst: {worst['over_bound']:.3f} x the bound ({worst})")
    for row in others:
        print(
            f"load {row['load']}: {row['engine']:12} {row['over_bound']:.2f} x bound, {row['loads']:.0f} loads"
        )


if __name__ == "__main__":
    main()
