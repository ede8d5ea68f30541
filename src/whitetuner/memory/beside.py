"""What models that take turns with the planned one hold: on the card what never leaves it, on the host their blocks, or a file
on disk for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from whitetuner.memory.machine import GIB, Machine
from whitetuner.memory.swap.host import PIN_SHARE

#: The process itself on the host: interpreter, libraries, data loading.
HOST_BASE_BYTES = 3 * GIB


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
