"""Blocks that do not fit on the device wait on the host and come in time; the model and the loop do not
notice.

The weights of every block have one master on the host: loading a block is one copy, giving it up costs nothing.
Frozen ones are never written again; blocks that train are updated where they lie as their backward ends
(memory/fused.py) and written back once. Some blocks stay (residents), the others take turns in a few slots.
A block is in use from the call of its forward to its end, and from the first gradient of its outputs to the
last gradient of its inputs; between the two nothing of it need be there, for what autograd saved of it is
kept as (block, offset) and found again wherever the block then is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from whitetuner.memory.blocks import Patch, blocks_of
from whitetuner.memory.swap import calls
from whitetuner.memory.swap.arena import Arena
from whitetuner.memory.swap.backend import Backend, Counters
from whitetuner.memory.swap.guard import Guard
from whitetuner.memory.swap.layout import layouts_of, spread_count
from whitetuner.memory.swap.masters import written_masters
from whitetuner.memory.swap.placement import Packed, Placement
from whitetuner.memory.swap.schedule import Kind, Spot
from whitetuner.memory.swap.shelf import Shelf


class _Hold(NamedTuple):
    """Why a block must stay where it is: a running forward (None) or a backward pass (its id).

    call: number of the forward call whose backward has begun; None while that is still to come (a checkpoint
          over several blocks computes them all again before the backward of the first begins)
    """

    backward: int | None
    call: int | None = None


class SwapEngine:
    """Streams the blocks of a module through a few slots of device memory.

    module:      any module; everything else of it moves to the backend's device at `attach`
    block_lists: dotted names of its lists of blocks, in running order
    residents:   how many blocks stay on the device, or which (indices over all lists)
    slots:       buffers for the others, each as large as the largest of them or as a few smaller ones that
                 take its place; at least 2
    trained:     what trains moves, too (full training)
    counters:    what moved since the last `step_end`;  pinned: a sentence on the host memory
    after_backward: called with a block's index when its backward has ended, while it still is on the device
    Adapters, norms and small biases stay on the device. Attach after adapters, compilation and recomputation.
    Raises ValueError when residents or slots do not suit the number of blocks.
    """

    def __init__(
        self,
        module: nn.Module,
        block_lists: Sequence[str],
        residents: int | Iterable[int],
        backend: Backend,
        *,
        slots: int = 2,
        smallest_bytes: int | None = None,
        trained: bool = False,
    ) -> None:
        self.module, self.backend, self.slots, self.trained = module, backend, slots, trained
        self.layouts = layouts_of(blocks_of(module, block_lists), smallest_bytes, trained)
        self.after_backward: Callable[[int], None] | None = None
        self.residents = self._which(residents)
        self.pinned = ""
        self.shared = False
        self._masters: list[torch.Tensor] = []
        self._shelf: Shelf | None = None  # where the masters were parked last
        self._parked = False
        self._placement: Placement | None = None
        self._patches: list[Patch] = []
        self._guards: list[Guard] = []
        self._held: dict[int, _Hold] = {}
        self._passes: set[int] = set()
        self._calls = 0
        self._counted = Counters()

    def _which(self, residents: int | Iterable[int]) -> frozenset[int]:
        count = len(self.layouts)
        if self.slots < 2:
            raise ValueError("a swapped module needs two slots: one to compute from, one to load into")
        if isinstance(residents, int):
            if not 0 <= residents <= count:
                raise ValueError(f"{residents} resident blocks of {count}")
            kept = spread_count(count, residents)
        else:
            kept = frozenset(residents)
            if any(not 0 <= index < count for index in kept):
                raise ValueError(f"resident blocks {sorted(kept)} of {count}")
        return kept | {index for index, layout in enumerate(self.layouts) if layout.num_bytes == 0}

    # ---- coming and going

    @property
    def attached(self) -> bool:
        return bool(self._masters) or self._parked

    @property
    def placement(self) -> Placement:
        """Where the blocks are; laid out when it is first needed."""
        assert self.attached
        if self._placement is None:
            self._fetch()
            self._placement = Placement(self.layouts, self._masters, self.backend, self.residents, self.slots)
            self._placement.counters = self._counted
        return self._placement

    @property
    def counters(self) -> Counters:
        return self._counted

    def attach(self, arena: Arena | None = None) -> SwapEngine:
        """Writes the masters, brings residents and everything that never moves to the device, wraps the
        blocks.

        arena: where the masters are shared with other processes; not its leader, this one takes what the leader has read.
               When blocks train, all of them write the same bits: `settle` keeps the slow from writing over the fast
        """
        assert not self.attached
        self.shared = arena is not None
        self._masters = written_masters(self.layouts, self.backend, arena, self.trained)
        moved = {id(entry.tensor) for layout in self.layouts for entry in layout.entries}
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if id(tensor) not in moved:
                tensor.data = tensor.data.to(self.backend.device)
        self.pinned = self.backend.seal(self._masters)
        for index, layout in enumerate(self.layouts):
            self._patches.append(Patch(layout.block, self._wrap(index, layout.block.forward)))
            self._guards.append(Guard(self, index))
        self.placement.backend.drain()
        return self

    def detach(self) -> None:
        """Leaves a plain module whose blocks lie on the host: the masters are their weights from now on."""
        self._fetch()
        self.evict()
        for guard in self._guards:
            guard.remove()
        for patch in self._patches:
            patch.remove()
        self.backend.unseal()
        self._masters, self._patches, self._guards = [], [], []

    def evict(self) -> None:
        """Frees all device memory of the blocks, for other work; they come back with the next forward."""
        self.flush()
        self.reset()
        for index in range(0 if self._parked else len(self.layouts)):
            self.bind_home(index)
        self._placement = None

    def park(self, shelf: Shelf) -> None:
        """As evict, and the masters leave host memory for the shelf; they come back when they are needed.

        shelf: this engine's own. Raises UserError when it cannot hold them; they then stay where they were.
        """
        self.evict()
        if self._parked:
            return
        shelf.put(self._masters)
        self.backend.unseal()
        self._shelf, self._parked, self._masters = shelf, True, []
        for layout in self.layouts:
            for entry in layout.entries:
                entry.tensor.data = torch.empty(1, dtype=entry.dtype).expand(entry.shape)

    def _fetch(self) -> None:
        """The masters are on the host."""
        if not self._parked:
            return
        assert self._shelf is not None
        masters = [self.backend.master(layout.num_bytes) for layout in self.layouts]
        self._shelf.take(masters)
        self._parked, self._masters = False, masters
        for layout, master in zip(self.layouts, masters, strict=True):
            for entry in layout.entries:
                entry.tensor.data = self.backend.away(entry.view(master), entry.tensor.requires_grad)
        self.pinned = self.backend.seal(masters)

    def resize(self, residents: int | Iterable[int], slots: int | None = None) -> None:
        """Other residents, other slots; between steps. Shrinking copies nothing: the masters are complete."""
        before = self.slots
        self.slots = before if slots is None else slots
        try:
            kept = self._which(residents)
        except ValueError:
            self.slots = before
            raise
        self.evict()
        self.residents = kept

    def reset(self) -> None:
        """Forgets what was in use, after an exception within a step; the next forward does it by itself."""
        self._held.clear()
        self._passes.clear()

    def step_end(self) -> Counters:
        """Ends the count of a step and returns it."""
        done, self._counted = self._counted, Counters()
        if self._placement is not None:
            self._placement.counters = self._counted
        return done

    def bind_home(self, index: int) -> None:
        """Binds a block's tensors to their master."""
        self._fetch()
        for entry in self.layouts[index].entries:
            entry.tensor.data = entry.view(self._masters[index])

    def homes(self, away: bool = False) -> dict[int, torch.Tensor]:
        """id of each tensor that moves -> its part of its master; away: not of blocks that lie on the device for good."""
        kept = self.residents if away and self._placement is not None else frozenset()
        each = [(self.layouts[i], self.master(i)) for i in range(len(self.layouts)) if i not in kept]
        return {id(entry.tensor): entry.view(master) for layout, master in each for entry in layout.entries}

    def master(self, index: int) -> torch.Tensor:
        """The flat master of a block."""
        self._fetch()
        return self._masters[index]

    def flush(self) -> None:
        """Brings every master up to what was trained; nothing to do where nothing trains."""
        self.backend.drain() if self._placement is None else self._placement.flush()

    def settle(self) -> None:
        """Before a word to processes that share the masters: nothing of earlier blocks is still to be written into them.

        Processes update a block only when all have had its gradients, after a word. So none writes a block that another
        still has to read, and with this none writes an older step's numbers over another's newer ones.
        """
        if self.shared and self._placement is not None:
            self._placement.settle()

    def written(self, index: int) -> None:
        """The block's trained tensors were changed on the device; the block is in use."""
        if self._shelf is not None:
            self._shelf.written = False
        self.placement.write_back(index)

    def rewritten(self, index: int) -> None:
        """The master of a block was written from outside (load_state_dict)."""
        if self._shelf is not None:
            self._shelf.written = False
        if self._placement is not None:
            self._placement.reload(index)

    # ---- use and release

    def _busy(self) -> frozenset[int]:
        numbers = (self.placement.number[index] for index in self._held)
        return frozenset(number for number in numbers if number is not None)

    def _use(self, index: int, kind: Kind) -> None:
        """From now on the block's weights may be read; the caller holds the block."""
        places = self.placement
        number = places.number[index]
        if number is not None:
            places.ring.itinerary.use(number, kind)
            if places.ring.place[number] is None:
                places.load(number, self._room(number))
                places.counters.demanded += 1
        places.arrive(index)
        if number is not None:
            self._prefetch()

    def _room(self, number: int) -> Spot:
        ring = self.placement.ring
        spot = ring.room_now(number, self._busy())
        if spot is None:
            raise RuntimeError(
                f"{len(self._held)} swapped blocks are in use at once, with {len(ring.within)} slots: give the engine "
                "as many slots as there are blocks under one checkpoint, and one more"
            )
        return spot

    def _prefetch(self) -> None:
        for number, spot in self.placement.ring.prefetches(self._busy()):
            self.placement.load(number, spot)

    def _finish(self, index: int) -> None:
        """The block's weights are not read any more in this pass."""
        hold = self._held.get(index)
        if self.after_backward is not None and hold is not None and hold.backward is not None:
            self.after_backward(index)
        self._held.pop(index, None)
        if self.placement.number[index] is not None:
            self.placement.released(index)
            self._prefetch()

    # ---- calls of a block

    def _wrap(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def swapped(*args: Any, **kwargs: Any) -> Any:
            running = calls.backward_pass()
            if running is not None:
                again = calls.in_checkpoint()
                self._hold(index, running, None)
                if again:  # the second computation of a checkpoint; its gradients are announced by the first
                    return forward(*args, **kwargs)
                return self._call(index, forward, args, kwargs)
            if any(hold.backward is not None for hold in self._held.values()):
                self.reset()  # the last backward pass ended by an exception
            self.backend.here()
            self._held[index] = _Hold(None)
            try:
                self._use(index, "forward" if torch.is_grad_enabled() else "sampling")
                return self._call(index, forward, args, kwargs)
            finally:
                self._finish(index)

        return swapped

    def _call(
        self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        self._calls += 1
        call = self._calls
        with calls.saving(self._pack, self._unpack):
            outputs = forward(*args, **kwargs)
        calls.when_outputs_begin(lambda: self._backward_begins(index, call), outputs)
        return outputs

    def _hold(self, index: int, running: int, call: int | None) -> None:
        """Keeps the block from now to its end in this backward pass."""
        before = self._held.get(index)
        if call is None and before is not None and before.backward == running:
            call = before.call
        self._held[index] = _Hold(running, call)
        if running not in self._passes:
            self._passes.add(running)
            calls.at_end_of_backward(lambda: self._pass_ends(running))
        self._use(index, "backward")

    def _backward_begins(self, index: int, call: int) -> None:
        """Gradients of the outputs of a call arrive; so all later calls are done with."""
        running = calls.backward_pass()
        assert running is not None
        for other, hold in list(self._held.items()):
            if other != index and hold.call is not None and hold.call > call:
                self._finish(other)
        self._hold(index, running, call)

    def _pass_ends(self, running: int) -> None:
        self._passes.discard(running)
        for index in [i for i, hold in self._held.items() if hold.backward == running]:
            self._finish(index)

    # ---- what autograd saves

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Packed:
        return self.placement.pack(tensor)

    def _unpack(self, packed: torch.Tensor | Packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        running = calls.backward_pass()
        if running is None:
            self._use(packed.block, "backward")
        elif packed.block not in self._held:
            self._hold(packed.block, running, None)
        return self.placement.find(packed)

    @contextmanager
    def weights_of(self, block: nn.Module) -> Iterator[None]:
        """Within it a block's weights may be read outside of its forward (norms of rows, merging)."""
        index = next(i for i, layout in enumerate(self.layouts) if layout.block is block)
        with self.on_device(index):
            yield

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Within it a block is on the device, outside of its forward and backward."""
        self.backend.here()
        self._held[index] = _Hold(None)
        try:
            self._use(index, "sampling")
            yield
        finally:
            self._finish(index)
