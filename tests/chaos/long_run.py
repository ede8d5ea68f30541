"""A run of many steps: what grows with them."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from ground import Ground, say
from starlette.testclient import TestClient

from whitetuner.gui.app import make_app
from whitetuner.gui.settings import Settings
from whitetuner.runs import events, jobs

#: Steps until allocators and caches have settled.
SETTLED = 200


@dataclass(frozen=True)
class Grown:
    """memory_mb of the trainer: between the first and the last tenth of the steps after those that settle; bytes_per_step of
    events.jsonl; step_ratio: the last tenth's median time of a step over the first's; page_mb: of the page, over `looks`."""

    steps: int
    memory_mb: float
    bytes_per_step: float
    step_ratio: float
    page_mb: float
    looks: int


def grown(ground: Ground, name: str, steps: int, looks: int = 200) -> Grown:
    """Trains so many steps, with saves, validation and TensorBoard, then looks at the run through the page again and again."""
    every = max(1, steps // 10)
    more = {"run.steps": steps, "save.every": every, "save.keep": 1, "validation.every": every}
    said = say("train", ground.config(name, **more, **{"log.tensorboard": True, "log.console_every": 1000}))
    assert said.code == 0, said.text
    run = ground.run(name)
    found, size = events.read(run / "events.jsonl")
    done = [event for event in found if isinstance(event, events.StepDone)][SETTLED:]
    tenth = len(done) // 10
    first, last = done[:tenth], done[-tenth:]
    return Grown(
        steps=steps,
        memory_mb=median(e.memory_mb for e in last) - median(e.memory_mb for e in first),
        bytes_per_step=size / steps,
        step_ratio=median(e.seconds for e in last) / median(e.seconds for e in first),
        page_mb=_page(run, looks),
        looks=looks,
    )


def _page(run: Path, looks: int) -> float:
    job = jobs.read(jobs.id_of(run.resolve()))
    assert job is not None
    page = TestClient(make_app(Settings()), base_url="http://127.0.0.1:7860")

    def look(times: int) -> float:
        for _ in range(times):
            assert page.get(f"/api/runs/{job.id}").status_code == 200
            assert page.get("/api/runs").status_code == 200
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20

    before = look(20)
    return look(looks) - before
