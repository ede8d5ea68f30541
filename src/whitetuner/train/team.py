"""All that learns in a run: one learner for most families, one for each expert of WAN 2.2, taking turns.

Whose turn it is is a function of the step alone, so that a resumed run goes on with the right one. Turns are long, because
changing them means that one expert's blocks leave the card and the other's come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from whitetuner.train.learner import Learner

#: Steps of a turn. 14 GB over a link of 25 GB/s take half a second, twenty steps of such a model minutes: well under 1 %.
TURN_STEPS = 20


class Beside(Protocol):
    """Denoisers that draw beside the learners and do not learn (companions.py)."""

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]: ...

    def make_room(self) -> None: ...


class Team:
    """Learners in the order of the family's parts, and what draws beside them. Raises nothing of its own."""

    def __init__(self, learners: Sequence[Learner], beside: Beside | None = None) -> None:
        assert learners
        self.learners, self.beside = tuple(learners), beside

    def at(self, step: int) -> Learner:
        """Who learns in the optimizer step after `step` steps."""
        return self.learners[step // TURN_STEPS % len(self.learners)]

    def turn_ends(self, step: int) -> int:
        """The step at which the turn running after `step` steps is over."""
        return (step // TURN_STEPS + 1) * TURN_STEPS

    def make_way_for(self, learner: Learner) -> None:
        """The others' blocks leave the device."""
        for other in self.learners:
            if other is not learner and other.fitted is not None:
                other.fitted.make_room()

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Part name -> denoiser, of all that draw."""
        own = {learner.part.name: learner.module for learner in self.learners}
        return own if self.beside is None else {**own, **self.beside.modules}

    @contextmanager
    def one_at_a_time(self) -> Iterator[dict[str, torch.nn.Module]]:
        """The denoisers for drawing: when another one is called than the one before, the others' blocks leave the device."""
        for make_room in self.make_room():
            make_room()
        modules = self.modules
        if len(modules) == 1:
            yield modules
            return
        last: list[str] = []

        def called(name: str) -> None:
            if last != [name]:
                last[:] = [name]
                for learner in self.learners:
                    if learner.part.name != name and learner.fitted is not None:
                        learner.fitted.make_room()
                if self.beside is not None and name not in self.beside.modules:
                    self.beside.make_room()

        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: called(name))
            for name, module in modules.items()
        ]
        try:
            yield modules
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See Learner.averaged."""
        with ExitStack() as stack:
            for learner in self.learners:
                stack.enter_context(learner.averaged())
            yield

    def save(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """(tensors by file, documents by file) of a checkpoint."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
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
