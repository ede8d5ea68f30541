"""The best checkpoint of a run: measured, kept, shown, gone on from, drawn with and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny_runs import tiny_place
from whitetuner import recipe
from whitetuner.cli import main
from whitetuner.config.load import load_config
from whitetuner.drawing import sample
from whitetuner.errors import UserError
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.forking import fork
from whitetuner.gui.run_reader import Reader
from whitetuner.runs import events
from whitetuner.runs.best import HELD_OUT_LOSS, POINTER, measured
from whitetuner.runs.folder import RunFolder
from whitetuner.tiny import tiny_values


def run_with(folder: Path, **more: Any) -> Path:
    values = {
        **tiny_values("flux2-klein", folder / "model", folder / "data", folder / "out"),
        "run.steps": 8,
        "save.every": 1,
        "save.keep": 2,
        "validation.every": 2,
        "validation.share": 0.4,
        "optimizer.ema": 0.5,
        **more,
    }
    return recipe.run(load_config(None, base=values)).folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("best")
    tiny_place(made, 5)
    return made


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Its rate is so high that the loss rises: the best is no late one."""
    return run_with(folder, **{"run.name": "whole", "optimizer.lr": 3.0, "optimizer.max_grad_norm": 0.0})


def steps_there(run: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").glob("checkpoint-*"))


def least(run: Path) -> tuple[float, int]:
    """(loss, step) of the least validation loss among the even steps, each of which was saved."""
    happened = events.read(run / "events.jsonl")[0]
    return min((e.loss, e.step) for e in happened if isinstance(e, events.Validation) and e.step)


def test_the_best_stays_and_events_report_and_page_agree(whole: Path) -> None:
    loss, step = least(whole)
    assert step < 7, "the loss was meant to rise"
    assert steps_there(whole) == [step, 7, 8]
    pointer = json.loads((whole / "checkpoints" / POINTER).read_text(encoding="utf-8"))
    assert pointer == {"step": step, "path": f"checkpoint-{step}", HELD_OUT_LOSS: loss}
    reader = Reader(RunFolder(whole))
    reader.look()
    assert reader.best() == step
    assert f"best checkpoint, held-out loss {loss:.4f}" in (whole / "report.html").read_text(encoding="utf-8")
    assert (
        json.loads((whole / "checkpoints/checkpoint-7/training_state.json").read_text())[HELD_OUT_LOSS]
        is None
    )


def test_a_run_goes_on_from_its_best_and_so_does_a_fork(folder: Path, whole: Path) -> None:
    _, step = least(whole)
    made, _ = fork(whole, "best", ["run.name=forked", "run.steps=9"])
    origin = RunFolder(folder / "out" / "forked").document()["forked_from"]
    assert origin["step"] == step and recipe.run(made, resume="latest").step == 9
    again = run_with(folder, **{"run.name": "again", "optimizer.lr": 3.0, "optimizer.max_grad_norm": 0.0})
    before, weights = losses(again), digest(checkpoint(again, 8))
    recipe.run(load_config(again / "config.toml"), resume="best")
    happened = events.read(again / "events.jsonl")[0]
    assert any(e.resumed_from == step for e in happened if isinstance(e, events.RunStarted))
    assert losses(again) == before and digest(checkpoint(again, 8)) == weights


def test_the_best_is_drawn_with_and_exported_as_it_was_measured(whole: Path, tmp_path: Path) -> None:
    """With a running average that is the average: the same picture as with a file made of it, another than with the factors."""
    _, step = least(whole)
    kept = whole / "checkpoints" / f"checkpoint-{step}"
    out = tmp_path / "best.safetensors"
    assert main(["export", str(whole), str(out), "--to", "diffusers", "--checkpoint", "best"]) == 0
    raw, averages = (
        load_file(kept / "lokr" / "lokr.safetensors"),
        load_file(kept / "accelerate_state" / "ema.safetensors"),
    )
    names = json.loads((kept / "accelerate_state" / "ema.json").read_text(encoding="utf-8"))["names"]
    written = load_file(out)
    assert len(names) == len(averages) and set(averages) == {str(n) for n in range(len(names))}
    mine = {name.rpartition("transformer.")[2]: tensor for name, tensor in written.items()}
    for number, name in enumerate(names):
        assert torch.equal(mine[name], averages[str(number)]) and name in raw
    assert any(not torch.equal(mine[name], raw[name]) for name in names)
    how: dict[str, Any] = {"prompt": "picture 1", "steps": 2}
    drawn = sample(str(whole), checkpoint="best", out=tmp_path / "a.png", **how).read_bytes()
    assert sample(str(whole), adapter=out, out=tmp_path / "b.png", **how).read_bytes() == drawn
    final = sample(str(whole), out=tmp_path / "c.png", **how).read_bytes()
    assert drawn != final == sample(str(whole), checkpoint=8, out=tmp_path / "d.png", **how).read_bytes()


def test_without_held_out_pictures_there_is_no_best(folder: Path, tmp_path: Path) -> None:
    run = run_with(folder, **{"run.name": "none", "run.steps": 2, "validation.share": 0.0})
    assert measured(run / "checkpoints", RunFolder(run).document()["run_id"]) == []
    assert not (run / "checkpoints" / POINTER).exists()
    with pytest.raises(UserError, match=r"held-out.*\n.*validation\.share"):
        recipe.run(load_config(run / "config.toml", ["run.steps=3"]), resume="best")
    with pytest.raises(UserError, match="none is the best"):
        fork(run, "best", [])
    with pytest.raises(UserError, match="none is the best"):
        sample(str(run), checkpoint="best", out=tmp_path / "x.png")
    with pytest.raises(UserError, match="no run's folder"):
        sample("builtin:nano", checkpoint="best", out=tmp_path / "x.png")


def test_a_stop_right_after_a_resume_does_not_forget_what_was_measured(folder: Path) -> None:
    run = run_with(folder, **{"run.name": "stopped", "run.steps": 2})
    loss = measured(run / "checkpoints", RunFolder(run).document()["run_id"])[0]
    with recipe.Session.open(load_config(run / "config.toml", ["run.steps=4"]), resume="latest") as session:
        session.prepare()
        session.save()
    assert measured(run / "checkpoints", RunFolder(run).document()["run_id"])[0] == loss
