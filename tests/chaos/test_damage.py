"""What power cuts, bad disks, clocks and other hands do to a run: it goes on to the same bits, or says why not.

Every attack is made on runs of adapters; the slow part makes it on full training (with block swap) and on two ranks as well.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disk import Disk, Write, on
from ground import (
    KINDS,
    Facts,
    Ground,
    Said,
    ended,
    forked,
    left_overs,
    say,
    start_ranks,
    whole_checkpoints,
)

from whitetuner import cli
from whitetuner.checkpoint.store import DamagedCheckpoint, read
from whitetuner.gui.run_state import Runs
from whitetuner.runs import jobs
from whitetuner.runs.folder import RunFolder

STEPS = 6


@pytest.fixture(
    scope="module",
    params=[
        "adapters",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "adapters"),
    ],
)
def ground(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Ground:
    more = {
        "save.every": 2,
        "save.keep": 0,
        "preview.every": 2,
        "preview.prompts": [{"text": "a", "steps": 1}],
    }
    return Ground(
        tmp_path_factory.mktemp("damage"),
        request.param,
        pictures=4,
        steps=STEPS,
        **more,
        **{"log.tensorboard": True},
    )


@pytest.fixture(scope="module")
def whole(ground: Ground) -> Facts:
    return ground.whole()


def interrupted(ground: Ground, name: str) -> Path:
    """A copy of the whole run, as a kill in its fifth step would have left it, with a cache of its own."""
    ground.config(name)
    shutil.copytree(ground.folder / "cache whole", ground.folder / f"cache {name}")
    run = Path(shutil.copytree(ground.run("whole"), ground.run(name)))
    for gone in ("final", f"checkpoints/checkpoint-{STEPS}"):
        shutil.rmtree(run / gone)
    (run / "report.html").unlink()
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    saved = [i for i, line in enumerate(lines) if b'"kind": "saved"' in line and b"checkpoint-4" in line]
    (run / "events.jsonl").write_bytes(b"".join(lines[: saved[0] + 2]))
    return run


def resumed(ground: Ground, name: str) -> Said:
    """`train --resume latest`; of several ranks the first one's words, and the first code that is not 0."""
    config, words = ground.folder / f"{name}.toml", ["--resume", "latest"]
    if ground.ranks == 1:
        return say("train", config, *words)
    codes = ended(start_ranks(config, words, ground.ranks))
    return Said(
        next((code for code in codes if code), 0), config.with_suffix(".txt").read_text(encoding="utf-8")
    )


def goes_on(ground: Ground, whole: Facts, name: str) -> str:
    said = resumed(ground, name)
    assert said.code == 0, said.text
    assert ground.facts(name) == whole
    assert not left_overs(ground.run(name))
    ground.forget(name)
    return said.text


def flipped(file: Path, chance: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    file.write_bytes(raw)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_flipped_bit_of_a_checkpoint_is_told(ground: Ground, whole: Facts) -> None:
    run, chance = interrupted(ground, "flipped"), random.Random(1)
    newest = run / "checkpoints" / "checkpoint-4"
    for file, _ in itertools.product(files_of(newest), range(20)):
        before = file.read_bytes()
        flipped(file, chance)
        with pytest.raises(DamagedCheckpoint):
            read(newest)
        file.write_bytes(before)
    flipped(chance.choice(list(newest.glob("*/*.safetensors"))), chance)
    text = goes_on(ground, whole, "flipped")
    assert "checkpoint-4" in text and "goes on from step 2" in text


def test_flipped_bits_of_the_cache_are_encoded_anew(ground: Ground, whole: Facts) -> None:
    interrupted(ground, "cache")
    folder, chance = ground.folder / "cache cache", random.Random(2)
    entries = [path for path in files_of(folder) if path.suffix in (".safetensors", ".json")]
    assert len(entries) > 8
    for file in entries:
        flipped(file, chance)
    goes_on(ground, whole, "cache")


def power_cut(run: Path, cache: Path, chance: random.Random) -> None:
    """What was never synced is cut anywhere, or zeros where its bytes should be; of the checkpoints the newest is torn, too."""
    saved = (run / "events.jsonl").read_bytes().index(b"checkpoint-4")
    for file in (*files_of(run), *files_of(cache)):
        size, synced = file.stat().st_size, 0
        inner = file.relative_to(run).parts[0] if file.is_relative_to(run) else ""
        if inner in ("run.json", "config.toml", "checkpoints"):
            continue
        if inner == "events.jsonl":
            synced = saved - 500  # synced before the checkpoint was written
        kept = chance.randint(min(synced, size), size)
        os.truncate(file, kept)
        if chance.random() < 0.5:
            os.truncate(file, size)
    torn = chance.choice(files_of(run / "checkpoints" / "checkpoint-4"))
    os.truncate(torn, chance.randrange(torn.stat().st_size))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_a_power_cut_costs_the_steps_since_the_last_whole_checkpoint(
    ground: Ground, whole: Facts, seed: int
) -> None:
    name = f"cut-{seed}"
    power_cut(interrupted(ground, name), ground.folder / f"cache {name}", random.Random(seed))
    assert "goes on from step 2" in goes_on(ground, whole, name)


def test_a_clock_that_jumps_changes_nothing(
    ground: Ground, whole: Facts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WHITETUNER_STATE", str(tmp_path))
    jumps = itertools.cycle((0.0, 4e9, -1e9, 30.0))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: max(0.0, real() + next(jumps)))
    interrupted(ground, "clock")
    said = resumed(ground, "clock")
    assert said.code == 0, said.text
    assert ground.facts("clock") == whole
    run = ground.run("clock").resolve()
    job = jobs.read(jobs.id_of(run))
    assert job is not None and jobs.state_of(job) == "finished"
    shown = json.dumps(Runs().reader(job).curve())
    assert "Infinity" not in shown and "NaN" not in shown
    ground.forget("clock")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="all start at once from a process that has torch loaded")
