"""Those who only read: the report, the console, TensorBoard."""

from __future__ import annotations

import itertools
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from whitetuner.config.load import dump_config, load_config
from whitetuner.errors import UserError
from whitetuner.runs import events
from whitetuner.runs.board import Board
from whitetuner.runs.console import Console, duration
from whitetuner.runs.curves import Line, chart, smooth, thin, ticks
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.report import write_report


def step(number: int, loss: float = 1.0, seconds: float = 0.1) -> events.StepDone:
    return events.StepDone(
        step=number,
        loss=loss,
        lr=1e-4,
        grad_norm=0.5,
        seconds=seconds,
        samples=2,
        sigmas=[0.1, 0.9],
        losses=[0.5, 1.5],
        weight_change=number / 1e3,
        memory_mb=2048,
    )


def a_run(path: Path, happened: list[events.Event]) -> RunFolder:
    loaded = load_config(
        None, base={"model.family": "flux2-klein", "run.name": "a & cat", "data.sets": [{"images": "猫"}]}
    )
    with RunFolder.open(path, resume=False) as folder:
        folder.begin(dump_config(loaded.config), loaded.document(), origins=dict(loaded.origins))
        folder.events.write_text("".join(map(events.as_line, happened)), encoding="utf-8")
    return folder


def picture(path: Path, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, os.urandom(3 * size[0] * size[1])).save(path)


