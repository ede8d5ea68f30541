"""What a naive or hostile user can do through the command line and what becomes of it, beyond one message and one exit code.

Those are in tests/corpus, with their table in docs/bad-input.md. Here is what takes several commands, or succeeds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from whitetuner import cli
from whitetuner.config.load import dump_config, load_config
from whitetuner.families import registry
from whitetuner.tiny import tiny_values

USE, FAILED, ENVIRONMENT = 2, 1, 3


@dataclass
class Said:
    """What one word of the command line answered."""

    code: int
    out: str
    err: str

    def told(self, code: int, *words: str) -> None:
        """It ended with this code, and with a message that has a mend and these words; no traceback."""
        text = self.out + self.err
        assert self.code == code, text
        missing = [word for word in words if word not in text]
        assert not missing, f"{missing} not in:\n{text}"
        assert "Traceback" not in text and "\n  -> " in text


@dataclass
class Place:
    """A folder with a tiny model (`model`), four captioned pictures (`data`) and room for configs and runs."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    def config(self, name: str, **more: Any) -> Path:
        """A config of a run of two steps, with dotted changes."""
        values = tiny_values("flux2-klein", self.folder / "model", self.folder / "data", self.folder / "out")
        values |= {"run.name": name, "run.steps": 2, "data.caption_dropout": 0.0, **more}
        path = self.folder / f"{name}.toml"
        path.write_text(dump_config(load_config(None, base=values).config), encoding="utf-8")
        return path

    def say(self, *words: object) -> Said:
        self.capture.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = int(str(error.code))
        return Said(code, *self.capture.readouterr())

    def model(self, name: str) -> Path:
        """A copy of the model to break."""
        return Path(shutil.copytree(self.folder / "model", self.folder / name))

    def data(self, name: str, count: int = 3) -> Path:
        return pictures(self.folder / name, count)


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bad")
    registry.make_tiny("flux2-klein", str(folder / "model"))
    pictures(folder / "data", 4)
    return folder


@pytest.fixture
def place(ground: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(ground, capsys)


@pytest.fixture(scope="module")
def finished(ground: Path) -> Path:
    """The folder of a finished run of four steps with checkpoints 2 and 4."""
    values = tiny_values("flux2-klein", ground / "model", ground / "data", ground / "out")
    values |= {"run.name": "finished", "run.steps": 4, "save.every": 2, "data.caption_dropout": 0.0}
    config = ground / "finished.toml"
    config.write_text(dump_config(load_config(None, base=values).config), encoding="utf-8")
    assert cli.main(["train", str(config)]) == 0
    return ground / "out" / "finished"


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", "pid")
    }


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    before = [contents(folder) for folder in folders]
    yield
    assert [contents(folder) for folder in folders] == before


# -- the config file ---------------------------------------------------------------------------------------------------


def test_bom_and_windows_line_ends_are_read(place: Place) -> None:
    path = place.config("bom")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert place.say("check", path, "--no-model").code == 0


# -- pictures and captions ---------------------------------------------------------------------------------------------


def test_one_picture_trains_alone_and_a_larger_batch_says_so(place: Place) -> None:
    config = place.config("one", **{"data.images": str(place.data("one picture", 1))})
    for word in ("check", "train"):
        place.say(word, config).told(USE, "data.batch_size", "at most 1")
    assert place.say("train", config, "--set", "data.batch_size=1").code == 0


def test_an_empty_caption_is_a_warning(place: Place) -> None:
    data = place.data("empty caption")
    (data / "1.txt").write_text("", encoding="utf-8")
    said = place.say("check", place.config("emptycap", **{"data.images": str(data)}), "--no-model")
    assert said.code == 0 and "empty" in said.out and "1.txt" in said.out


def test_captions_are_converted_where_they_can_be_and_the_others_told(place: Place) -> None:
    data, text = place.data("convert"), "一只红色的狗坐在草地上"
    (data / "1.txt").write_bytes(text.encode("gbk"))
    (data / "2.txt").write_bytes(b"\xff\xfe\x00")
    config = place.config("convert", **{"data.images": str(data)})
    place.say("check", config, "--no-model", "--convert-captions").told(
        USE, "2.txt", "1.txt.bak", "--encoding"
    )
    assert (data / "1.txt").read_text(encoding="utf-8").strip() == text
    assert (data / "1.txt.bak").read_bytes() == text.encode("gbk")
    assert (data / "2.txt").read_bytes() == b"\xff\xfe\x00"
    (data / "2.txt").unlink()
    assert place.say("train", config, "--set", 'data.default_caption="a dog"').code == 0


def test_spaces_chinese_and_emoji_in_every_path(place: Place) -> None:
    folder = place.folder / "我的 数据 🐱"
    shutil.copytree(place.folder / "model", folder / "模型 🎨")
    config = place.config(
        "训练 一 🚀",
        **{
            "model.path": str(folder / "模型 🎨"),
            "data.images": str(pictures(folder / "图 片", 3)),
            "run.output_dir": str(folder / "输出 é"),
            "data.cache_dir": str(folder / "缓存"),
            "preview.every": 2,
            "preview.prompts": [{"text": "一只猫 🐱", "steps": 1}],
        },
    )
    assert place.say("check", config).code == 0
    assert place.say("train", config).code == 0
    run = folder / "输出 é" / "训练 一 🚀"
    assert (run / "final" / "训练 一 🚀.safetensors").is_file() and (run / "report.html").is_file()
    assert place.say("sample", run, "--size", "64x64", "--steps", "1", "--out", folder / "画.png").code == 0
    assert (folder / "画.png").is_file()


