"""Swap on a graphics card: a copy stream for each direction, events, pinned host memory. The same code for CUDA,
ROCm and XPU.

Slots are allocated once and their lifetime is told by events alone, so the caching allocator is never asked
while training and no `record_stream` is needed. The host never waits in the steady state.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from whitetuner.memory.swap import host
from whitetuner.memory.swap.backend import Mark

log = logging.getLogger(__name__)


@dataclass
class _Staged:
    """The end of a copy that a worker will start: first the worker's word, then the event."""

    started: threading.Event = field(default_factory=threading.Event)
    event: Any = None
    error: BaseException | None = None


class DeviceBackend:
    """Backend of a device with streams.

    limit_bytes: of pinned memory; None: PIN_SHARE of the machine's
    register, unregister, staging: how memory is pinned in place and how a small pinned buffer is made; the
    defaults
                 are the driver's and torch's, other ones serve tests
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        limit_bytes: int | None = None,
        register: Callable[[torch.Tensor], bool] | None = None,
        unregister: Callable[[torch.Tensor], None] | None = None,
        staging: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._module: Any = torch.get_device_module(self.device)
        index: int | None = getattr(self.device, "index", None)
        if index is None and self.device.type != "cpu":
            self.device = torch.device(self.device.type, self._module.current_device())
        in_place = self.device.type == "cuda"
        self._register = register or (host.register_with_cuda if in_place else lambda _: False)
        self._unregister = unregister or (host.unregister_with_cuda if in_place else lambda _: None)
        self._staging = staging or (lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._limit = int(host.PIN_SHARE * host.host_bytes()) if limit_bytes is None else limit_bytes
        self._copies, self._copies_back = self._stream(), self._stream()
        self._compute = self._module.current_stream(self.device)
        self._pinned: list[torch.Tensor] = []
        self._pinned_at: frozenset[int] = frozenset()
        self._sealed = 0
        self._worker: _Worker | None = None
        self._last: dict[bool, Mark] = {}
        self._nothing: dict[torch.dtype, torch.Tensor] = {}
        self.pinned: host.Pinned | None = None

    def _stream(self) -> Any:
        return self._module.Stream() if self.device.type == "cpu" else self._module.Stream(self.device)

    def master(self, num_bytes: int) -> torch.Tensor:
        return host.mapped(num_bytes)

    def seal(self, masters: Sequence[torch.Tensor]) -> str:
        """Called again for more: what is pinned already counts against the limit."""
        before = sum(master.numel() for master in self._pinned)
        at = host.pin(masters, self._register, self._limit - before)
        self._pinned += [masters[i] for i in sorted(at)]
        self._pinned_at = frozenset(master.data_ptr() for master in self._pinned)
        self._sealed += sum(master.numel() for master in masters)
        done = sum(master.numel() for master in self._pinned)
        mode = "pinned"
        if done < self._sealed:
            largest = max(master.numel() for master in masters)
            mode = "partly pinned" if done else "staged"
            if self._worker is None:
                try:
                    buffers = [self._staging(largest) for _ in range(2)]
                except RuntimeError:
                    mode = "pageable"
                else:
                    self._worker = _Worker(self, buffers)
        self.pinned = host.Pinned(mode, len(self._pinned), done, self._sealed)
        log.info(self.pinned.sentence())
        return self.pinned.sentence()

    def unseal(self) -> None:
        self.drain()
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        for master in self._pinned:
            self._unregister(master)
        self._pinned, self._pinned_at, self._sealed = [], frozenset(), 0

    def slot(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def clear(self, slot: torch.Tensor) -> None:
        return

    def load(self, target: torch.Tensor, master: torch.Tensor, after: Sequence[Mark]) -> Mark:
        if not after:  # a new slot: the allocator may have handed out memory that is still in use
            after = (self.mark(),)
        return self._ask(target, master, after, up=True)

    def store(self, master: torch.Tensor, source: torch.Tensor, after: Mark) -> Mark:
        return self._ask(master, source, (after,), up=False)

    def _ask(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Mark], up: bool) -> Mark:
        ask = self.copy if self._worker is None else self._worker.ask
        self._last[up] = ask(target, source, after, up)
        return self._last[up]

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Mark], up: bool = True) -> Any:
        """Enqueues one copy on the stream of its direction; returns the event of its end."""
        copies = self._copies if up else self._copies_back
        with self._module.stream(copies):
            for mark in after:
                copies.wait_event(_event(mark))
            target.copy_(source, non_blocking=True)
            event = self._module.Event()
            event.record(copies)
        return event

    def is_pinned(self, master: torch.Tensor) -> bool:
        return master.data_ptr() in self._pinned_at

    def here(self) -> None:
        self._compute = self._module.current_stream(self.device)

    def mark(self) -> Mark:
        event = self._module.Event()
        event.record(self._compute)
        return event

    def wait(self, mark: Mark) -> None:
        self._compute.wait_event(_event(mark))

    def finish(self, mark: Mark) -> None:
        _event(mark).synchronize()

    def drain(self) -> None:
        for mark in self._last.values():
            _event(mark).synchronize()
        self._last.clear()

    def away(self, view: torch.Tensor, trained: bool = False) -> torch.Tensor:
        if not trained:
            return view
        if view.dtype not in self._nothing:
            self._nothing[view.dtype] = torch.zeros(1, dtype=view.dtype, device=self.device)
        return self._nothing[view.dtype].expand(view.shape)

    def link_bytes_per_s(self, num_bytes: int = 256 << 20, repeats: int = 4) -> float:
        """Measured speed host -> device from pinned memory, the fastest of some copies."""
        source, target = self._staging(num_bytes), self.slot(num_bytes)
        best = 0.0
        for _ in range(repeats):
            start = time.perf_counter()
            _event(self.copy(target, source, (self.mark(),))).synchronize()
            best = max(best, num_bytes / (time.perf_counter() - start))
        return best


def _event(mark: Mark) -> Any:
    if not isinstance(mark, _Staged):
        return mark
    mark.started.wait()
    if mark.error is not None:
        raise RuntimeError("the copy of a swapped block failed") from mark.error
    return mark.event


class _Worker:
    """Copies between masters that are not pinned and the device through small pinned buffers, in order of asking.

    While it lives all copies go through it, pinned ones too: two orders into one slot would overtake one
    another.
    """

    def __init__(self, backend: DeviceBackend, buffers: list[torch.Tensor]) -> None:
        self._backend = backend
        self._buffers: list[tuple[torch.Tensor, Any]] = [(buffer, None) for buffer in buffers]
        self._jobs: queue.SimpleQueue[
            tuple[torch.Tensor, torch.Tensor, Sequence[Mark], bool, _Staged] | None
        ] = queue.SimpleQueue()
        self._turn = 0
        self._thread = threading.Thread(target=self._run, name="swap-staging", daemon=True)
        self._thread.start()

    def ask(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Mark], up: bool) -> _Staged:
        staged = _Staged()
        self._jobs.put((target, source, after, up, staged))
        return staged

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            target, source, after, up, staged = job
            try:
                staged.event = self._copy(target, source, after, up)
            except RuntimeError as error:
                staged.error = error
            staged.started.set()

    def _copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Mark], up: bool) -> Any:
        if self._backend.is_pinned(source if up else target):
            return self._backend.copy(target, source, after, up)
        if target.shape != source.shape:
            raise RuntimeError(f"a copy of {source.numel()} bytes into {target.numel()}")
        event, size = None, self._buffers[0][0].numel()
        for start in range(0, target.numel(), size):  # what was sealed later may be larger than a buffer
            buffer, busy = self._buffers[self._turn]
            if busy is not None:
                busy.synchronize()
            there, here = target[start : start + size], source[start : start + size]
            part = buffer[: there.numel()]
            if up:
                part.copy_(here)
                event = self._backend.copy(there, part, after, up)
            else:
                event = self._backend.copy(part, here, after, up)
                event.synchronize()
                there.copy_(part)
            self._buffers[self._turn] = (buffer, event)
            self._turn = 1 - self._turn
        return event
