"""A run's folder and its events: owned by one, whole after a kill, readable by everybody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from whitetuner.config.load import dump_config, load_config
from whitetuner.errors import UserError
from whitetuner.runs import events
from whitetuner.runs.board import Board
from whitetuner.runs.console import Console, duration
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.report import smooth, thin, write_report


def step(number: int, loss: float = 1.0) -> events.StepDone:
    return events.StepDone(
        step=number, loss=loss, lr=1e-4, grad_norm=0.5, seconds=0.1, samples=2, sigmas=[0.1, 0.9], losses=[0.5, 1.5]
    )


def begin(folder: RunFolder) -> None:
    loaded = load_config(None, base={"model.family": "flux2-klein", "run.name": "test", "data.images": "x"})
    folder.begin(dump_config(loaded.config), loaded.document(), origins=dict(loaded.origins))


def finished(path: Path, steps: int = 20) -> RunFolder:
    with RunFolder.open(path, resume=False) as folder:
        begin(folder)
        folder.append(events.RunStarted(name="test", steps=steps))
        for number in range(1, steps + 1):
            folder.append(step(number, 1 / number))
        folder.append(events.Saved(step=steps, path="checkpoints/x", seconds=0.1))
        folder.append(events.Ended(status="finished", step=steps))
    return folder


def test_events_read_back_as_they_were(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    written = [
        events.RunStarted(name="猫", steps=3),
        step(1),
        events.Validation(step=1, loss=0.5, by_sigma={"0.5": 0.5}, seconds=1.0, held_out=True),
        events.Preview(step=1, files=["a.png"], prompts=["x\ny"], seconds=1.0),
        events.Ended(status="finished", step=1),
    ]
    for event in written:
        log.append(event)
    found, offset = events.read(log.path)
    assert found == written and offset == log.path.stat().st_size
    assert events.read(log.path, offset) == ([], offset)


def test_a_torn_last_line_is_passed_over_and_cut_before_the_next(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    log.append(step(1))
    whole = log.path.stat().st_size
    log.append(step(2))
    for size in range(whole + 1, log.path.stat().st_size):
        os.truncate(log.path, size)
        assert [event.step for event in events.read(log.path)[0]] == [1]
        break
    log.mend()
    log.append(step(2))
    assert [event.step for event in events.read(log.path)[0]] == [1, 2]


def test_nan_is_written_as_json(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    log.append(step(1, float("nan")))
    assert "NaN" not in log.path.read_text(encoding="utf-8") and events.read(log.path)[0][0].loss is None


def test_resume_cuts_what_will_happen_again(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    for number in range(1, 7):
        log.append(step(number))
        if number % 2 == 0:
            log.append(events.Saved(step=number, path="x", seconds=0.1))
    log.cut_after(4)
    found = events.read(log.path)[0]
    assert [event.step for event in found if event.kind == "step"] == [1, 2, 3, 4] and found[-1].kind == "saved"
    log.append(events.Ended(status="stopped", step=4))
    log.cut_after(3)  # saved, but killed before it was written down
    assert [event.step for event in events.read(log.path)[0] if event.kind == "step"] == [1, 2, 3]
    log.cut_after(0)
    assert events.read(log.path) == ([], 0)


def test_a_folder_has_one_owner_and_says_who(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        assert folder.running() and folder.owner() == os.getpid()
        with pytest.raises(UserError, match=f"another process \\({os.getpid()}\\)"), RunFolder.open(tmp_path / "r", resume=True):
            pass
    assert not folder.running()


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from whitetuner.runs.folder import RunFolder\n"
        "with RunFolder.open(Path(sys.argv[1]), resume=False): os.kill(os.getpid(), signal.SIGKILL if os.name != 'nt' else 15)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], check=False)
    assert not RunFolder(tmp_path / "r").running()
    with RunFolder.open(tmp_path / "r", resume=False):
        pass


def test_an_unfinished_run_is_not_overwritten_and_both_ways_out_are_shown(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        begin(folder)
    with pytest.raises(UserError) as caught, RunFolder.open(tmp_path / "r", resume=False):
        pass
    assert caught.value.code == 2
    assert "--resume latest" in str(caught.value) and "run.name" in str(caught.value)
    with RunFolder.open(tmp_path / "r", resume=True) as folder:
        assert folder.is_run()


def test_status_tells_a_crash_from_an_end(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        begin(folder)
        folder.append(events.RunStarted(name="test"))
        assert folder.status() == "running"
    assert folder.status() == "crashed"
    assert finished(tmp_path / "f").status() == "finished"


def test_wishes_reach_the_owner_once(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        begin(folder)
        RunFolder(tmp_path / "r").request("save")
        assert folder.take("save") and not folder.take("save") and not folder.asked("stop")


def test_an_output_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"), RunFolder.open(tmp_path / "file" / "r", resume=False):
        pass


def test_the_report_is_one_offline_file_and_stays_small(tmp_path: Path) -> None:
    folder = finished(tmp_path / "r", steps=30)
    log = events.EventLog(folder.events)
    (folder.samples / "step-000000").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder.samples / "step-000000" / "00.png")
    log.append(events.Preview(step=0, files=["samples/step-000000/00.png"], prompts=["<b>&"], seconds=1.0))
    log.append(events.Validation(step=30, loss=0.4, by_sigma={"0.5": 0.4}, seconds=1.0))
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert "data:image/jpeg;base64," in text and "<polyline" in text and "&lt;b&gt;&amp;" in text and "<b>&" not in text
    assert "http" not in text.replace("http-equiv", "") and len(text) < 200_000


def test_long_curves_are_thinned_without_losing_their_mean() -> None:
    points = [(i, float(i % 7)) for i in range(200_000)]
    assert len(thin(points)) <= 800
    assert abs(sum(y for _, y in thin(points)) / len(thin(points)) - 3.0) < 0.05
    assert all(abs(y - 2.0) < 1e-12 for _, y in smooth([(i, 2.0) for i in range(50)]))


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path, steps=3)
    for number in (1, 2, 3):
        board(step(number, 1 / number))
    board(events.Ended(status="finished", step=3))
    assert board.folder.name.startswith("train_3steps_1gpu_")
    found = EventAccumulator(str(board.folder)).Reload()
    assert [round(s.value, 4) for s in found.Scalars("train/loss")] == [1.0, 0.5, 0.3333]
    assert found.Scalars("loss_by_sigma/0.8-1.0")[0].value == 1.5


def test_plain_console_lines_tell_step_loss_and_eta(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(steps=10, plain=True)
    console(step(1))
    console(events.Validation(step=1, loss=0.25, by_sigma={}, seconds=1.0))
    out = capsys.readouterr().out
    assert "step 1/10" in out and "ETA 0:01" in out and "validation loss 0.2500" in out
    assert duration(3700) == "1:01:40" and duration(75) == "1:15"
