"""The running average of what is trained: previews, validation and the final files show it, training does not
see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from whitetuner.errors import UserError


class Ema:
    """average <- d average + (1 - d) parameter, in float32, with d = min(decay, (1 + n) / (10 + n)) at the
    n-th update.

    The warm-up of d (as in TensorFlow's ExponentialMovingAverage with num_updates) lets the average leave the
    start, which for an adapter is "no effect at all", within some ten steps.
    params: parameters in a fixed order, on their devices already; decay: in (0, 1)
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise UserError(
                "a decay of {decay} is no average",
                where="optimizer.ema",
                mend="use something like 0.999, or 0 for none",
                decay=decay,
            )
        self.decay, self.updates, self._inside = decay, 0, False
        self._params = list(params)
        self._average = [p.detach().to(torch.float32, copy=True) for p in self._params]

    @torch.no_grad()
    def update(self) -> None:
        """Once after every optimizer step."""
        assert not self._inside, "the parameters hold the average right now"
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self._average, self._params, strict=True):
            average.lerp_(parameter.to(torch.float32), 1.0 - d)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the parameters hold the average; after it, to the bit what they held before."""
        assert not self._inside, "the average is swapped in already"
        kept = [parameter.detach().clone() for parameter in self._params]
        self._inside = True
        try:
            self._fill(self._average)
            yield
        finally:
            self._fill(kept)
            self._inside = False

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages by their number in the order of the parameters (memory shared)."""
        return {str(number): average for number, average in enumerate(self._average)}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Back to a saved average. Raises UserError when it belongs to other parameters."""
        fits = tensors.keys() == self.state_tensors().keys() and all(
            tensors[name].shape == average.shape for name, average in self.state_tensors().items()
        )
        if not fits:
            raise UserError(
                "the saved running average belongs to other parameters",
                where="--resume",
                mend="resume with the method.targets, rank, factor and full_matrix the run began with",
            )
        for name, average in self.state_tensors().items():
            average.copy_(tensors[name])
        self.updates = updates

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._params, values, strict=True):
            parameter.copy_(value)


class HostEma:
    """The same of a whole model, in float32 on the host: the device has no room for it.

    values: names and present values of what trains, in a fixed order; decay: in (0, 1)
    """

    def __init__(self, values: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {name: one.to("cpu", torch.float32, copy=True) for name, one in values}

    @torch.no_grad()
    def update(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Once after every optimizer step."""
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, one in values:
            self.average[name].lerp_(one.to("cpu", torch.float32), 1.0 - d)
        self.updates += 1

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Back to a saved average. Raises UserError when it belongs to other parameters."""
        if tensors.keys() != self.average.keys():
            raise UserError(
                "the saved running average belongs to other parameters",
                where="--resume",
                mend="resume with the method.targets, rank, factor and full_matrix the run began with",
            )
        for name, average in self.average.items():
            average.copy_(tensors[name])
        self.updates = updates
