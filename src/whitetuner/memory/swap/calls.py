"""How the engine learns that a block's forward and backward begin and end, whatever it is called like.

Module hooks do not do: backward hooks look at positional tensors only and fire before the backward pass of a
block that is called with keywords; forward hooks do not run when a checkpoint stops its second computation
early. So a block's `forward` is replaced, and its outputs carry a hook: when their first gradient arrives,
the block's backward begins.

It has ended when that of an earlier call begins, or with the pass: autograd runs, of all nodes that are
ready, the one that was made last (torch/csrc/autograd/engine.cpp, CompareNodeTaskTime), and gradients flow
from later nodes to earlier ones, so that no node of a block is left when an earlier node runs. Nothing is
put into the graph for it: even an identity would sum the gradients of a shared input (temb) in another
order, and the results would differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.utils._pytree import tree_flatten

Pack = Callable[[torch.Tensor], Any]


def when_outputs_begin(begin: Callable[[], None], outputs: Any) -> None:
    """`begin` is called in the backward pass when the first gradient of any output arrives."""
    tensors = [t for t in tree_flatten(outputs)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
    if tensors:
        register_multi_grad_hook(tensors, lambda _: begin(), mode="any")


def backward_pass() -> int | None:
    """The id of the backward pass in which this code runs, or None."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Calls back when the present backward pass has ended; not when it ends by an exception."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def in_checkpoint() -> bool:
    """Whether tensors saved now are kept, or recomputed, by a non-reentrant torch checkpoint."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def saving(pack: Pack, unpack: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """Hooks on what the forward saves, in front of hooks that are there already; none inside a checkpoint.

    A checkpoint's own hooks must stay on top: covered by others they are silently never called, and nothing
    is recomputed. `pack` returns its argument for what it does not want; that goes on to the hooks beneath.
    """
    beneath: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if beneath is None:
        return saved_tensors_hooks(pack, unpack)
    if beneath[0].__module__ == "torch.utils.checkpoint":
        return nullcontext()
    outer_pack, outer_unpack = beneath

    def both_pack(tensor: torch.Tensor) -> tuple[bool, Any]:
        packed = pack(tensor)
        return (True, outer_pack(tensor)) if packed is tensor else (False, packed)

    def both_unpack(packed: tuple[bool, Any]) -> Any:
        return outer_unpack(packed[1]) if packed[0] else unpack(packed[1])

    return saved_tensors_hooks(both_pack, both_unpack)
