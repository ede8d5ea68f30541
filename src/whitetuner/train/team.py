"""All that learns in a run: one learner for most families, one for each expert of WAN 2.2, taking turns.

Whose turn it is is a function of the step alone, so that a resumed run goes on with the right one. Turns are long, because
changing them means that one expert's blocks leave the card and the other's come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from whitetuner.memory.beside import TURN_STEPS
from whitetuner.train.learner import Learns


class Beside(Protocol):
    """Denoisers that draw beside the learners and do not learn (companions.py)."""

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]: ...

    def make_room(self) -> None: ...

    def make_way(self) -> None: ...


class Team:
    """Learners in the order of the family's parts, and what draws beside them. Raises nothing of its own.

    turn_steps: of a turn; the same for all of a run, resumed or not; None: TURN_STEPS
    """

    def __init__(
        self, learners: Sequence[Learns], beside: Beside | None = None, turn_steps: int | None = None
    ) -> None:
        assert learners
        self.turn_steps = turn_steps or TURN_STEPS
        self.learners, self.beside = tuple(learners), beside
        self._holder: Learns | None = None

    def at(self, step: int) -> Learns:
        """Who learns in the optimizer step after `step` steps."""
        return self.learners[step // self.turn_steps % len(self.learners)]

    def turn_ends(self, step: int) -> int:
        """The step at which the turn running after `step` steps is over."""
        return (step // self.turn_steps + 1) * self.turn_steps

    def make_way_for(self, learner: Learns) -> None:
        """It has the device from now on: the others leave."""
        if self._holder is learner:
            return
        for other in self.learners:
            if other is not learner:
                other.leave()
        learner.come()
        self._holder = learner

    @contextmanager
    def guests(self) -> Iterator[None]:
        """Within it others may take the device (validation, previews); who had it has it again after."""
        holder = self._holder
        try:
            yield
        finally:
            if self.beside is not None:
                self.beside.make_way()
            if holder is not None:
                self.make_way_for(holder)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Part name -> denoiser, of all that draw."""
        own = {learner.part.name: learner.module for learner in self.learners}
        return own if self.beside is None else {**own, **self.beside.modules}

    @contextmanager
    def one_at_a_time(self) -> Iterator[dict[str, torch.nn.Module]]:
        """The denoisers for drawing: when another one is called than the one before, the others leave the device."""
        for make_room in self.make_room():
            make_room()
        if self.beside is not None:
            self._beside_is_next()  # before it is read
        modules = self.modules
        if len(modules) == 1:
            yield modules
            return
        own = {learner.part.name: learner for learner in self.learners}
        last: list[str] = []

        def called(name: str) -> None:
            if last == [name]:
                return
            last[:] = [name]
            if name not in own:
                self._beside_is_next()
                return
            if self.beside is not None:
                self.beside.make_way()
            self.make_way_for(own[name])

        if len(own) > 1:
            called(next(iter(own)))  # a pipeline asks its first denoiser where to compute
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: called(name))
            for name, module in modules.items()
        ]
        try:
            yield modules
        finally:
            for hook in hooks:
                hook.remove()

    def _beside_is_next(self) -> None:
        for learner in self.learners:
            learner.leave()
        self._holder = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See Learner.averaged."""
        with ExitStack() as stack:
            for learner in self.learners:
                stack.enter_context(learner.averaged())
            yield

    def save(self) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]:
        """(tensors by file, documents by file) of a checkpoint."""
        tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        documents: dict[str, Any] = {}
        for learner in self.learners:
            more_tensors, more_documents = learner.save()
            assert not tensors.keys() & more_tensors.keys(), "two parts of one name"
            tensors.update(more_tensors)
            documents.update(more_documents)
        return tensors, documents

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], documents: Mapping[str, Any]) -> None:
        """Back to a checkpoint, to the bit. Raises UserError when it does not fit this run's settings."""
        for learner in self.learners:
            learner.load(tensors, documents)

    def make_room(self) -> list[Any]:
        """For work beside: each frees the device memory of one denoiser's blocks."""
        own = [learner.fitted.make_room for learner in self.learners if learner.fitted is not None]
        return own if self.beside is None else [*own, self.beside.make_room]
