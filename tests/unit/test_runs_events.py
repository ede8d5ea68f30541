"""What happened in a run: whole lines after any kill, and nothing told twice after a resume."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from pathlib import Path

import pytest

from whitetuner.runs import events
from whitetuner.runs.files import write_atomically

ROOT = Path(__file__).parents[2]


def step(number: int, loss: float = 1.0) -> events.StepDone:
    return events.StepDone(
        step=number,
        loss=loss,
        lr=1e-4,
        grad_norm=0.5,
        seconds=0.1,
        samples=2,
        sigmas=[0.1, 0.9],
        losses=[0.5, 1.5],
    )


EVERY_KIND = [
    events.RunStarted(name="猫 \n \ud800", steps=3),
    events.Phase(name="cache", total=4),
    events.Progress(phase="cache", done=1, total=4),
    step(1),
    events.Preview(step=1, files=["a.png"], prompts=["x\ny"], seconds=1.0),
    events.Saved(step=1, path="checkpoints/checkpoint-1", seconds=0.5),
    events.Validation(step=1, loss=0.5, by_sigma={"0.5": 0.5}, seconds=1.0, held_out=True),
    events.Message(level="warning", text="{not a placeholder}"),
    events.Failed(reason="disk"),
    events.Ended(status="finished", step=1),
]


def steps_in(path: Path) -> list[int]:
    return [event.step for event in events.read(path)[0] if isinstance(event, events.StepDone)]


def test_every_kind_of_event_reads_back_as_it_was(tmp_path: Path) -> None:
    assert {type(event) for event in EVERY_KIND} == set(events.KINDS.values())
    log = events.EventLog(tmp_path / "e.jsonl")
    for event in EVERY_KIND[1:]:
        log.append(event)
    found, offset = events.read(log.path)
    assert found == EVERY_KIND[1:] and offset == log.path.stat().st_size
    assert events.read(log.path, offset) == ([], offset)
    log.append(EVERY_KIND[0])
    assert events.read(log.path, offset)[0][0].kind == "run_started"
    assert events.read(tmp_path / "not there") == ([], 0)


def test_wherever_the_file_is_torn_the_whole_lines_are_read_and_the_rest_is_cut(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    ends = [0]
    for event in EVERY_KIND[1:]:
        log.append(event)
        ends.append(log.path.stat().st_size)
    whole = log.path.read_bytes()
    for size in random.Random(0).sample(range(len(whole)), 60):
        log.path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends[1:])
        assert events.read(log.path)[0] == EVERY_KIND[1 : 1 + kept]
        log.mend()
        assert log.path.stat().st_size == ends[kept]
        log.append(step(9))
        assert events.read(log.path)[0][-1].kind == "step"


def test_a_line_of_a_later_version_is_passed_over_and_unknown_fields_too(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    line = json.loads(events.as_line(step(1)))
    lines = [{"kind": "from_the_future", "x": 1}, {**line, "new_field": 5}, {"kind": "step"}, [1], "text"]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    assert steps_in(path) == [1] and len(events.read(path)[0]) == 1


def test_numbers_that_json_does_not_know_come_back_as_nan(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    bad = dataclasses.replace(step(1, float("nan")), losses=[float("inf"), 1.0])
    log.append(bad)
    log.append(events.Validation(step=1, loss=float("-inf"), by_sigma={"0.5": float("nan")}, seconds=1))
    for line in log.path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)
    first, second = events.read(log.path)[0]
    assert isinstance(first, events.StepDone) and isinstance(second, events.Validation)
    assert math.isnan(first.loss) and math.isnan(first.losses[0]) and first.losses[1] == 1.0
    assert math.isnan(second.loss) and math.isnan(second.by_sigma["0.5"])
    assert events.read(log.path)[0][0].step == 1  # type: ignore[attr-defined]


def test_a_resume_cuts_what_will_happen_again(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    log.append(events.RunStarted(name="a"))
    for number in range(1, 7):
        log.append(step(number))
        if number % 2 == 0:
            log.append(events.Saved(step=number, path="x", seconds=0.1))
    log.append(events.Failed(reason="x"))
    log.cut_after(4)
    found = events.read(log.path)[0]
    assert steps_in(log.path) == [1, 2, 3, 4]
    assert found[0].kind == "run_started" and found[-1].kind == "saved"
    log.append(events.Ended(status="stopped", step=4))
    log.cut_after(3)  # saved, but killed before it was written down
    assert steps_in(log.path) == [1, 2, 3]
    log.cut_after(3)
    assert steps_in(log.path) == [1, 2, 3]
    log.cut_after(0)
    assert events.read(log.path) == ([], 0)


def test_a_reader_that_was_further_than_the_file_begins_again(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    for number in (1, 2, 3):
        log.append(step(number))
    _, offset = events.read(log.path)
    log.cut_after(1)
    found, again = events.read(log.path, offset)
    assert [event.step for event in found] == [1] and again < offset  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", [7, 64, 1 << 16])
def test_the_last_event_of_a_kind_is_found_from_the_end(tmp_path: Path, block: int) -> None:
    path = tmp_path / "e.jsonl"
    log = events.EventLog(path)
    assert events.last_of(path, (events.Ended,)) is None
    for event in EVERY_KIND[1:]:
        log.append(event)
    for event in EVERY_KIND[1:]:
        assert events.last_of(path, (type(event),), block) == event
    assert events.last_of(path, (events.RunStarted,), block) is None
    with path.open("ab") as file:
        file.write(b'{"kind": "ended", "sta')
    assert events.last_of(path, (events.Ended, events.Failed), block) == EVERY_KIND[-1]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = events.EventLog(tmp_path / "e.jsonl")
    log.append(step(1))
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:20]))
    with pytest.raises(OSError, match="space"):
        log.append(step(2))
    monkeypatch.undo()
    log.append(step(3))
    assert steps_in(log.path) == [1, 3]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "run.json"
    write_atomically(path, "old 猫")
    assert path.read_bytes() == "old 猫".encode()
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old 猫"
    assert [one.name for one in path.parent.iterdir()] == ["run.json"]


def test_every_event_and_field_is_written_down() -> None:
    text = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    for kind, cls in events.KINDS.items():
        row = next((line for line in text.splitlines() if line.startswith(f"| `{kind}` ")), "")
        missing = [
            one.name for one in dataclasses.fields(cls) if one.name != "time" and f"`{one.name}`" not in row
        ]
        assert row and not missing, (kind, missing)
