"""Step time and memory of swapped training on this machine's GPU, against all that it should be held against.

    python -m benchmarks.gpu [--model klein-4b klein-9b] [--px 1024] [--minutes 9.5] [--peers DIR]

Models have their released size and random weights; the adapter is the family's own. One command, under ten
minutes; each case is written to benchmarks/results/gpu_<device>.json as it ends, so that an interrupted run
keeps what it has. Of each model:

    resident     all blocks on the card, memory not capped: the floor, and T_f and T_b of the bounds
    ours         at shares of the blocks' bytes (slots included), in bf16 and int8, with and without recomputation
    plan         what the plan chooses for cards of 8, 12, 16 GB, with the process capped to that: peak and seconds
                 against what it predicted
    the others   diffusers' group offload, and the engines of musubi-tuner, OneTrainer and ai-toolkit from
                 checkouts in DIR (peers.py), with the same bytes of the card for weights

bound: max(T_f, V/B) + max(T_b, V/B), V what must be loaded in a pass, B the link as measured here;
order bound: with the time in which no load can begin at the turns (benchmarks/cpu/swap_schedule.py).
Without CUDA the schedule is run on a simulated link instead, and that is said; `--device cpu --model tiny`
checks this script alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.cpu import swap_schedule
from benchmarks.gpu.engines import ENGINES, CannotDo, Held, Job, ours
from benchmarks.gpu.models import MODELS, Stepper, Subject, subject
from benchmarks.gpu.peers import peers
from benchmarks.paired import environment

from whitetuner.errors import UserError
from whitetuner.memory.machine import CONTEXT_BYTES, GIB, Machine, this_machine, typical_machine
from whitetuner.memory.plan import make_plan
from whitetuner.memory.swap.layout import slot_bytes

RESULTS = Path(__file__).parents[1] / "results"
BASES = ("bf16", "int8")
CARDS_GB = (8, 12, 16)
#: What an engine can answer to a case that it cannot do; each becomes a row that says so.
_ANSWERS = (
    CannotDo,
    UserError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    ImportError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True)
class Case:
    """share: of the blocks' bytes that may be on the card;  card_gb: the plan decides, within this."""

    engine: str
    base: str = "bf16"
    share: float = 1.0
    recompute: bool = True
    card_gb: int | None = None


def cases(others: list[str]) -> Iterator[Case]:
    """The most telling first: a run that has no time for all leaves the last ones out."""
    yield Case("resident")
    for share in (0.0, 0.5):
        yield Case("ours", share=share)
    for card in CARDS_GB:
        yield Case("plan", card_gb=card)
    for name in others:
        yield Case(name, share=0.5)
    yield Case("resident", recompute=False)
    for share in (0.0, 0.25, 0.5, 0.75):
        yield Case("ours", share=share, recompute=False)
    yield Case("resident", "int8")
    yield Case("ours", "int8", 0.0)
    for share in (0.25, 0.75):
        yield Case("ours", share=share)
    for name in others:
        yield Case(name, share=0.25)


