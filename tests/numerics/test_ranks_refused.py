"""Ranks that do not belong together, do not come, or fail: every one of them ends, with the reason and by name."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
import torch

from whitetuner.config.load import load_config
from whitetuner.errors import Stopped, UserError
from whitetuner.resolve import choose_device
from whitetuner.runs.place import Place
from whitetuner.sharing import cache_share, same_config
from whitetuner.train.distributed import Ranks
from whitetuner.train.joining import joined

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="ranks are forked from a process that has torch loaded"
)
CPU = torch.device("cpu")


def reason(work: Any, ranks: Ranks) -> str:
    try:
        work(ranks)
    except UserError as error:
        return str(error)
    except Stopped:
        return "stopped"
    return ""


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    place = Place(0, 3, 0, 3, rendezvous=str(tmp_path / "port"), arrival_s=0.5)
    with pytest.raises(UserError, match=r"rank 1, rank 2 of 3 did not come"), joined(place, CPU):
        pass


def test_a_store_that_nobody_keeps_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    place = Place(1, 2, 1, 2, port=port, arrival_s=1.0)
    with pytest.raises(UserError, match=r"rank 0 cannot be reached at 127\.0\.0\.1"), joined(place, CPU):
        pass


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = Place(0, 2, 0, 2, port=port, arrival_s=1.0)
        with pytest.raises(UserError, match=f"port {port} of this machine is taken"), joined(place, CPU):
            pass


def other_rate(ranks: Ranks) -> None:
    base = {"model.family": "flux2-klein", "data.images": "x", "optimizer.lr": 1e-4 * (1 + ranks.rank)}
    with ranks.phase():
        same_config(ranks, load_config(None, base=base).config)


def second_fails(ranks: Ranks) -> None:
    with ranks.phase():
        ranks.meet()
        if ranks.rank == 1:
            raise UserError(
                "the picture {name} is no picture", where="data.images", mend="remove it", name="a.png"
            )
        ranks.meet()
        ranks.meet()


def second_is_stopped(ranks: Ranks) -> None:
    with ranks.phase():
        if ranks.rank == 1:
            raise Stopped
        ranks.meet()


def test_what_ends_one_ends_all(tmp_path: Path) -> None:
    told = forked_ranks.together(2, partial(reason, other_rate), tmp_path / "config")
    assert told[0] == told[1] and told[0].startswith(
        "optimizer.lr: rank 1 was started with 0.0002, rank 0 with"
    )
    told = forked_ranks.together(3, partial(reason, second_fails), tmp_path / "one")
    assert told[1].startswith("data.images: the picture a.png")
    assert told[0] == told[2] == "rank 1: " + told[1]
    assert forked_ranks.together(2, partial(reason, second_is_stopped), tmp_path / "stop") == ["stopped"] * 2


def shared_or_not(folder: Path, ranks: Ranks) -> tuple[tuple[int, int], tuple[int, int]]:
    own = folder / f"own-{ranks.rank}"
    together = cache_share(ranks, folder / "shared")
    ranks.ranks_here = (ranks.rank,)  # as on two machines ...
    return together, cache_share(ranks, own)  # ... that see different disks


def test_ranks_fill_one_cache_or_each_machine_its_own(tmp_path: Path) -> None:
    told = forked_ranks.together(2, partial(shared_or_not, tmp_path), tmp_path / "ranks")
    assert told == [((0, 2), (0, 1)), ((1, 2), (0, 1))]
    assert not list(tmp_path.glob("*/.seen-*"))


def test_a_gpu_that_is_not_there_is_named() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(UserError, match=f"GPU {count + 7} was asked for, but PyTorch sees {count} GPUs"):
        choose_device(f"cuda:{count + 7}")
