"""Host memory for the masters: exact in size, pinned in place as far as the machine lets us.

torch's own pinned allocator rounds up to powers of two (20 GiB become 32), so the memory is mapped here and
registered with the driver where it lies. What cannot be registered is copied through a few small pinned
buffers instead.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

#: Share of the machine's memory that is pinned at most. Windows lends pinned memory to the graphics driver
#: out of the half of the RAM that it calls shared GPU memory, and slows down when little of that is left.
PIN_SHARE = 0.4 if sys.platform == "win32" else 0.8
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_bytes() -> int:
    """Memory that this process may use: of the machine, or of its container when that is less."""
    total = psutil.virtual_memory().total
    for name in _CGROUP_LIMITS:
        path = Path(name)
        if path.is_file():
            text = path.read_text(encoding="utf-8").strip()
            if text.isdigit():
                total = min(total, int(text))
    return total


def mapped(num_bytes: int) -> torch.Tensor:
    """A flat uint8 tensor on pages of its own (in whole pages, no rounding beyond), of zeros."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if sys.platform == "win32":
        pages = mmap.mmap(-1, num_bytes)
    else:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)  # registering is paid per page
    return torch.frombuffer(pages, dtype=torch.uint8)


def give_back() -> None:
    """Freed memory returns to the system now. glibc keeps pieces below 32 MB for itself: seen, 2 GB of weights of 3 to 7 MB
    each stayed with a process that had copied them into an arena. Elsewhere nothing is done."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps nothing
        if trim is not None:
            trim(0)


def register_with_cuda(buffer: torch.Tensor) -> bool:
    """Pins a mapped buffer in place (CUDA and ROCm); False when the driver refuses."""
    code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 1))
    if code != 0:
        _forget_last_error()
    return code == 0


def unregister_with_cuda(buffer: torch.Tensor) -> None:
    """Undoes register_with_cuda."""
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def _forget_last_error() -> None:
    """A refused call leaves its error behind for whichever kernel starts next; one is started to take it."""
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Pinned:
    """How much of the masters is pinned. mode: "pinned", "partly pinned", "staged" or "pageable"."""

    mode: str
    count: int
    num_bytes: int
    total_bytes: int

    def sentence(self) -> str:
        gb = 1e9
        if self.mode == "pinned":
            return f"weights that are away wait in pinned memory ({self.total_bytes / gb:.2f} GB)"
        if self.mode == "partly pinned":
            return (
                f"{self.num_bytes / gb:.2f} of {self.total_bytes / gb:.2f} GB of the weights that are away are pinned; "
                "the rest goes through two small pinned buffers, about a tenth slower"
            )
        if self.mode == "staged":
            return (
                f"the system pins none of the {self.total_bytes / gb:.2f} GB of weights that are away; they go through "
                "two small pinned buffers, about a tenth slower"
            )
        return (
            f"the system pins no memory at all; {self.total_bytes / gb:.2f} GB of weights are copied from ordinary "
            "memory and training waits for every copy"
        )


def pin(
    masters: Sequence[torch.Tensor], register: Callable[[torch.Tensor], bool], limit_bytes: int
) -> frozenset[int]:
    """Registers masters up to `limit_bytes` until the driver refuses one; returns the indices of those
    pinned.
    """
    pinned, used = set(), 0
    for index, master in enumerate(masters):
        if master.numel() == 0:
            continue
        if used + master.numel() > limit_bytes or not register(master):
            break
        pinned.add(index)
        used += master.numel()
    return frozenset(pinned)
