"""The training loop, the same for every family, method and memory plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from whitetuner.errors import UserError
from whitetuner.family import Family
from whitetuner.records import Batch, StepBatches
from whitetuner.runs.events import StepDone
from whitetuner.train.distributed import Ranks
from whitetuner.train.guard import damaged_weights, first_bad_module, not_finite
from whitetuner.train.learner import Learns
from whitetuner.train.step import StepLoss, StepSettings, step_loss

ALONE = Ranks()
#: The distance from the start is a pass over all trained numbers: every so many steps, and with each save.
WEIGHT_CHANGE_EVERY = 10


@dataclass
class LoopSettings:
    """steps: optimizer steps in all; lr_at: factor of the learning rate at a step (0-based); max_grad_norm: 0 = no clipping."""

    steps: int
    lr: float
    lr_at: Callable[[int], float]
    max_grad_norm: float = 1.0


@dataclass
class Hooks:
    """What the recipe wants done between steps. Plain callables; none of them changes what is learned."""

    on_step: Callable[[StepDone], None]
    after_step: Callable[[int], None]  # previews, validation, saving
    stop_asked: Callable[[], bool]
    on_bad: Callable[[int], object]  # (last good step): save before the run fails


@dataclass
class Outcome:
    """step: the last one done; stopped: it was asked to end before its last."""

    step: int
    stopped: bool


def train(
    family: Family,
    learner: Learns,
    batches: Iterator[StepBatches],
    step_settings: StepSettings,
    settings: LoopSettings,
    hooks: Hooks,
    *,
    start: int = 0,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Runs optimizer steps start+1 .. steps. `batches` must begin with step start+1.

    ranks: that share each step; all apply the same sum of gradients, and say the same of the step
    Raises NotFinite, before anything is applied, when loss or gradients are NaN or infinite.
    """
    modules = {learner.part.name: learner.module}
    step, change, stop = start, 0.0, False
    while step < settings.steps:
        if stop or (ranks.world == 1 and hooks.stop_asked()):
            return Outcome(step, True)
        began = time.perf_counter()
        given = next(batches)
        samples = sum(given.sizes)
        lr = settings.lr * settings.lr_at(step)
        wary = learner.in_passes and ranks.world == 1
        passes = partial(_passes, family, modules, learner, given.mine, samples, step_settings, device, wary)
        done = learner.run(passes, lr, settings.max_grad_norm)
        asked = ranks.world > 1 and hooks.stop_asked()
        stop, losses, sigmas = _agreed(ranks, asked, done, given.sizes)
        value = sum(losses) / samples
        norm = 0.0
        if _finite(value):
            if not learner.in_passes:  # else block by block, as they were used
                ranks.sum_gradients(learner.parameters)
            norm = learner.clipped(settings.max_grad_norm)
        if not (_finite(value) and _finite(norm)):
            error = _refusal(family, learner, given.mine, step_settings, step + 1, value, hooks, device)
            ranks.meet(error if ranks.rank == _blamed(losses, given.sizes, ranks.world) else None)
        learner.apply(lr)
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
                sigmas=[round(one, 5) for one in sigmas],
                losses=[round(one, 6) for one in losses],
                weight_change=change,
                memory_mb=_memory_mb(device),
            )
        )
        hooks.after_step(step)
    return Outcome(step, False)


def _passes(
    family: Family,
    modules: Mapping[str, torch.nn.Module],
    learner: Learns,
    micro: Sequence[Batch],
    samples: int,
    settings: StepSettings,
    device: torch.device,
    wary: bool,
) -> list[StepLoss]:
    """Forward and backward of every micro-batch that this rank has of a step. samples: of the whole step.

    wary: where backward passes change the weights, none is begun once a loss is not finite. With other ranks it is: they wait
    for its gradients, and all refuse their sum before anything is changed.
    """
    done, sound = [], True
    for number, batch in enumerate(micro):
        loss = step_loss(family, modules, learner.part.name, batch, settings, device)
        done.append(StepLoss(loss.weighted.detach(), loss.plain, loss.sigma))
        sound = sound and not (wary and not _finite(float(loss.plain.sum())))
        if not sound:
            continue
        learner.pass_begins(number == len(micro) - 1)
        # Divided by the samples of the step, not of the batch: also in a smaller last batch each weighs the same.
        (loss.weighted.sum() / samples).backward()
        learner.pass_ends()
    return done


def _agreed(
    ranks: Ranks, stop: bool, done: Sequence[StepLoss], sizes: Sequence[int]
) -> tuple[bool, list[float], list[float]]:
    """(somebody asked to stop, loss of every sample of the step, sigma of every sample), in the order of the samples."""
    told = [torch.stack([loss.plain.float(), loss.sigma.float()], 1).flatten() for loss in done]
    values = torch.cat(told).tolist() if told else []
    most = 2 * max(sum(sizes[rank :: ranks.world]) for rank in range(ranks.world))
    agreed = ranks.agree(stop, values, most)
    places, losses, sigmas = [0] * ranks.world, [], []
    for number, size in enumerate(sizes):
        rank = number % ranks.world
        piece = agreed.rows[rank][places[rank] : places[rank] + 2 * size]
        places[rank] += 2 * size
        losses += piece[0::2]
        sigmas += piece[1::2]
    return agreed.stop, losses, sigmas


def _blamed(losses: Sequence[float], sizes: Sequence[int], world: int) -> int:
    """The rank that had the first sample without a finite loss; 0 when all losses are finite."""
    owners = [number % world for number, size in enumerate(sizes) for _ in range(size)]
    return next((owner for owner, loss in zip(owners, losses, strict=True) if not _finite(loss)), 0)


def _refusal(
    family: Family,
    learner: Learns,
    micro: Sequence[Batch],
    settings: StepSettings,
    step: int,
    loss: float,
    hooks: Hooks,
    device: torch.device,
) -> UserError:
    """Undoes the step and says what is at fault, as far as this rank can see."""
    culprit = next((name for name, p in learner.named_parameters() if not torch.isfinite(p).all()), None)
    bad_gradient = next(
        (n for n, p in learner.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()),
        None,
    )
    modules = {learner.part.name: learner.module}
    alone = learner.fitted is None or not learner.fitted.sharded
    for batch in micro if alone else ():  # a pass of one rank would wait for the others'
        if culprit is None:
            culprit = first_bad_module(
                learner.module.named_modules(),
                partial(step_loss, family, modules, learner.part.name, batch, settings, device),
            )
    learner.drop()
    hooks.on_bad(step - 1)
    if learner.fitted is not None:
        learner.fitted.make_room()  # so that every weight is its own again, not what a slot holds by now
    damaged = None if culprit is None else damaged_weights(learner.module, culprit)
    if damaged is not None:
        return damaged
    names = ", ".join(item.target.name for batch in micro for item in batch.items)
    what = "gradient" if _finite(loss) else "loss"
    where = culprit or (
        f"the gradient of {bad_gradient}" if bad_gradient else "the loss itself (encoded picture or text)"
    )
    return not_finite(step, what, where, names)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _memory_mb(device: torch.device) -> float:
    """Peak device memory so far; on a CPU the process' resident memory, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import psutil

    return psutil.Process().memory_info().rss / 2**20
