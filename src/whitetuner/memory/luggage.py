"""What of a model does not move in blocks (embeddings, norms, adapters, an optimizer's state) leaves the device, too, while
another model has its turn: of two experts of 14 billion weights that is 0.8 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Move = Callable[[torch.Tensor, torch.device], torch.Tensor]


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device)


class Luggage:
    """Tensors that go to the host together and come back. They stay the same objects: only `.data` changes.

    tensors: all that belongs to the model at that moment; those that lie elsewhere anyway are let be
    move:    how one is moved; other ones serve tests, on a device that is the host itself
    """

    def __init__(
        self, tensors: Callable[[], Iterable[torch.Tensor]], device: torch.device, move: Move = _to
    ) -> None:
        self._tensors, self._device, self._move = tensors, device, move
        self._away: list[torch.Tensor] = []

    @property
    def packed(self) -> bool:
        return bool(self._away)

    def pack(self) -> None:
        """To the host. Once packed, nothing more is done."""
        if self._away:
            return
        there = {id(one): one for one in self._tensors() if one.device.type == self._device.type}
        self._away = list(there.values())
        for tensor in self._away:
            tensor.data = self._move(tensor.data, torch.device("cpu"))

    def unpack(self) -> None:
        """Back to the device."""
        away, self._away = self._away, []
        for tensor in away:
            tensor.data = self._move(tensor.data, self._device)
