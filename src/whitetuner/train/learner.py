"""What learns: one denoiser with its adapter, optimizer and average. WAN 2.2 has two, most families one.

A denoiser that learns with its own weights is train/whole.py; `Learns` is what both have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from whitetuner.adapters.attach import Adapter
from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.family import Part
from whitetuner.memory.fit import Fitted
from whitetuner.memory.luggage import Luggage
from whitetuner.train.ema import Ema
from whitetuner.train.optim import clip_grad_norm, optimizer_tensors, restore_optimizer, set_lr

STATE = "accelerate_state"
T = TypeVar("T")


class Learns(Protocol):
    """What the loop, the team and the files know of one denoiser that learns.

    in_passes: gradients are added up over the ranks in the passes of a step already, and weights may change in them; else
               both come after
    """

    part: Part
    module: torch.nn.Module
    kind: str
    in_passes: bool

    @property
    def parameters(self) -> list[torch.nn.Parameter]: ...

    @property
    def fitted(self) -> Fitted | None: ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def leave(self) -> None:
        """For another's turn: nothing of it stays on the device."""
        ...

    def come(self) -> None:
        """Its turn begins."""
        ...

    def run(self, passes: Callable[[], T], lr: float, max_norm: float) -> T:
        """All forward and backward passes of one step."""
        ...

    def pass_begins(self, last: bool) -> None:
        """Before each backward pass. last: of the step."""
        ...

    def pass_ends(self) -> None: ...

    def clipped(self, max_norm: float) -> float:
        """The norm of the step's gradient, before it was scaled down to max_norm."""
        ...

    def apply(self, lr: float) -> None:
        """The end of a step whose numbers are sound."""
        ...

    def drop(self) -> None:
        """Forgets gradients that are not to be applied."""
        ...

    def weight_change(self) -> float: ...

    def averaged(self) -> AbstractContextManager[None]: ...

    def save(self) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]: ...

    def load(
        self, tensors: Mapping[str, Mapping[str, torch.Tensor]], documents: Mapping[str, Any]
    ) -> None: ...


class Learner:
    """A frozen denoiser, the adapter on it, its optimizer and (optionally) the running average of the adapter.

    kind: "lokr" or "lora", also the name of the checkpoint's folder and file
    fitted: how the denoiser was made to fit the device (memory.fit); None: it lies there as a whole
    turns_on: the device that it shares with others in turns; None: it stays where it is
    """

    def __init__(
        self,
        part: Part,
        module: torch.nn.Module,
        adapter: Adapter,
        kind: str,
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        fitted: Fitted | None = None,
        turns_on: torch.device | None = None,
    ) -> None:
        self.fitted, self.in_passes = fitted, False
        self.luggage = None if turns_on is None else Luggage(self._tensors, turns_on)
        self.part, self.module, self.adapter, self.kind = part, module, adapter, kind
        self.optimizer, self.ema = optimizer, ema
        self._trained = list(adapter.parameters())
        self._start = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Of the adapter."""
        return self._trained

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self.adapter.named_parameters()

    def run(self, passes: Callable[[], T], lr: float, max_norm: float) -> T:
        """All forward and backward passes of one step; when memory runs out, again with fewer blocks on the device.

        The second try computes what the first would have: nothing is applied before the optimizer's step.
        """
        if self.fitted is None:
            return passes()
        done = self.fitted.run(passes, self.drop)
        self.fitted.step_end()
        return done

    def leave(self) -> None:
        """For another's turn: nothing of it stays on the device."""
        if self.fitted is not None:
            self.fitted.make_way()
        if self.luggage is not None:
            self.luggage.pack()

    def come(self) -> None:
        """Its turn begins; blocks come with the first forward."""
        if self.luggage is not None:
            self.luggage.unpack()

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()
        yield from (one for one in tree_leaves(dict(self.optimizer.state)) if isinstance(one, torch.Tensor))
        if self.ema is not None:
            yield from self.ema.state_tensors().values()

    def pass_begins(self, last: bool) -> None:
        return

    def pass_ends(self) -> None:
        return

    def clipped(self, max_norm: float) -> float:
        """Scales the gradient down to max_norm (0: not); returns its norm before."""
        return float(clip_grad_norm(self.parameters, max_norm))

    def apply(self, lr: float) -> None:
        """Takes the optimizer's step."""
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.drop()
        if self.ema is not None:
            self.ema.update()

    def drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def weight_change(self) -> float:
        """Root mean square distance of the trained numbers from where the run began (step 0, also after a resume)."""
        total = sum(
            float((p.detach().cpu() - s).square().sum()) for p, s in zip(self.parameters, self._start)
        )
        return (total / sum(s.numel() for s in self._start)) ** 0.5

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the adapter holds its running average (if there is one): what previews, validation and files show."""
        if self.ema is None:
            yield
            return
        with self.ema.swapped_in():
            yield

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The adapter in diffusers names, float32, on the CPU; a copy."""
        return {
            name: tensor.detach().float().to("cpu", copy=True)
            for name, tensor in self.adapter.state_dict().items()
        }

    def save(self) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]:
        """(tensors by file, documents by file) of a checkpoint."""
        tensors, scalars = optimizer_tensors(self.optimizer)
        files: dict[str, Mapping[str, torch.Tensor]] = {self._file: self.adapter_tensors()}
        if tensors:
            files[f"{self._state('optimizer')}.safetensors"] = tensors
        documents = {f"{self._state('optimizer')}.json": scalars}
        if self.ema is not None:
            files[f"{self._state('ema')}.safetensors"] = self.ema.state_tensors()
            names = [name for name, _ in self.named_parameters()]
            documents[f"{self._state('ema')}.json"] = {"updates": self.ema.updates, "names": names}
        return files, documents

    @property
    def _file(self) -> str:
        return f"{self.kind}/{self.part.file(self.kind)}"

    def _state(self, name: str) -> str:
        return f"{STATE}/{self.part.file(name).removesuffix('.safetensors')}"

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], documents: Mapping[str, Any]) -> None:
        """Back to a checkpoint, to the bit. Raises UserError when it does not fit this run's settings."""
        name = self._file
        if name not in tensors:
            raise UserError(
                "the checkpoint holds no {name}",
                where="--resume",
                mend="resume with the method.kind the run began with",
                code=EXIT_FAILED,
                name=name,
            )
        self.adapter.load_state_dict(tensors[name])
        restore_optimizer(
            self.optimizer,
            tensors.get(f"{self._state('optimizer')}.safetensors", {}),
            documents[f"{self._state('optimizer')}.json"],
        )
        if self.ema is not None:
            ema = tensors.get(f"{self._state('ema')}.safetensors")
            if ema is None:
                raise UserError(
                    "the checkpoint holds no running average, but optimizer.ema is set now",
                    where="optimizer.ema",
                    mend="set optimizer.ema = 0 as when the run began, or start a new run",
                )
            self.ema.load_state_tensors(ema, int(documents[f"{self._state('ema')}.json"]["updates"]))
