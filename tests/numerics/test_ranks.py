"""E7: several ranks learn what one process learns from the same samples, to the bit where the sums have one order."""

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

from whitetuner import recipe
from whitetuner.adapters.attach import attach
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.between import shared_previews
from whitetuner.config.load import load_config
from whitetuner.data.samples import make_testdata
from whitetuner.errors import UserError
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.memory.swap.arena import Arena, Link, kind_for
from whitetuner.runs import events
from whitetuner.tiny import tiny_values
from whitetuner.train.distributed import Ranks
from whitetuner.train.whole import WholeLearner

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
        learner = session.team.learners[0]
        if isinstance(learner, WholeLearner):
            return digest(dict(learner.values()))
        return digest({str(i): p for i, p in enumerate(learner.parameters)})


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


def gradients_of(rank: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Of a rank, of sizes that do not divide evenly; the last parameter is used by the odd ranks alone, one by none."""
    generator = torch.Generator().manual_seed(rank)
    found = [torch.randn(size, generator=generator).to(dtype) for size in ((7, 3), (1,), (5,))]
    return [*found, None, torch.ones(2, dtype=dtype) if rank % 2 else None]


def summed(ranks: Ranks) -> list[list[torch.Tensor | None]]:
    told = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mine = gradients_of(ranks.rank, dtype)
        shapes = [one.shape for one in gradients_of(1, dtype) if one is not None]
        parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
        parameters.insert(3, torch.nn.Parameter(torch.zeros(4, dtype=dtype)))
        for parameter, gradient in zip(parameters, mine, strict=True):
            parameter.grad = gradient
        ranks.sum_gradients(parameters)
        told.append([one.grad for one in parameters])
    return told


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gradients_are_added_in_the_order_of_the_ranks(tmp_path: Path, world: int) -> None:
    told = forked_ranks.together(world, summed, tmp_path)
    for number, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16)):
        wanted: list[torch.Tensor | None] = [None] * 5
        for rank in range(world):
            for index, one in enumerate(gradients_of(rank, dtype)):
                if one is not None:
                    wide = one.to(torch.promote_types(dtype, torch.float32))
                    before = wanted[index]
                    wanted[index] = wide if before is None else before + wide
        for of_rank in told:
            for found, expected in zip(of_rank[number], wanted, strict=True):
                assert (found is None) == (expected is None)
                assert found is None or torch.equal(found, expected.to(dtype))


def of_a_big_batch(dtype: torch.dtype, rows: slice, ranks: Ranks | None = None) -> torch.Tensor:
    """The gradient of an adapter from these rows of 8, divided by all 8."""
    torch.manual_seed(0)
    holder = torch.nn.ModuleDict({"layer": torch.nn.Linear(24, 36, dtype=dtype)})
    adapter = attach(holder, ["layer"], AdapterSettings("lokr", rank=2, factor=4), seed=0)
    for delta in adapter.deltas.values():
        delta.to(dtype)
    parameters = list(adapter.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_()
    x = torch.randn(8, 24, dtype=dtype)[rows]
    (holder["layer"](x).square().mean(1).sum() / 8).backward()
    if ranks is not None:
        ranks.sum_gradients(parameters)
    return torch.cat([one.grad.flatten() for one in parameters if one.grad is not None])


def shares_of_a_big_batch(ranks: Ranks) -> list[torch.Tensor]:
    rows = slice(0, 5) if ranks.rank == 0 else slice(5, 8)  # uneven
    return [of_a_big_batch(dtype, rows, ranks) for dtype in (torch.float64, torch.float32)]


def test_uneven_shares_are_the_big_batch_within_rounding(tmp_path: Path) -> None:
    for found in forked_ranks.together(2, shares_of_a_big_batch, tmp_path):
        for one, dtype, bound in zip(found, (torch.float64, torch.float32), (1e-12, 1e-5), strict=True):
            whole = of_a_big_batch(dtype, slice(0, 8))
            assert (one - whole).norm() / whole.norm() < bound


def test_two_ranks_are_two_accumulated_batches_to_the_bit(place: dict[str, Any]) -> None:
    """With swap and recompute on the ranks and without both on the one process."""
    more = {"memory.blocks_to_swap": 3, "memory.gradient_checkpointing": True}
    both = run({**place, **more, "run.name": "two"}, 2)
    assert same(both, alone(place, "one", optimizer__gradient_accumulation=2))


def shared_drawing(ranks: Ranks) -> tuple[list[events.Event], list[tuple[int, int]]]:
    """Rank 1 of three cannot draw; each of the others draws every second of five scenes."""
    asked: list[tuple[int, int]] = []

    def draw(share: tuple[int, int]) -> list[events.Event]:
        asked.append(share)
        numbers = range(share[0], 5, share[1])
        files, prompts = [f"samples/{one:02d}.png" for one in numbers], [f"scene {one}" for one in numbers]
        told: list[events.Event] = [events.Message(level="info", text=f"by {ranks.rank}")]
        return [*told, events.Preview(step=4, files=files, prompts=prompts, seconds=1.0 + ranks.rank)]

    return shared_previews(ranks, 4, ranks.rank != 1, draw), asked


def test_previews_are_shared_by_the_ranks_that_can_draw(tmp_path: Path) -> None:
    first, second, third = forked_ranks.together(3, shared_drawing, tmp_path)
    assert [one[1] for one in (first, second, third)] == [[(0, 2)], [], [(1, 2)]]
    assert second[0] == third[0] == []
    *said, drawn = first[0]
    assert [one.text for one in said] == ["by 0", "by 2"] and drawn.seconds == 3.0
    assert drawn.files == [f"samples/{one:02d}.png" for one in range(5)]
    assert drawn.prompts == [f"scene {one}" for one in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lokr", "full"])
def test_pictures_drawn_by_two_ranks_are_those_of_one(place: dict[str, Any], kind: str) -> None:
    base = whole(place) if kind == "full" else place
    scenes = [{"text": f"picture {number}", "size": [64, 64], "steps": 2} for number in range(3)]
    values = {**base, "preview.every": 2, "preview.prompts": scenes, "memory.blocks_to_swap": 2}
    both = run({**values, "run.name": f"drawn-by-two-{kind}"}, 2)
    one = alone(values, f"drawn-by-one-{kind}", optimizer__gradient_accumulation=2)
    pictures = [
        [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in sorted(folder.rglob("0*.png"))]
        for folder in (both, one)
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 9  # before the first step, after 2 and 4
    told = [
        [found for found in events.read(folder / "events.jsonl")[0] if isinstance(found, events.Preview)]
        for folder in (both, one)
    ]
    assert [(x.step, x.files, x.prompts) for x in told[0]] == [(x.step, x.files, x.prompts) for x in told[1]]


def whole(place: dict[str, Any]) -> dict[str, Any]:
    more = {
        "method.kind": "full",
        "optimizer.lr": 1e-3,
        "optimizer.max_grad_norm": 0.5,
        "validation.every": 0,
    }
    return {**place, **more}


@pytest.mark.parametrize("ema", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("away", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_full_training_on_two_ranks_is_two_accumulated_batches_to_the_bit(
    place: dict[str, Any], ema: float, away: int
) -> None:
    """Gradients are added up block by block in the backward pass; swapped blocks have one copy on the host for both ranks,
    which both write, but for a running average, which takes the weights' place on one of them.
    """
    values = {**whole(place), "optimizer.ema": ema}
    name = f"whole-two-{ema}-{away}"
    several = run({**values, "memory.blocks_to_swap": away, "run.name": name}, 2)
    assert same(several, alone(values, f"{name}-one", optimizer__gradient_accumulation=2))
    found, _ = events.read(several / "events.jsonl")
    told = [one.text for one in found if isinstance(one, events.Message)]
    assert any("one copy of them for the 2 ranks" in text for text in told) == (not ema), told


@pytest.mark.slow
def test_full_training_with_uneven_passes(place: dict[str, Any]) -> None:
    """Three batches a step, begun by three ranks and gone on with by two: one of them has two, the other one."""
    values = {**whole(place), "run.name": "whole-three"}
    folder = run({**values, "run.steps": 2}, 3)
    run(values, 2, "latest")
    one = alone(whole(place), "whole-of-three", optimizer__gradient_accumulation=3)
    for found, wanted in zip(losses(folder), losses(one), strict=True):
        assert found[2] == wanted[2] and found[3] == pytest.approx(wanted[3], rel=1e-4)
    with pytest.raises(AssertionError, match="at most 3 ranks"):
        run({**values, "run.steps": 6}, 4, "latest")


def test_a_run_goes_on_with_other_numbers_of_ranks(place: dict[str, Any]) -> None:
    """E8: 2 -> 1 -> 4 ranks: the samples, their order, noise levels to the bit; losses within 1e-4, to the bit for 2 -> 1."""
    values = {**place, "run.name": "changing", "save.every": 2}
    folder = run({**values, "run.steps": 2}, 2)
    run({**values, "run.steps": 4}, 1, "latest")
    one = alone(place, "unchanged", optimizer__gradient_accumulation=2, run__steps=6)
    assert digest(checkpoint(folder, 4)) == digest(checkpoint(one, 4))
    run({**values, "run.steps": 6}, 4, "latest")
    for found, wanted in zip(losses(folder), losses(one), strict=True):
        assert found[0] == wanted[0] and found[2] == wanted[2]
        assert found[3] == pytest.approx(wanted[3], rel=1e-4)
    assert [row[:2] for row in losses(folder)[:4]] == [row[:2] for row in losses(one)[:4]]


def lost_in_the_middle(values: dict[str, Any], ranks: Ranks) -> None:
    """Rank 1 is killed after the fifth step."""
    with recipe.Session.open(load_config(None, base=values), ranks=ranks) as session:
        session.prepare()
        session.advance(5)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        session.run()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_by_name_and_a_resume_is_as_if_nothing_happened(
    place: dict[str, Any], tmp_path: Path
) -> None:
    values = {**place, "run.name": "lost", "run.steps": 8}
    began = time.monotonic()
    pids = forked_ranks.start(2, partial(lost_in_the_middle, values), tmp_path)
    codes = forked_ranks.ended(pids)
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - began < 60
    folder = Path(values["run.output_dir"]) / "lost"
    found, _ = events.read(folder / "events.jsonl")
    assert isinstance(found[-1], events.Failed) and f"rank 1 (cpu, process {pids[1]}" in found[-1].reason
    run(values, 2, "latest")
    whole = alone(place, "not-lost", optimizer__gradient_accumulation=2, run__steps=8)
    assert digest(checkpoint(folder, 8)) == digest(checkpoint(whole, 8)) and losses(folder) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world"), [*((name, 2) for name in registry.FAMILIES), (next(iter(registry.FAMILIES)), 4)]
)
def test_every_family_learns_the_same_on_ranks(place: dict[str, Any], name: str, world: int) -> None:
    """With swap and accumulation, against a process that accumulates all of it."""
    folder = Path(place["run.output_dir"]) / f"{name}-{world}"
    data, what = Path(place["data.images"]), ()
    if registry.spec(name).frames:
        data, what = folder / "data", ("t2v", "t2v-2.1")
        make_testdata("video", data, 3, 0)
    registry.make_tiny(name, str(folder / "model"), *what[1:])
    own = {
        **tiny_values(name, folder / "model", data, folder, *what),
        **{key: place[key] for key in ("save.every", "preview.every", "validation.every", "log.tensorboard")},
        "run.steps": STEPS,
        "data.batch_size": 1,
        "memory.blocks_to_swap": 1,
        "optimizer.gradient_accumulation": 4 // world,
    }
    several = run({**own, "run.name": "several"}, world)
    one = alone(own, "one", optimizer__gradient_accumulation=4)
    for found, wanted in zip(losses(several), losses(one), strict=True):
        assert found[2] == wanted[2] and found[3] == pytest.approx(wanted[3], rel=1e-4, abs=1e-5)


def arena_of(ranks: Ranks, world: int, room: int, kinds: list[str] | None = None) -> Any:
    if kinds is not None and "memfd" not in kinds:
        del os.memfd_create  # as on systems without it, or where processes do not see each other
    link = Link(
        ranks.first,
        world - 1,
        lambda key, text: ranks.say(f"a/{key}", text),
        lambda key: ranks.said(f"a/{key}", 0),
        lambda key: [ranks.said(f"a/{key}", rank) for rank in range(world)],
    )
    kind, why = kind_for(link, 1 << 20, lambda: room)
    if not kind:
        return why
    arena = Arena(link, kind)
    masters = arena.masters([4096, 0, 256])
    if ranks.first:
        for number, one in enumerate(masters):
            one.fill_(number + 1)
    arena.filled()
    left = list(Path("/dev/shm").glob("whitetuner-*")) if kind == "file" and ranks.first else []
    return kind, [one.tolist() for one in masters], left


@pytest.mark.parametrize("kinds", [["memfd"], ["file"]])
def test_what_one_rank_writes_all_read(tmp_path: Path, kinds: list[str]) -> None:
    told = forked_ranks.together(3, partial(arena_of, world=3, room=1 << 30, kinds=kinds), tmp_path)
    assert told == [(kinds[0], [[1] * 4096, [], [3] * 256], [])] * 3  # and nothing is left in /dev/shm


def test_a_small_dev_shm_is_said(tmp_path: Path) -> None:
    told = forked_ranks.together(2, partial(arena_of, world=2, room=1 << 10, kinds=["file"]), tmp_path)
    assert told[0] == told[1] and "GB free, the model needs" in told[0]


def not_finite(values: dict[str, Any], ranks: Ranks) -> str:
    """Rank 1's model has a broken weight from the third step on."""
    try:
        with recipe.Session.open(load_config(None, base=values), ranks=ranks) as session:
            session.prepare()
            session.advance(2)
            if ranks.rank == 1:
                module = session.team.learners[0].module
                next(iter(module.parameters())).data.view(-1)[0] = float("nan")
            session.run()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lokr", "full"])
def test_a_loss_that_is_not_finite_ends_all_ranks(place: dict[str, Any], tmp_path: Path, kind: str) -> None:
    base = whole(place) if kind == "full" else place
    values = {**base, "run.steps": 20, "save.every": 0, "run.name": f"broken-{kind}"}
    told = forked_ranks.together(2, partial(not_finite, values), tmp_path)
    assert all("finite" in one for one in told), told
    if kind == "lokr":  # in full training every rank finds the sum of a block's gradients broken
        assert told[0].startswith("rank 1: ") and told[0].removeprefix("rank 1: ") == told[1]
