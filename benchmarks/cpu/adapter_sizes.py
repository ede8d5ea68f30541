"""The default LoKr of every released model: which layers, how many parameters, how large a file. No weights, no GPU.

    python -m benchmarks.cpu.adapter_sizes [--out docs/adapter-sizes.md]

Models are built on the meta device from the released configs (each family's sketch.py); settings are the family's own.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from benchmarks.paired import environment

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.config.load import load_config
from whitetuner.families import registry
from whitetuner.memory.skeleton import sketch_module
from whitetuner.rehearsal import adapter_settings
from whitetuner.released import released

RESULT = Path(__file__).parents[1] / "results" / "adapter_sizes.json"


def row(name: str, variant: str) -> dict[str, Any]:
    spec = registry.spec(name)
    with tempfile.TemporaryDirectory() as folder:
        family, _ = released(name, variant, Path(folder))
        values = {"run.name": "sizes", "model.family": name, "model.path": folder, "method.kind": "lokr"}
        config = load_config(None, base={**values, "model.task": spec.tasks_of(variant)[0]}).config
        part = spec.parts(family.options)[0]
        module = family.load(
            lambda cls, where, **more: sketch_module(cls, where, dtype=torch.bfloat16, **more)
        )[part.name]
        paths = choose(module, list(spec.adapter_targets))
        settings = adapter_settings(config)
        adapter = attach(module, paths, settings, seed=0, device="meta")
        trained = sum(p.numel() for p in adapter.parameters())
        model = sum(p.numel() for p in module.parameters()) - trained
    names = Counter(re.sub(r"\.\d+\.", ".N.", path, count=1) for path in paths)
    return {
        "model": f"{spec.title} {variant}",
        "parameters": model,
        "layers": len(paths),
        "factor": settings.factor,
        "full_matrix": settings.full_matrix,
        "rank": settings.rank,
        "trained": trained,
        "file_mb_fp32": round(trained * 4 / 1e6, 1),
        "file_mb_bf16": round(trained * 2 / 1e6, 1),
        "names": dict(names.most_common()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# The default LoKr of every released model",
        "",
        "Built on the meta device from the released configs, at each family's own settings; no weights were read. Made by",
        "`python -m benchmarks.cpu.adapter_sizes --out docs/adapter-sizes.md`.",
        "",
        "| model | parameters | adapted layers | LoKr | trained | file fp32 | bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        kind = f"factor {one['factor']}, " + ("full W2" if one["full_matrix"] else f"rank {one['rank']}")
        lines.append(
            f"| {one['model']} | {one['parameters'] / 1e9:.2f} B | {one['layers']} | {kind} | "
            f"{one['trained'] / 1e6:.1f} M | {one['file_mb_fp32']:.0f} MB | {one['file_mb_bf16']:.0f} MB |"
        )
    lines += ["", "## Adapted layers", ""]
    alike: dict[str, list[str]] = {}
    for one in rows:
        names = ", ".join(f"`{name}` x {count}" for name, count in one["names"].items())
        alike.setdefault(names, []).append(one["model"])
    for names, models in alike.items():
        lines += [f"**{', '.join(models)}**: {names}", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(name, variant) for name in registry.FAMILIES for variant in registry.sketch(name).RELEASED]
    head = {
        "command": "python -m benchmarks.cpu.adapter_sizes",
        "environment": environment("torch", "diffusers"),
    }
    RESULT.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    text = table(rows)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
