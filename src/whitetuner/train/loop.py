"""The training loop, the same for every family, method and memory plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from whitetuner.family import Family
from whitetuner.records import Batch
from whitetuner.runs.events import StepDone
from whitetuner.train.guard import damaged_weights, first_bad_module, not_finite
from whitetuner.train.learner import Learner
from whitetuner.train.optim import clip_grad_norm
from whitetuner.train.step import StepLoss, StepSettings, step_loss

#: The distance from the start is a pass over all trained numbers: every so many steps, and with each save.
WEIGHT_CHANGE_EVERY = 10


@dataclass
class LoopSettings:
    """steps: optimizer steps in all; lr_at: factor of the learning rate at a step (0-based); max_grad_norm: 0 = no clipping."""

    steps: int
    lr: float
    lr_at: Callable[[int], float]
    accumulate: int = 1
    max_grad_norm: float = 1.0


@dataclass
class Hooks:
    """What the recipe wants done between steps. Plain callables; none of them changes what is learned."""

    on_step: Callable[[StepDone], None]
    after_step: Callable[[int], None]  # previews, validation, saving
    stop_asked: Callable[[], bool]
    on_bad: Callable[[int], None]  # (last good step): save before the run fails


@dataclass
class Outcome:
    step: int
    stopped: bool


def train(
    family: Family,
    learner: Learner,
    batches: Iterator[Batch],
    step_settings: StepSettings,
    settings: LoopSettings,
    hooks: Hooks,
    *,
    start: int = 0,
    device: torch.device,
) -> Outcome:
    """Runs optimizer steps start+1 .. steps. `batches` must begin with the first micro-batch of step start+1.

    Raises NotFinite, before anything is applied, when loss or gradients are NaN or infinite.
    """
    modules = {learner.part.name: learner.module}
    step, change = start, 0.0
    while step < settings.steps:
        if hooks.stop_asked():
            return Outcome(step, True)
        began = time.perf_counter()
        micro = [next(batches) for _ in range(settings.accumulate)]
        samples = sum(len(batch) for batch in micro)
        done = learner.run(partial(_passes, family, modules, learner.part.name, micro, step_settings, device))
        norm = float(clip_grad_norm(learner.parameters, settings.max_grad_norm))
        plain = torch.cat([loss.plain for loss in done])
        value = float(plain.mean())
        if not (_finite(value) and _finite(norm)):
            _refuse(family, learner, micro, step_settings, step + 1, value, hooks, device)
        lr = settings.lr * settings.lr_at(step)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.ema is not None:
            learner.ema.update()
        step += 1
        if step % WEIGHT_CHANGE_EVERY == 0 or step == settings.steps or step == start + 1:
            change = learner.weight_change()
        hooks.on_step(
            StepDone(
                step=step,
                loss=value,
                lr=lr,
                grad_norm=norm,
                seconds=time.perf_counter() - began,
                samples=samples,
                sigmas=[round(float(s), 5) for loss in done for s in loss.sigma],
                losses=[round(float(one), 6) for one in plain],
                weight_change=change,
                memory_mb=_memory_mb(device),
            )
        )
        hooks.after_step(step)
    return Outcome(step, False)


def _passes(
    family: Family,
    modules: Mapping[str, torch.nn.Module],
    part: str,
    micro: Sequence[Batch],
    settings: StepSettings,
    device: torch.device,
) -> list[StepLoss]:
    """Forward and backward of every micro-batch of a step."""
    samples = sum(len(batch) for batch in micro)
    done = []
    for batch in micro:
        loss = step_loss(family, modules, part, batch, settings, device)
        # Divided by the samples of the step, not of the batch: also in a smaller last batch each weighs the same.
        (loss.weighted.sum() / samples).backward()
        done.append(StepLoss(loss.weighted.detach(), loss.plain, loss.sigma))
    return done


def _refuse(
    family: Family,
    learner: Learner,
    micro: Sequence[Batch],
    settings: StepSettings,
    step: int,
    loss: float,
    hooks: Hooks,
    device: torch.device,
) -> None:
    culprit = next(
        (name for name, p in learner.adapter.named_parameters() if not torch.isfinite(p).all()), None
    )
    bad_gradient = next(
        (
            n
            for n, p in learner.adapter.named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ),
        None,
    )
    modules = {learner.part.name: learner.module}
    for batch in micro:
        if culprit is None:
            culprit = first_bad_module(
                learner.module.named_modules(),
                partial(step_loss, family, modules, learner.part.name, batch, settings, device),
            )
    learner.optimizer.zero_grad(set_to_none=True)
    hooks.on_bad(step - 1)
    if learner.fitted is not None:
        learner.fitted.make_room()  # so that every weight is its own again, not what a slot holds by now
    damaged = None if culprit is None else damaged_weights(learner.module, culprit)
    if damaged is not None:
        raise damaged
    names = ", ".join(item.target.name for batch in micro for item in batch.items)
    what = "gradient" if _finite(loss) else "loss"
    where = culprit or (
        f"the gradient of {bad_gradient}" if bad_gradient else "the loss itself (encoded picture or text)"
    )
    raise not_finite(step, what, where, names)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _memory_mb(device: torch.device) -> float:
    """Peak device memory so far; on a CPU the process' resident memory, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import psutil

    return psutil.Process().memory_info().rss / 2**20
