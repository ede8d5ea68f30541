"""A run that is killed at random moments, again and again, ends as one that was left alone: bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ground import KINDS, Ground
from kills import Tally, attack

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="children are forked from a process that has torch loaded"
)

#: Forty steps, saved at every second one: most kills hit a step or a save.
OFTEN = {"save.every": 2, "save.keep": 2, "validation.every": 10}


def killed(folder: Path, kind: str, kills: int, rounds: int, seed: int) -> Tally:
    ground = Ground(folder, kind, pictures=12, steps=40, **OFTEN)
    whole, tally = ground.whole(), Tally()
    for number in range(rounds):
        attack(ground, whole, f"killed-{number}", kills, seed + number, 1.1, False, tally)
    assert not tally.lost and not tally.unlike
    assert tally.kills >= rounds, tally
    return tally


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    killed(tmp_path, "adapters", kills=3, rounds=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_kills_change_nothing(tmp_path: Path, kind: str) -> None:
    tally = killed(tmp_path, kind, kills=5, rounds=4, seed=100)
    assert len(tally.doing) >= 2, tally.doing
