"""`demo` of every family, variant and task: from a random tiny model and drawn data to a picture and the files, in a minute."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from whitetuner.cli import main
from whitetuner.config.landed import not_landed
from whitetuner.data.video import look
from whitetuner.families import registry
from whitetuner.records import Size

#: Tasks whose feature is not there yet are refused; the day it lands, their demos are tests.
REFUSED = not_landed().get("model.task")
EVERY = [
    (name, variant, task)
    for name in registry.FAMILIES
    for variant in registry.spec(name).variants
    for task in registry.spec(name).tasks_of(variant)
    if REFUSED is None or task in ("t2i", *REFUSED)
]
PROVED = {(name, *pair) for name in registry.FAMILIES for pair in registry.spec(name).pairs()}
#: Variants of one architecture differ in numbers alone; those of the contract suite are enough for every day.
CASES = [
    pytest.param(*one, marks=[] if one in PROVED else pytest.mark.slow, id="-".join(one)) for one in EVERY
]


@pytest.mark.parametrize(("family", "variant", "task"), CASES)
def test_a_demo_learns_draws_and_leaves_its_files(
    family: str, variant: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    out, began = tmp_path / "demo", time.perf_counter()
    assert main(["demo", f"{family}:{variant}", "--task", task, "--out", str(out)]) == 0
    assert time.perf_counter() - began < 60
    assert "MISSED" not in capsys.readouterr().out
    if task in ("i2v", "t2v"):
        assert look(out / "sample.mp4").size == Size(64, 64, 5)
        assert look(out / "run/samples/step-000030/00.mp4").size == Size(64, 64, 5)
    else:
        assert Image.open(out / "sample.png").size == (64, 64)
    suffixes = ("_high_noise", "_low_noise") if variant.endswith("v-2.2") else ("",)
    finals = [f"run/final/run{suffix}.safetensors" for suffix in suffixes]
    for file in ("config.toml", "run/report.html", "run/samples/step-000030/00.png", *finals):
        assert (out / file).is_file(), file
    assert main(["check", str(out / "config.toml")]) == 0  # the config it leaves behind is a whole one
