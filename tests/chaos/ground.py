"""What every attack starts from: a tiny run that does everything, the same run left alone, and how the two are compared."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from whitetuner import cli
from whitetuner.checkpoint.store import read
from whitetuner.config.load import dump_config, load_config
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.runs import events, place
from whitetuner.tiny import tiny_values

#: What is attacked: (changes of the config, ranks).
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "adapters": ({}, 1),
    "full": (
        {
            "method.kind": "full",
            "optimizer.lr": 1e-3,
            "optimizer.max_grad_norm": 0.0,
            "memory.blocks_to_swap": 1,
        },
        1,
    ),
    "two ranks": ({}, 2),
}


@dataclass
class Said:
    code: int
    text: str


@dataclass(frozen=True)
class Facts:
    """All that two runs must agree on, to the bit."""

    tensors: str
    losses: tuple[Any, ...]
    final: bytes


class Ground:
    """A model and a data set in `folder`, and values of a run of `steps` steps over them."""

    def __init__(self, folder: Path, kind: str, pictures: int, steps: int, **more: Any) -> None:
        torch.set_num_threads(1)
        self.folder, self.steps = folder, steps
        changes, self.ranks = KINDS[kind]
        self.method = changes.get("method.kind", "lokr")
        registry.make_tiny("flux2-klein", str(folder / "model"))
        (folder / "data").mkdir()
        for index in range(pictures):
            pixels = np.random.default_rng(index).integers(
                0, 255, (96, 96 + 32 * (index % 2), 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / "data" / f"{index}.png")
            (folder / "data" / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
        self.values = {
            **tiny_values("flux2-klein", folder / "model", folder / "data", folder / "out"),
            **{"run.steps": steps, "optimizer.ema": 0.9, "validation.sigmas": 2, "validation.items": 1},
            **changes,
            **more,
        }

    def config(self, name: str, **more: Any) -> Path:
        """A config file of a run of this name, with a cache of its own."""
        values = {
            **self.values,
            "run.name": name,
            "data.cache_dir": str(self.folder / f"cache {name}"),
            **more,
        }
        path = self.folder / f"{name}.toml"
        path.write_text(dump_config(load_config(None, base=values).config), encoding="utf-8")
        return path

    def run(self, name: str) -> Path:
        return Path(str(self.values["run.output_dir"])) / name

    def whole(self, name: str = "whole") -> Facts:
        """The run, left alone."""
        config = self.config(name)
        if self.ranks == 1:
            said = say("train", config)
            assert said.code == 0, said.text
        else:
            codes = ended(start_ranks(config, [], self.ranks))
            assert codes == [0] * self.ranks, config.with_suffix(".txt").read_text(encoding="utf-8")
        return self.facts(name)

    @property
    def final(self) -> str:
        """The run's file with what was learned."""
        full = "transformer/diffusion_pytorch_model.safetensors"
        return f"final/{'lokr/lokr.safetensors' if self.method == 'lokr' else full}"

    def facts(self, name: str) -> Facts:
        run = self.run(name)
        tensors = tensors_of(run / self.final)
        return Facts(digest(checkpoint(run, self.steps)), tuple(map(repr, losses(run))), tensors)

    def forget(self, name: str) -> None:
        """Makes room: nothing of this run is looked at again."""
        for folder in (self.run(name), self.folder / f"cache {name}"):
            shutil.rmtree(folder, ignore_errors=True)


def tensors_of(file: Path) -> bytes:
    """The tensors' bytes; the header holds the run's own name."""
    raw = file.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def say(*words: object) -> Said:
    """A word of the command line, as it is typed."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as error:
            code = int(str(error.code))
    return Said(code, heard.getvalue())


def forked(work: Callable[[], int], told: Path) -> int:
    """The pid of a child that does this and exits with its result, its words in a file: no second import of torch."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            sys.stdout = sys.stderr = told.open("w", encoding="utf-8")
            for stream in (1, 2):  # what it starts in turn speaks there
                os.dup2(sys.stdout.fileno(), stream)
            code = work()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return child


def start_ranks(config: Path, words: list[str], ranks: int) -> list[int]:
    """Pids of forked ranks, told who they are as torchrun tells it."""
    meeting = config.with_suffix(".port")
    meeting.unlink(missing_ok=True)

    def rank(number: int) -> int:
        told = {"RANK": number, "WORLD_SIZE": ranks, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": ranks}
        told |= {
            place.RENDEZVOUS: meeting,
            place.DEVICE: "cpu",
            place.ARRIVAL: 60,
            "MASTER_PORT": 0,  # told in that file: two tests at once must not meet
            "GLOO_SOCKET_IFNAME": "lo",
        }
        os.environ.update({name: str(value) for name, value in told.items()})
        return cli.main(["train", str(config), *words])

    return [
        forked(partial(rank, number), config.with_suffix(f".{number}.txt" if number else ".txt"))
        for number in range(ranks)
    ]


def ended(pids: list[int]) -> list[int]:
    """Exit codes; a signal's is negative."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def whole_checkpoints(run: Path) -> dict[str, str]:
    """Every checkpoint that can be seen -> its hash. Raises DamagedCheckpoint for one that is not whole."""
    found = {}
    for path in sorted((run / "checkpoints").glob("checkpoint-*")):
        saved = read(path)
        found[path.name] = digest(
            {f"{file}:{key}": one for file, group in saved.tensors.items() for key, one in group.items()}
        )
    return found


def left_overs(run: Path) -> list[str]:
    """Half-made files that nothing will ever read again."""
    names = re.compile(r".*\.(writing|replaced|removing|tmp|new)$")
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if names.match(path.name))


def steps_of(run: Path) -> list[int]:
    found, _ = events.read(run / "events.jsonl")
    return [event.step for event in found if isinstance(event, events.StepDone)]
