"""A step that runs out of device memory is run again with fewer resident blocks, to the same result.

With a frozen base a step has no effect before the optimizer's: gradients of the broken try are dropped, the
masters on the host are whole, and noise and timesteps are functions of the sample. So the second try
computes what the first would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.memory.machine import GIB
from whitetuner.memory.swap.engine import SwapEngine

log = logging.getLogger(__name__)
T = TypeVar("T")
#: Share of the resident blocks that leave at each try.
_SHARE = 0.25


def with_room(
    step: Callable[[], T],
    engine: SwapEngine,
    forget: Callable[[], None],
    tell: Callable[[str], None] = log.warning,
) -> T:
    """Runs `step`; on running out of memory frees residents and runs it again.

    step:   a whole optimizer step up to, and without, the optimizer's: all its accumulated parts
    forget: drops what the broken try left (gradients)
    tell:   hears what was done, in a sentence
    Raises UserError when no resident is left to free.
    """
    while True:
        try:
            return step()
        except torch.OutOfMemoryError as error:
            if not any(engine.layouts[i].num_bytes for i in engine.residents):
                raise UserError(
                    "the card's memory does not suffice though every block is streamed ({error})",
                    where="memory",
                    mend="use a lower data.resolution, batch_size or num_frames, or gradient_checkpointing = true",
                    code=EXIT_FAILED,
                    error=str(error).splitlines()[0][:160],
                ) from error
        # outside of the handler: the traceback holds the broken step's tensors
        forget()
        shrink(engine, tell)


def shrink(engine: SwapEngine, tell: Callable[[str], None] = log.warning) -> None:
    """A quarter of the resident blocks leave the device, at even distances."""
    kept = [i for i in sorted(engine.residents) if engine.layouts[i].num_bytes]
    leave = max(1, round(len(kept) * _SHARE))
    step = len(kept) / leave
    gone = {kept[int(i * step)] for i in range(leave)}
    freed = sum(engine.layouts[i].num_bytes for i in gone)
    engine.resize(engine.residents - gone)
    if engine.backend.device.type == "cuda":
        torch.cuda.empty_cache()
    tell(
        f"out of memory: {len(gone)} of {len(kept)} resident blocks ({freed / GIB:.1f} GB) are streamed from now on, "
        "and the step is run again"
    )
