"""`validation.every = "auto"` in a whole run: measured once, kept, and no bit of what is learned hangs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_runs import tiny_place
from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.runs import events
from whitetuner.runs.cadence import SEEN, SKIPPED, Pace, interval_of
from whitetuner.runs.folder import RunFolder
from whitetuner.validating import PACE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("auto")
    values = tiny_place(folder, 5)
    more = {"validation.share": 0.4, "data.caption_dropout": 0.3, "save.every": 5, "save.keep": 0}
    return {**values, **more}


def train(base: dict[str, Any], name: str, resume: str | None = None, **more: Any) -> Path:
    return recipe.run(load_config(None, base={**base, "run.name": name, **more}), resume=resume).folder


def validated(run: Path) -> list[int]:
    return [e.step for e in events.read(run / "events.jsonl")[0] if isinstance(e, events.Validation)]


def test_validating_changes_no_bit_of_what_is_learned(base: dict[str, Any]) -> None:
    runs = [train(base, f"every-{every}", **{"run.steps": 6, "validation.every": every}) for every in (0, 1)]
    assert validated(runs[0]) == [] and validated(runs[1]) == list(range(7))
    never, always = (digest(checkpoint(run, 6)) for run in runs)
    assert never == always and losses(runs[0]) == losses(runs[1])


def test_the_pace_is_kept_and_a_resumed_run_looks_at_the_same_steps(base: dict[str, Any]) -> None:
    """Stopped after the pace was known. The steps are those of the pace in run.json, before and after."""
    more = {"run.steps": 40, "validation.every": "auto"}
    run = train(base, "parts", **{**more, "run.steps": 15})
    assert validated(run) == [0, 15]
    pace = RunFolder(run).document()[PACE]
    assert pace["validation_s"] > 0 and pace["step_s"] > 0
    told = [e.text for e in events.read(run / "events.jsonl")[0] if isinstance(e, events.Message)]
    assert sum("validat" in text for text in told) == 1
    # As if validation had been measured at a fiftieth of a step: the interval is then 5, and every saved step is met.
    known = {"validation_s": 0.02, "step_s": 1.0}
    RunFolder(run).update(**{PACE: known})
    train(base, "parts", "latest", **more)
    assert RunFolder(run).document()[PACE] == known
    interval = interval_of(Pace(**known), 40, 5)
    assert validated(run) == [0, 15, *(step for step in range(16, 41) if step % interval == 0)]


def test_stopped_before_the_pace_is_known_it_is_told_from_all_steps(base: dict[str, Any]) -> None:
    more = {"validation.every": "auto"}
    run = train(base, "early", **more, **{"run.steps": 5})
    assert PACE not in RunFolder(run).document()
    train(base, "early", "latest", **more, **{"run.steps": SKIPPED + SEEN + 1})
    assert set(RunFolder(run).document()[PACE]) == {"validation_s", "step_s"}
    assert validated(run)[0] == 0 and validated(run).count(0) == 1
