"""E7: several ranks learn what one process learns from the same samples, to the bit where the sums have one order."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import forked_ranks
import numpy as np
import pytest
import torch
from PIL import Image

from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.tiny import tiny_values
from whitetuner.train.distributed import Ranks

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="ranks are forked from a process that has torch loaded"
)
STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    registry.make_tiny("flux2-klein", str(folder / "model"))
    (folder / "data").mkdir()
    for index in range(7):  # of two sizes, an odd number of each: batches are uneven
        pixels = np.random.default_rng(index).integers(0, 255, (96, 96 + 32 * (index % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{index}.png")
        (folder / "data" / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    values = tiny_values("flux2-klein", folder / "model", folder / "data", folder)
    return {
        **values,
        "run.steps": STEPS,
        "save.every": 2,
        "data.batch_size": 2,
        "optimizer.ema": 0.9,
        "preview.every": 0,
        "validation.every": 2,
        "log.tensorboard": False,
    }


def trained(values: dict[str, Any], ranks: Ranks, resume: str | None = None) -> str:
    """A hash of what this rank has learned: its adapter, which rank 0 alone writes down."""
    with recipe.Session.open(load_config(None, base=values), resume=resume, ranks=ranks) as session:
        session.run()
        return digest({str(i): p for i, p in enumerate(session.team.learners[0].parameters)})


def run(values: dict[str, Any], world: int, resume: str | None = None) -> Path:
    """By so many ranks, whose weights must be the same bits in the end; returns the run's folder."""
    folder = Path(values["run.output_dir"]) / values["run.name"]
    here = folder.parent / f"ranks-{folder.name}-{world}-{resume}"
    hashes = forked_ranks.together(world, partial(trained, values, resume=resume), here)
    assert len(set(hashes)) == 1, f"replicas differ: {hashes}"
    return folder


def alone(values: dict[str, Any], name: str, **more: Any) -> Path:
    base = {**values, "run.name": name, **{key.replace("__", "."): value for key, value in more.items()}}
    return recipe.run(load_config(None, base=base)).folder


def same(one: Path, two: Path) -> bool:
    return digest(checkpoint(one, STEPS)) == digest(checkpoint(two, STEPS)) and losses(one) == losses(two)


def test_two_ranks_are_two_accumulated_batches_to_the_bit(place: dict[str, Any]) -> None:
    both = run({**place, "run.name": "two"}, 2)
    assert same(both, alone(place, "one", optimizer__gradient_accumulation=2))


def test_two_ranks_with_swap_and_recompute_are_those_without(place: dict[str, Any]) -> None:
    more = {"memory.blocks_to_swap": 3, "memory.gradient_checkpointing": True}
    swapped = run({**place, **more, "run.name": "two-swapped"}, 2)
    assert same(swapped, alone(place, "one-again", optimizer__gradient_accumulation=2))
