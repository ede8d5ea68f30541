"""Every wrong input that the corpus knows ends as its table (docs/bad-input.md) says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from case import LIMIT_S, Answer, Place, ends
from table import AREAS, CASES, rendered

DOCUMENT = Path(__file__).parents[2] / "docs" / "bad-input.md"
#: Cases a minute cannot hold are the slow part's; the quick one has every so many.
EVERY = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHITETUNER_STATE", str(folder / "state"))
        (folder / "cwd").mkdir()
        patch.chdir(folder / "cwd")
        yield Place.made(folder)


def failures(answers: list[Answer]) -> list[str]:
    return [
        f"{one.case.area}: {one.case.fault}: {one.wrong}\n  $ {one.typed}\n  {one.message}"
        for one in answers
        if one.wrong
    ]


def test_a_sample_of_the_corpus(place: Place) -> None:
    answers = [ends(place, case) for case in CASES[::EVERY]]
    assert not failures(answers)
    written = set(_rows(DOCUMENT.read_text(encoding="utf-8")))
    now = _rows(rendered(answers).partition("cases.")[2])
    assert [row for row in now if row not in written] == [], "make it anew: python tests/corpus --write"


@pytest.mark.slow
def test_the_whole_corpus_and_its_table(place: Place) -> None:
    answers = [ends(place, case) for case in CASES]
    assert not failures(answers)
    assert max(one.seconds for one in answers) < LIMIT_S
    written, now = (_rows(text) for text in (DOCUMENT.read_text(encoding="utf-8"), rendered(answers)))
    assert now == written, "make it anew: python tests/corpus --write"


def test_the_table_lists_every_case() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"{len(CASES)} cases." in text and len(CASES) >= 150
    for case in CASES:
        assert f"| {case.fault.replace('|', chr(92) + '|').replace('<', '&lt;')} | {case.code} |" in text, (
            case.fault
        )
    assert len(text.splitlines()) == len(CASES) + rendered([]).count("\n") + 5 * len(AREAS)


def test_a_fault_is_listed_once_and_every_case_asks_for_words() -> None:
    names = Counter((case.area, case.fault) for case in CASES)
    assert [name for name, count in names.items() if count > 1] == []
    assert [case.fault for case in CASES if not any(case.says)] == []
    assert {case.area for case in CASES} == {area.AREA for area in AREAS}


#: What another Python or system says in its own words.
FOREIGN = ("this is not TOML", "whitetuner", "File exists", "Not a directory", "No such file", "port 99999")


def _rows(text: str) -> list[str]:
    return [
        line.partition("| ")[2].partition(" |")[0] if any(word in line for word in FOREIGN) else line
        for line in text.splitlines()
    ]
