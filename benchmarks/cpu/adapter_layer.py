"""What an adapter costs: forward and backward of one layer at real width, and what is kept in between.

A frozen 3072 x 3072 bf16 layer over 1024 tokens (a block linear of FLUX.2 Klein 4B at 512 px, text included), LoKr of factor
8 with rank 16 and with a full second factor. Against the layer alone, lycoris-lora's default forward and PEFT's LoKr, their
parameters in bf16 (their fastest), ours float32 as always in training. Gradients go to x and to all factors.

    python -m benchmarks.cpu.adapter_layer [--pairs 40]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.paired import environment, paired
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig, get_peft_model
from torch import Tensor, nn

from whitetuner.adapters.deltas import Attached, initial_delta
from whitetuner.adapters.shapes import AdapterSettings

WIDTH, TOKENS, FACTOR, RANK = 3072, 1024, 8, 16
RESULT = Path(__file__).parents[1] / "results" / "adapter_layer.json"
SHAPES = {
    "rank 16": AdapterSettings("lokr", rank=RANK, factor=FACTOR),
    "full": AdapterSettings("lokr", factor=FACTOR, full_matrix=True),
}


def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH, bias=False).to(torch.bfloat16).requires_grad_(False)


def ours(settings: AdapterSettings) -> nn.Module:
    delta = initial_delta(settings, WIDTH, WIDTH, torch.Generator().manual_seed(0))
    return Attached(base(), _away_from_zero(delta))


def lycoris(settings: AdapterSettings) -> Callable[[Tensor], Tensor]:
    layer = base()
    module = LokrModule(
        "layer",
        layer,
        lora_dim=RANK,
        alpha=RANK,
        factor=FACTOR,
        full_matrix=settings.full_matrix,
        bypass_mode=False,
    )
    return _away_from_zero(module.to(torch.bfloat16))


def peft(settings: AdapterSettings) -> nn.Module:
    # PEFT has no switch for a full second factor: a rank of half its size asks for one
    rank = WIDTH // FACTOR if settings.full_matrix else RANK
    config = LoKrConfig(
        r=rank, alpha=rank, decompose_factor=FACTOR, init_weights="lycoris", target_modules=["0"]
    )
    model = get_peft_model(nn.Sequential(base()), config).to(torch.bfloat16)
    return _away_from_zero(model.base_model.model[0])


def _away_from_zero(module: nn.Module) -> nn.Module:
    """At the start one factor is zero, and zeros multiply no slower, but no run stays there."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return module


def step(layer: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(torch.bfloat16).requires_grad_()
    gradient = torch.randn(TOKENS, WIDTH, generator=generator).to(torch.bfloat16)
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []

    def run() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        layer(x).backward(gradient)

    return run


def kept_bytes(layer: Callable[[Tensor], Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward, besides x, the frozen weight and the parameters themselves."""
    x = torch.randn(TOKENS, WIDTH).to(torch.bfloat16).requires_grad_()
    own = (
        {p.untyped_storage().data_ptr() for p in layer.parameters()}
        if isinstance(layer, nn.Module)
        else set()
    )
    own |= {x.untyped_storage().data_ptr()}
    if isinstance(layer, LokrModule):
        own |= {p.untyped_storage().data_ptr() for p in layer.org_module[0].parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad  # alive until here, so that no address was used twice
    return sum(kept.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    memory: dict[str, int] = {}
    for name, settings in SHAPES.items():
        mine, theirs, third = ours(settings), lycoris(settings), peft(settings)
        rows[f"{name}: ours / plain"] = paired(step(mine), step(base()), pairs)
        rows[f"{name}: lycoris / ours"] = paired(step(theirs), step(mine), pairs)
        rows[f"{name}: peft / ours"] = paired(step(third), step(mine), pairs)
        memory |= {
            f"{name}: {who}": kept_bytes(it)
            for who, it in (("ours", mine), ("lycoris", theirs), ("peft", third))
        }
    least = min(memory["rank 16: lycoris"], memory["rank 16: peft"])
    targets = {
        "rank 16: ours / plain": (rows["rank 16: ours / plain"]["median_ratio"], "<=", 1.35),
        "full: ours / plain": (rows["full: ours / plain"]["median_ratio"], "<=", 1.6),
        "rank 16: lycoris / ours": (rows["rank 16: lycoris / ours"]["median_ratio"], ">=", 1.8),
        "full: lycoris / ours": (rows["full: lycoris / ours"]["median_ratio"], ">=", 1.8),
        "rank 16: kept by them / by ours": (least / memory["rank 16: ours"], ">=", 20.0),
    }
    met = {
        name: found <= bound if sign == "<=" else found >= bound
        for name, (found, sign, bound) in targets.items()
    }
    for name, row in rows.items():
        print(f"{name:<26} {row['median_ratio']:.2f}  [{row['low']:.2f}, {row['high']:.2f}]")
    for name, size in memory.items():
        print(f"{name:<26} {size / 2**20:.2f} MiB kept")
    for name, (found, sign, bound) in targets.items():
        print(f"{'met' if met[name] else 'MISSED':<8}{name}: {found:.2f} {sign} {bound}")
    result = {
        **environment("torch", "lycoris-lora", "peft"),
        "layer": f"{WIDTH}x{WIDTH} bf16, {TOKENS} tokens, LoKr factor {FACTOR}; forward and backward",
        "ratios": rows,
        "kept_bytes": memory,
        "targets": {n: {"found": f, "wanted": f"{s} {b}", "met": met[n]} for n, (f, s, b) in targets.items()},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
