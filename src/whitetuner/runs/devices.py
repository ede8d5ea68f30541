"""The GPUs of this machine, told without torch, and the lock of each: one training at a time, whoever started it.

A lock is held by the training process itself through the operating system, so it is never left behind by a crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from whitetuner.errors import UserError
from whitetuner.runs.files import write_atomically
from whitetuner.runs.state import state_folder

_QUERY = "index,uuid,name,memory.total,memory.used,utilization.gpu,temperature.gpu,power.draw"
_ANSWER_S = 10


@dataclass(frozen=True)
class Device:
    """A GPU, or the one CPU of a machine without. name: of the lock (the GPU's uuid, "cpu"); index: as nvidia-smi counts;
    memory in MB; what the driver does not tell is None."""

    name: str
    title: str
    index: int | None = None
    total_mb: float | None = None
    used_mb: float | None = None
    busy_percent: float | None = None
    celsius: float | None = None
    watts: float | None = None


CPU = Device("cpu", "CPU")


def devices() -> list[Device]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in nvidia-smi's order; a CPU where there is none."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_ANSWER_S,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except (OSError, subprocess.TimeoutExpired):  # no driver: no GPU that a training could use
        return [CPU]
    found = read_answer(answer.stdout) if answer.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        words = [word.strip() for word in visible.split(",") if word.strip()]
        chosen = [[one for one in found if word in (str(one.index), one.name)] for word in words]
        found = [one for ones in chosen for one in ones]
    return found or [CPU]


def read_answer(text: str) -> list[Device]:
    """nvidia-smi's lines; rows of another shape are passed over."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 8 and cells[0].isdigit():
            numbers = [_number(cell) for cell in cells[3:]]
            found.append(Device(cells[1], cells[2], int(cells[0]), *numbers))
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]", "[Not Supported]"


@dataclass(frozen=True)
class Wish:
    """What a run asks for: these devices, or so many of any."""

    devices: tuple[Device, ...]
    count: int

    def overlaps(self, names: Iterable[str]) -> bool:
        return not {one.name for one in self.devices}.isdisjoint(names)


def wish_of(asked: str, there: Sequence[Device]) -> Wish:
    """ "auto": the first; "any", "any:2": free ones; "0", "0,1", "cpu": these. Raises UserError for GPUs that are not there."""
    if asked in ("", "auto"):
        return Wish((there[0],), 1)
    found = re.fullmatch(r"any(?::(\d+))?", asked)
    if found:
        count = int(found[1] or 1)
        if there[0] is CPU:
            return Wish((CPU,), 1)
        if not 1 <= count <= len(there):
            raise UserError(
                "{count} GPUs were asked for, and there are {there}",
                where="--gpus",
                mend="ask for {there} at most",
                count=count,
                there=len(there),
            )
        return Wish(tuple(there), count)
    numbers = [word.strip().removeprefix("cuda:") for word in asked.split(",")]
    chosen = tuple(one for one in there if str(one.index) in numbers)
    # "cpu" on a machine with GPUs, and numbers that PyTorch will refuse with a better message than this one could
    return Wish(chosen or (CPU,), max(1, len(chosen)))


class Held:
    """Device locks of this process; released by `release` or by its end."""

    def __init__(self) -> None:
        self.devices: list[Device] = []
        self._locks: list[FileLock] = []

    def take(self, wish: Wish, run: Path) -> bool:
        """All that is wished for, or nothing. Raises OSError when locks cannot be written."""
        folder = state_folder() / "devices"
        folder.mkdir(parents=True, exist_ok=True)
        for device in wish.devices:
            if len(self.devices) == wish.count:
                break
            lock = FileLock(folder / f"{_file_name(device)}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                self.devices.append(device)
                self._locks.append(lock)
        if len(self.devices) < wish.count:
            self.release()
            return False
        for device in self.devices:
            told = json.dumps({"pid": os.getpid(), "run": str(run)})
            write_atomically(folder / f"{_file_name(device)}.json", told)
        return True

    def release(self) -> None:
        for lock in self._locks:
            lock.release()
        self.devices, self._locks = [], []


def holder(device: Device) -> dict[str, object]:
    """{pid, run} of the last process that held a device; {} when none did. Whether it lives is for the caller to ask."""
    try:
        found = json.loads(
            (state_folder() / "devices" / f"{_file_name(device)}.json").read_text(encoding="utf-8")
        )
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _file_name(device: Device) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", device.name)
