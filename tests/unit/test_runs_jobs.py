"""The list of runs, the queue and the device locks: told from processes and folders, so nothing in them can get stuck."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from whitetuner.errors import UserError
from whitetuner.paths import PYTHON
from whitetuner.runs import events, jobs, start
from whitetuner.runs.devices import CPU, Device, Held, Wish, read_answer, wish_of
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.listing import as_text, rows

GPUS = [Device("GPU-aa", "RTX 4070", 0), Device("GPU-bb", "RTX 5090", 1), Device("GPU-cc", "RTX 5090", 2)]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHITETUNER_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "state"


def claim(run: Path, gpus: str = "cpu", wait: bool = False):  # type: ignore[no-untyped-def]
    return jobs.claimed(run, run / "config.toml", gpus=gpus, resume=None, wait=wait, say=lambda text: None)


def began(run: Path, *more: events.Event) -> None:
    folder = RunFolder(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / "control").mkdir(exist_ok=True)
    folder.begin("", {"run": {"steps": 9}, "model": {"family": "f", "task": "t2i"}})
    for event in (events.RunStarted(name=run.name), *more):
        folder.append(event)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


CHILD = """
import sys, time
from pathlib import Path
from whitetuner.runs import jobs
run, marks = Path(sys.argv[1]), Path(sys.argv[2])
with jobs.claimed(run, run / "c.toml", gpus="cpu", resume=None, wait=True):
    with marks.open("a", encoding="utf-8") as file:
        print("in", run.name, file=file, flush=True)
    time.sleep(0.5)
    with marks.open("a", encoding="utf-8") as file:
        print("out", run.name, file=file, flush=True)
