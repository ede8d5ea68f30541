"""The words of the command line, as a new user types them, over a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from whitetuner.cli import WORDS, main
from whitetuner.families import registry
from whitetuner.parser import GROUPS, make_parser

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spaces, Chinese and an emoji in its name: model/, pictures/, config.toml and a finished run."""
    folder = tmp_path_factory.mktemp("a b") / "图 🎨"
    folder.mkdir()
    assert main(["tiny", "flux2-klein", str(folder / "model")]) == 0
    assert main(["testdata", "t2i", str(folder / "pictures"), "--count", "5"]) == 0
    config = folder / "config.toml"
    assert main(["init", "--tiny", str(folder / "model"), "-o", str(config)]) == 0
    more = [
        "run.name=猫",
        "run.steps=3",
        f"data.images={folder / 'pictures'}",
        f"run.output_dir={folder / 'out'}",
    ]
    assert main(["train", str(config), *(word for one in more for word in ("--set", one))]) == 0
    return folder


def test_every_word_is_in_a_group_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    words = make_parser().word_help  # type: ignore[attr-defined]
    assert set(words) == {word for group in GROUPS.values() for word in group} == set(WORDS)
    for word in words:
        with pytest.raises(SystemExit) as caught:
            main([word, "--help"])
        assert caught.value.code == 0
    assert main([]) == 2
    assert "Try:" in capsys.readouterr().out


def test_the_run_left_what_the_seed_promised(place: Path) -> None:
    run = place / "out" / "猫"
    for path in (
        "config.toml", "run.json", "events.jsonl", "report.html", "final/猫.safetensors", "final/lokr/lokr.safetensors",
        "final/lokr/lokr_diffusers.safetensors", "checkpoints/checkpoint-3/lokr/lokr.safetensors",
        "checkpoints/checkpoint-3/accelerate_state/optimizer.safetensors", "checkpoints/checkpoint-3/training_state.json",
    ):  # fmt: skip
        assert (run / path).is_file(), path
    workflow = json.loads((run / "final" / "猫_comfyui.json").read_text(encoding="utf-8"))
    assert any(node["inputs"].get("lora_name") == "猫.safetensors" for node in workflow.values())
    names = json.loads((run / "run.json").read_text(encoding="utf-8"))["names"]
    assert {one["program"] for one in names.values()} == {"ComfyUI", "diffusers"} and len(names) == 3
    assert all(one["known"] == one["total"] > 0 for one in names.values())
    total = names["final/猫.safetensors"]["total"]
    assert f"{total} of {total} keys known to ComfyUI" in (run / "report.html").read_text(encoding="utf-8")


