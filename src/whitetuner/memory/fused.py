"""Full training without the gradients of the whole model: a block is updated as its backward ends.

When the backward pass has left a block, all gradients of its weights are there and nothing reads the weights any more in
this step (autograd runs gradient sums before the nodes of earlier blocks; memory/swap/calls.py). So they are updated
where they lie, the gradients are dropped, and a streamed block is written back once while earlier blocks are computed.
What belongs to no block (embeddings, the last projection) is updated after the pass.

Of the gradients then live at once: one block's, and those outside of blocks. Several passes for one step
(accumulation) need the sums of all blocks between the passes; sums of streamed blocks wait on the host.
What the optimizer remembers lies where the block does: on the device for residents, on the host for streamed blocks,
brought while the block's backward is computed (memory/swap/state.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from whitetuner.memory.blocks import Patch, blocks_of
from whitetuner.memory.swap import calls
from whitetuner.memory.swap.engine import SwapEngine

#: The unit of what belongs to no block.
REST = "rest"


@dataclass
class Unit:
    """What is updated together. name: the block's path, or REST; index: the block's, None of REST.

    arrived: parameters whose gradient is complete in the present pass; sums: of earlier passes of the step
    """

    name: str
    index: int | None
    parameters: Mapping[str, nn.Parameter]
    arrived: dict[str, nn.Parameter] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


#: (unit, gradients by parameter name) -> None; the parameters are on the device. Gradients may be taken out one by one.
Update = Callable[[Unit, dict[str, Tensor]], None]


class BlockUpdates:
    """Calls `update` for each block as its gradients are complete in the last pass of a step.

    trained: names and parameters of the module that train
    engine:  asks for the swap engine of the module, None while everything is resident
    share:   is handed (unit's name, its gradients) before they are used, to add them up over ranks; may write to the
             tensors and to the dict. Called for the units in the order in which their backward ends, REST last
    peak_gradient_bytes: most that lived at once, REST aside
    """

    def __init__(
        self,
        module: nn.Module,
        block_lists: Sequence[str],
        trained: Mapping[str, nn.Parameter],
        update: Update,
        engine: Callable[[], SwapEngine | None] = lambda: None,
        share: Callable[[str, dict[str, Tensor]], None] | None = None,
    ) -> None:
        self.update, self.engine, self.share = update, engine, share
        self.units = units_of(module, block_lists, trained)
        self.applied = False
        self.peak_gradient_bytes = self._gradient_bytes = 0
        self._last = True
        self._open: dict[int, int] = {}
        self._calls = 0
        self._pass: int | None = None
        self._blocks: list[Unit | None] = [None] * len(blocks_of(module, block_lists))
        self._handles = []
        for unit in self.units:
            if unit.index is not None:
                self._blocks[unit.index] = unit
            for name, parameter in unit.parameters.items():
                hook = self._hook(unit, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        blocks = enumerate(block for _, block in blocks_of(module, block_lists))
        self._patches = [Patch(block, self._watched(i, block.forward)) for i, block in blocks]

    def _hook(self, unit: Unit, name: str) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
            if name not in unit.arrived:
                unit.arrived[name] = parameter
                if unit.index is not None:
                    self._gradient_bytes += parameter.grad.nbytes
                    self.peak_gradient_bytes = max(self.peak_gradient_bytes, self._gradient_bytes)

        return arrived

    # ---- when a block's backward has ended (with a swap engine, it says so, too, while the block is still there)

    def _watched(self, index: int, forward: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object, **kwargs: object) -> object:
            outputs = forward(*args, **kwargs)
            if torch.is_grad_enabled() and calls.backward_pass() is None:
                self._calls += 1
                call = self._calls
                calls.when_outputs_begin(lambda: self._begins(index, call), outputs)
            return outputs

        return watched

    def _begins(self, index: int, call: int) -> None:
        running = calls.backward_pass()
        if running != self._pass:
            self._pass = running
            self._open.clear()
        for later in [one for one in self._open if one > call]:
            self.block_ends(self._open.pop(later))
        self._open[call] = index

    def block_ends(self, index: int) -> None:
        """All gradients of the block that this pass will give are there. More calls do no harm."""
        unit = self._blocks[index]
        if unit is not None and unit.arrived:
            self._unit_ends(unit)

    # ---- passes

    def begin_pass(self, last: bool) -> None:
        """Before each backward pass. last: of the step, after which nothing is added to its gradients."""
        self._last = last
        self._open.clear()

    def end_pass(self) -> None:
        """After each backward pass: what belongs to no block, and what the last pass had no gradient for."""
        for unit in self.units:
            if not (unit.arrived or (self._last and unit.sums)):
                continue
            engine = self.engine()
            if unit.index is None or engine is None:
                self._unit_ends(unit)
            else:
                with engine.on_device(unit.index):
                    self._unit_ends(unit)

    def begin_step(self) -> None:
        """Before the first pass of a step: whatever a broken one left is dropped."""
        self.applied = False
        self._gradient_bytes = 0
        for unit in self.units:
            unit.arrived.clear()
            unit.sums.clear()
            for parameter in unit.parameters.values():
                parameter.grad = None

    def _unit_ends(self, unit: Unit) -> None:
        engine = self.engine()
        streamed = unit.index is not None and engine is not None and unit.index not in engine.residents
        gradients: dict[str, Tensor] = {}
        for name, parameter in unit.arrived.items():
            assert parameter.grad is not None
            if unit.index is not None:
                self._gradient_bytes -= parameter.grad.nbytes
            gradients[name], parameter.grad = parameter.grad, None
        unit.arrived.clear()
        if not self._last:
            for name in list(gradients):
                _add(unit.sums, name, gradients.pop(name), on_host=streamed)
            return
        for name in list(unit.sums):
            total = unit.sums.pop(name).to(unit.parameters[name].device)
            # the order of the sum does not change a bit of a sum of two
            gradients[name] = total.add_(gradients[name]) if name in gradients else total
        if self.share is not None:
            if engine is not None:
                engine.settle()
            self.share(unit.name, gradients)
        self.applied = True
        self.update(unit, gradients)
        if unit.index is not None and engine is not None:
            engine.written(unit.index)

    def remove(self) -> None:
        """Takes the hooks off again."""
        for handle in self._handles:
            handle.remove()
        for patch in reversed(self._patches):
            patch.remove()
        self._handles, self._patches = [], []


def _add(sums: dict[str, Tensor], name: str, gradient: Tensor, on_host: bool) -> None:
    """Adds in float32: sums of bf16 gradients in bf16 would lose the smaller ones."""
    precise = gradient.float()
    if name in sums:
        sums[name] += precise.to(sums[name].device)
    else:
        sums[name] = precise.to("cpu") if on_host else precise


def units_of(
    module: nn.Module, block_lists: Sequence[str], trained: Mapping[str, nn.Parameter]
) -> list[Unit]:
    """The blocks that have something to train, in running order, and REST with all else; a parameter that two blocks
    share is among that.
    """
    blocks = blocks_of(module, block_lists)
    owner: dict[int, int | None] = {}
    for index, (_, block) in enumerate(blocks):
        for parameter in block.parameters():
            owner[id(parameter)] = None if id(parameter) in owner else index
    found: dict[int | None, dict[str, nn.Parameter]] = {}
    for name, parameter in trained.items():
        found.setdefault(owner.get(id(parameter)), {})[name] = parameter
    units = [Unit(path, i, found[i]) for i, (path, _) in enumerate(blocks) if i in found]
    return units + ([Unit(REST, None, found[None])] if None in found else [])
