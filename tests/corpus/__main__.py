"""Runs the corpus; prints what does not hold.

python tests/corpus [--write] [WORD]        --write: makes docs/bad-input.md anew; WORD: only cases with it
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

from case import Place, ends  # noqa: E402
from table import CASES, rendered  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "bad-input.md"


def main() -> int:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    chosen = [case for case in CASES if all(word in f"{case.area}: {case.fault}" for word in words)]
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        os.environ["WHITETUNER_STATE"] = str(Path(folder, "state"))
        Path(folder, "cwd").mkdir()
        os.chdir(Path(folder, "cwd"))
        place, began, answers = Place.made(Path(folder)), time.perf_counter(), []
        for case in chosen:
            answers.append(ends(place, case))
            one = answers[-1]
            if one.wrong or words:
                print(
                    f"{case.area}: {case.fault}\n  $ {one.typed}\n  {one.message}\n  !! {one.wrong}",
                    flush=True,
                )
        os.chdir(folder)
    wrong = [one for one in answers if one.wrong]
    slowest = max(answers, key=lambda one: one.seconds)
    print(
        f"{len(answers) - len(wrong)} of {len(answers)} as they should, {time.perf_counter() - began:.0f} s"
    )
    print(f"slowest: {slowest.case.fault}, {slowest.seconds:.1f} s")
    if "--write" in sys.argv:
        DOCUMENT.write_text(rendered(answers), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
