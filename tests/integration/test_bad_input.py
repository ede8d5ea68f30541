"""What a naive or hostile user can do through the command line: one clear message, the right exit code, nothing lost.

Every case goes through `whitetuner.cli.main`, the way it is typed. A message says what, where and how to mend; a traceback
would surface here as an exception. `untouched` holds that nothing of the user's was changed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("word", ["train", "check", "cache"])
def test_a_config_that_is_not_there_or_a_folder_or_no_text(place: Place, word: str) -> None:
    place.config("near")
    place.say(word, place.folder / "nope.toml").told(USE, "no such file", "near.toml")
    if word != "check":  # check takes folders
        place.say(word, place.folder / "data").told(USE, "this is a folder", "config.toml")
    place.say(word, place.folder / "data" / "0.png").told(USE, "not UTF-8")


def test_bom_and_windows_line_ends_are_read(place: Place) -> None:
    path = place.config("bom")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert place.say("check", path, "--no-model").code == 0


@pytest.mark.parametrize("path", [r"C:\Users\me\model", r"C:\train\new"], ids=["no escape", "valid escapes"])
def test_backslashes_show_the_single_quoted_form(place: Place, path: str) -> None:
    """Also where every backslash happens to begin a valid escape, and the text would silently hold a tab."""
    file = place.folder / "backslash.toml"
    file.write_text(
        f'[model]\nfamily = "flux2-klein"\npath = "{path}"\n[data]\nimages = "x"\n', encoding="utf-8"
    )
    place.say("train", file).told(USE, "backslash", "line 3", "single quotes", "'C:\\")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('run.steps="100"', ("run.steps", "without quotes")),
        ("run.steps=0", ("run.steps", "at least 1")),
        ("run.stepz=3", ("run.stepz", "did you mean run.steps?")),
        ("modle.path=x", ("modle", "did you mean model?")),
        ("method.kind=lockr", ('did you mean "lokr"?',)),
        ("optimizer.lr=nan", ("optimizer.lr", "finite")),
        ("run.name=a/b", ("run.name", "folder name")),
        ("model.family=flux2-kline", ("model.family", "flux2-klein")),
        ("memory.device=bogus", ("memory.device",)),
        ("run.steps", ("--set", "section.key=value")),
    ],
)
def test_wrong_values_are_told_with_their_key(place: Place, setting: str, words: tuple[str, ...]) -> None:
    with untouched(place.folder / "data"):
        place.say("train", place.config("values"), "--set", setting).told(USE, *words)
    assert not (place.folder / "out" / "values").exists()


@pytest.mark.parametrize("word", ["check", "train"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optimizer.name=adamv", ("optimizer.name", "adamw")),
        ("optimizer.name=nomodule:X", ("optimizer.name", "nomodule")),
        ("optimizer.args={foo=1}", ("optimizer.args", "foo")),
        ("method.targets=['nothing.*']", ("method.targets", "matches no layer")),
        ("preview.prompts=[{text='x', size=[65, 64]}]", ("preview.prompts[0].size", "[64, 64]")),
        ("data.resolution=65", ("not a multiple of 16", "64 or 80")),
        ("data.batch_size=64", ("data.batch_size", "at most 4")),
    ],
)
def test_what_only_the_model_tells_is_told_before_it_loads(
    place: Place, setting: str, words: tuple[str, ...], word: str
) -> None:
    said = place.say(word, place.config("early"), "--set", setting)
    said.told(USE, *words)
    assert "loading the model" not in said.out and "encoding" not in said.out
    shutil.rmtree(place.folder / "out" / "early", ignore_errors=True)


def test_a_gpu_that_is_not_there(place: Place) -> None:
    place.say("train", place.config("gpu"), "--gpus", "97").told(ENVIRONMENT, "GPU 97", "'cpu'")
    place.say("train", place.config("gpu"), "--gpus", "0,1").told(USE, "several devices")


# -- pictures and captions ---------------------------------------------------------------------------------------------


def png_bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(9999)))
        + chunk(b"IEND", b"")
    )


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SETS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no images": (lambda d: [path.unlink() for path in d.iterdir()], ("no pictures",)),
    "caption missing": (lambda d: (d / "1.txt").unlink(), ("1.png", "no caption file", "default_caption")),
    "gbk": (
        lambda d: (d / "1.txt").write_bytes("红色的狗坐在草地上".encode("gbk")),
        ("1.txt", "--convert-captions"),
    ),
    "zero bytes": (lambda d: (d / "1.png").write_bytes(b""), ("1.png", "0 bytes")),
    "truncated": (lambda d: half(d / "1.png"), ("1.png", "cut off")),
    "web page": (lambda d: (d / "1.png").write_bytes(b"<html>404"), ("1.png", "web page")),
    "noise": (lambda d: (d / "1.png").write_bytes(bytes(range(250))), ("1.png", "unknown format")),
    "bomb": (
        lambda d: (d / "1.png").write_bytes(png_bomb(60000, 60000)),
        ("1.png", "60000 x 60000", "megapixels"),
    ),
    "same stem": (lambda d: Image.open(d / "1.png").save(d / "1.jpg"), ("1.jpg", "1.png", "same name")),
    "too small": (lambda d: Image.new("RGB", (3, 3)).save(d / "1.png"), ("1.png", "3 x 3", "upscale")),
}


@pytest.mark.parametrize("case", SETS)
def test_a_data_set_with_a_fault_is_refused_by_check_and_train_alike(place: Place, case: str) -> None:
    break_it, words = SETS[case]
    name = f"set {case}"
    data = place.data(name)
    break_it(data)
    config = place.config("sets", **{"data.images": str(data)})
    with untouched(data):
        place.say("check", config, "--no-model").told(USE, *words)
        said = place.say("train", config)
        said.told(USE, *words)
    assert "loading the model" not in said.out


def test_damage_that_only_decoding_shows_stops_caching_with_the_file_named(place: Place) -> None:
    data = place.data("flipped")
    raw = bytearray((data / "1.png").read_bytes())
    raw[2000:2100] = bytes(100)
    (data / "1.png").write_bytes(raw)
    config = place.config("flipped", **{"data.images": str(data)})
    place.say("check", config, "--no-model", "--deep").told(USE, "1.png", "damaged")
    place.say("train", config).told(USE, "1.png", "damaged")


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


# -- the model ---------------------------------------------------------------------------------------------------------


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def weights(model: Path, part: str) -> Path:
    return next((model / part).glob("*.safetensors"))


def another_class(model: Path) -> None:
    file = model / "transformer" / "config.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**document, "_class_name": "ZImageTransformer2DModel"}), encoding="utf-8")


def other_size(model: Path) -> None:
    other = model.with_name(model.name + " 9b")
    registry.make_tiny("flux2-klein", str(other), "base-9b")
    shutil.copy(weights(other, "transformer"), weights(model, "transformer"))


def pickled(model: Path) -> None:
    weights(model, "transformer").unlink()
    torch.save({}, model / "transformer" / "diffusion_pytorch_model.bin")


def wrong_shape(model: Path) -> None:
    rewrite(weights(model, "transformer"), lambda t: t.update({"x_embedder.weight": torch.zeros(3, 3)}))


def write(*parts: str, text: str) -> Callable[[Path], object]:
    return lambda model: model.joinpath(*parts).write_text(text, encoding="utf-8")


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no transformer": (
        lambda m: shutil.rmtree(m / "transformer"),
        ("no part 'transformer'", "model.transformer"),
    ),
    "no vae": (lambda m: shutil.rmtree(m / "vae"), ("no part 'vae'",)),
    "no text encoder": (lambda m: shutil.rmtree(m / "text_encoder"), ("no part 'text_encoder'",)),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), ("no part 'tokenizer'",)),
    "no index": (lambda m: (m / "model_index.json").unlink(), ("model_index.json is missing",)),
    "another class": (another_class, ("ZImageTransformer2DModel",)),
    "config a list": (
        write("transformer", "config.json", text="[]"),
        ("transformer", "config.json cannot be read"),
    ),
    "text config torn": (write("text_encoder", "config.json", text="{oops"), ("text_encoder", "config.json")),
    "tokenizer torn": (
        write("tokenizer", "tokenizer.json", text="{oops"),
        ("tokenizer.json cannot be read",),
    ),
    "scheduler torn": (write("scheduler", "scheduler_config.json", text="{"), ("scheduler_config.json",)),
    "transformer torn": (lambda m: half(weights(m, "transformer")), ("cut off", "download it again")),
    "vae torn": (lambda m: half(weights(m, "vae")), ("vae", "cut off")),
    "text encoder torn": (lambda m: half(weights(m, "text_encoder")), ("text_encoder", "cut off")),
    "zero bytes": (lambda m: weights(m, "vae").write_bytes(b""), ("0 bytes",)),
    "no weights": (lambda m: weights(m, "transformer").unlink(), ("holds no weights",)),
    "pickle": (pickled, ("pickle",)),
    "other size": (other_size, ("config.json does not have", "another model or size")),
    "wrong shape": (wrong_shape, ("x_embedder.weight", "shape")),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_broken_model_folder_is_told_by_check_train_and_sample_before_anything_is_made(
    place: Place, case: str
) -> None:
    break_it, words = MODELS[case]
    model = place.model(f"model {case}")
    break_it(model)
    config = place.config("models", **{"model.path": str(model)})
    place.say("check", config).told(USE, *words)
    place.say("train", config).told(USE, *words)
    assert not (place.folder / "out" / "models").exists()
    said = place.say("sample", model, "--size", "64x64", "--steps", "1", "--out", place.folder / "never.png")
    assert said.code == USE and not (place.folder / "never.png").exists()
    shutil.rmtree(model)


@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("transformer", "attn.to_q.weight", ("transformer_blocks.0.attn.to_q", "not finite", "damaged")),
        ("vae", "encoder.conv_in.weight", ("'vae'", "0.png", "not finite")),
        ("text_encoder", "q_proj.weight", ("'text'", "picture", "not finite")),
    ],
)
def test_nan_in_weights_names_the_part_and_blames_no_picture(
    place: Place, part: str, tensor: str, words: tuple[str, ...]
) -> None:
    model = place.model(f"nan {part}")
    rewrite(
        weights(model, part),
        lambda t: next(v for k, v in t.items() if k.endswith(tensor)).view(-1)[:1].fill_(torch.nan),
    )
    said = place.say("train", place.config(f"nan-{part}", **{"model.path": str(model)}))
    said.told(FAILED, *words)
    assert "was saved" not in said.out
    if part != "vae":  # drawing uses the other half of it
        out = place.folder / f"{part}.png"
        place.say("sample", model, "--size", "64x64", "--steps", "1", "--out", out).told(FAILED, "not finite")
        assert not out.exists()


# -- the run's folder --------------------------------------------------------------------------------------------------


def test_a_second_start_says_both_ways_out_and_touches_nothing(place: Place, finished: Path) -> None:
    with untouched(finished):
        said = place.say("train", place.folder / "finished.toml")
        said.told(USE, "--resume latest", "--set run.name=finished-2")


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        file = checkpoint / "training_state.json"
        document = json.loads(file.read_text(encoding="utf-8"))
        change(document)
        file.write_text(json.dumps(document), encoding="utf-8")

    return apply


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no state": lambda c: (c / "training_state.json").unlink(),
    "state a list": lambda c: (c / "training_state.json").write_text("[]", encoding="utf-8"),
    "state no text": lambda c: (c / "training_state.json").write_bytes(b"\xff\xfe"),
    "odd entry": damage(lambda d: d["files"].update({"lokr/lokr.safetensors": 3})),
    "no files": damage(lambda d: d.update(files={})),
    "outside": damage(lambda d: d["files"].update({"../../x": {"bytes": 1, "sha256": ""}})),
    "adapter gone": lambda c: (c / "lokr" / "lokr.safetensors").unlink(),
    "adapter torn": lambda c: half(c / "lokr" / "lokr.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_latest_takes_the_one_before(
    place: Place, finished: Path, case: str
) -> None:
    name = f"damaged-{case.replace(' ', '-')}"
    run = Path(shutil.copytree(finished, finished.with_name(name)))
    newest = run / "checkpoints" / "checkpoint-4"
    DAMAGES[case](newest)
    config = place.config(name, **{"run.steps": 5, "save.every": 2, "save.keep": 0})
    with untouched(run):
        place.say("train", config, "--resume", newest).told(FAILED, "checkpoint-4", "--resume latest")
    said = place.say("train", config, "--resume", "latest")
    assert said.code == 0 and "goes on from step 2" in said.out and "checkpoint-4" in said.out
    assert (run / "checkpoints" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("where", ["nope", "data", "out/finished", "latets"])
def test_resume_from_what_is_no_checkpoint_names_those_there_are(
    place: Place, finished: Path, where: str
) -> None:
    with untouched(finished):
        said = place.say("train", place.folder / "finished.toml", "--resume", place.folder / where)
        said.told(USE, "no checkpoint", "checkpoint-4", "latest")


def test_resume_from_another_runs_checkpoint(place: Place, finished: Path) -> None:
    config = place.config("other")
    assert place.say("train", config).code == 0
    with untouched(finished, place.folder / "out" / "other"):
        said = place.say("train", config, "--resume", finished / "checkpoints" / "checkpoint-2")
        said.told(USE, "belongs to another run", "method.init_from")


@pytest.mark.parametrize(
    "setting",
    [
        "method.factor=2",
        "data.batch_size=1",
        "run.seed=7",
        "noise.shift=2.0",
        "data.images=DATA",
        "data.images=NONE",
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(place: Place, finished: Path, setting: str) -> None:
    """config.toml, run.json and the events too: the command in the next message must still work."""
    other = place.folder / "other data"
    if not other.exists():
        place.data("other data")
    setting = setting.replace("DATA", str(other)).replace("NONE", str(place.folder / "none"))
    with untouched(finished):
        said = place.say(
            "train",
            place.folder / "finished.toml",
            "--resume",
            "latest",
            "--set",
            "run.steps=6",
            "--set",
            setting,
        )
        said.told(USE)


@pytest.mark.parametrize("text", ["{oops", "[]", "{}"])
def test_a_damaged_run_json_is_told(place: Place, finished: Path, text: str) -> None:
    run = Path(shutil.copytree(finished, finished.with_name("no-json"), dirs_exist_ok=True))
    (run / "run.json").write_text(text, encoding="utf-8")
    place.say("train", place.config("no-json"), "--resume", "latest").told(USE, "run.json is damaged")


@pytest.mark.parametrize(
    "blocked", ["run", "cache", "checkpoints", "final", "samples", "tensorboard", "events.jsonl"]
)
def test_something_in_the_way_is_named(place: Place, blocked: str) -> None:
    name = f"blocked-{blocked}"
    more = {
        "save.every": 1,
        "preview.every": 1,
        "preview.prompts": [{"text": "a", "steps": 1}],
        "log.tensorboard": True,
    }
    run = place.folder / "out" / name
    (run.parent if blocked == "run" else run).mkdir(parents=True, exist_ok=True)
    file = {"run": run, "cache": place.folder / "cache in the way"}.get(blocked, run / blocked)
    if blocked == "events.jsonl":
        file.mkdir()
    else:
        file.write_text("mine", encoding="utf-8")
    if blocked == "cache":
        more["data.cache_dir"] = str(file)
    code = ENVIRONMENT if blocked in ("run", "cache") else FAILED
    place.say("train", place.config(name, **more)).told(code, str(file))
    assert file.is_dir() if blocked == "events.jsonl" else file.read_text(encoding="utf-8") == "mine"


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


@pytest.mark.parametrize("word", ["stop", "watch"])
@pytest.mark.parametrize("where", ["data", "nope", "data/0.png"])
def test_stop_and_watch_want_a_run(place: Place, word: str, where: str) -> None:
    with untouched(place.folder / "data"):
        place.say(word, place.folder / where).told(USE, "no run's folder")


# -- adapter files -----------------------------------------------------------------------------------------------------


def adapter_files(folder: Path, good: Path) -> dict[str, Path]:
    """Files that are no adapter for this model, by what is wrong with them."""
    folder.mkdir(exist_ok=True)
    made = {
        name: folder / f"{name}.safetensors"
        for name in ("torn", "empty", "page", "pickle", "stranger", "nan", "shapes")
    }
    made["torn"].write_bytes(good.read_bytes()[:-100])
    made["empty"].write_bytes(b"")
    made["page"].write_bytes(b"<html>" * 99)
    torch.save({"a": torch.zeros(2)}, made["pickle"])
    save_file({"foo.weight": torch.zeros(3)}, made["stranger"])
    tensors = load_file(good)
    save_file({key: value * torch.nan for key, value in tensors.items()}, made["nan"])
    save_file(
        {key: torch.zeros(8, 8) if key.endswith("w1") else value for key, value in tensors.items()},
        made["shapes"],
    )
    return {**made, "missing": folder / "missing.safetensors", "folder": folder}


ADAPTERS = ["torn", "empty", "page", "pickle", "stranger", "nan", "missing", "folder"]


@pytest.mark.parametrize("case", [*ADAPTERS, "shapes"])
def test_an_adapter_file_that_is_none_is_refused_everywhere(place: Place, finished: Path, case: str) -> None:
    good = finished / "final" / "lokr" / "lokr.safetensors"
    file = adapter_files(place.folder / "adapters", good)[case]
    out = place.folder / "never.safetensors"
    if case != "shapes":  # a good file of another model
        place.say("export", file, out, "--to", "comfyui").told(USE, str(file))
        assert not out.exists()
    if case in ("torn", "empty", "page", "pickle", "missing", "folder"):
        place.say("inspect", file).told(USE, str(file))
    else:
        assert place.say("inspect", file).code == 0
    picture = place.folder / "never.png"
    place.say("sample", place.folder / "model", "--adapter", file, "--size", "64x64", "--out", picture).told(
        USE
    )
    assert not picture.exists()
    place.say("train", place.config("from"), "--set", f"method.init_from='{file}'").told(USE)
    assert not (place.folder / "out" / "from").exists()


def test_export_keeps_its_source(place: Place, finished: Path) -> None:
    good = finished / "final" / "lokr" / "lokr.safetensors"
    with untouched(finished):
        place.say("export", good, good, "--to", "diffusers").told(USE, "same file")


# -- drawing and small words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "65x64"), ("--size", "64x64")),
        (("--size", "big"), ("WIDTHxHEIGHT",)),
        (("--size", "0x0"), ("--size",)),
        (("--size", "1000000x1000000"), ("--size", "8192")),
        (("--steps", "0"), ("--steps",)),
        (("--cfg", "nan"), ("--cfg",)),
        (("--seed", "-1"), ("--seed",)),
        (("--strength", "inf"), ("--strength",)),
        (("--out", "picture.xyz"), ("--out", ".png")),
        (("--image", "a.png"), ("--image",)),
        (("--family", "nope"), ("flux2-klein",)),
    ],
)
def test_numbers_and_names_to_draw_with_are_checked_before_the_model_loads(
    place: Place,
    words: tuple[str, ...],
    said: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    place.say("sample", place.folder / "model", *words).told(USE, *said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["nope", "data", "data/0.png"])
def test_sample_wants_a_model_or_a_run(place: Place, what: str) -> None:
    place.say("sample", place.folder / what).told(USE, "model.path")


def test_small_words_overwrite_nothing(place: Place) -> None:
    config = place.config("kept")
    with untouched(place.folder / "data", place.folder / "model"):
        place.say("tiny", "flux2-klein", place.folder / "data").told(USE, "not empty")
        place.say("tiny", "flux2-klein", place.folder / "model").told(USE, "not empty")
        before = config.read_bytes()
        place.say("init", "nano-lokr", "-o", config).told(USE, "there already")
        assert config.read_bytes() == before
        place.say("init", "nano-lokr", "-o", place.folder / "no" / "dir" / "x.toml").told(
            ENVIRONMENT, "x.toml"
        )
        place.say("testdata", "t2i", place.folder / "data" / "0.png", "--count", "1").told(
            ENVIRONMENT, "0.png"
        )


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
@pytest.mark.parametrize("size", ["8k", "12k", "20k", "32k", "64k", "128k", "160k", "200k", "300k"])
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
