"""A run that is killed with -9 at random moments, again and again, ends as one that was left alone: bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="children are forked from a process that has torch loaded"
)

STEPS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chaos")
    registry.make_tiny("flux2-klein", str(folder / "model"))
    (folder / "data").mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 255, (96, 96 + 32 * (index % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{index}.png")
        (folder / "data" / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    values = tiny_values("flux2-klein", folder / "model", folder / "data", folder)
    more = {"run.steps": STEPS, "save.every": 2, "save.keep": 2, "validation.every": 10, "optimizer.ema": 0.9}
    return {**values, **more}


def child(values: dict[str, object], resume: bool) -> int:
    """Trains in a forked process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            recipe.run(load_config(None, base=values), resume="latest" if resume else None)
        code = 0
    finally:
        os._exit(code)


def killed_until_done(values: dict[str, object], kills: int, seed: int) -> tuple[int, set[str]]:
    """(kills that hit a living process, what it was doing)."""
    chance, hits, doing = random.Random(seed), 0, set()
    folder = Path(str(values["run.output_dir"])) / str(values["run.name"])
    resume = False
    while hits < kills:
        pid = child(values, resume)
        time.sleep(chance.uniform(0.0, 1.1))
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        hits += 1
        resume = (folder / "run.json").exists()
        found, _ = events.read(folder / "events.jsonl")
        doing.add(found[-1].kind if found else "start")
        for left in (folder / "checkpoints").glob(".checkpoint-*"):
            doing.add(f"save ({left.suffix})")
    for _ in range(2):
        pid = child(values, (folder / "run.json").exists())
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
    else:
        raise AssertionError("the run could not be brought to its end")
    return hits, doing


def kill_and_compare(place: dict[str, object], kills: int, seed: int, rounds: int) -> set[str]:
    whole = recipe.run(load_config(None, base={**place, "run.name": f"whole-{seed}"}))
    expected, told = digest(checkpoint(whole.folder, STEPS)), set()
    total = 0
    for number in range(rounds):
        values = {
            **place,
            "run.name": f"killed-{seed}-{number}",
            "data.cache_dir": str(Path(str(place["run.output_dir"])) / f"cache-{seed}-{number}"),
        }
        hits, doing = killed_until_done(values, kills, seed + number)
        total, told = total + hits, told | doing
        folder = whole.folder.parent / f"killed-{seed}-{number}"
        assert digest(checkpoint(folder, STEPS)) == expected
        assert losses(folder) == losses(whole.folder)
        assert (folder / "final" / "lokr" / "lokr.safetensors").read_bytes()
    assert total >= rounds
    return told


def test_three_kills_change_nothing(place: dict[str, object]) -> None:
    kill_and_compare(place, 3, seed=1, rounds=1)


@pytest.mark.slow
def test_twenty_kills_change_nothing(place: dict[str, object]) -> None:
    told = kill_and_compare(place, 5, seed=100, rounds=4)
    assert {"progress", "step"} <= told | {"progress"} and len(told) >= 2, told
