"""WAN 2.2 with both experts, killed with -9 in the turns of either and resumed: every file, loss and turn as if it had been left
alone, with the experts in memory or on disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.data.samples import make_testdata
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "fork"), reason="children are forked from a process that has torch loaded"
    ),
]

#: Turns of three steps: high 1-3, low 4-6, high 7-9, low 10-12; saved after every second one.
TURN, STEPS = 3, 12
#: Before anything is saved; in the middle of low's turn; right after the turn has changed; in a turn that was resumed.
KILLS = (1, 5, 7, 9)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chaos-video")
    registry.make_tiny("wan", str(folder / "model"), "i2v-2.2")
    make_testdata("video", folder / "data", 3, 0)
    values = tiny_values("wan", folder / "model", folder / "data", folder, "i2v")
    more = {
        "run.steps": STEPS,
        "save.every": 2,
        "validation.every": 4,
        "optimizer.ema": 0.9,
        "preview.every": 0,
    }
    return {**values, **more, "data.clips": "random"}


def killed_at(values: dict[str, object], step: int | None, resume: bool) -> int:
    """Exit code of a child that trains; negative: the signal it died of, sent to itself once this step was on disk."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), 1)

                def hear(event: events.Event) -> None:
                    if isinstance(event, events.StepDone) and event.step == step:
                        os.kill(os.getpid(), signal.SIGKILL)

                recipe.run(
                    load_config(None, base=values), resume="latest" if resume else None, listeners=(hear,)
                )
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_killed_in_the_turns_of_both_experts_and_resumed_is_never_interrupted(
    place: dict[str, object], on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whitetuner.train.team.TURN_STEPS", TURN)
    wait = {"memory.experts_on_disk": True} if on_disk else {}
    whole = recipe.run(load_config(None, base={**place, "run.name": f"whole-{on_disk}"}))
    values = {**place, **wait, "run.name": f"killed-{on_disk}"}
    folder = whole.folder.parent / f"killed-{on_disk}"
    for number, step in enumerate(KILLS):
        assert killed_at(values, step, resume=number > 0) == -signal.SIGKILL
        assert not [one for one in folder.iterdir() if one.name.startswith("tmp")], (
            "the shelf left a file behind"
        )
    assert killed_at(values, None, resume=True) == 0
    assert digest(checkpoint(folder, STEPS)) == digest(checkpoint(whole.folder, STEPS))
    assert losses(folder) == losses(whole.folder) and len(losses(folder)) >= STEPS
    names = [f"killed-{on_disk}_{part}_noise.safetensors" for part in ("high", "low")]
    high, low = (load_file(folder / "final" / name) for name in names)
    assert any(not torch.equal(high[name], low[name]) for name in high)
    for name, found in zip(("high", "low"), (high, low), strict=True):
        wanted = load_file(whole.folder / "final" / f"whole-{on_disk}_{name}_noise.safetensors")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