def test_check_of_a_config_and_of_a_folder(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    pictures = str(place / "pictures")
    assert main(["check", str(place / "config.toml"), "--set", f"data.images={pictures}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["data"]["usable"] == 5 and Path(found["report"]).is_file()
    assert main(["check", pictures, "--deep"]) == 0
    assert "5 of 5 pictures can be used" in capsys.readouterr().out
    (place / "broken").mkdir()
    (place / "broken" / "a.jpg").write_bytes(b"")
    assert main(["check", str(place / "broken")]) == 2


def test_cache_finds_what_the_run_encoded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [f"data.images={place / 'pictures'}", f"run.output_dir={place / 'out'}"]
    assert (
        main(["cache", str(place / "config.toml"), *(word for one in more for word in ("--set", one))]) == 0
    )
    assert "5 pictures are encoded" in capsys.readouterr().out


def test_sample_from_a_run_a_model_and_an_adapter(place: Path) -> None:
    run, model = str(place / "out" / "猫"), str(place / "model")
    draw = ["--size", "64x96", "--steps", "2", "--prompt", "一只猫"]
    assert main(["sample", run, *draw, "--out", str(place / "run.png")]) == 0
    assert main(["sample", model, *draw, "--out", str(place / "base.png")]) == 0
    file = str(place / "out" / "猫" / "final" / "lokr" / "lokr_diffusers.safetensors")
    assert main(["sample", model, *draw, "--adapter", file, "--out", str(place / "adapter.png")]) == 0
    assert (
        main(["sample", model, *draw, "--adapter", file, "--strength", "0", "--out", str(place / "none.png")])
        == 0
    )
    pictures = {
        name: Image.open(place / f"{name}.png").tobytes() for name in ("run", "base", "adapter", "none")
    }
    assert Image.open(place / "run.png").size == (64, 96)
    assert pictures["base"] == pictures["none"]


def test_export_and_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "out" / "猫" / "final" / "猫.safetensors"
    for naming in ("comfyui", "diffusers", "lycoris"):
        target = place / f"{naming}.safetensors"
        assert main(["export", str(file), str(target), "--to", naming]) == 0
        capsys.readouterr()
        assert main(["inspect", str(target), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["family"] == "flux2-klein" and found["kind"] == "lokr"
        assert found["training"]["trained_by"].startswith("White Tuner")


def test_merge_extract_and_resize(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base = str(place / "out" / "猫" / "final" / "猫.safetensors"), str(place / "model")
    one, folder = str(place / "merged.safetensors"), str(place / "merged")
    assert (
        main(["merge", base, adapter, one]) == 0 and main(["export", one, folder, "--to", "diffusers"]) == 0
    )
    assert (place / "merged" / "config.json").is_file()
    capsys.readouterr()
    assert main(["inspect", one, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["what"] == "model" and "ComfyUI" in found["read_by"] and found["naming"] == "original"
    again, small = str(place / "again.safetensors"), str(place / "small.safetensors")
    assert main(["extract", folder, base, again, "--kind", "lokr", "--rank", "2", "--factor", "2"]) == 0
    assert "relative error" in capsys.readouterr().out
    assert main(["resize", again, small, "--rank", "1"]) == 0
    assert "relative error" in capsys.readouterr().out
    for wrong in (
        ["merge", base, adapter, adapter],
        ["merge", base, one, str(place / "x.safetensors")],
        ["export", one, str(place / "x.safetensors"), "--to", "lycoris"],
        ["extract", base, base, str(place / "x.safetensors")],
        ["extract", folder, base, str(place / "x.safetensors"), "--full-matrix"],
        ["export", str(place / "none"), str(place / "x.safetensors"), "--to", "comfyui"],
    ):
        assert main(wrong) == 2
    assert not (place / "x.safetensors").exists() and "Traceback" not in capsys.readouterr().err


def test_watch_and_stop(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(place / "out" / "猫")]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["stop", str(place)]) == 2


def test_families_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == list(registry.FAMILIES)


def test_a_tiny_model_is_drawn_with_as_it_wants_to_be_asked(tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert main(["tiny", "flux2-klein", str(model)]) == 0
    assert main(["sample", str(model), "--steps", "1", "--cfg", "1", "--out", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").size == (64, 64)


@pytest.mark.parametrize("method", ["lokr", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_demo_of_a_family_learns(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "flux2-klein", "--method", method, "--out", str(tmp_path / "demo")]) == 0
    assert "random weights" in capsys.readouterr().out
    assert (tmp_path / "demo" / "config.toml").is_file() and (tmp_path / "demo" / "sample.png").is_file()


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys\nfrom whitetuner.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules and 'pydantic' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr


def test_words_and_flags_quoted_in_the_docs_exist() -> None:
    parser = make_parser()
    words = parser.word_help  # type: ignore[attr-defined]
    own = {"test", "setup"}
    for file in [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for word in re.findall(r"python launch\.py ([a-z]+)", file.read_text(encoding="utf-8")):
            assert word in words or word in own, f"{file.name}: {word}"


@pytest.mark.slow
def test_selftest_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "flux2-klein", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and {row["equality"] for row in found["rows"]} == {
        "E1",
        "E2",
        "E3",
        "E4",
        "E5",
        "E6",
        "E7",
        "E8",
        "E9",
        "E10",
        "E12",
    }


@pytest.mark.slow
def test_the_demo_teaches_the_word(tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    score = json.loads((tmp_path / "demo" / "score.json").read_text(encoding="utf-8"))
    assert (
        score["new_before"] < 0.05
        and score["new_after"] >= 0.8
        and score["old_before"] - score["old_after"] <= 0.1
    )
    for name in ("before_after.png", "timelapse.gif", "loss.png"):
        assert Image.open(tmp_path / "demo" / name).width > 100
