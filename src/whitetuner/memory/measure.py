"""What a training step needs besides the weights, measured on tensors that have shapes and no memory.

The step runs under torch's FakeTensorMode: every operator of the real forward and backward, no numbers. So
the bytes that autograd saves, the peak of everything that is alive and the floating-point operations are
those of this model at this resolution, batch and adapter, with no weights loaded and no device. (Kernels'
own scratch memory is not seen.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from whitetuner.memory.blocks import Patch, blocks_of
from whitetuner.memory.micro import MicroBatches
from whitetuner.memory.recompute import checkpoint_blocks

#: Whole numbers up to which a tensor is taken for sizes, lengths or a mask, whose values stay readable.
_MOST_COUNTS = 1 << 16
#: Blocks of the two short runs of `measure_alike`.
_FEW = (3, 5)


@dataclass(frozen=True)
class BlockCost:
    """One block at one shape, in bytes and operations.

    saved_bytes: kept from forward to backward when it is not computed again;  input_bytes: when it is
    flops:       of its forwards that a backward follows
    """

    path: str
    saved_bytes: int
    input_bytes: int
    flops: int


@dataclass(frozen=True)
class StepCost:
    """One step of forward and backward, weights and optimizer aside.

    peak_bytes:         the most that is alive at once with every block computed again
    peak_bytes_plain:   and with none
    flops_forward, flops_backward: of the whole model, nothing computed again
    forwards, backwards: passes through the blocks; a model that looks at given pictures apart has more of the former
    """

    blocks: tuple[BlockCost, ...]
    peak_bytes: int
    peak_bytes_plain: int
    flops_forward: int
    flops_backward: int
    forwards: int = 1
    backwards: int = 1

    def peak_with(self, plain: Sequence[int]) -> int:
        """Peak when these blocks keep what they save and the others are computed again."""
        more = sum(self.blocks[i].saved_bytes - self.blocks[i].input_bytes for i in plain)
        return min(self.peak_bytes + more, max(self.peak_bytes_plain, self.peak_bytes))

    def flops_again(self, plain: Sequence[int]) -> int:
        """Operations of the second computation when these blocks have none."""
        kept = frozenset(plain)
        return sum(block.flops for i, block in enumerate(self.blocks) if i not in kept)


def measure_step(
    module: nn.Module,
    block_lists: Sequence[str],
    step: Callable[[], torch.Tensor],
    *,
    fake: bool = True,
    drop_gradients: bool = False,
    micro: MicroBatches | None = None,
) -> StepCost:
    """Runs `step` (it returns the scalar loss) with and without recomputation, and measures.

    module: on any device, the meta device too; what trains must require gradients. Left as it was.
    step:   may read real tensors; with `fake` they are turned into tensors without content where they meet
            the model
    drop_gradients: of each weight as soon as it is there, as full training does (memory/fused.py)
    fake:   False runs the real thing, for tests
    micro:  a batch goes through each block in pieces
    """
    blocks = blocks_of(module, block_lists)
    with _without_content(module) if fake else _as_it_is():
        plain = _run(module, block_lists, blocks, step, "none", drop_gradients, micro)
        again = _run(module, block_lists, blocks, step, "all", drop_gradients, micro)
    costs = [
        BlockCost(path, plain.saved[i], again.saved[i], plain.flops_of_block[i])
        for i, (path, _) in enumerate(blocks)
    ]
    return StepCost(
        tuple(costs),
        again.peak,
        plain.peak,
        plain.flops_forward,
        plain.flops_backward,
        max(plain.forwards),
        max(plain.backwards),
    )


def measure_alike(
    module: nn.Module,
    block_list: str,
    step: Callable[[], torch.Tensor],
    *,
    drop_gradients: bool = False,
    micro: MicroBatches | None = None,
) -> StepCost:
    """As measure_step for one list of blocks of one shape: told from a run with three of them and one with five.

    Every block more adds what the one before added, so forty blocks of a video model are measured in seconds. With few blocks,
    or blocks that differ, all of them are run.
    """
    holder, _, name = block_list.rpartition(".")
    owner = module.get_submodule(holder)
    blocks = getattr(owner, name)
    kinds = {tuple((key, tensor.shape) for key, tensor in block.named_parameters()) for block in blocks}
    if len(blocks) <= _FEW[1] or len(kinds) > 1:
        return measure_step(module, (block_list,), step, drop_gradients=drop_gradients, micro=micro)
    found = []
    for count in _FEW:
        setattr(owner, name, nn.ModuleList(blocks[:count]))
        try:
            found.append(
                measure_step(module, (block_list,), step, drop_gradients=drop_gradients, micro=micro)
            )
        finally:
            setattr(owner, name, blocks)
    few, more = found
    each = 1 / (_FEW[1] - _FEW[0])

    def grown(kind: str) -> int:
        slope = (getattr(more, kind) - getattr(few, kind)) * each
        return int(getattr(more, kind) + slope * (len(blocks) - _FEW[1]))

    middle = more.blocks[1]
    rest = [replace(middle, path=f"{block_list}.{index}") for index in range(_FEW[1], len(blocks))]
    kinds_of_cost = ("peak_bytes", "peak_bytes_plain", "flops_forward", "flops_backward")
    whole = StepCost((*more.blocks, *rest), *(grown(kind) for kind in kinds_of_cost))
    return replace(whole, forwards=more.forwards, backwards=more.backwards)


@dataclass
class _Seen:
    saved: list[int]
    flops_of_block: list[int]
    forwards: list[int]
    backwards: list[int]
    peak: int = 0
    flops_forward: int = 0
    flops_backward: int = 0


def _run(
    module: nn.Module,
    block_lists: Sequence[str],
    blocks: Sequence[tuple[str, nn.Module]],
    step: Callable[[], torch.Tensor],
    which: str,
    drop_gradients: bool = False,
    micro: MicroBatches | None = None,
) -> _Seen:
    count = len(blocks)
    seen = _Seen([0] * count, [0] * count, [0] * count, [0] * count)
    weights = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    counted: dict[int, Any] = {}
    watch = _Watch(weights)

    def tap(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights and storage._cdata not in counted:
                counted[storage._cdata] = storage  # kept alive, so that its address is not used again
                seen.saved[index] += storage.nbytes()
            return tensor

        def tapped(*args: Any, **kwargs: Any) -> Any:
            before = watch.flops
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                result = forward(*args, **kwargs)
            seen.forwards[index] += 1
            if torch.is_grad_enabled():
                seen.backwards[index] += 1
                seen.flops_of_block[index] += watch.flops - before
            return result

        return tapped

    before = {parameter: parameter.grad for parameter in module.parameters() if parameter.requires_grad}
    drops = [p.register_post_accumulate_grad_hook(_drop) for p in before] if drop_gradients else []
    handle = checkpoint_blocks(module, block_lists, which, micro=micro)
    patches = [Patch(block, tap(i, block.forward)) for i, (_, block) in enumerate(blocks)]
    try:
        with watch:
            loss = step()
            seen.flops_forward = watch.flops
            counted.clear()
            loss.backward()
            seen.flops_backward = watch.flops - seen.flops_forward
        seen.peak = watch.peak
    finally:
        for patch in reversed(patches):
            patch.remove()
        handle.remove()
        for hook in drops:
            hook.remove()
        for parameter, gradient in before.items():
            parameter.grad = gradient
    return seen


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Watch(TorchDispatchMode):
    """Follows the bytes of all storages that operators make, their largest sum, and counts operations."""

    def __init__(self, ignore: set[int]) -> None:
        super().__init__()
        self.bytes, self.peak, self.flops = 0, 0, 0
        self._ignore = ignore
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if given and all(map(_is_count, given)):  # a batch's sizes and lengths: the family reads their values
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if not given and isinstance(result, FakeTensor) and _is_small(result):  # a mask, say, made on the way
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        self.flops += _flops(func._overloadpacket, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor)
        return result

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._ignore:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._part, key, size)

    def _part(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _is_count(tensor: torch.Tensor) -> bool:
    """A few real whole numbers, as sizes, lengths and masks are."""
    return not isinstance(tensor, FakeTensor) and _is_small(tensor)


def _is_small(tensor: torch.Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return whole and tensor.device.type == "cpu" and tensor.numel() <= _MOST_COUNTS


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one call, by torch's own formulas; it has none for the attention kernels of the CPU."""
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    return 0


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _without_content(module: nn.Module) -> Iterator[None]:
    """Within it the module's parameters and buffers are fake tensors on the CPU, and so is all that is
    computed.
    """
    kept = [(child, dict(child._parameters), dict(child._buffers)) for child in module.modules()]
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return made[id(tensor)]

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for child, parameters, buffers in kept:
                for name, parameter in parameters.items():
                    if parameter is not None:
                        child._parameters[name] = _parameter(fake(parameter), parameter.requires_grad, made)
                for name, buffer in buffers.items():
                    if buffer is not None and buffer.is_meta:
                        child._buffers[name] = fake(buffer)
            yield
    finally:
        for child, parameters, buffers in kept:
            child._parameters.update(parameters)
            child._buffers.update(buffers)


def _parameter(tensor: torch.Tensor, requires_grad: bool, made: dict[int, torch.Tensor]) -> nn.Parameter:
    """One Parameter for one fake tensor, so that ties stay ties."""
    key = -id(tensor)
    if key not in made:
        made[key] = nn.Parameter(tensor, requires_grad=requires_grad)
    parameter = made[key]
    assert isinstance(parameter, nn.Parameter)
    return parameter