# -- the run's folder --------------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_fails_neither_run_nor_check(place: Place) -> None:
    config = place.config("no-report")
    (place.folder / "out" / "no-report" / "report.html").mkdir(parents=True)
    said = place.say("train", config)
    assert said.code == 0 and "report.html cannot be written" in said.out
    (place.folder / "out" / "check" / "no-report" / "report.html").mkdir(parents=True)
    place.say("check", config).told(USE, "4 of 4 pictures can be used", "report cannot be written")


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the first run is forked from a process that has torch loaded"
)
def test_two_runs_into_one_folder_and_a_start_after_kill_9(place: Place) -> None:
    config = place.config("twice", **{"run.steps": 100_000, "save.every": 20})
    run = place.folder / "out" / "twice"
    child = forked(lambda: cli.main(["train", str(config)]), place.folder / "twice.txt")
    try:
        until = time.monotonic() + 60
        while not list(run.glob("checkpoints/checkpoint-*")):
            assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < until
            time.sleep(0.05)
        place.say("train", config).told(USE, f"({child})", "run.name=twice-2", "whitetuner stop")
        place.say("train", config, "--resume", "latest").told(USE, "is training into this folder")
        place.say("sample", run).told(USE, "no final file")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with untouched(run):
        place.say("train", config).told(USE, "not finished", "--resume latest", "run.name=twice-2")
        said = place.say("stop", run)
        assert said.code == USE and "nothing is running" in said.err
        assert place.say("stop", run, "--now").code == USE


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


# -- a full disk, a folder of somebody else ----------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of this size; yields what changes it. Skips where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
    )
    if not done or done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield (
            lambda options: (
                subprocess.run([str(mount), "-o", f"remount,{options}", str(folder)], check=True) and None
            )
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_the_disk_fills_up_while_caching(place: Place) -> None:
    with small_disk(place.folder / "disk", "20k") as remount:
        config = place.config("full-cache", **{"data.cache_dir": str(place.folder / "disk" / "cache")})
        for word in ("cache", "train"):
            place.say(word, config).told(FAILED, "disk", "data.cache_dir", "what is encoded stays")
        remount("size=4m")
        assert place.say("train", config).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", ["8k", "64k", "200k"])
def test_the_disk_fills_up_while_training_and_with_room_it_goes_on(place: Place, size: str) -> None:
    """Whatever does not fit: config, events, previews, curves, checkpoints, final files, report."""
    more = {"run.steps": 6, "save.every": 2, "save.keep": 0, "preview.every": 3, "log.tensorboard": True}
    more |= {
        "preview.prompts": [{"text": "a", "steps": 1}],
        "data.cache_dir": str(place.folder / "out" / "cache"),
    }
    with small_disk(place.folder / "disk", size) as remount:
        config = place.config(f"full-{size}", **more, **{"run.output_dir": str(place.folder / "disk")})
        place.say("train", config).told(FAILED, str(place.folder / "disk"))
        run = place.folder / "disk" / f"full-{size}"
        saved = {path.name: contents(path) for path in run.glob("checkpoints/checkpoint-*")}
        remount("size=4m")
        assert place.say("train", config, "--resume", "latest").code == 0
        assert {name: contents(run / "checkpoints" / name) for name in saved} == saved
        assert (run / "final" / f"full-{size}.safetensors").is_file()


@pytest.mark.slow
def test_a_read_only_disk(place: Place, finished: Path) -> None:
    disk = place.folder / "disk"
    with small_disk(disk, "1m") as remount:
        remount("ro")
        place.say("train", place.config("ro", **{"run.output_dir": str(disk)})).told(
            ENVIRONMENT, "run.output_dir"
        )
        place.say("train", place.config("ro2", **{"data.cache_dir": str(disk / "c")})).told(
            ENVIRONMENT, "data.cache_dir"
        )
        good = finished / "final" / "lokr" / "lokr.safetensors"
        place.say("export", good, disk / "x.safetensors", "--to", "diffusers").told(FAILED, "x.safetensors")
        place.say("tiny", "flux2-klein", disk / "t").told(ENVIRONMENT, str(disk))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to become somebody else in a child")
def test_another_users_output_folder(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    config = place.config("foreign")
    assert (
        place.say("train", config, "--set", "run.name=own").code == 0
    )  # all that is imported late is there now
    base = Path(tempfile.gettempdir()).resolve()
    for folder in (place.folder, *place.folder.parents):
        if base in folder.resolve().parents:
            folder.chmod(0o755)
    for file in (place.folder / "model").rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for their owner alone
    told = place.folder / "foreign.txt"

    state = place.folder / "state of nobody"
    state.mkdir(mode=0o777)
    state.chmod(0o777)

    def as_nobody() -> int:
        os.environ["WHITETUNER_STATE"] = str(state)
        os.setgid(65534)
        os.setuid(65534)
        return cli.main(["train", str(config)])

    child = forked(as_nobody, told)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Said(code, "", told.read_text(encoding="utf-8")).told(ENVIRONMENT, "run.output_dir", "foreign")
    assert not (place.folder / "out" / "foreign").exists()
