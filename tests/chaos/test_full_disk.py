"""The disk is full at some write of a run: what was saved stays whole, a message says so, with room it goes on to the bit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disk import Write
from full_disk import EVERYTHING, attack, writes_of
from ground import KINDS, Facts, Ground

Place = tuple[Ground, Facts, list[Write]]


@contextmanager
def ready(folder: Path, kind: str) -> Iterator[Place]:
    """(where to attack, what the run left alone came to, every write of it)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHITETUNER_STATE", str(folder / "state"))
        ground = Ground(folder, kind, pictures=2, steps=4, **EVERYTHING)
        yield ground, ground.whole(), writes_of(ground)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ready(tmp_path_factory.mktemp("disk"), next(iter(KINDS))) as found:
        yield found


def letters(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


@pytest.mark.parametrize(
    ("call", "file"),
    [
        ("write", "NAME/events.jsonl"),
        ("write", "NAME/checkpoints/.checkpoint-4.writing/training_state.json"),
        ("write", "NAME/tensorboard/train_4steps_1gpu_N_N/events.out.tfevents.N"),
    ],
)
def test_a_full_disk_at_the_last_write_of_a_kind(place: Place, call: str, file: str) -> None:
    ground, whole, writes = place
    last = [one for one in writes if (one.call, one.file) == (call, file)][-1]
    told = attack(ground, whole, last, True, f"full {call}")
    assert not told.wrong, told


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind, (_, ranks) in KINDS.items() if ranks == 1])
def test_a_full_disk_at_the_first_write_of_every_kind(tmp_path: Path, kind: str) -> None:
    """All writes, each with and without the disk staying full: `python tests/chaos disk`."""
    kinds: dict[tuple[str, str], Write] = {}
    with ready(tmp_path, kind) as (ground, whole, writes):
        for one in writes:
            alike = r"checkpoint-\d|accelerate_state/\w+|runs|devices|text|vae|fsync.*|replace.*|mkdir.*"
            kinds.setdefault((one.call, re.sub(alike, "X", f"{one.call} {one.file}")), one)
        assert len(kinds) > 30
        told = [
            attack(ground, whole, one, bool(number % 3), letters(number))
            for number, one in enumerate(kinds.values())
        ]
    assert [one for one in told if one.wrong] == []
    assert {one.code for one in told} == {0, 1, 3}
