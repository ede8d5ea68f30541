"""A run that is ended by signals at random moments until it is done, and what must hold after every one of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ground import Facts, Ground, forked, left_overs, whole_checkpoints

from whitetuner import cli
from whitetuner.errors import EXIT_STOPPED
from whitetuner.runs import events

#: One in four is asked to stop, the others are ended from outside.
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGINT)


@dataclass
class Tally:
    """kills: that hit a living process; doing: what it did then; lost: checkpoints that were there before and not after,
    or were not whole; unlike: runs whose result was another one than that of the run left alone."""

    kills: int = 0
    runs: int = 0
    doing: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)


def start(config: Path, resume: bool, cold: bool) -> int:
    """The pid of a training process: forked from this one, or a new interpreter."""
    words = ["train", str(config), *(["--resume", "latest"] if resume else [])]
    told = config.with_suffix(".txt")
    if not cold:
        return forked(lambda: cli.main(words), told)
    with told.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "whitetuner", *words], stdout=file, stderr=file, stdin=subprocess.DEVNULL
        )
    child.returncode = 0  # it is waited for by its number
    return child.pid


def attack(
    ground: Ground, whole: Facts, name: str, kills: int, seed: int, within_s: float, cold: bool, tally: Tally
) -> None:
    """Up to so many signals into one run, each within so many seconds of a start; then it is left to end, and compared."""
    chance, config, run = random.Random(seed), ground.config(name), ground.run(name)
    before: dict[str, str] = {}
    resume = False
    for _ in range(kills):
        sent = chance.choice(SIGNALS)
        pid = start(config, resume, cold)
        time.sleep(chance.uniform(0.0, within_s))
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.kill(pid, sent)
            _, status = os.waitpid(pid, 0)
            tally.kills += 1
            tally.doing[doing(run)] += 1
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -sent, EXIT_STOPPED):
            tally.unlike.append(
                f"{name}: exit code {code}: {config.with_suffix('.txt').read_text(encoding='utf-8')[-300:]}"
            )
            return
        now = whole_checkpoints(run)
        if newest(now) < newest(before) or any(now.get(one, was) != was for one, was in before.items()):
            tally.lost.append(f"{name}: {sorted(before)} became {sorted(now)}")
        before, resume = now, (run / "run.json").exists()
        if code == 0:
            break
    else:
        _, status = os.waitpid(start(config, resume, cold), 0)
        code = os.waitstatus_to_exitcode(status)
    tally.runs += 1
    if code or ground.facts(name) != whole or left_overs(run):
        tally.unlike.append(f"{name}: exit code {code}, left over {left_overs(run)}")
    else:
        ground.forget(name)


def newest(saved: dict[str, str]) -> int:
    return max((int(name.rpartition("-")[2]) for name in saved), default=-1)


def doing(run: Path) -> str:
    """What the run said last; half a checkpoint on the disk says more."""
    for left in (run / "checkpoints").glob(".checkpoint-*"):
        return f"save ({left.suffix[1:]})"
    found, _ = events.read(run / "events.jsonl")
    if not found:
        return "start"
    last = found[-1]
    return f"phase {last.name}" if isinstance(last, events.Phase) else last.kind
