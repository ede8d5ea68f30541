"""Ranks that each hold a share of the weights (FSDP2) learn what one process learns, and leave the same files."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import forked_ranks
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.errors import UserError
from whitetuner.evidence import losses
from whitetuner.families import registry
from whitetuner.rehearsal import rehearse
from whitetuner.resolve import open_family
from whitetuner.runs import events
from whitetuner.tiny import tiny_values
from whitetuner.train.distributed import Ranks
from whitetuner.train.learner import STATE

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="ranks are forked from a process that has torch loaded"
)
STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharded")
    registry.make_tiny("flux2-klein", str(folder / "model"))
    (folder / "data").mkdir()
    for index in range(7):  # of two sizes, an odd number of each: the ranks' shares of a step are uneven
        pixels = np.random.default_rng(index).integers(0, 255, (96, 96 + 32 * (index % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{index}.png")
        (folder / "data" / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    return {
        **tiny_values("flux2-klein", folder / "model", folder / "data", folder),
        "run.steps": STEPS,
        "save.every": 2,
        "data.batch_size": 2,
        "optimizer.ema": 0.9,
        "preview.every": 0,
        "validation.every": 2,
        "log.tensorboard": False,
    }


def trained(values: dict[str, Any], ranks: Ranks, resume: str | None = None) -> dict[str, tuple[int, int]]:
    """name -> numbers of a weight, and how many of them this rank holds."""
    with recipe.Session.open(load_config(None, base=values), resume=resume, ranks=ranks) as session:
        session.run()
        found = session.team.learners[0].module.named_parameters()
        return {
            name: (p.numel(), p.to_local().numel() if isinstance(p, DTensor) else p.numel())
            for name, p in found
        }


def run(values: dict[str, Any], world: int, resume: str | None = None) -> list[dict[str, tuple[int, int]]]:
    here = Path(values["run.output_dir"]) / f"ranks-{values['run.name']}-{resume}-{values['run.steps']}"
    return forked_ranks.together(world, partial(trained, values, resume=resume), here)


def folder_of(values: dict[str, Any]) -> Path:
    return Path(values["run.output_dir"]) / values["run.name"]


def alone(values: dict[str, Any], name: str, **more: Any) -> Path:
    base = {**values, "run.name": name, "optimizer.gradient_accumulation": 2, "memory.shard": False}
    return recipe.run(load_config(None, base={**base, **more})).folder


def assert_same_run(sharded: Path, one: Path, rel: float = 1e-5) -> None:
    """Losses and final files, within float32 rounding."""
    assert len(losses(one)) >= STEPS
    for found, wanted in zip(losses(sharded), losses(one), strict=True):
        assert found[0] == wanted[0] and found[2] == wanted[2]
        assert found[3] == pytest.approx(wanted[3], rel=rel)
    names = {path.relative_to(one / "final").as_posix() for path in (one / "final").rglob("*.safetensors")}
    assert names
    for name in names:
        other = name.replace(one.name, sharded.name)
        mine, wanted_file = load_file(sharded / "final" / other), load_file(one / "final" / name)
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
            k: (v.shape, v.dtype) for k, v in wanted_file.items()
        }
        for key, tensor in wanted_file.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_base_learns_what_one_process_learns(place: dict[str, Any]) -> None:
    """With recomputation, inputs on the host, validation and previews, in which all ranks take part."""
    values = {
        **place,
        "run.name": "sharded",
        "memory.shard": True,
        "memory.gradient_checkpointing": True,
        "memory.activation_offload": True,
        "preview.every": STEPS,
        "preview.prompts": [{"text": "a picture", "steps": 2}, {"text": "another", "steps": 2}],
    }
    for held in run(values, 2):
        base = {name: sizes for name, sizes in held.items() if ".delta." not in name}
        assert len(base) < len(held)
        assert all(mine == size for name, (size, mine) in held.items() if name not in base)
        total, mine = (sum(column) for column in zip(*base.values(), strict=True))
        assert 0.45 * total < mine < 0.55 * total
    one = alone(place, "one")
    assert_same_run(folder_of(values), one)
    told = [e for e in events.read(folder_of(values) / "events.jsonl")[0] if isinstance(e, events.Validation)]
    wanted = [e for e in events.read(one / "events.jsonl")[0] if isinstance(e, events.Validation)]
    assert [e.loss for e in told] == pytest.approx([e.loss for e in wanted], rel=1e-5) and len(told) == 3
    assert len(list((folder_of(values) / "samples").rglob("*.png"))) == 4


@pytest.mark.slow
def test_a_sharded_run_goes_on_sharded_and_not(place: dict[str, Any]) -> None:
    values = {**place, "run.name": "changing", "memory.shard": True}
    run({**values, "run.steps": 2}, 2)
    run({**values, "run.steps": 4}, 2, "latest")
    on_one = {**values, "run.steps": 6, "memory.shard": False}
    recipe.run(load_config(None, base=on_one), resume="latest")
    assert_same_run(folder_of(values), alone(place, "unchanged", **{"run.steps": 6}))
    with pytest.raises(AssertionError, match="all ranks make every pass together: this run has 2 batches"):
        run({**values, "run.steps": 8}, 3, "latest")


def whole(place: dict[str, Any]) -> dict[str, Any]:
    more = {
        "method.kind": "full",
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-3,
        "optimizer.max_grad_norm": 0.5,
    }
    return {**place, **more}


@pytest.mark.slow
def test_full_training_shares_out_weights_gradients_and_states(place: dict[str, Any]) -> None:
    """Interrupted in the middle; the files, the checkpoint's too, are those of one process."""
    values = {
        **whole(place),
        "run.name": "whole",
        "memory.shard": True,
        "memory.gradient_checkpointing": True,
    }
    run({**values, "run.steps": 2}, 2)
    for held in run(values, 2, "latest"):
        total, mine = (sum(column) for column in zip(*held.values(), strict=True))
        assert 0.45 * total < mine < 0.55 * total
    folder, one = folder_of(values), alone(whole(place), "whole-one")
    assert_same_run(folder, one)
    config = Path("final/transformer/config.json")
    assert (folder / config).read_bytes() == (one / config).read_bytes()
    for name in (f"{STATE}/optimizer", f"{STATE}/ema", "transformer/diffusion_pytorch_model"):
        file = f"checkpoints/checkpoint-{STEPS}/{name}.safetensors"
        mine, theirs = load_file(folder / file), load_file(one / file)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_sharded_full_training_with_masters_goes_on_with_one_process(place: dict[str, Any]) -> None:
    base = {**whole(place), "method.precision": "fp32_master", "optimizer.clip": "block"}
    values = {**base, "run.name": "masters", "memory.shard": True}
    run({**values, "run.steps": 2}, 2)
    recipe.run(load_config(None, base={**values, "memory.shard": False}), resume="latest")
    for found, wanted in zip(losses(folder_of(values)), losses(alone(base, "masters-one")), strict=True):
        assert found[2] == wanted[2] and found[3] == pytest.approx(wanted[3], rel=5e-3)  # bf16 is computed in


