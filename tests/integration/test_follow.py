"""wandb and SwanLab beside a run: they get every point, and nothing they do stops, slows or changes it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import tiny_place
from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.errors import UserError
from whitetuner.evidence import checkpoint, digest
from whitetuner.runs import events, follow
from whitetuner.runs.scalars import scalars

#: A module in the library's place. What it is given it writes down; its first line says how it goes wrong.
STAND_IN = """
import json, pathlib, time
{harm}
class Run:
    def log(self, values, step): LINES.append([step, values])
    def finish(self): pathlib.Path({place!r}).write_text(json.dumps(LINES))
LINES = []
def Settings(**given): return given
def init(**given):
    assert given["mode"] == "offline" and given["project"] == "cats" and given["config"]["run"]["steps"] == 3
    return Run()
finish = Run().finish
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("follow")
    more = {"run.steps": 3, "validation.every": 2, "save.every": 3, "log.project": "cats"}
    return {**tiny_place(folder, 2), **more}


def train(base: dict[str, Any], name: str, **more: Any) -> Path:
    return recipe.run(load_config(None, base={**base, "run.name": name, **more})).folder


def library(name: str, folder: Path, harm: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a stand-in where this process and its children find it first; -> what it will have been given."""
    place = folder / "given.json"
    (folder / f"{name}.py").write_text(STAND_IN.format(harm=harm, place=str(place)), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return place


def messages(run: Path) -> list[str]:
    return [e.text for e in events.read(run / "events.jsonl")[0] if isinstance(e, events.Message)]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_every_point_arrives_in_its_order(
    base: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = library(name, tmp_path, "", monkeypatch)
    run = train(base, f"all-{name}", **{f"log.{name}": "offline"})
    points = [scalars(event) for event in events.read(run / "events.jsonl")[0]]
    assert json.loads(place.read_text()) == [list(point) for point in points if point is not None]
    assert not any(text.startswith(f"{name} ") for text in messages(run))


@pytest.mark.parametrize(
    "harm", ["raise RuntimeError('no network')", "import os; os._exit(3)", "time.sleep(100)"]
)
def test_what_fails_is_told_once_and_changes_no_bit(
    base: dict[str, Any], harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "END_S", 0.5 if "sleep" in harm else 60.0)
    library("wandb", tmp_path, harm, monkeypatch)
    name = f"harm-{abs(hash(harm))}"
    began = time.monotonic()
    run = train(base, name, **{"log.wandb": "offline"})
    assert time.monotonic() - began < 60
    assert len([text for text in messages(run) if text.startswith("wandb ")]) == 1
    plain = train(base, f"{name}-plain")
    assert digest(checkpoint(run, 3)) == digest(checkpoint(plain, 3))
    if "network" in harm:
        assert "no network" in (run / "logs" / "wandb.txt").read_text(encoding="utf-8")


def test_a_missing_library_and_a_missing_key_are_told_before_anything_is_made(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out = Path(base["run.output_dir"])
    monkeypatch.setattr(follow, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install swanlab"):
        train(base, "none", **{"log.swanlab": "offline"})
    monkeypatch.setenv(follow.PYTHON, "nowhere/python")
    with pytest.raises(UserError, match="which nowhere/python does not have"):
        train(base, "none", **{"log.wandb": "offline"})
    monkeypatch.undo()
    library("wandb", tmp_path, "", monkeypatch)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_API_KEY is not set"):
        train(base, "none", **{"log.wandb": "online"})
    assert not (out / "none").exists()