class Bench:
    """The cases of one model. link: bytes/s, None where there is none (a CPU)."""

    def __init__(
        self, subject: Subject, engines: dict[str, Callable[[Job], Held]], machine: Machine | None, steps: int
    ) -> None:
        self.subject, self.engines, self.machine, self.steps = subject, engines, machine, steps
        self.device = subject.device
        self.cuda = self.device.type == "cuda"

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def run(self, case: Case) -> dict[str, Any]:
        """Never raises what an engine answers; the row then says `failed`."""
        row: dict[str, Any] = {"model": self.subject.name, **asdict(case)}
        try:
            row |= self._plan(case) if case.engine == "plan" else self._engine(case)
        except _ANSWERS as error:
            row["failed"] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            )
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        return row

    def _engine(self, case: Case) -> dict[str, Any]:
        sizes = self.subject.weights[case.base].blocks
        room = max(int(case.share * sum(sizes)), 2 * slot_bytes(sizes))
        job = Job(self.subject.build(case.base), self.subject.lists, self.device, sizes, room, case.recompute)
        return {"room_bytes": room, **self._measure(job, self.engines[case.engine])}

    def _plan(self, case: Case) -> dict[str, Any]:
        assert case.card_gb is not None
        machine = self.machine or typical_machine(case.card_gb, 64)
        machine = Machine(**{**asdict(machine), "vram_bytes": case.card_gb * GIB})
        best = make_plan(self.subject.weights, self.subject.cost, machine).best
        sizes = self.subject.weights[best.base].blocks
        job = Job(self.subject.build(best.base), self.subject.lists, self.device, sizes, 0, True)
        job.residents, job.slots = frozenset(best.residents), best.slots
        job.plain = frozenset(best.plain)
        if self.cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            allowed = (case.card_gb * GIB - CONTEXT_BYTES) / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed), self.device)
        row = {
            "base": best.base,
            "plan": best.sentence(),
            "planned_peak_bytes": best.peak_bytes,
            "planned_s": best.seconds,
            **self._measure(job, ours if best.streamed else self.engines["resident"]),
        }
        if self.cuda:
            row["peak_over_plan"] = row["peak_bytes"] / best.peak_bytes
            row["step_over_plan"] = row["step_s"] / best.seconds
        return row

    def _measure(self, job: Job, engine: Callable[[Job], Held]) -> dict[str, Any]:
        if self.cuda:
            torch.cuda.empty_cache()  # what building left behind is not the engine's
            torch.cuda.reset_peak_memory_stats(self.device)
        start = self.now()
        held = engine(job)
        row: dict[str, Any] = {"setup_s": self.now() - start, "weight_bytes": held.weight_bytes, **held.facts}
        try:
            row |= self._steps(Stepper(self.subject, held.module), held)
        finally:
            held.release()
        if self.cuda:
            row["peak_bytes"] = torch.cuda.max_memory_reserved(self.device) + CONTEXT_BYTES
        return row

    def _steps(self, stepper: Stepper, held: Held) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(stepper.trained(), lr=0.0)
        whole: list[float] = []
        halves: list[tuple[float, float]] = []
        losses: list[float] = []
        gradients: list[float] = []

        def step(parted: bool) -> None:
            held.before_step()
            start = self.now()
            loss = stepper.forward()
            middle = self.now() if parted else 0.0
            loss.backward()
            end = self.now()
            if parted:
                halves.append((middle - start, end - middle))
            else:
                whole.append(end - start)
            squares = [p.grad.double().square().sum() for p in stepper.trained() if p.grad is not None]
            gradients.append(float(torch.stack(squares).sum()) ** 0.5)
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step(False)
        held.counters()
        whole.clear()
        for _ in range(self.steps):
            step(False)
        moved = {name: count / self.steps for name, count in held.counters().items()}
        for _ in range(3):
            step(True)
        return {
            "step_s": median(whole),
            "step_s_slowest": max(whole),
            "forward_s": median(half[0] for half in halves),
            "backward_s": median(half[1] for half in halves),
            "loss": losses[0],
            "gradient_norm": gradients[0],
            "steps_alike": len(set(losses)) == len(set(gradients)) == 1,
            **moved,
        }


