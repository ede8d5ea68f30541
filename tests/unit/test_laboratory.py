"""The laboratory (benchmarks/learning): its judges, its cells, its table that goes on, and its page."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.learning import draws, laboratory, laboratory_page, peers, rivals
from benchmarks.learning.concepts import CONCEPTS, draw_duo
from benchmarks.learning.real_width import OURS, summary, whole
from benchmarks.learning.suites import ASKS, SUITES
from benchmarks.learning.table import Table
from benchmarks.learning.teach import Lesson
from diffusers import AutoencoderKLFlux2
from PIL import Image

from whitetuner.config.full import refuse_wrong_full
from whitetuner.errors import UserError
from whitetuner.nano.builtin import builtin_path
from whitetuner.nano.draw import Label, draw_set
from whitetuner.nano.vae import as_tensor

CELLS: dict[str, dict[str, Any]] = {"a": {"optimizer.lr": 1.0}, "b": {"optimizer.lr": 2.0}}


@pytest.mark.parametrize("word", CONCEPTS)
def test_the_judge_of_a_concept_knows_it_and_nothing_else(word: str) -> None:
    concept = CONCEPTS[word]
    drawn = concept.draw(32, 3)
    assert len(drawn) == 32 and all(word in one.caption for one in drawn)
    assert all(concept.right(one.image, one.label) for one in drawn)
    shifted = [concept.right(a.image, b.label) for a, b in zip(drawn, [*drawn[1:], drawn[0]], strict=True)]
    assert sum(shifted) <= 4  # neighbours of the same colours
    known = draw_set(80, 4)
    asked = [Label(drawn[0].label.shape, one.label.colour, one.label.background) for one in known]
    coloured = [
        (a.image, b) for a, b in zip(known, asked, strict=True) if "white" not in (b.colour, b.background)
    ]
    assert len(coloured) > 40 and not any(concept.right(image, label) for image, label in coloured)


@torch.no_grad()
def test_the_models_decoder_can_show_every_concept() -> None:
    """What the judge would refuse of a perfect answer no training could teach."""
    vae = AutoencoderKLFlux2.from_pretrained(builtin_path() / "vae", dtype=torch.float32).eval()
    for concept in CONCEPTS.values():
        drawn = concept.draw(12, 5)
        pictures = torch.stack([as_tensor(one.image) for one in drawn])
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
        seen = ((decoded + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        assert all(concept.right(picture, one.label) for picture, one in zip(seen, drawn, strict=True))


def test_a_duo_with_its_halves_exchanged_is_wrong() -> None:
    assert not any(CONCEPTS["duo"].right(one.image[:, ::-1], one.label) for one in draw_duo(16, 1))


def test_every_cell_is_a_config_of_its_own(tmp_path: Path) -> None:
    lesson = Lesson(tmp_path, "zorp", 20, 12, 4, 4)
    assert set(SUITES) < set(ASKS)
    for cells in SUITES.values():
        assert 1 < len(cells) <= 12
        configs = [lesson.config("cell", 42, changes).config for changes in cells.values()]
        for config in configs:
            refuse_wrong_full(config)
        assert len({config.model_dump_json() for config in configs}) == len(cells)


def test_a_table_that_was_killed_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path, made = tmp_path / "t.json", []

    def make(cell: str, seed: int) -> dict[str, float]:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((cell, seed))
        return {"new": 0.5}

    def table() -> Table:
        return Table(path, CELLS, {"steps": 3}, [1, 2, 3])

    with pytest.raises(KeyboardInterrupt):
        table().fill(make, lambda: False)
    assert made == [("a", 1), ("b", 1), ("a", 2)], "one seed of every cell, then the next"
    assert len(json.loads(path.read_text())["rows"]) == 3
    again: list[tuple[str, int]] = []
    table().fill(lambda cell, seed: again.append((cell, seed)) or {"new": 1.0}, lambda: len(again) == 2)
    assert again == [("b", 2), ("a", 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_rows_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    Table(tmp_path / "t.json", CELLS, {"steps": 3}, [1]).fill(lambda *_: {"new": 0.5}, lambda: False)
    with pytest.raises(UserError, match="other settings"):
        Table(tmp_path / "t.json", CELLS, {"steps": 4}, [1])
    with pytest.raises(UserError, match="other settings"):
        Table(tmp_path / "t.json", {"a": {"optimizer.lr": 3.0}}, {"steps": 3}, [1])


def test_what_a_cell_was_refused_for_is_a_row(tmp_path: Path) -> None:
    def make(cell: str, seed: int) -> dict[str, float]:
        if cell == "a":
            raise UserError("the loss is {value}", value="NaN")
        return {"new": 0.5, "old": 0.75, "validation_before": 0.2, "validation": 0.1, "seconds_per_step": 0.2}

    settings = {"suite": "kinds", "concept": "zorp", "steps": 3, "batch": 2, "judged_new": 4, "judged_old": 4}
    table = Table(tmp_path / "t.json", CELLS, settings, [1, 2])
    table.document |= {"before": {"new": 0.0, "old": 1.0}, "environment": {"command": "python"}}
    table.fill(make, lambda: False)
    text = laboratory_page.section("t", table.document)
    assert "| a | failed | | | | 0 of 2 |" in text and "- a, seed 2: the loss is NaN" in text
    assert "| b | 50 % ± 0 | 75 % ± 0 | 0.1000 ± 0.0000 (0.2000) | 0.20 | 2 of 2 |" in text


def test_the_page_is_what_the_tables_say() -> None:
    """`python -m benchmarks.learning.laboratory --write-docs` writes it."""
    assert laboratory_page.PAGE.read_text(encoding="utf-8") == laboratory_page.page()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and cache are the same for all."""
    return tmp_path_factory.mktemp("laboratory")


