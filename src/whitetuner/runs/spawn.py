"""Starts one process for each device of a run and stays beside them: the same way on every system, without torch.

Rank 0 speaks on this terminal, the others into logs/rank-N.log of the run. Ctrl-C and SIGTERM reach all of them; when one
ends by itself, the others are given a while to end as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from whitetuner.errors import EXIT_FAILED, EXIT_STOPPED
from whitetuner.paths import PYTHON
from whitetuner.runs import events
from whitetuner.runs.events import Ended, EventLog, Failed, RunStarted, last_of
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.place import DEVICE, LAUNCHER, RENDEZVOUS
from whitetuner.tongue import say

#: Between looks; for the others to end after one failed; from a polite end to a hard one.
LOOK_EVERY_S, GRACE_S, HARD_S = 0.1, 30.0, 10.0
#: Exit codes that a rank chooses itself: what is to be said was said.
_CHOSEN = (0, 1, 2, 3, EXIT_STOPPED)


@dataclass
class Rank:
    """A process of a run. number: from 0; log: where its words go, None: to the terminal."""

    number: int
    device: str
    process: subprocess.Popen[bytes]
    log: Path | None

    def __str__(self) -> str:
        return f"rank {self.number} ({self.device}, process {self.process.pid})"


def spawn(words: Sequence[str], run: Path, devices: Sequence[str]) -> int:
    """Runs `whitetuner WORDS` once for each device and returns the exit code of rank 0, or that of the rank that failed.

    words: of the command line, without --gpus; run: its folder; devices: "0", "1", ... or "cpu", one for each rank
    Raises KeyboardInterrupt at the third signal, with all ranks ended.
    """
    with ExitStack() as stack:
        meeting = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="whitetuner-ranks-")))
        ranks: list[Rank] = []
        stack.callback(_end, ranks)
        stack.enter_context(_passed_on(ranks))
        for number, device in enumerate(devices):
            ranks.append(_start(number, device, len(devices), words, run, meeting / "port", stack))
        return _wait(ranks, run)


def _start(
    number: int,
    device: str,
    world: int,
    words: Sequence[str],
    run: Path,
    port: Path,
    stack: ExitStack,
) -> Rank:
    given = {
        "RANK": number,
        "WORLD_SIZE": world,
        "LOCAL_RANK": number,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        RENDEZVOUS: port,
        DEVICE: device,
        LAUNCHER: os.getpid(),
        "PYTHONUTF8": 1,
    }
    environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
    environment.pop("MASTER_PORT", None)
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    loopback = _loopback()
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    # As many threads for each as there are cores for it; more only wait for each other.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    log, output = None, None
    if number:
        log = run / "logs" / f"rank-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        output = stack.enter_context(log.open("ab"))
    process = subprocess.Popen(
        [*PYTHON, "-m", "whitetuner", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=os.name != "nt",
    )
    return Rank(number, device, process, log)


def _loopback() -> str | None:
    """The name of the interface of 127.0.0.1, which all ranks of one machine share."""
    if os.name == "nt":
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == "127.0.0.1" for one in addresses):
            return name
    return None


@contextmanager
def _passed_on(ranks: Sequence[Rank]) -> Iterator[None]:
    """Signals go to the ranks, once each: on POSIX they are in sessions of their own; on Windows the console's Ctrl-C reaches
    them by itself, and there is nothing else. The third one ends them."""
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        for rank in ranks:
            if os.name != "nt" and rank.process.poll() is None:
                with contextlib.suppress(OSError):
                    rank.process.send_signal(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[Rank], run: Path) -> int:
    began = time.time()
    first: Rank | None = None
    ends = 0.0
    while any(rank.process.poll() is None for rank in ranks):
        time.sleep(LOOK_EVERY_S)
        failed = next((one for one in ranks if one.process.poll() not in (None, 0, EXIT_STOPPED)), None)
        if first is None and failed is not None:
            first, ends = failed, time.monotonic() + GRACE_S
        if first is not None and time.monotonic() > ends:
            _end(ranks)
    failed = first or next((one for one in ranks if one.process.returncode not in (0, EXIT_STOPPED)), None)
    if failed is None:
        return ranks[0].process.returncode
    if failed.process.returncode not in _CHOSEN:
        words = _last_words(failed)
        say(f"error: {words}", wrong=True)
        _write_down(run, words, began)
        return EXIT_FAILED
    if failed.log is not None and failed.process.returncode != ranks[0].process.returncode:
        say(f"error: {failed} failed; its words are in {failed.log}", wrong=True)
    return failed.process.returncode


def _last_words(rank: Rank) -> str:
    code = rank.process.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    more = "" if rank.log is None else f"; its log: {rank.log}"
    return (
        f"{rank} {how}, so the run has ended; what was saved before is intact\n"
        f"  -> go on with --resume latest{more}"
    )


def _write_down(run: Path, words: str, began: float) -> None:
    """Into the run's events, where rank 0 could not do it any more."""
    folder = RunFolder(run)
    last = last_of(folder.events, (RunStarted, Failed, Ended))
    if isinstance(last, RunStarted) and last.time >= began - 1 and not folder.running():
        log = EventLog(folder.events)
        with contextlib.suppress(OSError):
            log.mend()
            log.append(events.Failed(reason=words))


def _end(ranks: Sequence[Rank]) -> None:
    """Ends what still runs, first politely."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
    ends = time.monotonic() + HARD_S
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
