"""Memory, files and the time of a step stay as they are, however long a run is; a night of sleep does not move the ETA."""

from __future__ import annotations

from pathlib import Path

import pytest
from ground import Ground
from long_run import grown

from whitetuner.runs import events
from whitetuner.runs.console import Console


@pytest.mark.slow
def test_nothing_grows_with_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 steps: `python tests/chaos long`. A kilobyte lost in a step would be a megabyte here."""
    monkeypatch.setenv("WHITETUNER_STATE", str(tmp_path / "state"))
    found = grown(Ground(tmp_path, "adapters", pictures=4, steps=9), "long", steps=1200, looks=100)
    assert found.memory_mb < 4 and found.page_mb < 4, found
    assert found.bytes_per_step < 700 and found.step_ratio < 2, found


def test_a_night_of_sleep_in_one_step_does_not_move_the_eta(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(steps=200, plain=True)
    for number in range(1, 100):
        seconds = 30_000.0 if number == 90 else 0.5
        step = events.StepDone(step=number, loss=1.0, lr=1e-4, grad_norm=1.0, seconds=seconds, samples=2)
        console.last_line = -1e9
        console(step)
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 99/200  ETA 0:50 ")
