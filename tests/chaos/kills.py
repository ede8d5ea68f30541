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

import psutil
from ground import Facts, Ground, ended, forked, left_overs, start_ranks, whole_checkpoints

from whitetuner import cli
from whitetuner.errors import EXIT_STOPPED
from whitetuner.runs import events

#: One in four is asked to stop, the others are ended from outside.
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGINT)
#: For ranks to notice that nobody looks after them any more, and to save.
ORPHANS_S = 120


@dataclass
class Tally:
    """kills: that hit a living process; doing: what it did then; lost: checkpoints that were there before and not after,
    or were not whole; unlike: runs whose result was another one than that of the run left alone."""

    kills: int = 0
    runs: int = 0
    doing: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)


def start(ground: Ground, config: Path, resume: bool, cold: bool) -> list[int]:
    """Pids of a training: forked from this process, or a new interpreter (which starts its ranks itself)."""
    more = ["--resume", "latest"] if resume else []
    if not cold and ground.ranks > 1:
        return start_ranks(config, more, ground.ranks)
    words = ["train", str(config), *more]
    told = config.with_suffix(".txt")
    if not cold:
        return [forked(lambda: cli.main(words), told)]
    words += ["--gpus", ",".join(["cpu"] * ground.ranks)] if ground.ranks > 1 else []
    with told.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "whitetuner", *words], stdout=file, stderr=file, stdin=subprocess.DEVNULL
        )
    child.returncode = 0  # it is waited for by its number
    return [child.pid]


def attack(
    ground: Ground, whole: Facts, name: str, kills: int, seed: int, within_s: float, cold: bool, tally: Tally
) -> None:
    """Up to so many signals into one run, half of them within so many seconds of a start, half at work; then it is left to
    end, and compared. Of several ranks one is hit, or all at once."""
    chance, config, run = random.Random(seed), ground.config(name), ground.run(name)
    before: dict[str, str] = {}
    resume = False
    for _ in range(kills):
        sent = chance.choice(SIGNALS)
        pids = start(ground, config, resume, cold)
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0.0, within_s))
        else:  # a slow machine would else be hit on its way there alone
            await_steps(run, pids[0], chance.randrange(1, 12))
            time.sleep(chance.uniform(0.0, 0.05))
        there = [pid for pid in pids if not over(pid)]
        if there:
            tally.kills += 1
            tally.doing[doing(run)] += 1
        ranks = [rank for pid in there if cold for rank in psutil.Process(pid).children(recursive=True)]
        for pid in there if chance.random() < 0.7 else there[-1:]:
            os.kill(pid, sent)
        codes = ended(pids)
        # Whoever started them is gone: they save and stop by themselves, and nobody can go on until they have.
        _, left = psutil.wait_procs(ranks, timeout=ORPHANS_S)
        if left:
            tally.unlike.append(f"{name}: ranks went on for {ORPHANS_S} s without who started them")
            return
        # A rank whose neighbour was killed ends by itself, and says so.
        fine = (0, -sent, EXIT_STOPPED) + ((1, 3) if ground.ranks > 1 else ())
        if any(code not in fine for code in codes):
            tally.unlike.append(
                f"{name}: exit codes {codes}: {config.with_suffix('.txt').read_text(encoding='utf-8')[-300:]}"
            )
            return
        now = whole_checkpoints(run)
        if newest(now) < newest(before) or any(now.get(one, was) != was for one, was in before.items()):
            tally.lost.append(f"{name}: {sorted(before)} became {sorted(now)}")
        before, resume = now, (run / "run.json").exists()
        if not any(codes):
            break
    else:
        codes = ended(start(ground, config, resume, cold))
    tally.runs += 1
    if any(codes) or ground.facts(name) != whole or left_overs(run):
        tally.unlike.append(f"{name}: exit codes {codes}, left over {left_overs(run)}")
    else:
        ground.forget(name)


def over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def await_steps(run: Path, pid: int, count: int) -> None:
    """Until it has learned so many steps more, or is over."""
    before = None
    while not over(pid):
        last = events.last_of(run / "events.jsonl", (events.StepDone, events.RunStarted))
        step = last.step if isinstance(last, events.StepDone) else 0
        if before is None or step < before:
            before = step
        if step >= before + count:
            return
        time.sleep(0.003)


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
