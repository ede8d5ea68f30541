"""Memory that runs out is told with a way on by every word that computes, on the card and on the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from whitetuner import captioning, cli, drawing, prepared
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.samples import make_testdata
from whitetuner.families import registry
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

FAULTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    registry.make_tiny("flux2-klein", str(folder / "model"))
    make_testdata("t2i", folder / "data", 2, 0)
    values = tiny_values("flux2-klein", folder / "model", folder / "data", folder)
    text = dump_config(load_config(None, base={**values, "run.name": "run"}).config)
    (folder / "config.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=["card", "machine", "python"])
def test_memory_that_runs_out_is_told(
    fault: Exception, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise fault

    for module, name in ((prepared, "_cache"), (drawing, "encode_prompts"), (captioning, "open_reader")):
        monkeypatch.setattr(module, name, full)
    config, model, data = str(place / "config.toml"), str(place / "model"), str(place / "data")
    drawn = ["sample", model, "--size", "64x64", "--out", str(place / "drawn.png")]
    for words in (
        ["train", config],
        ["cache", config],
        drawn,
        ["caption", data, "--model", model, "--overwrite"],
    ):
        capsys.readouterr()
        assert cli.main(words) == 1, words
        said = capsys.readouterr().err
        assert "ran out of memory" in said and "\n  -> " in said, words
    last = events.read(place / "run" / "events.jsonl")[0][-1]
    assert isinstance(last, events.Failed) and "out of memory" in last.reason


def test_another_fault_is_not_called_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(prepared, "_cache", fault)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["cache", str(place / "config.toml")])