def test_the_report_is_one_file_that_asks_the_net_for_nothing(tmp_path: Path) -> None:
    happened: list[events.Event] = [
        events.RunStarted(name="cat", steps=40),
        *(step(n, 1 / n) for n in range(1, 41)),
    ]
    happened += [
        events.Preview(
            step=0, files=["samples/0.png", "samples/gone.png"], prompts=["<b>&", "猫"], seconds=1.0
        ),
        events.Validation(step=0, loss=0.8, by_sigma={"0.5": 0.8}, seconds=1.0),
        events.Validation(step=40, loss=0.4, by_sigma={"0.5": 0.4}, seconds=1.0),
        events.Saved(step=40, path="checkpoints/checkpoint-40", seconds=0.1),
        events.Message(level="warning", text="small <batch>"),
        events.Ended(status="finished", step=40),
    ]
    folder = a_run(tmp_path / "r", happened)
    picture(folder.samples / "0.png")
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|url\(|@import|<script", text)
    assert "data:image/jpeg;base64," in text and text.count("<polyline") >= 7
    for said in (
        "&lt;b&gt;&amp;",
        "a &amp; cat",
        "small &lt;batch&gt;",
        "-50.0 %",
        "finished",
        "已完成",
        "checkpoint 40",
        "猫",
    ):
        assert said in text, said
    words = re.sub(r"data:[^\"]*", "", text).replace("name=", "")  # a picture's base64 may hold any letters
    for unsaid in ("<b>&", "<batch>", "nan", "None"):
        assert unsaid not in words, unsaid
    assert "data.sets[0].images" in text and "family default (" in text


def test_the_report_ranks_the_pictures_and_tells_the_gap_at_like_noise_levels(tmp_path: Path) -> None:
    """Step losses are 0.5 at sigma 0.1 and 1.5 at 0.9; steps after the last validation do not count."""
    held = {"0.2": 0.75, "0.8": 2.0}  # -0.25 and -0.5
    ranking = {"cats/<b>.png": 2.25, "猫/a.png": 0.5}
    one = events.Validation(step=2, loss=1.4, by_sigma=held, seconds=1.0, held_out=True, by_picture=ranking)
    folder = a_run(tmp_path / "r", [step(1), step(2), one, replace(step(3), losses=[9.0, 9.0])])
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert "-0.3750" in text and "训练损失减验证损失" in text
    assert text.index("cats/&lt;b&gt;.png") < text.index("2.2500") < text.index("猫/a.png")
    folder = a_run(tmp_path / "seen", [step(1), replace(one, held_out=False, by_picture={})])
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert "训练损失减验证损失" not in text and "Pictures by loss" not in text


@pytest.mark.parametrize(
    ("happened", "said"),
    [
        ([], "ended without a word"),
        ([events.RunStarted(name="cat"), step(1)], "ended without a word"),
        (
            [events.RunStarted(name="cat"), step(1, math.nan), step(2, math.inf), step(3)],
            "ended without a word",
        ),
        ([step(1), events.Failed(reason="the <disk> is full")], "the &lt;disk&gt; is full"),
        ([events.Validation(step=0, loss=math.nan, by_sigma={}, seconds=1)], "held-out"),
    ],
)
def test_a_run_that_went_wrong_has_a_report_too(
    tmp_path: Path, happened: list[events.Event], said: str
) -> None:
    if said == "held-out":
        said = "fixed noise"
    folder = a_run(tmp_path / "r", happened)
    assert said in write_report(folder.path).read_text(encoding="utf-8")


def test_previews_of_a_long_run_are_chosen_evenly_and_the_file_stays_small(tmp_path: Path) -> None:
    happened: list[events.Event] = []
    for number in range(0, 4001, 100):
        files = [f"samples/{number}-{index}.png" for index in range(3)]
        happened.append(events.Preview(step=number, files=files, prompts=["a", "b", "c"], seconds=1.0))
    folder = a_run(tmp_path / "r", happened)
    for event in happened:
        for file in event.files:  # type: ignore[attr-defined]
            picture(folder.path / file, (300, 200))
    path = write_report(folder.path)
    text = path.read_text(encoding="utf-8")
    assert text.count("<img") == 24 and "<th>0</th>" in text and "<th>4000</th>" in text
    assert path.stat().st_size < 1_500_000  # noise compresses worst


def test_a_torn_picture_is_left_out(tmp_path: Path) -> None:
    folder = a_run(
        tmp_path / "r", [events.Preview(step=0, files=["a.png", "b.mp4"], prompts=["x", "y"], seconds=1.0)]
    )
    picture(folder.path / "a.png")
    os.truncate(folder.path / "a.png", 500)
    (folder.path / "b.mp4").write_bytes(b"no picture")
    assert "<img" not in write_report(folder.path).read_text(encoding="utf-8")


def test_a_folder_without_a_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json is missing"):
        write_report(tmp_path)


def test_twenty_thousand_steps_make_a_file_of_a_few_hundred_kilobytes(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r", [step(n, 1 + math.sin(n)) for n in range(1, 20_001)])
    assert write_report(folder.path).stat().st_size < 400_000


def test_curves_are_thinned_without_losing_their_mean() -> None:
    points = [(i, float(i % 7)) for i in range(200_000)]
    assert len(thin(points)) <= 800
    assert abs(sum(y for _, y in thin(points)) / len(thin(points)) - 3.0) < 0.05
    assert thin(points[:800]) == points[:800]
    assert all(abs(y - 2.0) < 1e-12 for _, y in smooth([(i, 2.0) for i in range(50)]))


def test_one_wild_value_does_not_flatten_the_rest() -> None:
    points = [(i, 1.0 + (i % 2)) for i in range(600)]
    points[300] = (300, 1e6)
    heights = [float(y) for y in re.findall(r",(\d+\.\d)", str(chart([Line(points, "red")])))]
    assert max(heights) - sorted(heights)[len(heights) // 2 - 5] > 50


def test_no_measured_point_is_left_out_of_the_axis() -> None:
    curve = Line([(i, 1.0) for i in range(600)], "red")
    tops = [
        float(y)
        for y in re.findall(
            r'cy="(\d+\.\d)"', str(chart([curve, Line([(0, 9.0), (300, 5.0)], "blue", dots=True)]))
        )
    ]
    assert 10.0 < tops[0] < tops[1] - 50


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3e-5, 1e-4), (-2.0, 1e9), (0.4, 0.41)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 * (high - low) <= tick <= high * (1 + 1e-9) for tick in found)
    steps = {round(b - a, 12) for a, b in itertools.pairwise(found)}
    assert max(steps) - min(steps) < 1e-9 * (high - low)


def test_a_curve_of_nothing_is_nothing() -> None:
    assert chart([]) == "" and chart([Line([(1, math.nan), (2, math.nan)], "red")]) == ""
    assert "nan" not in chart([Line([(1, 5.0), (2, 5.0), (3, math.nan)], "red")])


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path, steps=3)
    for number in (1, 2, 3):
        board(step(number, 1 / number))
    board(events.Validation(step=3, loss=0.5, by_sigma={"0.125": 0.25}, seconds=1.0))
    board(events.Ended(status="finished", step=3))
    assert board.folder.name.startswith("train_3steps_1gpu_")
    found = EventAccumulator(str(board.folder)).Reload()
    assert [round(s.value, 4) for s in found.Scalars("train/loss")] == [1.0, 0.5, 0.3333]
    assert [s.step for s in found.Scalars("train/weight_change")] == [1, 2, 3]
    assert found.Scalars("loss_by_sigma/0.8-1.0")[0].value == 1.5
    assert set(found.Tags()["scalars"]) == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/weight_change",
        "train/memory_mb",
        "train/step_time",
        "loss_by_sigma/0.0-0.2",
        "loss_by_sigma/0.8-1.0",
        "validation/loss",
        "validation/sigma_0.12",
    }


