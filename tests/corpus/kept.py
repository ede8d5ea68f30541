"""Runs and checkpoints that are damaged, another's, or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import ENVIRONMENT, FAILED, Case, Place, Typed
from sets import half

from whitetuner.checkpoint import store

AREA = "checkpoint"


def _document(change: Callable[[dict[str, Any]], object], honest: bool = False) -> Callable[[Path], None]:
    """honest: the document's hash is made to fit, as somebody would who means it."""

    def apply(checkpoint: Path) -> None:
        file = checkpoint / store.STATE_FILE
        document = json.loads(file.read_text(encoding="utf-8"))
        change(document)
        if honest:
            document[store.OWN_HASH] = store._own_hash(document)
        file.write_text(json.dumps(document), encoding="utf-8")

    return apply


def _run(place: Place) -> tuple[Path, Path]:
    """A copy of the finished run, and the config that goes on with it."""
    run = place.copy("out/finished", "out/kept")
    return run, place.config("kept", **{"run.steps": 6, "save.every": 2})


def _damaged(fault: str, harm: Callable[[Path], object], *says: str) -> Case:
    """By its name it is refused; "latest" passes it over (tests/chaos/test_damage.py)."""

    def make(place: Place) -> list[Typed]:
        run, config = _run(place)
        newest = run / "checkpoints" / "checkpoint-4"
        harm(newest)
        return [
            ["train", config, "--resume", newest],
            ["fork", run, "--at", "4", "--set", "run.steps=9", "--no-start"],
        ]

    return Case(AREA, fault, make, ("checkpoint-4", *says), FAILED)


def _resume(fault: str, *words: str, says: tuple[str, ...], code: int = 2) -> Case:
    """{run}, {data}, {folder} stand for folders."""

    def make(place: Place) -> list[Typed]:
        run, config = _run(place)
        names = {"run": run, "data": place.folder / "data", "folder": place.folder}
        return [["train", config, *(word.format(**names) for word in words)]]

    return Case(AREA, fault, make, says, code)


def _broken_run(fault: str, harm: Callable[[Path], object], *says: str) -> Case:
    def make(place: Place) -> list[Typed]:
        run, config = _run(place)
        harm(run)
        return [["train", config, "--resume", "latest"], ["fork", run, "--at", "4", "--no-start"]]

    return Case(AREA, fault, make, says)


def _in_the_way(name: str, code: int) -> Case:
    def make(place: Place) -> list[Typed]:
        run = place.folder / "out" / "blocked"
        (run.parent if name == "run" else run).mkdir(parents=True, exist_ok=True)
        file = {"run": run, "cache": place.folder / "cache in the way"}.get(name, run / name)
        if name == "events.jsonl":
            file.mkdir()
        else:
            file.write_text("mine", encoding="utf-8")
        more = {
            "save.every": 1,
            "preview.every": 1,
            "preview.prompts": [{"text": "a", "steps": 1}],
            "log.tensorboard": True,
        }
        more |= {"data.cache_dir": str(file)} if name == "cache" else {}
        return [["train", place.config("blocked", **more)]]

    what = "a folder" if name == "events.jsonl" else "a file"
    return Case(AREA, f"{what} of the user's where the run wants {name}", make, (name.split()[0],), code)


