"""What can be typed wrongly at `plan`: told in a moment, with the mend, before a shape is reckoned."""

from __future__ import annotations

import pytest

from whitetuner import cli, plan_view
from whitetuner.families import registry
from whitetuner.memory.machine import typical_machine
from whitetuner.records import Size


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["zimage", "--vram", "nan"], "--vram"),
        (["zimage", "--vram", "inf"], "--vram"),
        (["zimage", "--vram", "1e9"], "--vram"),
        (["zimage", "--vram", "-8"], "--vram"),
        (["zimage", "--vram", "12", "--host", "nan"], "--host"),
        (["zimage", "--vram", "12", "--host", "-5"], "--host"),
        (["zimage", "--vram", "12", "--size", "0x0"], "--size"),
        (["zimage", "--vram", "12", "--size", "100000x100000"], "--size"),
        (["zimage", "--vram", "12", "--size", "8x8"], "--size"),
        (["zimage", "--vram", "12", "--task", "edit"], "--task"),
        (["zimage", "--set", "memory.bse=int8"], "memory.base"),
        (["zimage", "--set", "method.kind=full", "--set", "memory.base=int8"], "memory.base"),
        (["config.toml", "--size", "64x64"], "--size"),
        (["config.toml", "--task", "t2i"], "--task"),
        (["zimage:nosuch", "--vram", "12"], "zimage:base"),
        (["Z-Image", "--vram", "12"], "zimage"),
        (["qwen-image:edit", "--vram", "24", "--task", "t2i"], "--task"),
        (["qwen-image:t2i", "--vram", "24", "--task", "edit"], "--task"),
    ],
)
def test_what_cannot_be_planned_is_told(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert told in said and "\n  -> " in said


def test_a_family_that_is_not_there_is_told_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "flux3", "--vram", "12"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in registry.FAMILIES)


@pytest.mark.slow
def test_a_size_between_two_is_planned_as_it_is_trained() -> None:
    """Buckets are multiples of the model's stride, and the page asks with whatever resolution was typed."""
    found = plan_view.of_family("flux2-klein", Size(79, 65), None, [typical_machine(12, 32)])
    assert found["shape"].startswith("64x64")
