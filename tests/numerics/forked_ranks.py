"""Ranks for tests: forked from this process, which has torch loaded, so that a group of them costs no start."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from whitetuner.runs.place import Place
from whitetuner.train.distributed import Ranks
from whitetuner.train.joining import joined


def start(world: int, work: Callable[[Ranks], Any], folder: Path, **place: Any) -> list[int]:
    """Processes that do the work as ranks 0 .. world-1; what it returns is left in folder/RANK.pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "port").unlink(missing_ok=True)
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            with (folder / f"{rank}.log").open("w", encoding="utf-8") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                try:
                    here = Place(rank, world, rank, world, rendezvous=str(folder / "port"), **place)
                    with joined(here, torch.device("cpu")) as ranks:
                        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(ranks)))
                    code = 0
                finally:
                    log.write(traceback.format_exc())
        finally:
            os._exit(code)
    return pids


def ended(pids: list[int]) -> list[int]:
    """Exit codes; a signal's is negative."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def together(world: int, work: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    """What the work returned on every rank."""
    codes = ended(start(world, work, folder))
    logs = [(folder / f"{rank}.log").read_text(encoding="utf-8") for rank in range(world)]
    assert codes == [0] * world, "\n".join(logs)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]
