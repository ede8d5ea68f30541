"""The facts of a machine that a plan needs: memory of the card and of the host, speed of computing and of
the link.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from whitetuner.memory.swap.device import DeviceBackend
from whitetuner.memory.swap.host import host_bytes

GIB = 1 << 30
#: What a process takes on a card before the first tensor: driver context, cuBLAS and cuDNN workspaces.
CONTEXT_BYTES = int(0.6 * GIB)
#: Share of its peak in matrix products that a transformer's training step reaches.
_EFFICIENCY = 0.45


@dataclass(frozen=True)
class Machine:
    """vram_bytes: that the run may use, context included;  flops_per_s: reached in training, not the peak;
    link_bytes_per_s: host to card, pinned;  measured: these speeds were taken on this machine
    """

    name: str
    vram_bytes: int
    host_bytes: int
    flops_per_s: float
    link_bytes_per_s: float
    measured: bool = False


#: Up to so many GB: a card of that size, its dense bf16 FLOP/s with float32 sums (vendors' tables), bytes/s
#: of its slot.
_TYPICAL = (
    (8.5, "RTX 4060", 30e12, 12e9),
    (13.0, "RTX 4070", 58e12, 25e9),
    (17.0, "RTX 4080", 97e12, 25e9),
    (25.0, "RTX 4090", 165e12, 25e9),
    (33.0, "RTX 5090", 209e12, 50e9),
    (10_000.0, "H100", 800e12, 50e9),
)


def typical_machine(vram_gb: float, host_gb: float | None = None) -> Machine:
    """A card that is usually sold with this much memory; the host is this one unless told (GB are 2^30
    bytes).
    """
    name, flops, link = next(row[1:] for row in _TYPICAL if vram_gb <= row[0])
    host = host_bytes() if host_gb is None else int(host_gb * GIB)
    return Machine(f"a card like the {name}", int(vram_gb * GIB), host, flops * _EFFICIENCY, link)


def this_machine(device: torch.device, vram_gb: float | None = None) -> Machine:
    """The machine with this CUDA or ROCm device, its speeds measured (about a second).

    vram_gb: that may be used, of what is free now; None: all of that
    """
    assert device.type == "cuda"
    free, _ = torch.cuda.mem_get_info(device)
    allowed = free if vram_gb is None else min(free, int(vram_gb * GIB))
    link = DeviceBackend(device).link_bytes_per_s()
    flops = _product_flops(device) * _EFFICIENCY / 0.8  # a large product alone reaches about 0.8 of the peak
    return Machine(torch.cuda.get_device_name(device), allowed, host_bytes(), flops, link, measured=True)


def _product_flops(device: torch.device, size: int = 6144, repeats: int = 8) -> float:
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    torch.cuda.synchronize(device)
    return repeats * 2 * size**3 / (time.perf_counter() - start)
