"""The check of a machine: what training will lean on, whether it holds, and what to do where it does not.

Nothing is changed and nothing is sent anywhere. Every finding is one line; only a `bad` one stands in the way of training.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil

from whitetuner.errors import EXIT_ENVIRONMENT
from whitetuner.install.machine import Driver, has_long_paths, is_writable, nvidia_driver
from whitetuner.install.torch_build import OLDEST_TORCH
from whitetuner.runs.devices import CPU, Device, devices, holder
from whitetuner.runs.state import state_folder
from whitetuner.tongue import padded, told
from whitetuner.version import __version__

Status = Literal["ok", "look", "bad"]

GIB = 1 << 30
#: What the smallest useful run asks for: the weights of a 4 B model in int8 wait on the host, and are there once on the disk.
LEAST_RAM_GIB, LEAST_DISK_GIB, LEAST_SHM_GIB = 12, 20, 1
#: Below this, reading 20 GB of weights takes longer than ten minutes.
LEAST_DISK_MB_S = 35
#: Written and read back to time the disk.
_PROBE_BYTES = 64 << 20
_PORTS = {7860: "gui --port", 6006: "gui --tensorboard"}
#: Extra of pyproject.toml -> (module, what it is for).
EXTRAS = {
    "video": ("av", "video files"),
    "quant": ("bitsandbytes", "the optimizer adamw8bit"),
    "prodigy": ("prodigyopt", "the optimizer prodigy"),
    "heic": ("pillow_heif", "HEIC pictures"),
}


@dataclass(frozen=True)
class Finding:
    """what: the thing looked at; value: what was found; status: "look": training works, but worse or not all of it; mend: what
    to do, "" where nothing is to be done."""

    what: str
    value: str
    status: Status = "ok"
    mend: str = ""


def examine(folder: Path) -> list[Finding]:
    """Everything, in the order in which it is needed. folder: where runs will be written (made nowhere here)."""
    looks: Sequence[Callable[[], Iterator[Finding]]] = (
        _python,
        _torch,
        lambda: _cards(devices()),
        _memory,
        lambda: _disk(folder),
        _rights_of_state,
        _ports,
        _fonts,
        _extras,
    )
    return [finding for look in looks for finding in look()]


def _python() -> Iterator[Finding]:
    fits = (3, 10) <= sys.version_info[:2] <= (3, 14)
    mend = "" if fits else "install Python 3.10 to 3.14, then run launch.py with it"
    yield Finding(
        "White Tuner", f"{__version__}, Python {platform.python_version()}", "ok" if fits else "bad", mend
    )
    mend = (
        ""
        if has_long_paths()
        else "switch on LongPathsEnabled (Windows: Settings, For developers, long paths)"
    )
    yield Finding("system", f"{platform.platform()}, {os.cpu_count()} cores", "look" if mend else "ok", mend)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("PyTorch", f"cannot be loaded ({error})", "bad", "python launch.py setup")
        return
    version, cuda = str(torch.__version__), torch.version.cuda
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Finding(
            "PyTorch", version, "bad", f"python launch.py setup (it brings PyTorch {oldest} or newer)"
        )
        return
    built = f"CUDA {cuda}" if cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    driver, seen = nvidia_driver(), torch.cuda.is_available()
    problem = torch_problem(built, driver, seen, torch.cuda.get_arch_list() if seen else [])
    yield Finding("PyTorch", f"{version}, built for {built}", "bad" if problem else "ok", problem)


def torch_problem(built: str, driver: Driver | None, seen: bool, archs: Sequence[str]) -> str:
    """What is wrong between this build, the driver and the card; "" for nothing.

    built: "CUDA 13.0", "ROCm 6.4" or "CPU"; seen: PyTorch sees a GPU; archs: what it was compiled for ("sm_90")
    """
    if driver is None:
        return ""
    if built == "CPU":
        return (
            "there is an NVIDIA driver, but this PyTorch is built for the CPU: python launch.py setup --again"
        )
    if not built.startswith("CUDA"):
        return ""
    major = int(built.split()[1].split(".")[0])
    if driver.cuda is not None and driver.cuda[0] < major:
        have = ".".join(map(str, driver.cuda))
        return f"the driver is for CUDA {have}: update it, or python launch.py setup --torch-index cu126"
    if driver.capability is not None and seen:
        mine = 10 * driver.capability[0] + driver.capability[1]
        compiled = [
            int("".join(c for c in one.partition("_")[2] if c.isdigit())) for one in archs if "_" in one
        ]
        if compiled and not any(one // 10 == mine // 10 and one <= mine for one in compiled):
            return f"the card (sm_{mine}) is not among those it was compiled for: python launch.py setup --torch-index cu126"
    return (
        "" if seen else "the driver is there, but PyTorch sees no GPU: update the driver, restart the machine"
    )


def _cards(there: Sequence[Device]) -> Iterator[Finding]:
    if list(there) == [CPU]:
        yield Finding("GPU", "none: training runs on the CPU (tiny models, tests)", "look", "")
        return
    for card in there:
        total, used = card.total_mb or 0, card.used_mb or 0
        has = f"{card.title}, {total / 1024:.1f} GB, {max(0.0, total - used) / 1024:.1f} GB free"
        users = _users(card)
        busy = used > 0.25 * total and bool(total)
        has = f"{has}; held by {', '.join(users)}" if users else has
        yield Finding(f"GPU {card.index}", has, "look" if busy else "ok", _free_it(users) if busy else "")


def _users(card: Device) -> list[str]:
    """Processes on a card, by nvidia-smi and by our own locks."""
    found = {}
    ask = [
        "nvidia-smi",
        f"--id={card.index}",
        "--query-compute-apps=pid,used_memory",
        "--format=csv,noheader,nounits",
    ]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run(ask, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
        for line in answer.stdout.splitlines():
            pid, _, used = (cell.strip() for cell in line.partition(","))
            if pid.isdigit():
                found[int(pid)] = f"{used} MB" if used.isdigit() else ""
    ours = holder(card).get("pid")
    if isinstance(ours, int) and psutil.pid_exists(ours):
        found.setdefault(ours, "")
    return [f"{_name_of(one)} (process {one}{', ' + used if used else ''})" for one, used in found.items()]


def _name_of(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "another user's program"


def _free_it(users: Sequence[str]) -> str:
    return (
        "end what is not needed there: what it holds is missing from the plan"
        if users
        else "a screen or a browser holds it"
    )


def _memory() -> Iterator[Finding]:
    from whitetuner.memory.swap.host import PIN_SHARE, host_bytes

    memory, swap, mine = psutil.virtual_memory(), psutil.swap_memory(), host_bytes()
    low = mine < LEAST_RAM_GIB * GIB
    has = f"{memory.total / GIB:.1f} GB, {memory.available / GIB:.1f} GB free"
    if mine < memory.total:
        has = f"{has}; {mine / GIB:.1f} GB of them for this container"
    yield Finding(
        "memory",
        has,
        "look" if low else "ok",
        "close other programs; prefer the smallest models" if low else "",
    )
    yield Finding("pinned at most", f"{PIN_SHARE * mine / GIB:.1f} GB of weights can wait in pinned memory")
    small = os.name == "nt" and swap.total < 16 * GIB
    mend = "give Windows a page file of 32 GB or more (it must cover what is loaded)" if small else ""
    yield Finding("swap or page file", f"{swap.total / GIB:.1f} GB", "look" if small else "ok", mend)
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        small = free < LEAST_SHM_GIB * GIB
        mend = (
            "several GPUs will each need a copy of the model: start the container with --shm-size=32g"
            if small
            else ""
        )
        yield Finding("/dev/shm", f"{free / GIB:.1f} GB free", "look" if small else "ok", mend)


def _disk(folder: Path) -> Iterator[Finding]:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not is_writable(there):
        yield Finding(
            "output folder", f"{there} cannot be written", "bad", "set run.output_dir to a folder of yours"
        )
        return
    free = shutil.disk_usage(there).free
    if free < 2 * _PROBE_BYTES:
        yield Finding("disk", f"{free >> 20} MB free at {there}", "bad", "make room")
        return
    speed = _write_speed(there)
    few, slow = free < LEAST_DISK_GIB * GIB, speed < LEAST_DISK_MB_S
    mend = "make room: models, caches and checkpoints are large" if few else ""
    mend = mend or ("keep models and output on a faster disk (no network drive)" if slow else "")
    has = f"{free / GIB:.0f} GB free at {there}, writes {speed:.0f} MB/s"
    yield Finding("disk", has, "look" if mend else "ok", mend)


def _write_speed(folder: Path) -> float:
    """MB/s, onto the disk and not into its cache."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(_PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _PROBE_BYTES / 1e6 / max(1e-6, time.perf_counter() - began)