def options(folder: Path, table: str, *words: str) -> argparse.Namespace:
    own = ["--steps", "2", "--seeds", "1", "--batch", "2", "--judged", "1", "1"]
    return laboratory.parser_for("").parse_args(
        [*own, "--folder", str(folder), "--result", str(folder / f"{table}.json"), *words]
    )


@pytest.mark.slow
def test_a_suite_trains_its_cells_and_never_one_twice(folder: Path) -> None:
    given = options(folder, "kinds", "--only", "LoKr factor 4")
    given.suite = "kinds"
    (row,) = laboratory.run(given).document["rows"]
    assert row["cell"] == "LoKr factor 4" and row["new"] in (0, 1) and 0 < row["validation"] < 1
    assert sorted(path.name for path in (folder / "zorp").iterdir()) == [
        "cache",
        "config.toml",
        "data",
        "more",
    ]
    assert laboratory.run(given).document["rows"] == [row], "seconds would differ had it been trained again"


@pytest.mark.slow
def test_rivals_that_start_with_our_numbers_learn_what_ours_learn(folder: Path) -> None:
    names = [
        name
        for name in rivals.RIVALS
        if ("White" in name or "our start" in name) and "as the script" not in name
    ]
    rows = rivals.run(options(folder, "rivals", "--only", *names)).document["rows"]
    losses = {row["cell"]: row["validation"] for row in rows}
    assert len(losses) == len(names) == 5
    for kind in ("LoRA", "LoKr"):
        same = [loss for name, loss in losses.items() if name.startswith(kind)]
        assert max(same) - min(same) <= 2e-5, losses  # told to five digits
        assert min(abs(loss - rows[0]["validation_before"]) for loss in same) > 1e-4, "nothing was learned"


@pytest.mark.slow
def test_what_was_learned_is_the_batches_whoever_learns(folder: Path) -> None:
    """Ours and the script's arithmetic over the same batches: one adapter, to the rounding of 32 bit."""
    lesson = Lesson(folder / "zorp", "zorp", 4, 6, 1, 1)
    lesson.prepare()
    our_rates, script_rates = draws.schedules(lesson, 3)
    assert script_rates(3) == pytest.approx(our_rates(3))
    own, _ = draws.ours_recorded(lesson, 3)
    plain, _ = draws.theirs_over(lesson, own, our_rates)
    again, _ = draws.ours_over(lesson, 3, own, our_rates)
    assert draws.apart(plain, own["end"]) < 1e-4 and draws.apart(again, own["end"]) == 0.0
    assert draws.apart(own["start"], own["end"]) > 0.1, "nothing was learned"
    other, _ = draws.theirs_over(lesson, own, lambda step: 0.5 * our_rates(step))
    assert draws.apart(other, own["end"]) > 0.1


THEIR_SCRIPT = """
import sys
import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms import functional as TF
from torchvision.transforms import transforms as again

assert again.Resize is transforms.Resize

table = load_dataset(sys.argv[1])["train"]
assert len(table["image"]) == len(table["text"]) == 8 and len(set(table["text"])) == 5, table["text"]
image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
assert TF.resize(image, [8, 6], interpolation=transforms.InterpolationMode.BILINEAR).size == (6, 8)
top, left, height, width = transforms.RandomCrop.get_params(image, output_size=(2, 3))
assert TF.crop(image, top, left, height, width).size == (3, 2) == TF.center_crop(image, (2, 3)).size
whole = TF.pil_to_tensor(image)
assert torch.equal(TF.crop(whole, 1, 0, 2, 3), whole[:, 1:3, :3]) and transforms.Resize((4, 4))(whole) is whole
pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])(image)
assert torch.equal(pixels, TF.normalize(TF.to_tensor(image), [0.5], [0.5]))
image.save(sys.argv[1] + "/one.png")
assert torch.equal(read_image(sys.argv[1] + "/one.png", ImageReadMode.RGB), whole)
transforms.ColorJitter(brightness=0.2)
pixels = TF.normalize(TF.to_tensor(TF.hflip(image)), [0.5], [0.5])
assert pixels.shape == (3, 4, 4) and torch.equal(pixels[:, 0, 3], torch.tensor([0.0, 1.0, 2.0]) / 127.5 - 1)
"""


