"""A run that begins at a checkpoint of another: what it takes along, what it may change, and that the other one stays."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from whitetuner import recipe
from whitetuner.checkpoint import store
from whitetuner.cli import main
from whitetuner.config.load import load_config
from whitetuner.config.migrate import FORMAT
from whitetuner.errors import UserError
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.forking import fork
from whitetuner.gui.pickers import Roots
from whitetuner.gui.run_state import Runs
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.jobs import Job
from whitetuner.tiny import tiny_values


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, saved at every second."""
    folder = tmp_path_factory.mktemp("fork")
    registry.make_tiny("flux2-klein", str(folder / "model"))
    for name, count in (("data", 5), ("other", 3)):
        (folder / name).mkdir()
        for index in range(count):
            pixels = np.random.default_rng([len(name), index]).integers(0, 255, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
            (folder / name / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    values: dict[str, Any] = tiny_values("flux2-klein", folder / "model", folder / "data", folder / "out")
    values |= {"run.name": "whole", "run.steps": 6, "save.every": 2, "save.keep": 0, "optimizer.ema": 0.9}
    return recipe.run(load_config(None, base=values)).folder


def go_on(run: Path, at: int | None, *overrides: str) -> Path:
    loaded, _ = fork(run, at, overrides)
    return recipe.run(loaded, resume="latest").folder


def all_of(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(path.relative_to(folder).as_posix().encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def test_a_fork_that_changes_nothing_is_the_run_itself_to_the_bit(whole: Path) -> None:
    before = all_of(whole)
    made = go_on(whole, 2)
    assert made.name == "whole-fork-2" and made.parent == whole.parent
    assert digest(checkpoint(made, 6)) == digest(checkpoint(whole, 6))
    assert losses(made) == losses(whole)[2:] and len(losses(made)) == 4
    final = "final/lokr/lokr.safetensors"
    assert (made / final).stat().st_size
    assert all_of(whole) == before
    origin = RunFolder(made).document()["forked_from"]
    assert (made / origin["run"]).resolve() == whole.resolve() and origin["step"] == 2


def test_other_data_noise_and_rate_are_learned_from_and_resumed(whole: Path) -> None:
    other = f"data.images={json.dumps(str(whole.parents[1] / 'other'))}"
    changes = (other, "run.name=other", "run.seed=7", "optimizer.lr=0.003", "noise.timesteps=linear")
    _, told = (answer := fork(whole, None, (*changes, "run.steps=8")))
    assert any("optimizer.lr" in line for line in told) and any("run.seed" in line for line in told)
    made = recipe.run(answer[0], resume="latest").folder
    assert [step for step, *_ in losses(made)] == [7, 8]
    hashes = [RunFolder(one).document()["resolved"]["data_hash"] for one in (whole, made)]
    assert hashes[0] != hashes[1]
    again = load_config(made / "config.toml", ["run.steps=9"])
    assert recipe.run(again, resume="latest").step == 9
    with pytest.raises(UserError, match="not those this run began with"):
        back = load_config(made / "config.toml", [other.replace("other", "data"), "run.steps=10"])
        recipe.run(back, resume="latest")


@pytest.mark.parametrize(
    "at, overrides, words",
    [
        (3, (), "this run has: 2, 4, 6"),
        (6, (), "reached already"),
        (2, ("method.rank=3",), "method.rank"),
        (2, ('method.kind="lora"',), "method.kind"),
        (2, ('optimizer.name="adafactor"',), "optimizer.name"),
        (2, ("run.name=whole",), "already"),
        (2, ('memory.dtype="bf16"',), "memory.dtype"),
        (2, ("run.setps=9",), "run.steps"),
    ],
)
def test_what_a_checkpoint_cannot_take_is_refused_and_nothing_is_made(
    whole: Path, at: int, overrides: tuple[str, ...], words: str
) -> None:
    before = {path.name for path in whole.parent.iterdir()}
    with pytest.raises(UserError) as caught:
        fork(whole, at, overrides)
    assert words in str(caught.value)
    assert {path.name for path in whole.parent.iterdir()} == before


def test_a_damaged_checkpoint_and_a_folder_that_is_no_run_are_told(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run's folder"):
        fork(tmp_path, None)
    made = go_on(whole, 4, "run.name=torn")
    file = next((made / "checkpoints" / "checkpoint-6").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="torn"):
        fork(made, 6, ("run.steps=8",))


def test_the_word_makes_it_and_trains_it(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fork", str(whole), "--at", "4", "--set", "run.name=typed", "--set", "optimizer.lr=0.002"]
    assert main([*words, "--no-start"]) == 0
    assert "optimizer.lr" in capsys.readouterr().out
    assert main(["train", str(whole.parent / "typed" / "config.toml"), "--resume", "latest"]) == 0
    assert [step for step, *_ in losses(whole.parent / "typed")] == [5, 6]
    assert main(words) == 2 and "already" in capsys.readouterr().err


def test_the_report_and_the_page_lay_the_first_runs_curve_under_it(
    whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = go_on(whole, 4, "run.name=drawn")
    assert "whole, until step 4" in (made / "report.html").read_text(encoding="utf-8")
    assert "until step" not in (whole / "report.html").read_text(encoding="utf-8")
    monkeypatch.setenv("WHITETUNER_STATE", str(tmp_path))
    job = Job(run=str(made), config="c.toml", cwd=str(whole.parent))
    runs, roots = Runs(), Roots.of(None)
    found = runs.origin(job, roots)
    assert found is not None and found[0].folder.path.name == "whole" and found[1] == 4
    curve = runs.reader(replace(job, run=str(whole))).curve()
    assert found[0].mean() == {key: curve[key] for key in ("step", "smooth")}
    assert runs.origin(replace(job, run=str(whole)), roots) is None
    assert runs.origin(job, Roots.of([tmp_path])) is None
    RunFolder(made).update(forked_from={"run": "../gone", "step": 4, "run_id": "x"})
    assert runs.origin(job, roots) is None


def rewrite_state(path: Path, **changes: Any) -> dict[str, Any]:
    """Another content for a checkpoint's state file, whole as far as its hashes tell."""
    file = path / store.STATE_FILE
    state = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    state = {key: value for key, value in state.items() if key != store.OWN_HASH and value is not None}
    state[store.OWN_HASH] = store._own_hash(state)
    file.write_text(json.dumps(state), encoding="utf-8")
    return state


def test_a_run_of_an_earlier_version_goes_on_and_is_forked_to_the_bit(whole: Path) -> None:
    """Its files say what was renamed since in its own words, lack the options that came later, and tell no format."""
    halfway = RunFolder(go_on(whole, 2, "run.name=earlier", "run.steps=4"))
    file = halfway.config_file
    text = file.read_text(encoding="utf-8")
    assert text.startswith(f"format = {FORMAT}\n")
    lines = [
        line for line in text.split("\n") if not line.startswith(("format", "min_snr_gamma", "micro_batch"))
    ]
    text = "\n".join(lines).replace("steps = 4", "steps = 6")
    text = text.replace("[model.options]", '[model.options]\nvariant = "base"')
    file.write_text(text, encoding="utf-8")
    newest = halfway.checkpoints / "checkpoint-4"
    state = json.loads((newest / store.STATE_FILE).read_text(encoding="utf-8"))
    assert state["config_format"] == FORMAT
    config = state["config"]
    config["model"]["options"]["variant"] = "base"
    del config["noise"]["min_snr_gamma"], config["memory"]["micro_batch"]
    rewrite_state(newest, config=config, config_format=None)

    forked = go_on(halfway.path, 4, "run.name=earlier-forked")
    assert main(["train", str(file), "--resume", "latest"]) == 0
    for made in (halfway.path, forked):
        assert digest(checkpoint(made, 6)) == digest(checkpoint(whole, 6))
        assert losses(made)[-2:] == losses(whole)[4:]
    assert load_config(file).notes == ()  # a run that goes on writes its config anew


def test_a_checkpoint_of_a_newer_version_is_refused(whole: Path) -> None:
    made = RunFolder(go_on(whole, 2, "run.name=newer", "run.steps=4"))
    rewrite_state(made.checkpoints / "checkpoint-4", config_format=FORMAT + 1)
    again = load_config(made.config_file, ["run.steps=6"])
    with pytest.raises(UserError, match="newer White Tuner"):
        recipe.run(again, resume="latest")
    with pytest.raises(UserError, match="newer White Tuner"):
        fork(made.path, 4, ["run.steps=6"])
