"""Two ways of doing one thing, timed side by side: the ratio of a pair shakes off what else the machine does.

Each pair runs both, in alternating order (ab, ba, ab, ...), so that a slow drift and "the second one finds a
warm cache" cancel. The interval of the median comes from order statistics: for n independent ratios the
number below the true median is Binomial(n, 1/2), whatever their distribution (David and Nagaraja, Order
Statistics, 7.1).
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median


def paired(
    a: Callable[[], object], b: Callable[[], object], pairs: int = 40, warmup: int = 3
) -> dict[str, float]:
    """Time of `a` over time of `b`.

    pairs:  how often both are timed, at least 6 (below that no 95 % interval exists)
    Returns median_ratio with its 95 % interval low..high, the median seconds of either (a_seconds,
    b_seconds), pairs.
    """
    for _ in range(warmup):
        a()
        b()
    a_times: list[float] = []
    b_times: list[float] = []
    for index in range(pairs):
        both = ((a, a_times), (b, b_times))
        for run, times in both if index % 2 == 0 else reversed(both):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    ratios = [one / other for one, other in zip(a_times, b_times, strict=True)]
    low, high = median_interval(ratios)
    return {
        "median_ratio": median(ratios),
        "low": low,
        "high": high,
        "a_seconds": median(a_times),
        "b_seconds": median(b_times),
        "pairs": pairs,
    }


def median_interval(values: list[float], coverage: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median, of at least the given coverage.

    Raises ValueError for too few values.
    """
    n = len(values)
    below = 0.0  # chance that at most `cut` values lie below the median
    cut = -1
    while below + math.comb(n, cut + 1) / 2**n <= (1 - coverage) / 2:
        cut += 1
        below += math.comb(n, cut) / 2**n
    if cut < 0:
        raise ValueError(f"{n} values are too few for an interval of {coverage:.0%}")
    ordered = sorted(values)
    return ordered[cut], ordered[n - 1 - cut]


def environment(*packages: str) -> dict[str, object]:
    """What a figure depends on: command, Python, package versions, CPU, cores, threads, load at the end.

    Benchmarks are started from the repository's root as `python -m benchmarks.cpu.NAME`.
    """
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started = ["-m", spec.name] if spec else sys.argv[:1]
    return {
        "command": " ".join(["python", *started, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
