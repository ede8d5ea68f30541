"""One training loop for both stages of the pretraining: warmup, constant rate, decay, moving average, resume.

Every step draws from its own generator, seeded by (seed, step), so that an interrupted training goes on as if
nothing had happened, and the state holds no generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

PRINT_EVERY = 100


@dataclass(frozen=True)
class Plan:
    """steps; warmup in steps; decay: share of the steps, at the end, over which the rate falls linearly to
    nothing.

    ema: decay of the moving average of the weights, itself warmed up as min(ema, (1 + i) / (10 + i)).
    """

    steps: int
    warmup: int
    decay: float
    ema: float
    save_every: int = 100

    def rate(self, step: int) -> float:
        """Factor on the learning rate, (0, 1]."""
        left = (self.steps - step) / max(1.0, self.steps * self.decay)
        return min(1.0, (step + 1) / self.warmup, left)


@dataclass
class Progress:
    """seconds: training time alone, of all calls together. loss: mean of the last steps that were told of."""

    step: int = 0
    seconds: float = 0.0
    loss: float = float("nan")


def muon_and_adamw(model: nn.Module, blocks: tuple[str, ...], rate: float) -> list[Optimizer]:
    """Muon for the matrices of the blocks (parameters whose names begin so), AdamW for all else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and name.startswith(blocks) else rest).append(weight)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


class Fit:
    """A model in training (the weights that want a gradient), its moving average and its file."""

    def __init__(
        self, name: str, model: nn.Module, optimizers: Sequence[Optimizer], plan: Plan, path: Path
    ) -> None:
        self.name, self.model, self.optimizers, self.plan, self.path = name, model, optimizers, plan, path
        self.weights = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
        self.average = {key: weight.detach().clone() for key, weight in self.weights.items()}
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.progress = Progress()

    def run(self, loss_of: Callable[[Generator, int], Tensor], seed: int, deadline: float) -> bool:
        """Steps until the plan is done or `time.monotonic()` passes deadline; saves in both cases. -> done?

        loss_of(generator, step) -> scalar loss; all its randomness comes from the generator.
        """
        recent: list[float] = []
        while self.progress.step < self.plan.steps:
            if time.monotonic() > deadline:
                break
            began = time.monotonic()
            step = self.progress.step
            recent.append(self._step(loss_of(torch.Generator().manual_seed(seed * 10_000_000 + step), step)))
            self.progress.step += 1
            self.progress.seconds += time.monotonic() - began
            if self.progress.step % PRINT_EVERY == 0:
                mean = self.progress.loss = sum(recent) / len(recent)
                print(
                    f"{self.name} {self.progress.step}/{self.plan.steps}",
                    f"{self.progress.seconds:.0f} s loss {mean:.4f}",
                    flush=True,
                )
                recent.clear()
            if self.progress.step % self.plan.save_every == 0:
                self.save()
        self.save()
        return self.progress.step >= self.plan.steps

    def _step(self, loss: Tensor) -> float:
        factor = self.plan.rate(self.progress.step)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        i = self.progress.step + 1
        keep = min(self.plan.ema, (1 + i) / (10 + i))
        torch._foreach_lerp_(
            list(self.average.values()), [weight.detach() for weight in self.weights.values()], 1 - keep
        )
        return loss.item()

    def averaged(self, model: nn.Module) -> nn.Module:
        """The average's weights put into model (another instance of the same class), for evaluation."""
        missing, unexpected = model.load_state_dict(self.average, strict=False)
        assert not unexpected and not set(missing) & set(self.weights), "the average belongs to another model"
        return model.eval().requires_grad_(False)

    def save(self) -> None:
        """Written beside, then renamed: a kill leaves the last state whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        state = {
            "weights": {key: weight.detach() for key, weight in self.weights.items()},
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.progress.step,
            "seconds": self.progress.seconds,
            "loss": self.progress.loss,
        }
        torch.save(state, beside)
        beside.replace(self.path)

    def load(self) -> None:
        """Goes on from the file, if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            for key, weight in self.weights.items():
                weight.copy_(state["weights"][key])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(state["step"], state["seconds"], state.get("loss", float("nan")))
