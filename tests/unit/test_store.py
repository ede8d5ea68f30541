"""Checkpoints: whole or not there, checked before use, rotated without losing the newest or another run's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whitetuner.checkpoint import store as store_module
from whitetuner.checkpoint.store import DamagedCheckpoint, Store, read
from whitetuner.errors import UserError
from whitetuner.runs.best import HELD_OUT_LOSS, POINTER, measured


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "lokr/lokr.safetensors": {"a.lokr_w1": torch.randn(4, 4, generator=generator)},
        "accelerate_state/optimizer.safetensors": {"0.exp_avg": torch.randn(4, 4, generator=generator)},
    }


def save(store: Store, step: int, loss: float | None = None) -> Path:
    state = {"config": {"a": 1}, HELD_OUT_LOSS: loss}
    return store.save(step, tensors(step), {"accelerate_state/optimizer.json": {"step": step}}, state)


def pointed(folder: Path) -> int | None:
    """The step that best.json names, which must be there and whole."""
    if not (folder / POINTER).is_file():
        return None
    facts = json.loads((folder / POINTER).read_text(encoding="utf-8"))
    found = read(folder / facts["path"], "run")
    assert found.step == facts["step"] and found.state[HELD_OUT_LOSS] == facts[HELD_OUT_LOSS]
    return found.step


def failing(error: UserError) -> None:
    pytest.fail(str(error))


LOSSES = st.lists(
    st.one_of(st.none(), st.sampled_from([0.1, 0.2, 0.3, float("nan")]), st.floats(0, 1)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(LOSSES, st.integers(0, 3))
def test_the_best_and_the_newest_stay_whatever_was_measured(losses: list[float | None], keep: int) -> None:
    """After every save: the least loss of all that was ever saved (the first of equals) is there, pointed at and found; beside
    it so many of the newest as `keep` says."""
    with TemporaryDirectory() as place:
        store = Store(Path(place), "run", keep)
        for step, loss in enumerate(losses, 1):
            save(store, step, loss)
            known = [(one, at) for at, one in enumerate(losses[:step], 1) if one is not None and one == one]
            best = min(known)[1] if known else None
            found = store.best(failing)
            assert (None if found is None else found.step) == best == pointed(Path(place))
            newest = set(range(1, step + 1) if keep == 0 else range(max(1, step - keep + 1), step + 1))
            there = {int(path.name.rpartition("-")[2]) for path in store.found()}
            assert there == newest | ({best} if best else set())


def test_best_is_of_this_run_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    save(Store(tmp_path, "other", 0), 1, 0.01)
    store = Store(tmp_path, "run", 0)
    assert store.best(failing) is None
    for step, loss in ((2, 0.3), (3, 0.1), (4, 0.2)):
        save(store, step, loss)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "training_state.json").write_text("[" * 100_000, encoding="utf-8")
    assert [one.step for one in measured(tmp_path, "run")] == [3, 4, 2]
    os.truncate(tmp_path / "checkpoint-3" / "lokr" / "lokr.safetensors", 10)
    told: list[UserError] = []
    found = store.best(told.append)
    assert found is not None and found.step == 4 and "torn" in str(told[0])


def test_going_back_points_at_the_best_that_is_left_and_a_fork_knows_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", "run", 0)
    for step, loss in ((1, 0.3), (2, 0.2), (3, 0.1)):
        save(store, step, loss)
    assert pointed(tmp_path / "run") == 3
    store.set_aside_after(2)
    assert pointed(tmp_path / "run") == 2
    other = Store(tmp_path / "fork", "fork", 0)
    other.adopt(read(tmp_path / "run" / "checkpoint-2"), {"config": {}}, {})
    assert other.best(failing) is None and not (tmp_path / "fork" / POINTER).exists()


def test_what_is_saved_is_read_back_to_the_bit(tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints", "run", keep=3)
    found = read(save(store, 7), "run")
    assert found.step == 7 and found.state["config"] == {"a": 1}
    assert found.documents["accelerate_state/optimizer.json"] == {"step": 7}
    for file, group in tensors(7).items():
        for name, tensor in group.items():
            assert torch.equal(found.tensors[file][name], tensor)


def test_the_oldest_own_go_and_the_newest_and_foreign_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(Store(folder, "other", keep=0), 1)
    (folder / "checkpoint-2").mkdir()  # something of the user's
    store = Store(folder, "run", keep=2)
    for step in (10, 20, 30, 100):
        save(store, step)
    assert [path.name for path in store.found()] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-30",
        "checkpoint-100",
    ]


def test_keep_one_keeps_the_newest(tmp_path: Path) -> None:
    store = Store(tmp_path, "run", keep=1)
    for step in (1, 2, 3):
        save(store, step)
        assert [path.name for path in store.found()] == [f"checkpoint-{step}"]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no_state", "torn_state", "not_json_object"])
def test_a_damaged_checkpoint_is_named_and_the_last_whole_one_used(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path, "run", keep=5)
    save(store, 1)
    newest = save(store, 2)
    file = newest / "lokr" / "lokr.safetensors"
    state = newest / "training_state.json"
    if harm == "truncate":
        os.truncate(file, file.stat().st_size - 3)
    elif harm == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "remove":
        file.unlink()
    elif harm == "no_state":
        state.unlink()
    elif harm == "torn_state":
        os.truncate(state, 20)
    else:
        state.write_text("[1, 2]", encoding="utf-8")
    told: list[UserError] = []
    found = store.latest(told.append)
    assert found is not None and found.step == 1
    assert len(told) == 1 and "checkpoint-2" in str(told[0])


@pytest.mark.parametrize(
    "old, new", [('"step": 7', '"step": 8'), ('"a": 1', '"a": 3'), ('"run_id": "r', '"run_id": "s')]
)
def test_a_digit_that_flipped_in_the_state_document_is_told(tmp_path: Path, old: str, new: str) -> None:
    path = save(Store(tmp_path, "run", keep=5), 7)
    state = path / "training_state.json"
    text = state.read_text(encoding="utf-8")
    assert text.count(old) == 1
    state.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match="was changed"):
        read(path, "run")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = save(Store(tmp_path, "other", keep=5), 1)
    with pytest.raises(DamagedCheckpoint, match="another run"):
        read(path, "run")


def test_names_that_lead_outside_are_refused(tmp_path: Path) -> None:
    path = save(Store(tmp_path / "c", "run", keep=5), 1)
    state = json.loads((path / "training_state.json").read_text(encoding="utf-8"))
    (tmp_path / "secret.json").write_text("{}", encoding="utf-8")
    state["files"]["../../secret.json"] = {"sha256": "", "bytes": 2}
    state["sha256"] = store_module._own_hash(state)  # as somebody would who means it
    (path / "training_state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match="outside"):
        read(path, "run")


def test_a_full_disk_leaves_the_earlier_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, "run", keep=1)
    save(store, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(UserError, match="disk is full") as caught:
        save(store, 2)
    assert caught.value.code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert read(tmp_path / "checkpoint-1", "run").step == 1


def test_left_overs_of_an_interrupted_save_are_swept_and_never_read(tmp_path: Path) -> None:
    store = Store(tmp_path, "run", keep=5)
    save(store, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-2.writing")
    assert store.latest(lambda error: pytest.fail(str(error))).step == 1
    save(store, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_every_way_to_be_killed_while_saving_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that touches the disk raises in turn, as a kill would end it; the newest whole one is always found, and so is the
    best, which best.json names a step late at most, until the run goes on."""

    class Killed(BaseException):
        pass

    calls = {"n": 0, "at": 0}

    def counted(function):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == calls["at"]:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(store_module, "write_whole", counted(store_module.write_whole))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(store_module, "_sync", counted(store_module._sync))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        store = Store(folder, "run", keep=1)
        calls.update(n=0, at=0)
        save(store, 1, 0.2)
        save(store, 2, 0.3)
        calls.update(n=0, at=at)
        newest_loss = 0.1 if at % 2 else 0.4
        try:
            save(store, 3, newest_loss)
        except Killed:
            calls.update(n=0, at=0)
            again = Store(folder, "run", keep=1)
            found, best = again.latest(failing), again.best(failing)
            assert found is not None and found.step in (2, 3)
            assert best is not None and best.step == (3 if found.step == 3 and newest_loss < 0.2 else 1)
            assert pointed(folder) in (1, best.step)
            again.set_aside_after(found.step)
            assert pointed(folder) == best.step
            continue
        break
    assert at > 8  # the kill really came at many places


def test_going_back_sets_the_later_ones_aside_and_keeps_them(tmp_path: Path) -> None:
    store = Store(tmp_path, "run", keep=0)
    for step in (1, 2, 3):
        save(store, step)
    assert [path.name for path in store.set_aside_after(1)] == ["left-checkpoint-2", "left-checkpoint-3"]
    assert store.latest(lambda error: pytest.fail(str(error))).step == 1
    save(store, 3)
    assert [path.name for path in store.set_aside_after(1)] == ["left-checkpoint-3.1"]
    assert read(tmp_path / "left-checkpoint-3", "run").step == 3
