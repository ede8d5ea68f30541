"""The long attacks, with a table of what came of them:

    python tests/chaos kills --out benchmarks/results/chaos_kills.json       100 signals per kind, 20 of them into cold starts
    python tests/chaos disk --out benchmarks/results/chaos_disk.json         a full disk at each write, and at each third for once
    python tests/chaos long --count 20000 --out benchmarks/results/chaos_long.json         what grows with the steps

Exit code 1 when anything was lost, differed, or was not told.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from full_disk import EVERYTHING, attack, writes_of
from ground import KINDS, Ground
from kills import Tally
from kills import attack as kill
from long_run import grown

#: Of a run of forty steps: a start that is forked is at work at once, a cold one has to load first.
WARM_S, COLD_S = 1.1, 14.0


def kills(folder: Path, kind: str, count: int, until: float) -> dict[str, Any]:
    ground = Ground(
        folder, kind, pictures=12, steps=40, **{"save.every": 2, "save.keep": 2, "validation.every": 10}
    )
    whole, warm, cold = ground.whole(), Tally(), Tally()
    seed = 0
    while (warm.kills < count or cold.kills < count // 5) and time.perf_counter() < until:
        # In turn, so that both were seen when the time is over.
        early = warm.kills < count and warm.kills <= 5 * cold.kills + 5
        tally, most = (warm, count) if early or cold.kills >= count // 5 else (cold, count // 5)
        name = f"{'warm' if tally is warm else 'cold'}-{seed}"
        within_s = WARM_S if tally is warm else COLD_S
        kill(ground, whole, name, min(5, most - tally.kills), seed, within_s, tally is cold, tally)
        seed += 1
    return {
        "forked": _told(warm),
        "cold": _told(cold),
        "ok": not (warm.lost or warm.unlike or cold.lost or cold.unlike),
    }


def _told(tally: Tally) -> dict[str, Any]:
    return {
        "signals": tally.kills,
        "runs": tally.runs,
        "hit while": dict(tally.doing.most_common()),
        "runs unlike the one left alone": tally.unlike,
        "checkpoints lost": tally.lost,
    }


def disk(folder: Path, kind: str, count: int, until: float) -> dict[str, Any]:
    ground = Ground(folder, kind, pictures=2, steps=4, **EVERYTHING)
    whole, found = ground.whole(), []
    writes = writes_of(ground)
    for number, one in enumerate(writes):
        name = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        found.append(attack(ground, whole, one, True, f"{name}x"))
        if number % 3 == 0:
            found.append(attack(ground, whole, one, False, f"{name}y"))
    return {
        "writes": len(writes),
        "attacks": len(found),
        "exit codes": dict(sorted(Counter(str(one.code) for one in found).items())),
        "calls": dict(Counter(one.call for one in writes)),
        "messages": dict(Counter(_alike(one.message) for one in found if one.code).most_common()),
        "wrong": [
            f"{one.write} {'stays' if one.stays else 'once'}: {one.wrong}" for one in found if one.wrong
        ],
        "ok": not any(one.wrong for one in found),
    }


def _alike(message: str) -> str:
    """Without the place and the numbers of this one."""
    text = message.partition(": ")[2].partition("\n")[0]
    return "".join("N" if char.isdigit() else char for char in text)


def long(folder: Path, kind: str, count: int, until: float) -> dict[str, Any]:
    found = grown(Ground(folder, kind, pictures=4, steps=9), "long", count)
    return {**asdict(found), "ok": found.memory_mb < 10 and found.page_mb < 10 and found.step_ratio < 2}


def _where() -> dict[str, Any]:
    return {
        "command": f"python tests/chaos {' '.join(sys.argv[1:])}",
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


ATTACKS: dict[str, Callable[[Path, str, int, float], dict[str, Any]]] = {
    "kills": kills,
    "disk": disk,
    "long": long,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument(
        "--count", type=int, default=100, help="signals per kind, or steps (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="of kills: no new run is begun after so many per kind")
    parser.add_argument("--out", type=Path, help="write the table there as JSON, beside the kinds it has")
    given = parser.parse_args()
    if given.minutes is not None and given.attack != "kills":
        parser.error("--minutes belongs to kills")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    kinds: dict[str, Any] = {}
    # The disk is filled below this process alone; ranks are others.
    able = [kind for kind, (_, ranks) in KINDS.items() if ranks == 1 or given.attack == "kills"]
    for kind in given.kind or able:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            os.environ["WHITETUNER_STATE"] = str(Path(folder) / "state")
            began = time.perf_counter()
            until = began + 60 * given.minutes if given.minutes else math.inf
            found = ATTACKS[given.attack](Path(folder), kind, given.count, until)
            kinds[kind] = {**found, "minutes": round((time.perf_counter() - began) / 60, 1), **_where()}
    if given.out and given.out.exists():
        kinds = {**json.loads(given.out.read_text(encoding="utf-8"))["kinds"], **kinds}
    result = {
        "what": f"{given.attack} into runs of a tiny FLUX.2 klein",
        "kinds": kinds,
        "ok": all(one["ok"] for one in kinds.values()),
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
