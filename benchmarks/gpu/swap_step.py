"""Time and memory of a training step with swapped blocks, against the resident model and the link's bound.

    python -m benchmarks.gpu.swap_step [--model klein-4b|klein-9b|tiny] [--px 1024] [--minutes 9]

Blocks have their released size and random weights; the adapter is LoKr of rank 16. For every residency, base
and choice of recomputation: median seconds of a step, over the resident step and over the bound
max(T_f, V/B) + max(T_b, V/B) with B and T measured here; peak memory and loads. diffusers' group offload with
streams is the other engine. Cases run in one process, each on a fresh model; memory is not capped but
reported. Results: benchmarks/results/swap_step_<device>_<model>_<px>.json, written after each case, so that
an interrupted run keeps what it has. `--device cpu --model tiny` checks the script alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.paired import environment
from diffusers import Flux2Transformer2DModel
from torch import nn

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.families import registry
from whitetuner.memory.quantize import quantize_linears
from whitetuner.memory.recompute import checkpoint_blocks
from whitetuner.memory.swap.device import DeviceBackend
from whitetuner.memory.swap.engine import SwapEngine

RESULTS = Path(__file__).parents[1] / "results"
LISTS = ("transformer_blocks", "single_transformer_blocks")
SHAPES: dict[str, dict[str, Any]] = {
    "klein-4b": {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
    },
    "klein-9b": {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    },
    "tiny": {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "joint_attention_dim": 64,
        "axes_dims_rope": (8, 8, 8, 8),
    },
}


@dataclass(frozen=True)
class Case:
    engine: str
    base: str = "bf16"
    resident_share: float = 1.0
    recompute: bool = True
    slots: int = 2


def cases() -> Iterator[Case]:
    for base in ("bf16", "int8"):
        for recompute in (True, False):
            yield Case("resident", base, recompute=recompute)
            for share in (0.0, 0.5):
                yield Case("ours", base, share, recompute)
    yield Case("ours", "bf16", 0.0, True, slots=3)
    yield Case("diffusers group offload", "bf16", 0.0, True)


class Bench:
    def __init__(self, shape: str, px: int, device: torch.device) -> None:
        self.shape, self.px, self.device = shape, px, device
        self.dtype = torch.bfloat16

    def model(self, base: str, device: torch.device) -> nn.Module:
        """Blocks filled one by one, so that no second copy of the model exists."""
        spec = registry.spec("flux2-klein")
        with torch.device("meta"):
            model = Flux2Transformer2DModel(in_channels=128, guidance_embeds=False, **SHAPES[self.shape])
        model.to(self.dtype).requires_grad_(False)
        kept = {n for n, _ in model.named_parameters() if any(fnmatchcase(n, p) for p in spec.keep_precise)}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    value = torch.empty(parameter.shape, dtype=self.dtype, device=device).normal_(std=0.02)
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
        if base != "bf16":
            quantize_linears(model, base, frozenset(kept))  # type: ignore[arg-type]
        attach(
            model,
            choose(model, spec.adapter_targets),
            AdapterSettings("lokr", rank=16),
            seed=0,
            device=self.device,
        )
        return model

    def step(self, model: nn.Module, marks: list[float] | None = None) -> None:
        """Forward and backward; `marks` gets the seconds of both."""
        tokens = (self.px // 16) ** 2
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        start = self.now()
        out = model(
            hidden_states=draw(1, tokens, 128),
            encoder_hidden_states=draw(1, 512, SHAPES[self.shape]["joint_attention_dim"]),
            timestep=torch.tensor([0.5], device=self.device, dtype=self.dtype),
            img_ids=torch.zeros(tokens, 4, device=self.device),
            txt_ids=torch.zeros(512, 4, device=self.device),
            return_dict=False,
        )[0]
        loss = out.float().square().mean()
        if marks is not None:
            marks.append(self.now() - start)
            start = self.now()
        loss.backward()
        if marks is not None:
            marks.append(self.now() - start)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def prepare(bench: Bench, case: Case) -> tuple[nn.Module, SwapEngine | None]:
    """The model with the case's engine on it."""
    if case.engine == "resident":
        model = bench.model(case.base, bench.device)
        checkpoint_blocks(model, LISTS, "all" if case.recompute else "none")
        return model, None
    model = bench.model(case.base, torch.device("cpu"))
    if case.engine == "ours":
        checkpoint_blocks(model, LISTS, "all" if case.recompute else "none")
        count = sum(len(model.get_submodule(name)) for name in LISTS)
        engine = SwapEngine(
            model, LISTS, round(count * case.resident_share), DeviceBackend(bench.device), slots=case.slots
        )
        return model, engine.attach()
    if case.engine == "diffusers group offload":
        model.enable_gradient_checkpointing()
        model.enable_group_offload(
            bench.device,
            torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
        return model, None
    raise ValueError(f"no engine is called {case.engine}")


def measure(bench: Bench, case: Case, steps: int) -> dict[str, Any]:
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    start = bench.now()
    model, engine = prepare(bench, case)
    row: dict[str, Any] = {**asdict(case), "setup_s": bench.now() - start}
    for _ in range(3):
        bench.step(model)
    if engine is not None:
        engine.step_end()
    whole, halves = [], []
    for _ in range(steps):
        start = bench.now()
        bench.step(model)
        whole.append(bench.now() - start)
    if engine is not None:
        counters = engine.step_end()
        row |= {
            "loads": counters.loads / steps,
            "bytes_up": counters.bytes_up / steps,
            "demanded": counters.demanded / steps,
            "copies_back": counters.copies_back,
            "device_bytes": engine.placement.device_bytes,
            "pinned": engine.pinned,
        }
    for _ in range(3):
        marks: list[float] = []
        bench.step(model, marks)
        halves.append(marks)
    row |= {
        "step_s": median(whole),
        "step_s_slowest": max(whole),
        "forward_s": median(m[0] for m in halves),
        "backward_s": median(m[1] for m in halves),
    }
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_reserved(bench.device)
    if engine is not None:
        engine.detach()
    return row


def compare(rows: list[dict[str, Any]], link: float) -> None:
    """Adds to each row its ratio to the resident step and to the bound, of the same base and
    recomputation.
    """
    resident = {(r["base"], r["recompute"]): r for r in rows if r["engine"] == "resident" and "step_s" in r}
    for row in rows:
        floor = resident.get((row["base"], row["recompute"]))
        if floor is None or "step_s" not in row:
            continue
        row["over_resident"] = row["step_s"] / floor["step_s"]
        if "bytes_up" in row:
            per_pass = row["bytes_up"] / 2 / link
            bound = max(floor["forward_s"], per_pass) + max(floor["backward_s"], per_pass)
            row["over_bound"] = row["step_s"] / bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="klein-4b")
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins after this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    device = torch.device(arguments.device)
    bench = Bench(arguments.model, arguments.px, device)
    link = DeviceBackend(device).link_bytes_per_s() if device.type == "cuda" else 1e9
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    out = (
        arguments.out
        or RESULTS / f"swap_step_{name.replace(' ', '_').lower()}_{arguments.model}_{arguments.px}.json"
    )
    result: dict[str, Any] = {
        "environment": environment("torch", "diffusers"),
        "device": name,
        "link_bytes_per_s": link,
        "model": arguments.model,
        "px": arguments.px,
        "rows": [],
    }
    for case in cases():
        if time.perf_counter() - began > 60 * arguments.minutes:
            result["stopped_at_s"] = time.perf_counter() - began
            break
        try:
            row = measure(bench, case, arguments.steps)
        except (RuntimeError, ValueError, TypeError, ImportError, AttributeError) as error:
            # an engine that cannot do this case is a result of the comparison
            row = {**asdict(case), "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        result["rows"].append(row)
        compare(result["rows"], link)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({k: row[k] for k in row if k not in ("pinned",)}), flush=True)


if __name__ == "__main__":
    main()
