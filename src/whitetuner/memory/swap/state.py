"""What an optimizer remembers of streamed blocks waits on the host, and comes while the block's backward is computed.

Two flat buffers on the device take turns: one is in use, into the other the next block's (the one before in running order:
backward passes go down) is loaded. Each block's tensors lie one after the other in a flat master of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from whitetuner.memory.swap.backend import Mark
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.layout import SMALLEST_BYTES, Entry, padded


@dataclass
class _Waiting:
    """entries: the tensors and their places in the master."""

    entries: list[Entry]
    master: Tensor


@dataclass
class _Buffer:
    """A place on the device. holds: the block whose state is on its way there or there; ready, free: its marks."""

    flat: Tensor
    holds: int | None = None
    ready: Mark = None
    free: Mark = None


class StateRing:
    """States of blocks by their index. smallest_bytes: tensors below it stay on the device."""

    def __init__(self, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.smallest_bytes = smallest_bytes
        self._waiting: dict[int, _Waiting] = {}
        self._buffers: list[_Buffer] = []

    @property
    def device_bytes(self) -> int:
        """Of both buffers."""
        return sum(buffer.flat.numel() for buffer in self._buffers)

    @property
    def host_bytes(self) -> int:
        return sum(one.master.numel() for one in self._waiting.values())

    @contextmanager
    def present(
        self, engine: SwapEngine | None, index: int | None, tensors: Callable[[], Sequence[Tensor]]
    ) -> Iterator[None]:
        """Within it the block's state is on the device; after it the state of a streamed block is on its way to the host.

        tensors: what is to wait there, asked for after the first update has made it
        """
        if engine is None or index is None:
            yield
            return
        if index not in self._waiting:
            bring(tensors(), engine.backend.device)
            yield
            self.adopt(engine, index, tensors())
            return
        backend, waiting = engine.backend, self._waiting[index]
        backend.here()
        buffer = next((one for one in self._buffers if one.holds == index), None)
        if buffer is None:
            buffer = self._load(engine, index)
        backend.wait(buffer.ready)
        size = waiting.master.numel()
        for entry in waiting.entries:
            entry.tensor.data = entry.view(buffer.flat[:size])
        yield
        buffer.free = backend.store(waiting.master, buffer.flat[:size], backend.mark())
        engine.counters.bytes_down += size
        buffer.holds = None
        for entry in waiting.entries:
            entry.tensor.data = entry.view(waiting.master)
        before = max((one for one in self._waiting if one < index), default=None)
        if before is not None and all(one.holds != before for one in self._buffers):
            self._load(engine, before, not_into=buffer)

    def waits(self, engine: SwapEngine | None, index: int | None) -> bool:
        """Whether the block's state is to wait on the host."""
        return engine is not None and index is not None and index not in engine.residents

    def adopt(self, engine: SwapEngine | None, index: int | None, tensors: Sequence[Tensor]) -> None:
        """These tensors are the block's state from now on; that of a streamed block goes to the host."""
        if engine is None or index is None or not self.waits(engine, index):
            return
        entries, offset = [], 0
        for tensor in tensors:
            if tensor.nbytes >= self.smallest_bytes:
                entries.append(Entry(tensor, offset, tensor.shape, tensor.dtype))
                offset += padded(tensor.nbytes)
        if not entries:
            return
        master = engine.backend.master(offset)
        for entry in entries:
            entry.view(master).copy_(entry.tensor.data)
            entry.tensor.data = entry.view(master)
        engine.backend.seal([master])
        self._waiting[index] = _Waiting(entries, master)

    def forget(self, engine: SwapEngine | None) -> None:
        """Other states will be set in place of these."""
        if engine is not None:
            engine.backend.drain()
        self._waiting, self._buffers = {}, []

    def release(self, engine: SwapEngine | None) -> None:
        """Everything waits on the host, whole; the buffers' memory is given back."""
        if engine is not None:
            engine.backend.drain()
        self._buffers = []

    def _load(self, engine: SwapEngine, index: int, not_into: _Buffer | None = None) -> _Buffer:
        master = self._waiting[index].master
        largest = max(one.master.numel() for one in self._waiting.values())
        if not self._buffers or self._buffers[0].flat.numel() < largest:
            engine.backend.drain()
            self._buffers = [_Buffer(engine.backend.slot(largest)) for _ in range(2)]
            not_into = None
        free = [one for one in self._buffers if one is not not_into]
        buffer = next((one for one in free if one.holds is None), free[0])
        engine.backend.clear(buffer.flat)
        after = [] if buffer.free is None else [buffer.free]
        buffer.ready = engine.backend.load(buffer.flat[: master.numel()], master, after)
        buffer.holds, buffer.free = index, None
        engine.counters.bytes_up += master.numel()
        return buffer


def bring(tensors: Sequence[Tensor], device: torch.device) -> None:
    """To a device, where they are not there yet. Counters of steps stay on the host, where optimizers keep them."""
    for tensor in tensors:
        if tensor.ndim and tensor.device != device:
            tensor.data = tensor.data.to(device)
