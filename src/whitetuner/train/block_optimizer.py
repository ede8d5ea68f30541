"""One optimizer for each block, so that a block can be updated, and its state moved, without the others.

Optimizers of the registry treat every tensor by itself (AdamW, its 8-bit kind, Adafactor), so that many small ones do what
one over everything would. Their step is computed in float32, tensor by tensor: of bf16 weights a float32 copy of one tensor
at a time exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whitetuner.train.optim import optimizer_tensors, restore_optimizer, set_lr
from whitetuner.train.precision import Precision, beside, precise, put

#: (parameters, whether they decay) -> an optimizer over them.
Make = Callable[[Sequence[nn.Parameter], bool], torch.optim.Optimizer]
BESIDE = "beside"


class BlockOptimizer:
    """Updates the parameters of one block.

    decays:    names of those that weight decay acts on (weights of products; not norms, biases and tables)
    precision: of the bf16 ones; those in float32 are updated in place
    at_once:   the optimizer is asked once a step with all tensors instead of once for each: for classes that count steps
               for all of them together; then float32 copies of the whole block exist
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decays: frozenset[str],
        make: Make,
        precision: Precision,
        device: torch.device,
        *,
        at_once: bool = False,
    ) -> None:
        self.parameters, self.precision, self.at_once, self.device = parameters, precision, at_once, device
        self.kept = {name: beside(p, precision) for name, p in parameters.items()}
        self._work = {
            name: p if p.dtype == torch.float32 else nn.Parameter(self._nothing(p.shape))
            for name, p in parameters.items()
        }
        decaying = [work for name, work in self._work.items() if name in decays]
        others = [work for name, work in self._work.items() if name not in decays]
        self.optimizer = make(decaying or others, bool(decaying))
        if decaying and others:
            self.optimizer.add_param_group({"params": others, "weight_decay": 0.0})

    def _nothing(self, shape: torch.Size) -> Tensor:
        """The shape without the memory."""
        return torch.zeros(1, device=self.device).expand(shape)

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], lr: float, scale: float, key: Callable[[str], int]) -> None:
        """Uses the gradients up. scale: of all of them (clipping); key: of a parameter's random numbers in this step."""
        set_lr(self.optimizer, lr)
        names = [name for name in self.parameters if name in gradients]
        plain = [name for name in names if self._work[name] is self.parameters[name]]
        for name in plain:
            gradient = gradients.pop(name)
            self._work[name].grad = gradient if scale == 1.0 else gradient * scale
        others = [name for name in names if name not in plain]
        together = [others] if self.at_once else [[name] for name in others]
        if plain and not (self.at_once and others):
            self._ask(plain)
        for turn in together:
            for name in turn:
                work = self._work[name]
                work.data = precise(self.parameters[name], self.kept[name])
                gradient = gradients.pop(name).float()
                work.grad = gradient if scale == 1.0 else gradient * scale
                del gradient
            self._ask([*turn, *(plain if self.at_once else ())])
            for name in turn:
                work = self._work[name]
                put(self.parameters[name], self.kept[name], work.data, self.precision, key(name))
                work.data = self._nothing(work.shape)

    def _ask(self, names: Sequence[str]) -> None:
        self.optimizer.step()
        for name in names:
            self._work[name].grad = None

    @property
    def works(self) -> Mapping[str, nn.Parameter]:
        """Name of a parameter -> what the optimizer knows it as."""
        return self._work

    # ---- what is remembered

    def tensors(self) -> list[Tensor]:
        """All that is remembered of this block alone, once it is there; small counters among it."""
        found = [kept for kept in self.kept.values() if kept is not None]
        for state in self.optimizer.state.values():
            found += [one for one in state.values() if isinstance(one, Tensor)]
        return found

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, document); memory is shared."""
        tensors, document = optimizer_tensors(self.optimizer)
        kept = {f"{BESIDE}.{name}": one for name, one in self.kept.items() if one is not None}
        return {**tensors, **kept}, document

    def load(self, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Back to what `save` gave, to the bit. Raises UserError when it belongs to another optimizer or other parameters."""
        restore_optimizer(self.optimizer, tensors, document)
        for name, kept in self.kept.items():
            if kept is not None:
                self.kept[name] = tensors[f"{BESIDE}.{name}"].to(self.device, copy=True)


def decaying(module: nn.Module, trained: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Names of weights that decay: those of products and embeddings. Norms, biases, modulation tables and tokens do not."""
    products = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {
        f"{path}.weight" if path else "weight"
        for path, child in module.named_modules()
        if isinstance(child, products)
    }
    return frozenset(found & trained.keys())