def compare(rows: list[dict[str, Any]], sizes: dict[str, tuple[int, ...]], link: float | None) -> None:
    """Adds to each row its ratios to the resident step and to the bounds, and to ours at the same memory."""
    done = [row for row in rows if "step_s" in row]
    floors = {(r["base"], r["recompute"]): r for r in done if r["engine"] == "resident"}
    mine = {(r["base"], r["recompute"], r["share"]): r for r in done if r["engine"] == "ours"}
    for row in done:
        floor = floors.get((row["base"], row["recompute"]))
        if floor is None or row["engine"] == "plan":
            continue
        row["over_resident"] = row["step_s"] / floor["step_s"]
        for figure in ("loss", "gradient_norm"):
            row[f"{figure}_differs"] = abs(row[figure] - floor[figure]) / abs(floor[figure])
        same = mine.get((row["base"], row["recompute"], row["share"]))
        if same is not None and row["engine"] not in ("ours", "resident"):
            row["over_ours"] = row["step_s"] / same["step_s"]
        if link is not None and "room_bytes" in row:
            blocks = sizes[row["base"]]
            seconds = max(0, sum(blocks) - row["room_bytes"]) / link
            outer = (blocks[0] + blocks[-1]) / sum(blocks) if seconds else 0.0
            times = (floor["forward_s"], floor["backward_s"])
            row["over_bound"] = row["step_s"] / sum(max(t, seconds) for t in times)
            row["over_order_bound"] = row["step_s"] / sum(max(t, seconds + outer * t) for t in times)


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures the engine is held to; None where nothing measured it."""
    mine = [row for row in rows if row["engine"] == "ours"]
    return {
        "worst_over_bound": max((r["over_bound"] for r in mine if "over_bound" in r), default=None),
        "worst_over_order_bound": max(
            (r["over_order_bound"] for r in mine if "over_order_bound" in r), default=None
        ),
        "best_other_over_ours": min((r["over_ours"] for r in rows if "over_ours" in r), default=None),
        "worst_peak_over_plan": max(
            (r["peak_over_plan"] for r in rows if "peak_over_plan" in r), default=None
        ),
        "failed": [f"{r['model']} {r['engine']}: {r['failed']}" for r in rows if "failed" in r],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["klein-4b", "klein-9b"])
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="no case begins when it would end after this"
    )
    parser.add_argument(
        "--peers", type=Path, help="folder with checkouts of musubi-tuner, OneTrainer, ai-toolkit"
    )
    parser.add_argument("--device", help="cuda, or cpu to try the script out with --model tiny")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device is None and not torch.cuda.is_available():
        print(
            "no CUDA device: nothing is measured; the engine's schedule runs on a simulated link instead",
            flush=True,
        )
        swap_schedule.main(["--out", str(arguments.out)] if arguments.out else [])
        return
    began = time.perf_counter()
    device = torch.device(arguments.device or "cuda")
    cuda = device.type == "cuda"
    machine = this_machine(device) if cuda else None
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    others = {} if arguments.peers is None else peers(arguments.peers)
    engines = {**ENGINES, **others}
    out = arguments.out or RESULTS / f"gpu_{name.replace(' ', '_').lower()}.json"
    result: dict[str, Any] = {
        "environment": environment("torch", "diffusers"),
        "device": name,
        "link_bytes_per_s": machine and machine.link_bytes_per_s,
        "px": arguments.px,
        "rows": [],
    }
    longest = 0.0
    for number, model in enumerate(arguments.model, 1):
        until = 60 * arguments.minutes * number / len(arguments.model)
        with subject(model, arguments.px, device, BASES) as one:
            bench = Bench(one, engines, machine, arguments.steps)
            sizes = {base: weights.blocks for base, weights in one.weights.items()}
            rows: list[dict[str, Any]] = []
            for case in cases([engine for engine in engines if engine not in ("resident", "ours")]):
                if time.perf_counter() - began + longest > until:
                    result.setdefault("left_out", []).append({"model": model, **asdict(case)})
                    continue
                start = time.perf_counter()
                row = bench.run(case)
                longest = max(longest, time.perf_counter() - start)
                rows.append(row)
                compare(rows, sizes, machine and machine.link_bytes_per_s)
                shown = [*result["rows"], *rows]
                told = {**result, "rows": shown, "verdict": verdict(shown)}
                out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
                print(json.dumps({k: v for k, v in row.items() if k not in ("pinned", "plan")}), flush=True)
        result["rows"] += rows
    print(json.dumps(verdict(result["rows"]), indent=1))


if __name__ == "__main__":
    main()
