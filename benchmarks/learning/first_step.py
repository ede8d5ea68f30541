"""How far one step of AdamW moves a layer's output, per unit of learning rate: what a rate of one kind is worth in another.

AdamW's first step moves every trained number by the rate, whichever way its gradient points. What the output of the layer then
changes by depends on how many numbers add up in it: for a LoRA on its rank, for a LoKr and for a whole matrix on the layer's
width. So a rate found for one kind on narrow layers (the laboratory's are 128 wide) is not the rate of that kind on wide ones
(FLUX.2 Klein 4B: 3072), and the ratio of two kinds' rates changes with the width, too. That a whole matrix's rate should fall
as its width grows is what Yang et al. 2022 derive (Tensor Programs V, arXiv 2203.03466, table 3).

    python -m benchmarks.learning.first_step

Layers are square. Inputs and gradients are normal numbers, of one token or 256: real ones lie between (tokens of a picture are
alike). Shown is the root mean square of the output's change over that of the input and over the rate; mean of three seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from benchmarks.paired import environment
from torch import Generator, Tensor, nn

from whitetuner.adapters.deltas import initial_delta
from whitetuner.adapters.shapes import AdapterSettings

RESULT = Path(__file__).parents[1] / "results/first_step.json"
WIDTHS, TOKENS, SEEDS = (128, 1024, 3072), (1, 256), (0, 1, 2)
RATE = 1e-4
KINDS: dict[str, AdapterSettings | None] = {
    "LoRA 4": AdapterSettings("lora", rank=4),
    "LoRA 16": AdapterSettings("lora", rank=16),
    "LoRA 64": AdapterSettings("lora", rank=64),
    "LoKr 4": AdapterSettings("lokr", factor=4, full_matrix=True),
    "LoKr 8": AdapterSettings("lokr", factor=8, full_matrix=True),
    "LoKr 16": AdapterSettings("lokr", factor=16, full_matrix=True),
    "whole matrix": None,
}


def moved(settings: AdapterSettings | None, width: int, tokens: int, seed: int) -> float:
    """Of one layer, one step and one seed."""
    generator = Generator().manual_seed(seed)
    x, gradient = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    still = torch.zeros(tokens, width)
    layer: nn.Module
    if settings is None:
        layer = nn.Linear(width, width, bias=False)
        nn.init.zeros_(layer.weight)

        def output() -> Tensor:
            return layer(x)
    else:
        layer = initial_delta(settings, width, width, generator)

        def output() -> Tensor:
            return layer(x, still)

    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=0.0)
    before = output()
    (before * gradient).sum().backward()
    optimizer.step()
    with torch.no_grad():
        change = output() - before
    return float(change.square().mean().sqrt() / x.square().mean().sqrt() / RATE)


def table() -> dict[str, Any]:
    """{kind: {"128 wide, 1 token": figure}}."""
    return {
        kind: {
            f"{width} wide, {tokens} {'token' if tokens == 1 else 'tokens'}": round(
                fmean(moved(settings, width, tokens, seed) for seed in SEEDS), 2
            )
            for width in WIDTHS
            for tokens in TOKENS
        }
        for kind, settings in KINDS.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    document = {
        "what": "rms of a layer's change after one step of AdamW, over the rms of its input and the rate; mean of three seeds",
        "moved": table(),
        "environment": {**environment("torch"), "command": "python -m benchmarks.learning.first_step"},
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document["moved"], indent=1))


if __name__ == "__main__":
    main()
