"""What models that take turns with the planned one hold on the host, or in files on disk, and how long a turn must be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from whitetuner.memory.machine import GIB, Machine
from whitetuner.memory.swap.host import PIN_SHARE

#: The process itself on the host: interpreter, libraries, data loading.
HOST_BASE_BYTES = 3 * GIB
#: What a disk reads in order, bytes a second: an SSD at SATA.
DISK_BYTES_PER_S = 0.5e9
#: Of a turn's time at most, what its beginning may take; and no turn is longer than this part of the run, for a fair share.
SHARE_OF_TURN, SHARE_OF_RUN = 0.03, 0.1
#: Steps of a turn at least.
TURN_STEPS = 20


class Held(NamedTuple):
    """Bytes on the host at most, and in files for blocks whose turn it is not."""

    host_bytes: int
    disk_bytes: int = 0


@dataclass(frozen=True)
class Beside:
    """Models that take turns with the planned one.

    learners:       that learn too: each as large as the planned one, in the same base, with an adapter of the same shape
    drawing_bytes:  blocks of one that only draws
    on_disk:        whether those whose turn it is not wait in files; None: where the host has no room for all
    """

    learners: int = 0
    drawing_bytes: int = 0
    on_disk: bool | None = False

    def held(
        self, blocks_bytes: int, small_bytes: int, streamed: bool, sent_bytes: int, machine: Machine
    ) -> Held:
        """blocks_bytes: of the planned model, in host memory where it is streamed or takes turns; small_bytes: all else of it,
        adapter and optimizer too, which leaves the card for another's turn; sent_bytes: inputs of blocks.

        With files the most is held while a step runs, while the other draws, or when all that learn have just been loaded.
        """
        own = blocks_bytes if streamed or self.learners else 0
        others = self.learners * blocks_bytes + self.drawing_bytes
        base = HOST_BASE_BYTES + self.learners * small_bytes
        together = Held(base + own + others + sent_bytes)
        stays = self.on_disk is False or (self.on_disk is None and has_room(together.host_bytes, machine))
        if not others or stays:
            return together
        awake = max(own, self.drawing_bytes) + sent_bytes
        return Held(base + max(awake, own + self.learners * blocks_bytes), own + others)


ALONE = Beside()


def has_room(host_bytes: int, machine: Machine) -> bool:
    """Memory for the process, streamed weights and inputs, and these within what may be pinned."""
    return host_bytes <= machine.host_bytes and host_bytes - HOST_BASE_BYTES <= PIN_SHARE * machine.host_bytes


def exchange_s(resident_bytes: int, small_bytes: int, parked_bytes: int, link_bytes_per_s: float) -> float:
    """Seconds at the beginning of a turn in which nothing can be computed, at most.

    resident_bytes: of blocks and slots that must be filled anew on the card; small_bytes: what lies outside of the blocks, of
    which one model's goes and the other's comes; parked_bytes: read from a file
    """
    return (resident_bytes + 2 * small_bytes) / link_bytes_per_s + parked_bytes / DISK_BYTES_PER_S


def turn_steps(exchange: float, step_s: float, run_steps: int) -> int:
    """Optimizer steps of a turn, so that its beginning (`exchange` seconds) is within SHARE_OF_TURN of it."""
    wanted = math.ceil(exchange / (SHARE_OF_TURN * step_s)) if step_s else TURN_STEPS
    return max(TURN_STEPS, min(wanted, int(SHARE_OF_RUN * run_steps)))
