"""One wrong input each: what is wrong, what is typed, and what has to come of it. The tables are in the files beside this one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.testclient import TestClient

from whitetuner import cli
from whitetuner.config.load import dump_config, load_config
from whitetuner.families import registry
from whitetuner.gui.app import make_app
from whitetuner.gui.settings import Settings
from whitetuner.tiny import tiny_values

USE, FAILED, ENVIRONMENT = 2, 1, 3
#: Seconds until the answer, whatever the input is.
LIMIT_S = 10.0

#: A word of the command line and its arguments, or a request of the page: (address, JSON or bytes).
Typed = Sequence[object]


@dataclass(frozen=True)
class Case:
    """fault: in a user's words, unique in its area; make: prepares it and says what is typed, one or several commands that all
    have to answer so; says: words of the message, the place among them; code: exit code, for the page the HTTP status."""

    area: str
    fault: str
    make: Callable[[Place], Sequence[Typed]]
    says: tuple[str, ...]
    code: int = USE


@dataclass(frozen=True)
class Answer:
    """The message as it is shown in the table; wrong: what does not hold ("": nothing)."""

    case: Case
    typed: str
    message: str
    seconds: float
    wrong: str


@dataclass
class Place:
    """A tiny model (model/), four captioned pictures (data/), a finished run (out/finished) with checkpoints 2 and 4."""

    folder: Path
    _page: list[TestClient] = field(default_factory=list)

    @classmethod
    def made(cls, folder: Path) -> Place:
        torch.set_num_threads(1)
        place = cls(folder)
        registry.make_tiny("flux2-klein", str(folder / "model"))
        pictures(folder / "data", 4)
        code, text, _ = place.say("train", place.config("finished", **{"run.steps": 4, "save.every": 2}))
        assert code == 0, text
        return place

    def values(self, name: str, **more: Any) -> dict[str, Any]:
        values = tiny_values("flux2-klein", self.folder / "model", self.folder / "data", self.folder / "out")
        return {**values, "run.name": name, "run.steps": 2, "data.caption_dropout": 0.0, **more}

    def config(self, name: str, **more: Any) -> Path:
        """A config of a run of two steps, with dotted changes."""
        path = self.folder / f"{name}.toml"
        text = dump_config(load_config(None, base=self.values(name, **more)).config)
        path.write_text(text, encoding="utf-8")
        return path

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    def copy(self, what: str, name: str) -> Path:
        return Path(shutil.copytree(self.folder / what, self.folder / name))

    @property
    def adapter(self) -> Path:
        return self.folder / "out" / "finished" / "final" / "lokr" / "lokr.safetensors"

    def say(self, *words: object) -> tuple[int, str, float]:
        """(exit code, all that was printed, seconds) of a command."""
        heard, began = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            try:
                code = cli.main([str(word) for word in words])
            except SystemExit as error:
                code = int(str(error.code))
            except Exception:  # noqa: BLE001 - what nobody foresaw is what is looked for
                code = 99
                traceback.print_exc()
        return code, heard.getvalue(), time.perf_counter() - began

    def ask(self, address: str, body: object) -> tuple[int, str, float]:
        """(status, JSON, seconds) of a request of the page."""
        if not self._page:
            app = make_app(Settings())
            self._page.append(
                TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False)
            )
        content = body if isinstance(body, bytes) else json.dumps(body)
        began = time.perf_counter()
        answer = self._page[0].post(address, content=content, headers={"content-type": "application/json"})
        return answer.status_code, answer.text, time.perf_counter() - began


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    return folder


def contents(folder: Path) -> Mapping[str, str]:
    """Every file that is the user's -> its hash. What runs and checks write for themselves is not."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts
        if inner[0] not in ("state", "cwd") and "control" not in inner and path.is_file():
            found["/".join(inner)] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return found


def harmed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What was changed, removed, or written outside of the folder for runs."""
    gone = [name for name in before if after.get(name) != before[name]]
    return gone + [name for name in after if name not in before and not name.startswith("out/")]


def ends(place: Place, case: Case) -> Answer:
    """Runs the case; what it made is removed again."""
    known = set(place.folder.iterdir())
    runs = set((place.folder / "out").iterdir())
    wrong: list[str] = []
    said, spent, typed = "", 0.0, ""
    try:
        commands = list(case.make(place))
        before = contents(place.folder)
        for number, command in enumerate(commands):
            is_page = str(command[0]).startswith("/api/")
            code, text, seconds = place.ask(*command) if is_page else place.say(*command)  # type: ignore[arg-type]
            spent = max(spent, seconds)
            wrong += faults(case, code, text, seconds, is_page)
            if number == 0:
                said, typed = text, " ".join(map(str, command[:1] if is_page else command))
        changed = harmed(before, contents(place.folder))
        wrong += [f"files changed: {changed[:3]}"] if changed else []
    finally:
        for made in {*place.folder.iterdir()} - known | {*(place.folder / "out").iterdir()} - runs:
            made.chmod(0o755)
            shutil.rmtree(made) if made.is_dir() else made.unlink()
    return Answer(
        case, plain(typed, place), plain(shown(said), place), spent, "; ".join(dict.fromkeys(wrong))
    )


def faults(case: Case, code: int, text: str, seconds: float, is_page: bool) -> list[str]:
    wrong = [f"code {code}, not {case.code}"] if code != case.code else []
    readable = json.loads(text) if is_page else None
    flat = text if readable is None else json.dumps(readable, ensure_ascii=False)
    wrong += [f"{word!r} is not said" for word in case.says if word not in flat]
    if "Traceback" in text:
        wrong.append("a traceback")
    if case.code == USE and "loading the model" in text:
        wrong.append("told only after the model was loaded")
    if not is_page and "\n  -> " not in text and "usage: " not in text:
        wrong.append("no mend")
    if seconds > LIMIT_S:
        wrong.append(f"{seconds:.0f} s")
    return wrong


def shown(text: str) -> str:
    """The message of an answer: without progress, listings and usage."""
    if text.startswith("{"):
        found = json.loads(text)
        wrong = found.get("errors")
        rows = found.get("refused") or (next(iter(wrong.values()), []) if isinstance(wrong, dict) else [])
        rows = rows or [parts[-2:] for _, *parts in found.get("others", [])][:1]
        rows = rows[0] if rows and isinstance(rows[0], list) else rows
        return " -> ".join(part for part in map(str, rows) if part) if isinstance(rows, list) else str(rows)
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if line.lstrip().startswith("-> ")), None)
    if at is None:
        return next((line for line in reversed(lines) if "error" in line), text[-200:])
    return f"{lines[at - 1].removeprefix('error: ').strip()} {lines[at].strip()}"


def plain(text: str, place: Place) -> str:
    """The same on every machine: no folder, and nothing of what other libraries say, which stands in brackets."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # half characters of names that are no UTF-8
    text = text.replace(str(place.folder) + os.sep, "").replace(str(place.folder), ".")
    return re.sub(r"\s+", " ", re.sub(r"\((?:[^()]|\([^()]*\))*\)", "(...)", text)).strip()
