"""Wrong words and numbers on the command line."""

from __future__ import annotations

import os

from case import ENVIRONMENT, Case, Place, Typed

AREA = "command line"


def _draw(fault: str, *words: str, says: tuple[str, ...], code: int = 2) -> Case:
    def make(place: Place) -> list[Typed]:
        given = [word.format(folder=place.folder) for word in words]
        out = [] if "--out" in words else ["--out", place.folder / "never.png"]
        return [["sample", place.folder / "model", *out, *given]]

    return Case(AREA, fault, make, says, code)


def _typed(fault: str, *words: str, says: tuple[str, ...], code: int = 2) -> Case:
    return Case(AREA, fault, lambda place: [[word.format(folder=place.folder) for word in words]], says, code)


CASES = [
    _typed("fetching what is no name of a hub", "fetch", "./model", says=("modelscope:ORG/MODEL",)),
    _typed("a word that there is not", "trian", says=("train",)),
    _typed("an option that there is not", "train", "x.toml", "--fast", says=("--fast",)),
    _typed("an argument is missing", "train", says=("config",)),
    _typed("a number that is none", "tiny", "flux2-klein", "{folder}/t", "--seed", "x", says=("--seed",)),
    _draw("a size between the model's", "--size", "65x64", says=("--size", "64x64")),
    _draw("a size that is a word", "--size", "big", says=("--size", "WIDTHxHEIGHT")),
    _draw("a size of nothing", "--size", "0x0", says=("--size",)),
    _draw("a size of a million pixels a side", "--size", "1000000x1000000", says=("--size", "8192")),
    _draw("no denoising steps", "--steps", "0", says=("--steps",)),
    _draw("guidance that is no number", "--cfg", "nan", says=("--cfg",)),
    _draw("a negative seed", "--seed", "-1", says=("--seed",)),
    _draw("an endless strength", "--strength", "inf", says=("--strength",)),
    _draw("frames for a model of pictures", "--frames", "9", says=("--frames",)),
    _draw("a picture format that is not written", "--out", "picture.xyz", says=("--out", ".png")),
    _draw(
        "a picture inside a file", "--out", "{folder}/finished.toml/x.png", says=("--out",), code=ENVIRONMENT
    ),
    _draw("a given picture for text to image", "--image", "a.png", says=("--image",)),
    _draw("a family that is not known", "--family", "sdxl", says=("flux2-klein",)),
    _draw("half a character in the prompt", "--prompt", "a\udcc3 cat", says=("--prompt", "UTF-8")),
    _typed("drawing with a folder of pictures", "sample", "{folder}/data", says=("data",)),
    _typed("drawing with what is not there", "sample", "{folder}/nope", says=("nope",)),
    _typed("a tiny model over pictures", "tiny", "flux2-klein", "{folder}/data", says=("not empty",)),
    _typed(
        "a tiny model of a family that is not known",
        "tiny",
        "sdxl",
        "{folder}/t",
        says=("sdxl", "flux2-klein"),
    ),
    _typed(
        "a tiny model of a variant that is not known",
        "tiny",
        "flux2-klein",
        "{folder}/t",
        "--variant",
        "xl",
        says=("xl", "base-4b"),
    ),
    _typed("a preset that there is not", "init", "nano", says=("nano", "nano-lokr")),
    _typed(
        "a config over one that is there",
        "init",
        "nano-lokr",
        "-o",
        "{folder}/finished.toml",
        says=("there already",),
    ),
    _typed(
        "a config in a folder that is not there",
        "init",
        "nano-lokr",
        "-o",
        "{folder}/no/dir/x.toml",
        says=("x.toml",),
        code=ENVIRONMENT,
    ),
    _typed("a config for a folder that is not there", "init", "--tiny", "{folder}/nope", says=("--tiny",)),
    _typed(
        "a config from a file that is no trainer's", "init", "--from", "{folder}/data/0.txt", says=("0.txt",)
    ),
    _typed(
        "a config from a file that is not there", "init", "--from", "{folder}/nope.yaml", says=("nope.yaml",)
    ),
    _typed(
        "test data over a file",
        "testdata",
        "t2i",
        "{folder}/data/0.png",
        "--count",
        "1",
        says=("0.png",),
        code=ENVIRONMENT,
    ),
    _typed(
        "test data of a negative number", "testdata", "t2i", "{folder}/t", "--count", "-1", says=("--count",)
    ),
    _typed(
        "a plan of a family that is not known", "plan", "flux3", "--vram", "12", says=("flux3", "flux2-klein")
    ),
    _typed(
        "a plan of a variant that is not known",
        "plan",
        "zimage:nosuch",
        "--vram",
        "12",
        says=("zimage:base",),
    ),
    _typed("a plan in another spelling", "plan", "Z-Image", "--vram", "12", says=("zimage",)),
    *(
        _typed(f"a plan for a card of {given} GB", "plan", "zimage", "--vram", given, says=("--vram",))
        for given in ("nan", "inf", "1e9", "-8")
    ),
    *(
        _typed(
            f"a plan for a machine of {given} GB",
            "plan",
            "zimage",
            "--vram",
            "12",
            "--host",
            given,
            says=("--host",),
        )
        for given in ("nan", "-5")
    ),
    *(
        _typed(
            f"a plan for {given} pixels", "plan", "zimage", "--vram", "12", "--size", given, says=("--size",)
        )
        for given in ("0x0", "100000x100000", "8x8", "wide")
    ),
    _typed(
        "a plan of a task that the family does not have",
        "plan",
        "zimage",
        "--vram",
        "12",
        "--task",
        "edit",
        says=("--task",),
    ),
    _typed(
        "a plan of a task of another variant",
        "plan",
        "qwen-image:edit",
        "--vram",
        "24",
        "--task",
        "t2i",
        says=("--task",),
    ),
    _typed(
        "a plan with a misspelt setting", "plan", "zimage", "--set", "memory.bse=int8", says=("memory.base",)
    ),
    _typed(
        "a plan of full training over a quantised base",
        "plan",
        "zimage",
        "--set",
        "method.kind=full",
        "--set",
        "memory.base=int8",
        says=("memory.base",),
    ),
    _typed(
        "a plan of a config with a size",
        "plan",
        "{folder}/finished.toml",
        "--size",
        "64x64",
        says=("--size",),
    ),
    _typed(
        "captions by a model that is not there",
        "caption",
        "{folder}/data",
        "--ext",
        ".caption",
        "--model",
        "{folder}/nope",
        says=("nope",),
    ),
    _typed(
        "captions by a folder of pictures",
        "caption",
        "{folder}/data",
        "--ext",
        ".caption",
        "--model",
        "{folder}/data",
        says=("data",),
    ),
    _typed(
        "captions for what is not there",
        "caption",
        "{folder}/nope",
        "--model",
        "{folder}/model",
        says=("nope",),
    ),
    _typed(
        "captions of no length",
        "caption",
        "{folder}/data",
        "--model",
        "{folder}/model",
        "--max-tokens",
        "0",
        says=("--max-tokens",),
    ),
    _typed("a bug report about nothing", "doctor", "--run", "{folder}/out/finished", says=("--bundle",)),
    _typed("a page on a port that there is not", "gui", "--port", "99999", says=("port",), code=ENVIRONMENT),
    _typed(
        "a page with a password file that is not there",
        "gui",
        "--listen",
        "0.0.0.0",
        "--password-file",
        "{folder}/nope",
        says=("nope",),
    ),
    _typed("a self-test of a family that is not known", "selftest", "sdxl", says=("sdxl", "flux2-klein")),
    _typed(
        "a demo of a family that is not known",
        "demo",
        "sdxl",
        "--out",
        "{folder}/d",
        says=("sdxl", "flux2-klein"),
    ),
    _typed(
        "a demo of a task that the family does not have",
        "demo",
        "zimage",
        "--task",
        "edit",
        "--out",
        "{folder}/d",
        says=("edit",),
    ),
    *(
        []
        if os.name == "nt"
        else [
            _typed(
                "a config whose name is no UTF-8",
                "train",
                os.fsdecode(b"caf\xe9.toml"),
                says=("no such file",),
            )
        ]
    ),
]
