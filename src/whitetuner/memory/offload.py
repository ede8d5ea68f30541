"""Inputs of checkpointed blocks wait on the host: for long videos, where 40 of them are larger than the
weights.

A block's input goes to pinned host memory while the next blocks compute, and comes back one block ahead of
its use in the backward pass. The buffers are exact in size (torch's own pinned ones are rounded up to a power
of two: 335 MB, a clip's, to 512). Given to `recompute.checkpoint_blocks(...,
keep_inputs=InputsOnHost(device).saving)`.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from whitetuner.memory.swap.host import mapped, register_with_cuda, unregister_with_cuda

#: Smaller tensors (modulation vectors, masks) stay: their copies would cost more than they free.
SMALLEST_BYTES = 1 << 20


@dataclass
class _Away:
    """A tensor on the host. place: its turn in the forward;  back: the tensor on the device, once it was
    asked for;  last: the event of the last copy from or to the host
    """

    place: int
    host: torch.Tensor
    shape: torch.Size
    sent: Any
    last: list[Any]
    back: torch.Tensor | None = None
    arrived: Any = None


class InputsOnHost:
    """Saves tensors to the host and brings them back.

    smallest_bytes: tensors below stay on the device, as do those that an earlier block has saved and that
                    still live (temb, rotary tables): moving them would free nothing
    host_bytes:     the most that was on the host at once
    """

    def __init__(self, device: torch.device | str, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.device = torch.device(device)
        self.smallest_bytes = smallest_bytes
        self.host_bytes = 0
        self._module: Any = torch.get_device_module(self.device)
        self._copies = self._module.Stream()
        self._met: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._order: list[weakref.ref[_Away]] = []
        self._spare: dict[tuple[int, torch.dtype], list[tuple[torch.Tensor, Any]]] = {}
        self._held = 0
        self._pinned: list[torch.Tensor] = []
        weakref.finalize(self, _unpin, self._pinned).atexit = False

    def saving(self) -> AbstractContextManager[Any]:
        """Context in which what autograd saves goes to the host."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Away:
        size = tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        met = self._met.get(storage.data_ptr())
        if (
            size < self.smallest_bytes
            or tensor.device.type != self.device.type
            or (tensor.requires_grad and tensor.is_leaf)
            or not tensor.is_contiguous()
            or (met is not None and met() is storage)
        ):
            return tensor
        self._met[storage.data_ptr()] = weakref.ref(storage)
        host = self._buffer(tensor)
        with self._module.stream(self._copies):
            self._copies.wait_event(self._mark())
            host.copy_(tensor.reshape(-1), non_blocking=True)
            sent = self._event(self._copies)
        if self.device.type == "cuda":
            tensor.record_stream(self._copies)
        away = _Away(len(self._order), host, tensor.shape, sent, [sent])
        weakref.finalize(away, self._give_back, host, away.last)
        self._order.append(weakref.ref(away))
        return away

    def _unpack(self, packed: torch.Tensor | _Away) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._bring(packed)
        before = self._order[packed.place - 1]() if 0 < packed.place < len(self._order) else None
        if before is not None:
            self._bring(before)
        self._module.current_stream().wait_event(packed.arrived)
        tensor = packed.back
        assert tensor is not None
        if packed.place == 0:  # the first of the forward is the last of the backward
            self._order, self._met = [], {}
        return tensor

    def _bring(self, away: _Away) -> None:
        """Begins to copy a tensor back, once."""
        if away.back is not None:
            return
        away.back = torch.empty(away.shape, dtype=away.host.dtype, device=self.device)
        with self._module.stream(self._copies):
            self._copies.wait_event(
                self._mark()
            )  # the new memory may still be in use by what was computed before
            self._copies.wait_event(away.sent)
            away.back.view(-1).copy_(away.host, non_blocking=True)
            away.arrived = self._event(self._copies)
        if self.device.type == "cuda":
            away.back.record_stream(self._copies)
        away.last[0] = away.arrived

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        spare = self._spare.setdefault((tensor.numel(), tensor.dtype), [])
        for index, (buffer, free) in enumerate(spare):
            if free.query():
                del spare[index]
                return buffer
        flat = mapped(tensor.numel() * tensor.element_size())
        self._held += flat.numel()
        self.host_bytes = max(self.host_bytes, self._held)
        if self.device.type == "cuda" and register_with_cuda(flat):
            self._pinned.append(flat)
        return flat.view(tensor.dtype)

    def _give_back(self, host: torch.Tensor, last: list[Any]) -> None:
        self._spare.setdefault((host.numel(), host.dtype), []).append((host, last[0]))

    def _mark(self) -> Any:
        return self._event(self._module.current_stream())

    def _event(self, stream: Any) -> Any:
        event = self._module.Event()
        event.record(stream)
        return event


def _unpin(buffers: list[torch.Tensor]) -> None:
    for buffer in buffers:
        unregister_with_cuda(buffer)