def test_the_stand_ins_do_what_a_foreign_script_asks_of_them(tmp_path: Path) -> None:
    """The script itself is run by hand, where a checkout of diffusers is: docs of benchmarks/learning/rivals.py."""
    for name, count in (("new", 1), ("old", 4)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / "data" / name / f"{number}.png")
            (tmp_path / "data" / name / f"{number}.txt").write_text(f"{name} {number}\n", encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(THEIR_SCRIPT, encoding="utf-8")
    words = [sys.executable, "-m", "benchmarks.learning.theirs", str(script), str(tmp_path / "data")]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src")])
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_script_is_told_our_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rivals.SCRIPT not in rivals.cells()
    monkeypatch.setenv("DIFFUSERS_DIR", str(folder))
    assert rivals.SCRIPT in rivals.cells()
    lesson = laboratory.lesson_of(options(folder, "rivals"))
    lesson.folder.mkdir(parents=True, exist_ok=True)
    words = rivals.script_words(lesson, 42, folder / "out")
    given = dict(pairwise(words))
    assert given["--logit_mean"] == "-0.6" and given["--learning_rate"] == "0.004" and given["--rank"] == "16"
    assert given["--lr_warmup_steps"] == str(min(20, lesson.steps // 10))
    with pytest.raises(UserError, match="there is no"):
        rivals.script_taught(lesson, 42)


def test_a_trainer_is_a_cell_where_its_checkout_is_and_told_our_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not {*peers.PEERS} & {*rivals.cells()}
    lesson = laboratory.lesson_of(options(folder, "rivals", "--batch", "12", "--steps", "10"))
    lesson.folder.mkdir(parents=True, exist_ok=True)
    cell = "LoRA 16: OneTrainer"
    monkeypatch.setenv("ONETRAINER_DIR", str(folder / "nowhere"))
    assert {*peers.PEERS} & {*rivals.cells()} == {cell}
    with pytest.raises(UserError, match="no checkout of OneTrainer"):
        rivals.made(lesson, cell, 42)
    told = peers.told(lesson, 42, {"method.kind": "lora", "method.rank": 16}, ["a.b"], folder / "out")
    assert told["rank"] == 16 and told["noise_mean"] == 0.6 and told["betas"] == [0.9, 0.99], told
    assert json.loads(json.dumps(told)) == told


def test_a_run_draws_each_picture_as_often_as_another(tmp_path: Path) -> None:
    for name, count in (("new", 4), ("old", 8)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.png").touch()
    given = {
        "data": [str(tmp_path / name) for name in ("new", "old")],
        "seed": 42,
        "steps": 40,
        "batch": 10,
        "caption_dropout": 0.1,
    }
    drawn = peers.drawn(given)
    counts = Counter(file for file, _ in drawn)
    assert len(drawn) == 400 and {counts[file] for file in counts if file.parent.name == "new"} == {50}
    assert {counts[file] for file in counts if file.parent.name == "old"} == {25}
    assert 20 <= sum(not kept for _, kept in drawn) <= 60 and drawn == peers.drawn(given)


def test_whole_programs_are_compared_within_a_round() -> None:
    rows = [
        {"name": name, "round": number, "step": step, "short": 1.0, "peak_gb": 2.0, "steps_gb": held}
        for name, number, step, held in (
            (OURS, 0, 2.0, 1.0),
            ("other", 0, 4.0, 2.0),
            (OURS, 1, 6.0, 1.0),
            ("other", 1, 12.0, 4.0),
        )
    ]
    found = summary(rows)
    assert found[OURS]["time"] == found[OURS]["memory"] == 1
    assert found["other"]["time"] == 0.5 and found["other"]["memory"] == 0.375 and found["other"]["step"] == 8


def test_a_program_is_watched_to_its_end_and_a_failed_one_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seconds, held = whole([sys.executable, "-c", "import time; a = b'x' * 3 * 10**7; time.sleep(0.5)"])
    assert seconds > 0.5 and max(gb for _, gb in held) > 0.03
    with pytest.raises(UserError, match="no room"):
        whole([sys.executable, "-c", "raise SystemExit('no room')"])
