"""A run's folder: owned by one, never overwritten, its state told from its files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whitetuner.config.load import dump_config, load_config
from whitetuner.errors import EXIT_ENVIRONMENT, EXIT_USE, UserError
from whitetuner.runs import events
from whitetuner.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
STEP = events.StepDone(step=1, loss=1.0, lr=1e-4, grad_norm=0.5, seconds=0.1, samples=2)


def begin(folder: RunFolder, *happened: events.Event) -> dict[str, object]:
    loaded = load_config(None, base={"model.family": "flux2-klein", "run.name": "test", "data.images": "x"})
    document = folder.begin(dump_config(loaded.config), loaded.document(), origins=dict(loaded.origins))
    for event in (events.RunStarted(name="test"), *happened):
        folder.append(event)
    return document


def made(path: Path, *happened: events.Event) -> RunFolder:
    with RunFolder.open(path, resume=False) as folder:
        begin(folder, *happened)
    return folder


def refused(path: Path, **more: object) -> UserError:
    with pytest.raises(UserError) as caught, RunFolder.open(path, **{"resume": False, **more}):  # type: ignore[arg-type]
        pass
    return caught.value


def test_a_folder_has_one_owner_and_says_who(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        assert folder.running() and folder.owner() == os.getpid()
        error = refused(tmp_path / "r", resume=True)
        assert error.code == EXIT_USE and f"another process ({os.getpid()})" in str(error)
        assert f"whitetuner stop {tmp_path / 'r'}" in str(error)
    assert not folder.running() and folder.owner() is None


def test_a_look_at_the_folder_does_not_keep_the_next_owner_out(tmp_path: Path) -> None:
    made(tmp_path / "r", STEP)
    looking = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from filelock import FileLock\n"
            "with FileLock(Path(sys.argv[1]) / 'control' / 'lock'):\n    print('in', flush=True); time.sleep(0.4)",
            str(tmp_path / "r"),
        ],
        stdout=subprocess.PIPE,
    )
    assert looking.stdout is not None and looking.stdout.readline().strip() == b"in"
    with RunFolder.open(tmp_path / "r", resume=True):
        pass
    looking.communicate()


def test_a_killed_owner_leaves_no_lock_and_a_crashed_run(tmp_path: Path) -> None:
    made(tmp_path / "r", STEP)
    code = (
        "import os, signal, sys; from pathlib import Path; from whitetuner.runs.folder import RunFolder\n"
        "with RunFolder.open(Path(sys.argv[1]), resume=True): os.kill(os.getpid(), getattr(signal, 'SIGKILL', 15))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], check=False)
    folder = RunFolder(tmp_path / "r")
    assert not folder.running() and folder.status() == "crashed"
    with RunFolder.open(tmp_path / "r", resume=True):
        pass


@pytest.mark.parametrize("end", [(), (events.Failed(reason="x"),), (events.Ended(status="stopped", step=1),)])
def test_an_unfinished_run_is_not_overwritten_and_both_ways_out_are_commands(
    tmp_path: Path, end: tuple[events.Event, ...]
) -> None:
    path = made(tmp_path / "my cat", STEP, *end).path
    before = (path / "events.jsonl").read_bytes()
    (tmp_path / "my cat-2").mkdir()
    error = refused(path, config=Path("my.toml"))
    assert error.code == EXIT_USE
    assert "whitetuner train my.toml --resume latest\n" in str(error)
    assert 'whitetuner train my.toml --set run.name="my cat-3"' in str(error)
    assert (path / "events.jsonl").read_bytes() == before
    with RunFolder.open(path, resume=True) as folder:
        assert folder.is_run()


def test_a_finished_run_is_kept_too(tmp_path: Path) -> None:
    made(tmp_path / "r", STEP, events.Ended(status="finished", step=1))
    assert "a finished run" in str(refused(tmp_path / "r")) and "--set run.steps=MORE" in str(
        refused(tmp_path / "r")
    )


def test_a_run_that_ended_before_its_first_step_begins_anew(tmp_path: Path) -> None:
    first = made(tmp_path / "r", events.Failed(reason="the picture is broken")).document()
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        assert not folder.is_run() and not folder.events.exists()
        assert begin(folder)["run_id"] != first["run_id"]


def test_a_run_killed_before_its_first_step_is_not_taken_for_one_that_ended(tmp_path: Path) -> None:
    made(tmp_path / "r")
    assert "not finished" in str(refused(tmp_path / "r"))


def test_status_is_told_from_files(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        begin(folder, STEP)
        assert folder.status() == "running"
    assert folder.status() == "crashed"
    for number, (event, status) in enumerate(
        [
            (events.Ended(status="finished", step=1), "finished"),
            (events.Ended(status="stopped", step=1), "stopped"),
            (events.Failed(reason="x"), "failed"),
            (events.RunStarted(name="again", resumed_from=1), "crashed"),
        ]
    ):
        folder.append(event)
        assert folder.status() == status, number


def test_a_resume_keeps_the_id_and_records_what_was_before(tmp_path: Path) -> None:
    first = made(tmp_path / "r", STEP).document()
    with RunFolder.open(tmp_path / "r", resume=True) as folder:
        folder.update(resolved={"dtype": "float32"})
        begin(folder)
        second = folder.document()
    assert second["run_id"] == first["run_id"] and second["began"] == first["began"]
    (earlier,) = second["history"]
    assert earlier["config"] == first["config"] and earlier["resolved"] == {"dtype": "float32"}
    assert load_config(folder.config_file).config.run.name == "test"


def test_a_torn_last_event_is_cut_before_the_run_goes_on(tmp_path: Path) -> None:
    folder = made(tmp_path / "r", STEP)
    with folder.events.open("ab") as file:
        file.write(b'{"kind": "step", "st')
    with RunFolder.open(tmp_path / "r", resume=True) as folder:
        begin(folder, STEP)
    assert [event.kind for event in events.read(folder.events)[0]] == [
        "run_started",
        "step",
        "run_started",
        "step",
    ]


def test_wishes_reach_the_owner_once_and_only_a_running_one(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        begin(folder, STEP)
        other = RunFolder(tmp_path / "r")
        assert not folder.asked("stop") and not folder.take("save")
        other.request("save")
        assert folder.take("save") and not folder.take("save") and not folder.asked("stop")
        other.request("stop")
        assert folder.asked("stop")
    with pytest.raises(UserError, match=r"nothing is running here \(this run: crashed\)"):
        other.request("stop")
    with RunFolder.open(tmp_path / "r", resume=True) as folder:
        assert not folder.asked("stop"), "a wish from before must not stop the next one"


def test_asking_costs_next_to_nothing(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", resume=False) as folder:
        began = time.perf_counter()
        for _ in range(1000):
            folder.asked("stop")
        assert time.perf_counter() - began < 1.0  # 1 ms a step would be seen; this takes some microseconds


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ending_the_process_needs_no_answer_from_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from whitetuner.runs.folder import RunFolder\n"
        "with RunFolder.open(Path(sys.argv[1]), resume=False): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline().strip() == b"in"
    RunFolder(tmp_path / "r").end_process()
    assert process.wait(10) < 0 and not RunFolder(tmp_path / "r").running()
    RunFolder(tmp_path / "r").end_process()  # nobody there: nothing to do


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    error = refused(tmp_path / "file" / "r")
    assert (
        error.code == EXIT_ENVIRONMENT
        and "cannot be written" in str(error)
        and "run.output_dir" in str(error)
    )


def test_a_folder_without_a_run_is_told_and_a_damaged_run_json_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json is missing"):
        RunFolder(tmp_path).require()
    folder = made(tmp_path / "r", STEP)
    folder.run_file.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        folder.document()


def test_what_run_json_holds_is_written_down(tmp_path: Path) -> None:
    folder = made(tmp_path / "r", STEP)
    with RunFolder.open(folder.path, resume=True) as folder:
        begin(folder)
    text = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    missing = [key for key in folder.document() if f"| `{key}` |" not in text]
    assert not missing
    assert all(
        f"`{name}" in text
        for name in ("control/stop", "control/save", "control/preview", "control/lock", "control/pid")
    )
    json.dumps(folder.document(), allow_nan=False)