CASES = [
    _damaged(
        "training_state.json is missing", lambda c: (c / store.STATE_FILE).unlink(), "training_state.json"
    ),
    _damaged(
        "training_state.json is a list",
        lambda c: (c / store.STATE_FILE).write_text("[]", encoding="utf-8"),
        "training_state.json",
    ),
    _damaged(
        "training_state.json is no text",
        lambda c: (c / store.STATE_FILE).write_bytes(b"\xff\xfe"),
        "training_state.json",
    ),
    _damaged(
        "training_state.json lists an odd entry",
        _document(lambda d: d["files"].update({"lokr/lokr.safetensors": 3})),
        "training_state.json",
    ),
    _damaged(
        "training_state.json lists no files", _document(lambda d: d.update(files={})), "training_state.json"
    ),
    _damaged(
        "a digit of training_state.json was changed", _document(lambda d: d.update(step=5)), "was changed"
    ),
    _damaged(
        "it names files outside of itself",
        _document(lambda d: d["files"].update({"../../x": {"bytes": 1, "sha256": ""}}), True),
        "outside",
    ),
    _damaged("it does not tell its config", _document(lambda d: d.pop("config"), True), "config"),
    _damaged(
        "the adapter is missing",
        lambda c: (c / "lokr" / "lokr.safetensors").unlink(),
        "lokr.safetensors is missing",
    ),
    _damaged("the adapter is cut in half", lambda c: half(c / "lokr" / "lokr.safetensors"), "torn"),
    _damaged(
        "a file of the optimizer was changed",
        lambda c: (f := c / "accelerate_state" / "optimizer.json").write_bytes(
            f.read_bytes().replace(b"1", b"2")
        ),
        "was changed",
    ),
    _resume("a finished run is begun again", says=("--resume latest", "run.name=kept-2")),
    _resume(
        "resumed from what is not there",
        "--resume",
        "{folder}/nope",
        says=("no checkpoint", "checkpoint-4", "latest"),
    ),
    _resume(
        "resumed from a folder of pictures", "--resume", "{data}", says=("no checkpoint", "checkpoint-4")
    ),
    _resume("resumed from the run's own folder", "--resume", "{run}", says=("no checkpoint", "checkpoint-4")),
    _resume("`latest` is misspelt", "--resume", "latets", says=("no checkpoint", "latest")),
    _resume(
        "another size of adapter", "--resume", "latest", "--set", "method.factor=2", says=("method.factor",)
    ),
    _resume(
        "another kind of adapter", "--resume", "latest", "--set", "method.kind=lora", says=("method.kind",)
    ),
    _resume(
        "another batch size", "--resume", "latest", "--set", "data.batch_size=1", says=("data.batch_size",)
    ),
    _resume("another seed", "--resume", "latest", "--set", "run.seed=7", says=("run.seed",)),
    _resume(
        "another noise schedule", "--resume", "latest", "--set", "noise.shift=2.0", says=("noise.shift",)
    ),
    _resume(
        "another optimizer",
        "--resume",
        "latest",
        "--set",
        "optimizer.name=adafactor",
        says=("optimizer.name",),
    ),
    _resume(
        "the pictures are gone",
        "--resume",
        "latest",
        "--set",
        "data.images={folder}/none",
        says=("none", "no such folder"),
    ),
    Case(
        AREA,
        "another run's checkpoint",
        lambda p: [["train", (pair := _run(p))[1], "--resume", _other(p, pair[0])]],
        ("belongs to another run", "method.init_from"),
    ),
    Case(
        AREA,
        "other pictures than those it began with",
        lambda p: (
            run := _run(p),
            [["train", run[1], "--resume", "latest", "--set", f"data.images='{_few(p)}'"]],
        )[1],
        ("not those this run began with",),
    ),
    *(
        _broken_run(
            f"run.json is {what}",
            lambda r, text=text: (r / "run.json").write_bytes(text),
            "run.json is damaged",
        )
        for what, text in {"torn": b"{oops", "a list": b"[]", "empty": b"{}", "zeros": bytes(99)}.items()
    ),
    Case(
        AREA,
        "forked at a step that was not saved",
        lambda p: [["fork", p.folder / "out" / "finished", "--at", "3"]],
        ("--at", "2, 4"),
    ),
    Case(
        AREA,
        "forked where it has ended",
        lambda p: [["fork", p.folder / "out" / "finished", "--at", "4"]],
        ("--at", "run.steps=MORE"),
    ),
    Case(
        AREA,
        "forked with another adapter",
        lambda p: [["fork", p.folder / "out" / "finished", "--at", "2", "--set", "method.factor=2"]],
        ("method.factor",),
    ),
    Case(
        AREA,
        "forked onto a run that is there",
        lambda p: [["fork", p.folder / "out" / "finished", "--at", "2", "--set", "run.name=finished"]],
        ("run.name",),
    ),
    *(
        Case(
            AREA,
            f"`{' '.join(word)}` of a folder of pictures",
            lambda p, word=word: [[word[0], p.folder / "data", *word[1:]]],
            ("no run's folder",),
        )
        for word in (("stop",), ("watch", "--once"), ("fork", "--at", "2"))
    ),
    *(
        Case(
            AREA,
            f"`{word}` of a run that is not there",
            lambda p, word=word: [[word, p.folder / "nope"]],
            ("no run's folder",),
        )
        for word in ("stop", "watch", "fork")
    ),
    Case(
        AREA,
        "`stop` of a run that has ended",
        lambda p: [["stop", p.folder / "out" / "finished"], ["stop", p.folder / "out" / "finished", "--now"]],
        ("nothing is running",),
    ),
    Case(
        AREA,
        "drawing with a run that saved nothing",
        lambda p: (
            shutil.rmtree(_run(p)[0] / "final"),
            [["sample", p.folder / "out" / "kept", "--out", p.folder / "o.png"]],
        )[1],
        ("no final file",),
    ),
    *(
        _in_the_way(name, ENVIRONMENT if name in ("run", "cache") else FAILED)
        for name in ("run", "cache", "checkpoints", "final", "samples", "tensorboard", "events.jsonl")
    ),
]


def _other(place: Place, run: Path) -> Path:
    other = place.copy("out/finished", "out/other")
    document = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**document, "run_id": "0" * 32}), encoding="utf-8")
    return other / "checkpoints" / "checkpoint-2"


def _few(place: Place) -> Path:
    folder = place.copy("data", "few")
    (folder / "3.png").unlink()
    (folder / "3.txt").unlink()
    return folder
