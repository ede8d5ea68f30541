"""Host memory of ranks that share one arena: PSS of 4 ranks with 2 GB of swapped blocks, less that of the same ranks with one.

    python -m benchmarks.cpu.shared_arena [--ranks 4] [--gb 2] [--trained]

The real way: a FLUX.2 Klein transformer of that size with random weights on the disk, built by one rank and stood in for by
the others, fitted with all blocks swapped, one forward and backward each. PSS counts a page that n processes map as 1/n in
each, so the sum over the ranks counts it once (Linux, /proc/PID/smaps_rollup). It is taken with the blocks given back
(`make_room`): the slots stand for the card's memory. --trained: full training's, every block written once by every rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmarks.paired import environment

from whitetuner.families import registry
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build
from whitetuner.memory.fit import fit
from whitetuner.memory.swap.arena import Arena, Link, kind_for
from whitetuner.memory.swap.host import give_back
from whitetuner.runs.place import place_here
from whitetuner.tiny import tiny_options
from whitetuner.train.distributed import Ranks
from whitetuner.train.joining import joined

RESULT = Path(__file__).parents[1] / "results" / "shared_arena.json"
FAMILY = "flux2-klein"


def model(folder: Path, gb: float) -> None:
    """A folder whose single blocks take so many GB (0: one block, the same widths), weights in float32."""
    registry.make_tiny(FAMILY, str(folder))
    from diffusers import Flux2Transformer2DModel

    config = json.loads((folder / "transformer/config.json").read_text(encoding="utf-8"))
    config.update(num_attention_heads=32, num_single_layers=1)
    one = sum(
        p.numel() for p in _meta(Flux2Transformer2DModel, config).single_transformer_blocks.parameters()
    )
    config["num_single_layers"] = max(1, round(gb * 1e9 / 4 / one))
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    Flux2Transformer2DModel(**config).save_pretrained(folder / "transformer")


def _meta(cls: type, config: dict[str, object]) -> torch.nn.Module:
    with torch.device("meta"):
        return cls(**{key: value for key, value in config.items() if not key.startswith("_")})  # type: ignore[no-any-return]


def link(ranks: Ranks, name: str) -> Link:
    return Link(
        ranks.first,
        ranks.world - 1,
        lambda key, text: ranks.say(f"{name}/{key}", text),
        lambda key: ranks.said(f"{name}/{key}", 0),
        lambda key: [ranks.said(f"{name}/{key}", rank) for rank in range(ranks.world)],
    )


def rank(folder: Path, trained: bool) -> None:
    """One rank: builds, fits, computes once and says its PSS."""
    torch.set_num_threads(1)
    with joined(place_here(), torch.device("cpu")) as ranks:
        kind, why = kind_for(link(ranks, "probe"), 0)
        assert kind, why
        family = registry.load(
            FAMILY, registry.spec(FAMILY).options(**tiny_options(FAMILY)), ModelPaths(folder)
        )
        part = family.spec.parts(family.options)[0]
        hosted = tuple(f"{name}.*" for name in part.block_lists)
        module = family.load(Build(host=hosted, host_absent=not ranks.first))[part.name]
        arena = Arena(link(ranks, "arena"), kind)
        module.requires_grad_(trained)
        fitted = fit(module, part.block_lists, "cpu", residents=(), arena=arena, trained=trained)
        block = module.single_transformer_blocks[0]
        assert fitted.engine is not None
        for index, layout in enumerate(fitted.engine.layouts) if trained else ():
            with torch.no_grad(), fitted.engine.on_device(index):
                for entry in layout.entries:
                    entry.tensor.data.add_(1)
                fitted.engine.settle()
                ranks.meet()  # where training would hear of all ranks' gradients
                fitted.engine.written(index)
        with fitted.engine.weights_of(block):
            seen = float(next(iter(block.parameters())).detach().float().sum())
        fitted.make_room()
        give_back()
        ranks.meet()
        rows = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        pss = next(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))
        told = ranks.told([pss, arena.bytes_mapped, seen])
        if ranks.first:
            assert len({one[2] for one in told}) == 1, "ranks see other weights"
            print(json.dumps({"pss": [one[0] for one in told], "arena": arena.bytes_mapped, "kind": kind}))
        ranks.meet()


def measured(folder: Path, ranks: int, trained: bool) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.cpu.shared_arena", "--rank", str(folder)]
                + ["--trained"] * trained,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                    "RANK": str(number),
                    "WORLD_SIZE": str(ranks),
                    "WHITETUNER_RENDEZVOUS": f"{meeting}/port",
                },
                stdout=subprocess.PIPE if number == 0 else subprocess.DEVNULL,
            )
            for number in range(ranks)
        ]
        told = processes[0].communicate()[0]
        assert all(process.wait() == 0 for process in processes)
        return json.loads(told.decode().splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank(given.rank, given.trained)
        return
    with tempfile.TemporaryDirectory() as place:
        full, empty = Path(place) / "full", Path(place) / "empty"
        model(full, given.gb)
        model(empty, 0)
        with_arena, without = (measured(one, given.ranks, given.trained) for one in (full, empty))
    arena = int(str(with_arena["arena"])) - int(str(without["arena"]))
    extra = sum(with_arena["pss"]) - sum(without["pss"])  # type: ignore[call-overload]
    found = {
        "ranks": given.ranks,
        "arena_bytes": arena,
        "pss_with": with_arena["pss"],
        "pss_without": without["pss"],
        "extra_bytes": extra,
        "extra_over_arena": extra / arena,
        "kind": with_arena["kind"],
        "trained": given.trained,
        "environment": environment("torch", "diffusers"),
    }
    print(json.dumps(found, indent=1))
    result = RESULT.with_stem("shared_arena_trained") if given.trained else RESULT
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
