"""The pages of troubleshooting hold every message of the source, in both languages, and are what the source says now."""

from __future__ import annotations

import ast

import pytest
from test_gui_told import templates
from troubles import ERRORS, PAGES, SOURCE, below, is_bare, messages, page, shown, topic

from whitetuner.gui.told import table


@pytest.mark.parametrize("language", sorted(PAGES))
def test_the_page_is_what_the_source_says_now(language: str) -> None:
    written = PAGES[language].read_text(encoding="utf-8")
    assert written == page(language), "run: python tests/unit/troubles.py"


def test_no_message_is_missing() -> None:
    """Found in another way by the tests of the page's Chinese."""
    known = {text for one in messages() for text in (one.what, *one.mends)}
    assert set(templates()) <= known and len(known) > 800


def test_every_message_has_a_chinese_one_and_a_topic() -> None:
    """Those of UserError's children too, which the page shows as well."""
    texts = {text: one.file for one in messages() for text in (one.what, *one.mends)}
    assert {f"{file}: {text!r}" for text, file in texts.items() if text not in table()} == set()
    assert all(topic(one.file) for one in messages())


def test_no_child_of_usererror_is_overlooked() -> None:
    """UserErrors holds others and says nothing itself."""
    children = {
        node.name
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "UserError" for base in node.bases)
    }
    assert {"UserError", *children} - {"UserErrors"} == set(ERRORS)


def test_a_row_is_a_row_whatever_the_message_holds() -> None:
    assert shown("{key}: a|b\n  `whitetuner fetch {path}` *.bak") == (
        r"*key*: a\|b<br>`whitetuner fetch PATH` \*.bak"
    )
    for language, columns in (("en", 2), ("zh", 3)):
        rows = [line for line in below(language).splitlines() if line.startswith("|")]
        assert {line.replace(r"\|", "").count("|") for line in rows} == {columns + 1}
        assert len(rows) > len([one for one in messages() if not is_bare(one)])


def test_a_mend_stands_beside_its_own_message() -> None:
    known = {one.what: one.mends for one in messages()}
    assert known["two frames have the number {number}"] == ("delete one of them",)
    assert known["{prefix}.{name} holds whole numbers, no weights"] == (
        "download it again, or have its program write it anew",
    )