def test_of_several_starts_at_once_one_trains_and_the_others_say_so(ground: Ground, whole: Facts) -> None:
    """Into one folder two, and one beside it which shares their cache."""
    config = ground.config("same")
    cache = str(ground.folder / "cache same")
    words = [["train", str(config)]] * 2 + [
        ["train", str(ground.config(name)), "--set", f"data.cache_dir={json.dumps(cache)}"] for name in "x"
    ]
    if ground.ranks > 1:
        words = [[*given, "--gpus", ",".join(["cpu"] * ground.ranks)] for given in words]
    told = [ground.folder / f"start-{number}.txt" for number in range(len(words))]
    pids = [forked(lambda given=given: cli.main(given), file) for given, file in zip(words, told)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(codes[:2]) == [0, 2] and codes[2:] == [0], [file.read_text("utf-8") for file in told]
    for code, file in zip(codes, told):
        text = file.read_text(encoding="utf-8")
        assert code == 0 or ("\n  -> " in text and "Traceback" not in text and "same" in text)
    for name in ("same", "x"):
        assert ground.facts(name) == whole
        ground.forget(name)


def caption(data: Path) -> None:
    """Of the same length, and the file says that it was never changed."""
    file = data / "1.txt"
    status = file.stat()
    file.write_text("Picture 1", encoding="utf-8")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "caption": caption,
    "picture": lambda data: shutil.copy(data / "0.png", data / "2.png"),
    "added": lambda data: [shutil.copy(data / f"0.{end}", data / f"9.{end}") for end in ("png", "txt")],
    "removed": lambda data: [(data / f"3.{end}").unlink() for end in ("png", "txt")],
    "captions swapped": lambda data: [
        (data / "1.txt").rename(data / "x"),
        (data / "2.txt").rename(data / "1.txt"),
        (data / "x").rename(data / "2.txt"),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_data_set_is_refused_and_the_right_one_goes_on(
    ground: Ground, whole: Facts, change: str
) -> None:
    name = f"data {change}"
    run = interrupted(ground, name)
    data = ground.folder / "data"
    kept = Path(shutil.copytree(data, ground.folder / "kept"))
    CHANGES[change](data)
    before = {path: path.read_bytes() for path in files_of(run) if "control" not in path.parts}
    said = resumed(ground, name)
    shutil.rmtree(data)
    kept.rename(data)
    assert (
        said.code == 2
        and "not those this run began with" in said.text
        and "\n  -> put them back" in said.text
    )
    assert {path: path.read_bytes() for path in files_of(run) if "control" not in path.parts} == before
    if change == "caption":
        goes_on(ground, whole, name)
    ground.forget(name)


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["events.jsonl", "checkpoints/checkpoint-6", "final"])
def test_a_disk_that_takes_nothing_any_more_is_told(
    ground: Ground, whole: Facts, reason: int, where: str
) -> None:
    """Read-only from one moment to the next, another's, or broken."""
    name = f"refused {Path(where).name.partition('.')[0]} {reason}"
    run = interrupted(ground, name)
    call = {"events.jsonl": "write", "final": "replace"}.get(where, "rename")
    disk = Disk([run], Write(call, where if where != "final" else ground.final, 1), reason=reason)
    with on(disk):
        said = resumed(ground, name)
    assert disk.hit or ground.ranks > 1, "ranks are other processes"
    assert said.code == 1 and os.strerror(reason) in said.text and "\n  -> " in said.text, said.text
    assert "checkpoint-4" in whole_checkpoints(run)
    goes_on(ground, whole, name)


def test_nothing_of_a_read_only_run_is_needed_to_look_at_it(ground: Ground, whole: Facts) -> None:
    disk = Disk([ground.folder], Write("create", "out/whole/control/lock", 1), reason=errno.EROFS)
    (ground.run("whole") / "control" / "lock").unlink(missing_ok=True)
    with on(disk):
        assert RunFolder(ground.run("whole")).status() == "finished"
        assert say("watch", ground.run("whole"), "--once").code == 0
