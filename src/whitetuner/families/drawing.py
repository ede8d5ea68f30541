"""What every family's drawing asks of a diffusers pipeline: to work where the denoiser is, and to end when it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The pipelines' `callback_on_step_end`: (pipeline, step, timestep, tensors) -> the tensors to go on with.
AfterStep = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class AtHome:
    """Base before a pipeline: it works on `home`, where the denoiser computes. diffusers would look where the VAE lies, which may
    be parked elsewhere.
    """

    home = torch.device("cpu")

    @property
    def _execution_device(self) -> torch.device:
        return self.home


def ending_when_told(on_step: Callable[[int], bool] | None) -> AfterStep:
    """on_step: as in Family.generate; where it returns False the pipeline ends with what is there."""

    def after_step(pipe: Any, index: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if on_step is not None and not on_step(index):
            pipe._interrupt = True
        return values

    return after_step
