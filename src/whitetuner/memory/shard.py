"""Each rank holds a share of every block's weights (PyTorch's FSDP2): for models that fit no card.

A block's weights are gathered from all ranks just before it runs, in the forward and again in the backward pass, and the
gathered copy is dropped right after. So every pass is made by all ranks together: each has as many of a step as the others.
Adapters are left whole on every rank; they are small, and their gradients are averaged as without sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from whitetuner.memory.blocks import blocks_of
from whitetuner.memory.fit import Fitted
from whitetuner.memory.kernels import set_attention
from whitetuner.memory.offload import InputsOnHost
from whitetuner.memory.recompute import checkpoint_blocks

T = TypeVar("T")


@dataclass
class Sharded(Fitted):
    """As Fitted, of a module whose weights are shared out: it can't change how many blocks are on the device.

    together: a context around work in which ranks wait for each other in every block
    """

    together: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def sharded(self) -> bool:
        return True

    def run(self, step: Callable[[], T], forget: Callable[[], None]) -> T:
        with self.together():
            return step()


def fit_sharded(
    module: nn.Module,
    block_lists: Sequence[str],
    mesh: DeviceMesh,
    *,
    whole: Collection[nn.Parameter] = (),
    plain: Iterable[int] = (),
    inputs_on_host: bool = False,
    attention: str = "auto",
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Sharded:
    """Shares out a module's weights among the mesh, block by block, then all that is in no block.

    whole: parameters that every rank keeps whole, on its device already;  together: see Sharded;  others: see memory.fit.fit
    Gradients are added up, in float32, and not divided: a step's loss is divided by the samples of all ranks already.
    Each block comes to the mesh's device for itself: the whole module never is there.
    """
    set_attention(module, attention)
    device = torch.device(mesh.device_type)
    saving = InputsOnHost(device).saving if inputs_on_host else nullcontext
    blocks = [block for _, block in blocks_of(module, block_lists)]
    again = frozenset(range(len(blocks))) - frozenset(plain)
    recompute = checkpoint_blocks(module, block_lists, again, keep_inputs=saving)
    for one in (*blocks, module):
        fully_shard(
            one,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            ignored_params=set(whole),
        )
        assert isinstance(one, FSDPModule)
        one.set_gradient_divide_factor(1.0)
        one.set_force_sum_reduction_for_comms(True)
        unused = getattr(one, "set_reduce_scatter_unused_params", None)  # of newer PyTorch
        if unused is not None:
            unused(True, recurse=False)  # else ranks that used other weights would not fit together
    return Sharded(module, tuple(block_lists), recompute, None, None, together=together)