def test_reading_and_showing_need_no_torch() -> None:
    import subprocess
    import sys

    names = ["board", "console", "curves", "events", "files", "folder", "report"]
    code = "import sys\n" + "".join(f"import whitetuner.runs.{name}\n" for name in names)
    code += "from whitetuner.runs.board import Board; from whitetuner.runs import events; import tempfile, pathlib\n"
    code += "board = Board(pathlib.Path(tempfile.mkdtemp()), 1)\n"
    code += "board(events.Validation(step=1, loss=1.0, by_sigma={}, seconds=1.0)); board.close()\n"
    code += "import whitetuner.config.load, whitetuner.config.reference\n"
    code += "assert not {'torch', 'diffusers', 'transformers', 'tensorflow'} & set(sys.modules), sorted(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plain_lines_tell_step_loss_pace_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(plain=True)
    console(events.RunStarted(name="cat", steps=10))
    console(events.Phase(name="cache vae", total=10))
    console(events.Phase(name="train", total=10))
    console(step(1))
    console(events.Validation(step=1, loss=0.25, by_sigma={}, seconds=60.0))
    console(events.Preview(step=1, files=["a"], prompts=["a"], seconds=600.0))
    console(events.Saved(step=1, path="x", seconds=600.0))
    console(step(10))
    console(events.Ended(status="finished", step=10))
    out = capsys.readouterr().out
    assert "step 1/10" in out and "ETA 0:01" in out, (
        "previews, validation and saving are not in the time left"
    )
    assert "encoding: vae\ntraining\n" in out
    assert "20.0 samples/s" in out and "validation loss 0.2500" in out and "step 10/10" in out
    assert out.endswith("finished at step 10\n") and "\x1b" not in out


def test_one_slow_step_does_not_spoil_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(steps=20, plain=True)
    console(step(1, seconds=300.0))
    for number in range(2, 21):
        console(step(number))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.index("ETA") < 30, "a narrow terminal cuts the end off"
    assert "0.10 s/step" in last and "ETA 0:00" in last


def test_plain_lines_do_not_flood_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(steps=500, plain=True)
    for number in range(1, 501):
        console(step(number))
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 5 and lines[0].startswith("step 1/") and lines[-1].startswith("step 500/")


def test_durations_are_readable() -> None:
    assert (duration(3700), duration(75), duration(0.2)) == ("1:01:40", "1:15", "0:00")
