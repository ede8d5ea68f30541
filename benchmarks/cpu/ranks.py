"""What adding up gradients costs on two CPU ranks, beside DDP's and accelerate's on the same model; and weak scaling.

    python -m benchmarks.cpu.ranks [--rounds 40]

The embedded model with a LoKr, a fixed batch of 8 a rank; forward, backward, clip and update in each way, one after the other in
every round, the order turned from round to round, both ranks together at the start of each. "none" adds nothing up (ranks only
compute side by side); a round's time is the slower rank's. "solo" is rank 0 alone on the machine. Ratios are medians over rounds
of a way's time to that of another in the same round, with their 95 % interval. Target: ours/none at most 1.05, or 2 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from benchmarks.paired import environment, median_interval

from whitetuner.assemble import step_settings
from whitetuner.config.load import load_config
from whitetuner.demo import draw_folder, write_config
from whitetuner.recipe import Session
from whitetuner.runs.place import place_here
from whitetuner.train.joining import joined
from whitetuner.train.optim import clip_grad_norm
from whitetuner.train.step import step_loss

RESULT = Path(__file__).parents[1] / "results" / "ranks.json"
WAYS = ("solo", "none", "ours", "ddp", "accelerate")


class Loss(torch.nn.Module):
    """The denoiser and its loss as one module, for those that wrap modules."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        learner = session.team.learners[0]
        self.module, self.part = learner.module, learner.part
        self.session = [session]
        self.settings = step_settings(session.config, session.data.shift, learner.part)

    def forward(self, batch: object) -> torch.Tensor:
        family = self.session[0].family
        modules = {self.part.name: self.module}
        loss = step_loss(family, modules, self.part.name, batch, self.settings, torch.device("cpu"))  # type: ignore[arg-type]
        return loss.weighted.mean()


def rank(folder: Path, rounds: int) -> None:
    """One of the two: times every way, round by round."""
    import accelerate
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    more = ["preview.every=0", "validation.every=0", "save.every=0", "optimizer.ema=0", "data.batch_size=8"]
    with (
        joined(place_here(), torch.device("cpu")) as ranks,
        Session.open(load_config(folder / "config.toml", more), ranks=ranks) as session,
    ):
        session.prepare()
        learner = session.team.learners[0]
        batch = next(iter(session._batches)).mine[0]  # type: ignore[arg-type]
        plain = Loss(session)
        wrapped = DistributedDataParallel(plain)
        helper = accelerate.Accelerator(cpu=True)
        prepared = helper.prepare(plain)
        optimizer = torch.optim.AdamW(learner.parameters, 1e-9, fused=True)

        def update() -> None:
            clip_grad_norm(learner.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def none() -> None:
            plain(batch).backward()
            update()

        def ours() -> None:
            plain(batch).backward()
            ranks.agree(False, [0.0] * 16, 16)
            ranks.sum_gradients(learner.parameters)
            update()

        def ddp() -> None:
            wrapped(batch).backward()
            update()

        def accelerated() -> None:
            helper.backward(prepared(batch))
            update()

        ways: dict[str, Callable[[], None]] = dict(
            zip(WAYS, (none, none, ours, ddp, accelerated), strict=True)
        )
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 2):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                ranks.meet()
                if name == "solo" and not ranks.first:
                    continue
                began = time.perf_counter()
                ways[name]()
                if number >= 2:
                    times[name].append(time.perf_counter() - began)
        rows = ranks.told(times)
        if ranks.first:  # a step of both is over when the slower one is done
            slower = {
                name: [max(pair) for pair in zip(*(row[name] for row in rows), strict=True)]
                for name in WAYS[1:]
            }
            told = {
                "times": {"solo": times["solo"], **slower},
                "trained": sum(one.numel() for one in learner.parameters),
            }
            (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")


def ratio(times: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Median over rounds with its 95 % interval, and the median difference in ms."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, high = median_interval(ratios)
    extra = median(a - b for a, b in zip(times[one], times[other], strict=True))
    return {"median_ratio": median(ratios), "low": low, "high": high, "extra_ms": 1000 * extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank(given.rank, given.rounds)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_folder(folder / "data" / "new", 16, 1)
        draw_folder(folder / "data" / "old", 16, 2)
        write_config(folder, 100_000).rename(folder / "config.toml")
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
        own |= {
            "WHITETUNER_RENDEZVOUS": str(folder / "port"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29555",
        }
        command = [
            sys.executable,
            "-m",
            "benchmarks.cpu.ranks",
            "--rank",
            name,
            "--rounds",
            str(given.rounds),
        ]
        both = [
            subprocess.Popen(
                command, env={**os.environ, **own, "RANK": str(number), "LOCAL_RANK": str(number)}
            )
            for number in range(2)
        ]
        assert [process.wait() for process in both] == [0, 0]
        told = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    times = told["times"]
    found = {
        "rounds": given.rounds,
        "trained_numbers": told["trained"],
        "seconds": {name: median(times[name]) for name in WAYS},
        "averaging": {name: ratio(times, name, "none") for name in WAYS[2:]},
        "weak_scaling": {name: ratio(times, name, "solo") for name in WAYS[1:]},
        "environment": environment("torch", "accelerate"),
    }
    print(json.dumps(found, indent=1))
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
