"""Which settings teach best: cells of a suite, several seeds each, on the embedded model, judged by a program.

Every cell is the demo's recipe with the cell's settings changed: 32 pictures of a new concept beside 256 of what the model
knows. A program then says how many of 64 fresh captions of the concept are drawn right (new), and of 96 of the old vocabulary
(old: what is lost there was forgotten). A suite may be killed at any time: started again, it goes on with what is missing.

    python -m benchmarks.learning.laboratory kinds [--seeds 3] [--steps 200] [--concept zorp|duo|nook] [--minutes 15]
    python -m benchmarks.learning.laboratory --write-docs        docs/laboratory.md and its charts

Suites: kinds, timesteps, levels, base, batch_lr, precision, rates, techniques (benchmarks/learning/suites.py); the cells of the
last two are judged after each quarter of the steps, too. A cell of 200 steps of 12 takes about a minute on one quiet core.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.learning.concepts import CONCEPTS
from benchmarks.learning.suites import CURVES, SUITES
from benchmarks.learning.table import Table
from benchmarks.learning.teach import Lesson, judged, taught
from benchmarks.paired import environment

from whitetuner.errors import UserError

RESULTS = Path(__file__).parents[1] / "results"


def parser_for(doc: str) -> argparse.ArgumentParser:
    """Options that all tables of lessons have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--concept", choices=CONCEPTS, default="zorp")
    parser.add_argument("--judged", type=int, nargs=2, default=(64, 96), metavar=("NEW", "OLD"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no cell is begun after so many")
    parser.add_argument("--only", nargs="+", help="cells, by name")
    parser.add_argument("--folder", type=Path, default=Path("output/laboratory"), help="pictures and cache")
    parser.add_argument("--result", type=Path, help="where the table is kept")
    return parser


def lesson_of(given: argparse.Namespace) -> Lesson:
    folder = (given.folder / given.concept).resolve()
    return Lesson(folder, given.concept, given.steps, given.batch, *given.judged)


def result_of(given: argparse.Namespace, suite: str) -> Path:
    concept = "" if given.concept == "zorp" else f"_{given.concept}"
    return given.result or RESULTS / f"laboratory_{suite}{concept}.json"


def seeds_of(given: argparse.Namespace) -> list[int]:
    """The demo's first."""
    return [42 + number for number in range(given.seeds)]


def command_of(given: argparse.Namespace, *words_before: str) -> str:
    """What repeats the table; where the pictures are kept and when it was told to stop is nobody's matter."""
    words = ["python", "-m", *words_before]
    words += [f"--seeds {given.seeds}", f"--steps {given.steps}", f"--batch {given.batch}"]
    words += [f"--concept {given.concept}", "--judged {} {}".format(*given.judged)]
    return " ".join(words)


def run(given: argparse.Namespace) -> Table:
    """Fills the suite's table. Raises UserError when its file holds rows of other settings."""
    lesson = lesson_of(given)
    if given.suite in CURVES:
        lesson = replace(lesson, moments=tuple(given.steps * part // 4 for part in (1, 2, 3)))
    table = Table(
        result_of(given, given.suite),
        SUITES[given.suite],
        {"suite": given.suite, **lesson.settings()},
        seeds_of(given),
    )
    begin(table, lesson, command_of(given, "benchmarks.learning.laboratory", given.suite))
    began = time.monotonic()

    def make(cell: str, seed: int) -> dict[str, Any]:
        return taught(lesson, "cell", seed, SUITES[given.suite][cell])

    table.fill(make, lambda: time.monotonic() - began > 60 * given.minutes, given.only)
    return table


def begin(table: Table, lesson: Lesson, command: str) -> None:
    """Pictures, what a figure depends on, and what the model draws before it is taught."""
    lesson.prepare()
    table.document["environment"] = {**environment("torch", "diffusers"), "command": command}
    if not table.document["before"]:
        table.document["before"] = judged(lesson)


def main() -> None:
    parser = parser_for(__doc__ or "")
    parser.add_argument("suite", nargs="?", choices=SUITES)
    parser.add_argument("--write-docs", action="store_true", help="the page and its charts")
    given = parser.parse_args()
    if not (given.suite or given.write_docs):
        parser.error("a suite, or --write-docs")
    torch.set_num_threads(1)
    try:
        if given.suite:
            run(given)
    except UserError as error:
        raise SystemExit(str(error)) from None
    if given.write_docs:
        from benchmarks.learning.laboratory_page import write

        write()


if __name__ == "__main__":
    main()
