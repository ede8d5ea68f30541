"""What the plan says for the released models on cards of 8 to 32 GB, from their shapes alone: no weights, no
GPU.

    python -m benchmarks.cpu.swap_plans [--out FILE.md]

Speeds are those assumed for a usual card of each size (memory/machine.py): predictions, not measurements.
The adapter is LoKr of rank 16 with the family's own targets. A family appears when its released shapes stand
in MODELS.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from benchmarks.paired import environment
from diffusers import Flux2Transformer2DModel
from torch import nn

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.memory.machine import typical_machine
from whitetuner.memory.measure import measure_step
from whitetuner.memory.plan import make_plan, weigh
from whitetuner.memory.quantize import quantize_linears

RESULT = Path(__file__).parents[1] / "results" / "swap_plans.json"
CARDS = (8, 12, 16, 24, 32)
BASES = ("bf16", "int8")


@dataclass(frozen=True)
class Model:
    """A released denoiser. step: (module, width in px) -> a function that gives the loss of one step."""

    family: str
    title: str
    make: Callable[[], nn.Module]
    step: Callable[[nn.Module, int], Callable[[], torch.Tensor]]
    sizes: tuple[int, ...] = (512, 768, 1024)


def _klein(double: int, single: int, heads: int, text: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return Flux2Transformer2DModel(
            in_channels=128,
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            joint_attention_dim=text,
            guidance_embeds=False,
        )

    return make


def _klein_step(module: nn.Module, px: int) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        tokens, bf16 = (px // 16) ** 2, torch.bfloat16
        out = module(
            hidden_states=torch.zeros(1, tokens, 128, dtype=bf16),
            encoder_hidden_states=torch.zeros(1, 512, module.config.joint_attention_dim, dtype=bf16),
            timestep=torch.tensor([0.5], dtype=bf16),
            img_ids=torch.zeros(tokens, 4),
            txt_ids=torch.zeros(512, 4),
            return_dict=False,
        )[0]
        return out.float().square().mean()

    return step


MODELS = (
    Model("flux2-klein", "FLUX.2 Klein 4B", _klein(5, 20, 24, 7680), _klein_step),
    Model("flux2-klein", "FLUX.2 Klein 9B", _klein(8, 24, 32, 12288), _klein_step),
)


def sketch(model: Model, base: str) -> nn.Module:
    spec = registry.spec(model.family)
    with torch.device("meta"):
        module = model.make()
    module.to(torch.bfloat16).requires_grad_(False)
    if base != "bf16":
        names = [name for name, _ in module.named_parameters()]
        quantize_linears(
            module, base, frozenset(n for n in names if any(fnmatchcase(n, p) for p in spec.keep_precise))
        )
    attach(
        module, choose(module, spec.adapter_targets), AdapterSettings("lokr", rank=16), seed=0, device="meta"
    )
    return module


def rows(model: Model) -> list[dict[str, Any]]:
    spec = registry.spec(model.family)
    lists = spec.parts(spec.options())[0].block_lists
    weights = {base: weigh(sketch(model, base), lists) for base in BASES}
    module = sketch(model, "bf16")
    found = []
    for px in model.sizes:
        cost = measure_step(module, lists, model.step(module, px))
        for vram in CARDS:
            row: dict[str, Any] = {"model": model.title, "px": px, "vram_gb": vram}
            try:
                plan = make_plan(weights, cost, typical_machine(vram, 64))
            except UserError as error:
                row["refused"] = str(error)
            else:
                row |= {"sentence": plan.best.sentence(), "best": plan.to_json()["choices"][0]}
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for model in MODELS for row in rows(model)]
    result = {
        "command": "python -m benchmarks.cpu.swap_plans",
        "environment": environment("torch", "diffusers"),
    }
    RESULT.write_text(
        json.dumps({**result, "predicted": True, "rows": found}, indent=1) + "\n", encoding="utf-8"
    )
    lines = ["| model | px | card | plan (predicted, 64 GB host) |", "|---|---|---|---|"]
    lines += [
        f"| {row['model']} | {row['px']} | {row['vram_gb']} GB | {row.get('sentence') or 'does not fit'} |"
        for row in found
    ]
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
