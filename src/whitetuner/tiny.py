"""The config that trains a random tiny model of a family: for `demo FAMILY`, `init --tiny`, selftest and the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whitetuner.families import registry

#: Tiny models draw and train at this size.
TINY_SIZE_PX = 64
#: And videos of so many frames.
TINY_FRAMES = 5


def tiny_options(family: str) -> dict[str, Any]:
    """[model.options] that suit the tiny model."""
    return dict(registry.spec(family).tiny_options)


def tiny_values(
    family: str, model: Path, data: Path, output: Path, task: str = "t2i", variant: str = ""
) -> dict[str, Any]:
    """Dotted config values of a run over a tiny model and a small data set; seconds on a CPU.

    data: folder of pictures; of an edit task: with the folders target, condition_1 and condition_2, as `testdata` makes them,
    of which a variant that takes one picture is given the first
    """
    folders = [str(data / "condition_1"), str(data / "condition_2")]
    most = registry.spec(family).most_references.get(variant, len(folders))
    edit = {"data.target": str(data / "target"), "data.conditions": folders[:most]}
    film = {"data.videos": str(data), "data.num_frames": TINY_FRAMES}
    return {
        "run.name": f"tiny-{family}",
        "run.output_dir": str(output),
        "run.steps": 30,
        "model.family": family,
        "model.task": task,
        "model.path": str(model),
        **{f"model.options.{key}": value for key, value in tiny_options(family).items()},
        **(edit if task == "edit" else film if task in ("i2v", "t2v") else {"data.images": str(data)}),
        "data.resolution": TINY_SIZE_PX,
        "data.batch_size": 2,
        "data.caption_dropout": 0.1,
        "data.cache_dir": str(output / "cache"),
        "method.kind": "lokr",
        "method.factor": 4,
        "method.full_matrix": True,
        "optimizer.lr": 1e-2,
        "memory.device": "cpu",
        "save.every": 0,
        "preview.every": 0,
        "validation.every": 0,
        "log.tensorboard": False,
    }
