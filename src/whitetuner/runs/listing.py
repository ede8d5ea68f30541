"""The runs of this machine as rows: what `whitetuner jobs` prints and the page's list shows."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from whitetuner.errors import UserError
from whitetuner.runs import jobs
from whitetuner.runs.events import StepDone, last_of
from whitetuner.runs.folder import RunFolder


def rows() -> list[dict[str, Any]]:
    """id, name, run, state, step, steps, family, task, method, devices, asked_at, place (in the queue); the newest first."""
    places = {job.id: place for place, job in enumerate(jobs.queue(), 1)}
    return [row_of(job, places.get(job.id)) for job in jobs.jobs()]


def row_of(job: jobs.Job, place: int | None = None) -> dict[str, Any]:
    """What lists of runs show of a job; place: its place among those that wait, from 1."""
    folder = RunFolder(Path(job.run))
    state = jobs.state_of(job)
    step, facts = _facts(folder.path, jobs.stamp_of(folder))
    return {
        "id": job.id,
        "name": Path(job.run).name,
        "run": job.run,
        "state": state,
        "step": step if state != "refused" else None,
        **facts,
        "family": facts["family"] or job.family,
        "task": facts["task"] or job.task,
        "devices": list(job.devices),
        "gpus": job.gpus,
        "asked_at": job.asked_at,
        "place": place,
        "error": job.error,
    }


@lru_cache(maxsize=2048)
def _facts(run: Path, stamp: tuple[int, ...]) -> tuple[int | None, dict[str, Any]]:
    """(last step, steps, family, task and method), read again when the run's files have changed."""
    folder = RunFolder(run)
    found: dict[str, Any] = {"steps": None, "family": "", "task": "", "method": ""}
    last = last_of(folder.events, (StepDone,))
    step = last.step if isinstance(last, StepDone) else None
    if not folder.is_run():
        return step, found
    try:
        document = folder.document()
    except (UserError, OSError):  # damaged, or gone this moment: the row says what is known
        return step, found
    config = document.get("config", {})
    model = config.get("model", {})
    found["steps"] = document.get("resolved", {}).get("steps") or config.get("run", {}).get("steps")
    found["family"], found["task"] = model.get("family", ""), model.get("task", "")
    found["method"] = config.get("method", {}).get("kind", "")
    return step, found


def as_text(found: list[dict[str, Any]]) -> str:
    """A line each, the newest last, where a terminal's reader looks."""
    if not found:
        return "no runs on this machine yet; `whitetuner init` writes a config, `whitetuner train` trains"
    lines = []
    for row in reversed(found):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["asked_at"]))
        state = f"waiting ({row['place']})" if row["place"] else row["state"]
        step = f"{row['step'] or 0}/{row['steps'] or '?'}"
        lines.append(f"{when}  {state:<12} {step:>13}  {row['run']}")
    return "\n".join(lines)
