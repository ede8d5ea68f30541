"""The weights of the blocks go into their masters: of this process alone, or shared with others and written by one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whitetuner.memory.swap.arena import Arena
from whitetuner.memory.swap.backend import Backend
from whitetuner.memory.swap.host import give_back
from whitetuner.memory.swap.layout import BlockLayout, carry, padded, small_of

#: So much freed memory is returned to the system at a time.
GIVEN_BACK_BYTES = 64 * 2**20


def written_masters(
    layouts: Sequence[BlockLayout], backend: Backend, arena: Arena | None, trained: bool = False
) -> list[torch.Tensor]:
    """The master of every block; the blocks' tensors are bound to them.

    arena: shared; its leader's weights are everybody's, small tensors that do not move included
    trained: the blocks' own weights train
    """
    sizes = [layout.num_bytes for layout in layouts]
    still = small_of(layouts, trained) if arena is not None else []
    rest = padded(sum(padded(one.numel() * one.element_size()) for one in still))
    shared = None if arena is None else arena.masters([*sizes, rest])
    masters, freed = [], 0
    for index, layout in enumerate(layouts):
        master = backend.master(layout.num_bytes) if shared is None else shared[index]
        for entry in layout.entries:
            if arena is None or arena.leader:
                entry.view(master).copy_(entry.tensor.data)
            entry.tensor.data = backend.away(entry.view(master), entry.tensor.requires_grad)
        masters.append(master)
        freed += layout.num_bytes
        if freed > GIVEN_BACK_BYTES:  # else the host would hold all blocks twice for a while
            give_back()
            freed = 0
    if arena is None or shared is None:
        return masters
    if arena.leader:
        carry(still, shared[-1], write=True)
    arena.filled()
    if not arena.leader:
        carry(still, shared[-1], write=False)
    return masters
