"""The page over its routes: a client of the whole application, runs as they lie in their folders, a state folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from whitetuner.gui.app import make_app
from whitetuner.gui.settings import Settings
from whitetuner.runs import events, jobs
from whitetuner.runs.folder import RunFolder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHITETUNER_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def client(**settings: Any) -> TestClient:
    return TestClient(make_app(Settings(**settings)), base_url="http://127.0.0.1:7860")  # type: ignore[arg-type]


def made(run: Path, *more: events.Event, config: dict[str, Any] | None = None) -> jobs.Job:
    """A run's folder and its line in the list, its process gone."""
    folder = RunFolder(run)
    folder.control.mkdir(parents=True)
    document = {
        "run": {"name": run.name, "steps": 10},
        "model": {"family": "flux2-klein", "task": "t2i"},
        "method": {"kind": "lokr"},
    }
    folder.begin("", config or document)
    for event in (events.RunStarted(name=run.name, steps=10), *more):
        folder.append(event)
    job = jobs.Job(
        run=str(run.resolve()), config="c.toml", cwd=str(run.parent), pid=2**22 + 1, born=0.0, asked_at=1.0
    )
    job.write()
    return job


def step(number: int, loss: float = 0.5) -> events.StepDone:
    return events.StepDone(
        step=number, loss=loss, lr=1e-4, grad_norm=1.0, seconds=0.5, samples=2, memory_mb=100
    )


def preview(run: Path, number: int, *places: str) -> events.Preview:
    return events.Preview(step=number, files=list(places), prompts=["a"] * len(places), seconds=0.1)
