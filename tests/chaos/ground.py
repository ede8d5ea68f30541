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
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

#: What is attacked: changes of the config.
KINDS: dict[str, dict[str, Any]] = {
    "adapters": {},
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
            **KINDS[kind],
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
        said = say("train", self.config(name))
        assert said.code == 0, said.text
        return self.facts(name)

    def facts(self, name: str) -> Facts:
        run = self.run(name)
        final = run / "final" / "lokr" / "lokr.safetensors"
        return Facts(
            digest(checkpoint(run, self.steps)), tuple(map(repr, losses(run))), without_names(final, name)
        )

    def forget(self, name: str) -> None:
        """Makes room: nothing of this run is looked at again."""
        for folder in (self.run(name), self.folder / f"cache {name}"):
            shutil.rmtree(folder, ignore_errors=True)


def without_names(file: Path, name: str) -> bytes:
    """The tensors' bytes: the header holds the run's own name."""
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
            code = work()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return child


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