def ended_by(values: dict[str, Any], fault: str, ranks: Ranks) -> str:
    """Rank 1 gets a broken weight, or is killed, after the second step."""
    try:
        with recipe.Session.open(load_config(None, base=values), ranks=ranks) as session:
            session.prepare()
            session.advance(2)
            if ranks.rank == 1 and fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if ranks.rank == 1:
                session.team.learners[0].parameters[0].data.view(-1)[0] = float("nan")
            session.run()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lokr", "full"])
def test_a_loss_that_is_not_finite_ends_all_sharded_ranks(
    place: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    base = whole(place) if kind == "full" else place
    values = {**base, "run.name": f"broken-{kind}", "memory.shard": True, "save.every": 0}
    told = forked_ranks.together(2, partial(ended_by, values, "broken"), tmp_path)
    assert all("finite" in one for one in told), told
    blamed = 0 if kind == "full" else 1  # a broken share breaks the whole weight, on all ranks
    assert told[blamed - 1] == f"rank {blamed}: {told[blamed]}"


@pytest.mark.slow
def test_a_killed_rank_ends_a_sharded_run_by_name(place: dict[str, Any], tmp_path: Path) -> None:
    values = {**place, "run.name": "killed", "memory.shard": True}
    pids = forked_ranks.start(2, partial(ended_by, values, "killed"), tmp_path)
    began = time.monotonic()
    codes = forked_ranks.ended(pids)
    assert codes[1] == -signal.SIGKILL and time.monotonic() - began < 60
    found, _ = events.read(folder_of(values) / "events.jsonl")
    assert isinstance(found[-1], events.Failed) and f"rank 1 (cpu, process {pids[1]}" in found[-1].reason


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, r"this run has one.*--gpus 0,1"),
        ({"memory.blocks_to_swap": 2}, r"not both.*blocks_to_swap = \"auto\""),
        ({"memory.base": "int8"}, r"an? int8 base cannot be sharded.*memory\.base = \"bf16\""),
        ({"method.kind": "full", "optimizer.name": "adafactor"}, r"needs each weight as a whole.*\"adamw\""),
        ({"memory.compile": True}, r"torch\.compile was not tried"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything(
    tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    base = tiny_values("flux2-klein", tmp_path / "model", tmp_path / "data", tmp_path)
    values = {**base, "memory.shard": True, **more}
    with pytest.raises(UserError, match=f"(?s){said}"):
        recipe.run(load_config(None, base=values))
    assert not list(tmp_path.iterdir())


def test_two_experts_are_not_sharded(tmp_path: Path) -> None:
    registry.make_tiny("wan", str(tmp_path / "model"), "t2v-2.2")
    base = tiny_values("wan", tmp_path / "model", tmp_path / "data", tmp_path, "t2v")
    config = load_config(None, base={**base, "memory.shard": True}).config
    with pytest.raises(UserError, match="two experts that take turns cannot be sharded"):
        rehearse(config, open_family(config))
