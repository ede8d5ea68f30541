"""What is wrong with an adapter, a text or the place of a picture is told before a model is loaded for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from whitetuner import cli, drawing
from whitetuner.config.load import load_config
from whitetuner.data.samples import make_testdata
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.tiny import tiny_values


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and lokr.safetensors of a run of one step."""
    from whitetuner import recipe

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sample")
    registry.make_tiny("flux2-klein", str(folder / "model"))
    make_testdata("t2i", folder / "data", 2, 0)
    values = tiny_values("flux2-klein", folder / "model", folder / "data", folder)
    result = recipe.run(load_config(None, base={**values, "run.steps": 1}))
    (folder / "lokr.safetensors").write_bytes(result.final[-1].read_bytes())
    return folder


def refused(place: Path, **given: object) -> UserError:
    """What is said; no part of the model was loaded for it."""

    def load(*_: object) -> None:
        raise AssertionError("encoded before everything was looked at")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "encode_prompts", load)
        with pytest.raises(UserError) as told:
            drawing.sample(str(place / "model"), **{"out": place / "drawn.png", **given})  # type: ignore[arg-type]
    assert told.value.where and told.value.mend and not (place / "drawn.png").exists()
    return told.value


def test_an_adapter_of_another_size_is_told_by_its_file(place: Path) -> None:
    tensors = load_file(place / "lokr.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, place / "other.safetensors")
    said = refused(place, adapter=place / "other.safetensors")
    assert said.where == str(place / "other.safetensors") and "another model size" in said.what


def test_an_adapter_of_whole_numbers_is_none(place: Path) -> None:
    tensors = load_file(place / "lokr.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, place / "whole.safetensors")
    assert "whole numbers" in refused(place, adapter=place / "whole.safetensors").what


def test_a_place_that_cannot_be_is_told(place: Path) -> None:
    (place / "file").write_text("mine", encoding="utf-8")
    assert "no file can be written" in refused(place, out=place / "file" / "drawn.png").what
    assert (place / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("word", ["prompt", "negative"])
def test_a_text_that_the_terminal_broke_is_told(place: Path, word: str) -> None:
    assert refused(place, **{word: "a\udcc3 cat"}).where == f"--{word}"


def test_a_setting_that_the_terminal_broke_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[model]\nfamily = "flux2-klein"\n[data]\nimages = "x"\n', encoding="utf-8")
    assert cli.main(["train", str(config), "--set", 'data.prompt="\udcc3"']) == 2
    assert "no text" in capsys.readouterr().err