def _rights_of_state() -> Iterator[Finding]:
    place = state_folder()
    there = place
    while not there.exists():
        there = there.parent
    mend = "" if is_writable(there) else "set WHITETUNER_STATE to a folder of yours"
    yield Finding("list of runs, logins", str(place), "bad" if mend else "ok", mend)


def _ports() -> Iterator[Finding]:
    for port, word in _PORTS.items():
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        mend = f"a page may be open there already; another port: {word} {port + 1}" if taken else ""
        yield Finding(f"port {port}", "taken" if taken else "free", "look" if taken else "ok", mend)


def _fonts() -> Iterator[Finding]:
    if os.name == "nt" or sys.platform == "darwin":
        return  # both come with Chinese fonts
    program = shutil.which("fc-list")
    if program is None:
        yield Finding("Chinese font", "unknown: fontconfig is not installed")
        return
    found = subprocess.run(
        [program, ":lang=zh", "family"], capture_output=True, text=True, timeout=20
    ).stdout.split("\n")
    name = next((line.split(",")[0] for line in sorted(found) if line.strip()), "")
    mend = "" if name else "only for Chinese in a browser on this machine: apt install fonts-noto-cjk"
    yield Finding("Chinese font", name or "none", "ok" if name else "look", mend)


def _extras() -> Iterator[Finding]:
    for extra, (module, purpose) in EXTRAS.items():
        if find_spec(module) is None:
            yield Finding(extra, f"not installed: no {purpose}", "look", f"pip install whitetuner[{extra}]")
        else:
            yield Finding(extra, f"installed: {purpose}")


def as_text(findings: Sequence[Finding]) -> str:
    """A line each, with what to do below; at the end whether anything stands in the way."""
    mark = {"ok": "ok  ", "look": "look", "bad": "BAD "}
    lines = []
    for one in findings:
        lines.append(f"{mark[one.status]}  {padded(told(one.what), 21)} {told(one.value)}")
        lines += [f"      {'':<21} -> {told(one.mend)}"] if one.mend else []
    bad = ", ".join(told(one.what) for one in findings if one.status == "bad")
    lines += ["", told(f"in the way of training: {bad}" if bad else "nothing stands in the way of training")]
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs and bug reports."""
    packages = sorted({str(one.metadata["Name"]): one.version for one in metadata.distributions()}.items())
    return {"findings": [asdict(one) for one in findings], "packages": dict(packages)}


def exit_code(findings: Sequence[Finding]) -> int:
    """3 when anything is bad, else 0."""
    return EXIT_ENVIRONMENT if any(one.status == "bad" for one in findings) else 0
