"""All cases, and the table of what came of them (docs/bad-input.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import adapters
import configs
import kept
import models
import page
import sets
import words
from case import Answer, Case

AREAS = (configs, sets, models, adapters, kept, words, page)
CASES: list[Case] = [case for area in AREAS for case in area.CASES]

_HEAD = """\
# Wrong input, and what comes of it

Made by `python tests/corpus --write`; [tests/corpus](../tests/corpus) holds it true. Each row is typed (or asked of the page)
over a tiny model, four pictures and a finished run, most of them to several words at once. It has to end with this exit code
(the page: HTTP status) within ten seconds and without a traceback, the message says what is wrong, where, and how to mend it
(after the arrow), and no file of the user's is changed. What stands in brackets is other libraries' or the machine's, and left
out here.

Exit codes: 1 the run failed, 2 wrong use or config, 3 the environment.
"""


def rendered(answers: Sequence[Answer]) -> str:
    lines = [_HEAD, f"{len(answers)} cases."]
    area = ""
    for one in answers:
        if one.case.area != area:
            area = one.case.area
            lines += [
                "",
                f"## {area.capitalize()}",
                "",
                "| what is wrong | code | message |",
                "|---|---|---|",
            ]
        lines.append(f"| {_cell(one.case.fault)} | {one.case.code} | {_cell(one.message)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = re.sub(r"\d{8}_\d{6}", "TIME", text)  # in names of folders
    text = re.sub(
        r"\b\d{4,} of \d{4,} bytes", "N of M bytes", text
    )  # files hold the whole config: new options move it
    short = text if len(text) <= 300 else f"{text[:297]}..."
    # A zero byte would make the whole document no text.
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in short)
    return shown.replace("|", "\\|").replace("<", "&lt;")
