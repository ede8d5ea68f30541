"""What the swap engine asks of a machine, and the machine that proves it: a CPU whose copies are late on
purpose.

A backend has a copy stream for each direction beside the compute stream. `load` starts a copy into a slot once
the marks given have been passed; `wait` keeps the compute stream back until it has arrived; `store` writes what
was trained back. CpuBackend runs copies as late as it may, at random a little earlier, and fills a slot with
NaN the moment it is to be loaded anew: a missing wait, a slot given away too early or a tensor that still lies
in it becomes NaN, and tests compare to the bit.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Mark = Any  # a place in a stream: torch.Event of the device, a number on the CPU


@dataclass
class Counters:
    """What was moved since the last `step_end`. demanded: loads that began only when the block was needed.

    bytes_up, bytes_down: of weights and, in full training, of what the optimizer remembers of them
    """

    loads: int = 0
    bytes_up: int = 0
    copies_back: int = 0
    bytes_down: int = 0
    demanded: int = 0
    of_block: Counter[int] = field(default_factory=Counter)


class Backend(Protocol):
    """The machine under the swap engine."""

    device: torch.device

    def master(self, num_bytes: int) -> torch.Tensor:
        """A flat uint8 buffer on the host, to be written once."""
        ...

    def seal(self, masters: Sequence[torch.Tensor]) -> str:
        """Called when masters are written: pins them in place as far as it can. Returns one sentence of how far.
        Called again for more of them.
        """
        ...

    def unseal(self) -> None:
        """Undoes `seal`; the masters may be freed afterwards."""
        ...

    def slot(self, num_bytes: int) -> torch.Tensor:
        """A flat uint8 buffer on the device."""
        ...

    def clear(self, slot: torch.Tensor) -> None:
        """The slot's content is void from now on (nothing that is started later may read it)."""
        ...

    def load(self, target: torch.Tensor, master: torch.Tensor, after: Sequence[Mark]) -> Mark:
        """Starts the copy master -> target (equal sizes, part of a slot) after the marks; returns its end.

        after: none for a new slot, which nothing was computed from
        """
        ...

    def store(self, master: torch.Tensor, source: torch.Tensor, after: Mark) -> Mark:
        """Starts the copy source (on the device) -> master after `after`; returns its end."""
        ...

    def here(self) -> None:
        """The compute stream is the current one; called at each forward of a block."""
        ...

    def mark(self) -> Mark:
        """The present end of the compute stream."""
        ...

    def wait(self, mark: Mark) -> None:
        """What is computed from now on comes after `mark`."""
        ...

    def finish(self, mark: Mark) -> None:
        """Returns when the copy that ends there has arrived."""
        ...

    def drain(self) -> None:
        """Returns when all copies have arrived."""
        ...

    def away(self, view: torch.Tensor, trained: bool = False) -> torch.Tensor:
        """What a Parameter is bound to while its block is not on the device; `view`: its part of the
        master. Of one that trains it must be a tensor of the device: on another one autograd would forget where
        its gradients go.
        """
        ...


class CpuBackend:
    """The adversarial machine of the tests: see the module's text.

    seed: of the choice when queued copies run; None: always as late as possible
    poison: fill void slots and absent parameters with bytes 0xFF (NaN in every floating format)
    """

    device = torch.device("cpu")

    def __init__(self, seed: int | None = 0, *, poison: bool = True) -> None:
        self._random = None if seed is None else random.Random(seed)
        self._poison = poison
        self._up: deque[int] = deque()
        self._down: deque[int] = deque()
        self._copies: dict[int, _Copy] = {}
        self._issued = 0
        self._nothing: dict[int, torch.Tensor] = {}

    def master(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def seal(self, masters: Sequence[torch.Tensor]) -> str:
        return "weights that are away wait in ordinary memory (this is the CPU)"

    def unseal(self) -> None:
        return

    def slot(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def clear(self, slot: torch.Tensor) -> None:
        if not self._poison:
            return
        reading = [self._copies[i] for i in self._down if _overlap(self._copies[i].source, slot)]
        if reading:
            reading[-1].then.append(slot)
        else:
            slot.fill_(0xFF)

    def load(self, target: torch.Tensor, master: torch.Tensor, after: Sequence[Mark]) -> Mark:
        return self._issue(self._up, target, master, after)

    def store(self, master: torch.Tensor, source: torch.Tensor, after: Mark) -> Mark:
        return self._issue(self._down, master, source, [after])

    def _issue(
        self, queue: deque[int], target: torch.Tensor, source: torch.Tensor, after: Sequence[Mark]
    ) -> Mark:
        assert target.shape == source.shape
        self._issued += 1
        self._copies[self._issued] = _Copy(target, source, tuple(after))
        queue.append(self._issued)
        self._perhaps()
        return self._issued

    def here(self) -> None:
        self._perhaps()

    def mark(self) -> Mark:
        self._perhaps()
        return 0  # the CPU has computed everything that was asked of it

    def wait(self, mark: Mark) -> None:
        queue = self._up if mark in self._up else self._down
        while queue and queue[0] <= mark:
            self._run_oldest(queue)

    def finish(self, mark: Mark) -> None:
        self.wait(mark)

    def drain(self) -> None:
        for queue in (self._up, self._down):
            while queue:
                self._run_oldest(queue)

    def away(self, view: torch.Tensor, trained: bool = False) -> torch.Tensor:
        if not self._poison:
            return view
        size = view.numel() * view.element_size()
        if size not in self._nothing:
            self._nothing[size] = torch.full((size,), 0xFF, dtype=torch.uint8)
        return self._nothing[size].view(view.dtype).view(view.shape)

    def _perhaps(self) -> None:
        while self._random is not None and (self._up or self._down) and self._random.random() < 0.3:
            self._run_oldest(self._random.choice([queue for queue in (self._up, self._down) if queue]))

    def _run_oldest(self, queue: deque[int]) -> None:
        copy = self._copies.pop(queue.popleft())
        for mark in copy.after:
            self.wait(mark)
        copy.target.copy_(copy.source)
        for slot in copy.then:
            slot.fill_(0xFF)


@dataclass
class _Copy:
    """A copy that was asked for. after: what it comes after; then: slots that are void once it has run."""

    target: torch.Tensor
    source: torch.Tensor
    after: tuple[int, ...]
    then: list[torch.Tensor] = field(default_factory=list)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.data_ptr() < other.data_ptr() + other.numel() and other.data_ptr() < one.data_ptr() + one.numel()
    )