"""


def test_three_waiting_runs_have_the_one_lock_in_turn_in_the_order_they_came(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    children = []
    for index in range(3):
        run = tmp_path / f"run{index}"
        children.append(subprocess.Popen([sys.executable, "-c", CHILD, str(run), str(marks)]))
        deadline = time.time() + 20
        while jobs.read(jobs.id_of(run)) is None and time.time() < deadline:
            time.sleep(0.02)
    states = [jobs.state_of(job) for job in jobs.jobs()]
    assert states.count("waiting") >= 1
    assert [child.wait(60) for child in children] == [0, 0, 0]
    expected = [f"{word} run{index}" for index in range(3) for word in ("in", "out")]
    assert marks.read_text(encoding="utf-8").splitlines() == expected
    assert jobs.queue() == []


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.replace("0.5", "60"), str(tmp_path / "a"), str(marks)]
    )
    try:
        while not marks.exists():
            time.sleep(0.02)
        wish = wish_of("cpu", [CPU])
        assert not Held().take(wish, tmp_path)
    finally:
        child.kill()
        child.wait()
    held = Held()
    assert held.take(wish, tmp_path)
    held.release()


def test_a_busy_gpu_is_refused_without_wait_and_a_cpu_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "devices", lambda: GPUS[:1])
    first, other = Held(), Held()
    assert first.take(Wish((GPUS[0],), 1), tmp_path) and other.take(Wish((CPU,), 1), tmp_path)
    with pytest.raises(UserError, match="another training is on it"), claim(tmp_path / "run", "0"):
        pass
    assert jobs.state_of(jobs.jobs()[0]) == "refused" and "RTX 4070" in jobs.jobs()[0].error
    with claim(tmp_path / "shared", "cpu") as held:
        assert held == []
    first.release()
    with claim(tmp_path / "run", "0") as held:
        assert held == GPUS[:1]
    other.release()


@pytest.mark.parametrize(
    ("asked", "names", "count"),
    [
        ("auto", ["GPU-aa"], 1),
        ("any", ["GPU-aa", "GPU-bb", "GPU-cc"], 1),
        ("any:2", ["GPU-aa", "GPU-bb", "GPU-cc"], 2),
        ("1", ["GPU-bb"], 1),
        ("cuda:2", ["GPU-cc"], 1),
        ("0,2", ["GPU-aa", "GPU-cc"], 2),
        ("cpu", ["cpu"], 1),
    ],
)
def test_what_can_be_asked_for(asked: str, names: list[str], count: int) -> None:
    wish = wish_of(asked, GPUS)
    assert ([one.name for one in wish.devices], wish.count) == (names, count)


def test_any_takes_a_free_one_and_several_are_taken_together_or_not_at_all(tmp_path: Path) -> None:
    one, two, three = Held(), Held(), Held()
    assert one.take(wish_of("any", GPUS), tmp_path) and one.devices == GPUS[:1]
    assert two.take(wish_of("any", GPUS), tmp_path) and two.devices == GPUS[1:2]
    assert not three.take(wish_of("any:2", GPUS), tmp_path) and three.devices == []
    two.release()
    assert three.take(wish_of("any:2", GPUS), tmp_path) and three.devices == GPUS[1:]
    with pytest.raises(UserError, match="there are 3"):
        wish_of("any:4", GPUS)


def test_with_any_the_process_sees_only_what_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "devices", lambda: GPUS)
    first = Held()
    first.take(Wish(tuple(GPUS[:1]), 1), tmp_path)
    with claim(tmp_path / "run", "any") as held:
        assert held == GPUS[1:2] and os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-bb"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with claim(tmp_path / "other", "1"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    first.release()


def test_nvidia_smi_is_read_and_what_it_does_not_tell_is_none() -> None:
    text = "0, GPU-1, NVIDIA H100 80GB HBM3, 81559, 12, 3, 31, 70.5\n1, GPU-2, T, 10, [N/A], 0, 1, [Not Supported]\nnoise\n"
    first, second = read_answer(text)
    assert (first.total_mb, first.watts) == (81559.0, 70.5)
    assert second.used_mb is None and second.watts is None


def test_states_are_told_from_the_process_and_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claim(run):
        job = jobs.jobs()[0]
        assert jobs.state_of(job) == "starting"
        with RunFolder.open(run, resume=False) as folder:
            folder.begin("", {})
            folder.append(events.RunStarted(name="run"))
            assert jobs.state_of(job) == "running"
    dead = job.with_(pid=dead_pid(), born=0.0)
    assert jobs.state_of(dead) == "crashed"
    for event, state in (
        (events.Ended(status="finished", step=9), "finished"),
        (events.Ended(status="stopped", step=3), "stopped"),
        (events.Failed(reason="the disk is full"), "failed"),
    ):
        folder.append(event)
        assert jobs.state_of(dead) == state
    assert jobs.state_of(dead.with_(asked_at=time.time() + 5, error="bad config")) == "refused"
    assert (
        jobs.state_of(dead.with_(asked_at=time.time() + 5, waiting=True)) == "refused"
    )  # rebooted while it waited
    assert (
        jobs.state_of(jobs.Job(run=str(tmp_path / "gone"), config="", cwd="", pid=dead.pid, born=0.0))
        == "removed"
    )


def test_another_process_with_the_number_of_a_dead_one_is_not_it(tmp_path: Path) -> None:
    mine = psutil.Process().create_time()
    job = jobs.Job(run=str(tmp_path), config="", cwd="", pid=os.getpid(), born=mine)
    assert job.alive and not job.with_(born=mine - 100).alive


def test_a_refused_start_is_remembered_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError), claim(tmp_path / "run"):
        raise UserError("{path} holds no pictures", path="pics")
    row = rows()[0]
    assert row["state"] == "refused" and "pics holds no pictures" in row["error"]
    assert "refused" in as_text(rows())


def test_rows_tell_step_family_and_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claim(run):
        began(run, events.StepDone(step=4, loss=1.0, lr=1e-4, grad_norm=1.0, seconds=1.0, samples=1))
    row = rows()[0]
    assert (row["step"], row["steps"], row["family"], row["task"]) == (4, 9, "f", "t2i")
    assert "4/9" in as_text(rows())
    assert as_text([]).startswith("no runs")


def test_a_waiting_run_leaves_the_queue_when_asked(tmp_path: Path) -> None:
    held = Held()
    held.take(wish_of("cpu", [CPU]), tmp_path)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "a"), str(tmp_path / "marks")])
    while not jobs.queue():
        time.sleep(0.02)
    assert jobs.cancel(jobs.queue()[0])
    child.wait(10)
    assert jobs.jobs() == [] and not (tmp_path / "marks").exists()
    held.release()


def test_no_value_is_an_option_or_reaches_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a start, as the process gets them."""
    seen: list[list[str]] = []

    def record(command: list[str], *rest: object) -> subprocess.Popen[bytes]:
        seen.append(list(command))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(start, "detached", record)
    nasty = 'run.name=--help"; touch /tmp/x\n$(id) `id` && %PATH%'
    run = tmp_path / "--run"
    start.start(
        tmp_path / "--config.toml", run, cwd=tmp_path, overrides=[nasty], resume="--latest", gpus="--any"
    )
    words = seen[0]
    assert words[:5] == [*PYTHON, "-m", "whitetuner"]
    assert words[5] == "train"
    assert f"--set={nasty}" in words and "--resume=--latest" in words and "--gpus=--any" in words
    assert words[-2:] == ["--", str((tmp_path / "--config.toml").resolve())]


def test_a_started_process_is_in_a_session_of_its_own_and_its_end_is_written_down(tmp_path: Path) -> None:
    job = start.start(tmp_path / "missing.toml", tmp_path / "run", cwd=tmp_path)
    deadline = time.time() + 30
    while (found := jobs.read(job.id)) is not None and found.exit is None and time.time() < deadline:
        time.sleep(0.05)
    assert found is not None and found.exit == 2 and jobs.state_of(found) == "refused"
    assert "missing.toml" in Path(job.log).read_text(encoding="utf-8")
    if os.name != "nt":
        code = "import os; print(os.getsid(0) == os.getpid())"
        with (tmp_path / "out").open("wb") as out:
            start.detached([sys.executable, "-c", code], tmp_path, out, tmp_path / "log").wait()
        assert (tmp_path / "out").read_text(encoding="utf-8") == "True\n"


def test_another_rank_than_the_first_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with claim(tmp_path / "run") as held:
        assert held == [] and jobs.jobs() == []
