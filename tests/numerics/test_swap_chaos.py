"""200 random interleavings of what a training run may do never give a wrong gradient."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from swap_standins import LISTS, STYLES, Net, Setup, build, inputs

from whitetuner.memory.recompute import checkpoint_blocks
from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.swap.engine import SwapEngine


class Broken(Exception):
    pass


class Run:
    """One net, swapped or not, that is told what to do; `log` is everything that can be seen of it."""

    def __init__(self, setup: Setup, engine: Callable[[Net], SwapEngine] | None) -> None:
        self.net = build(setup)
        if setup.recompute is not None:
            checkpoint_blocks(self.net, LISTS, setup.recompute)
        self.engine = engine(self.net) if engine else None
        self.trained = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.SGD(self.trained.values(), lr=0.05)
        self.log: list[torch.Tensor] = []
        self.open: list[torch.Tensor] = []

    def loss(self, step: int, skip: frozenset[int]) -> torch.Tensor:
        x, text, sigma = inputs(step)
        net = self.net
        temb = net.time(sigma)
        x = net.embed(x)
        for number, pair in enumerate(net.pairs):
            if number not in skip:
                text, x = net.style(pair, hidden_states=x, encoder_hidden_states=text, temb=temb)
        for number, single in enumerate(net.singles, len(net.pairs)):
            if number not in skip:
                x = net.style(single, hidden_states=x, temb=temb)
        return net.out(x).square().mean() + 0 * text.sum()

    def do(self, action: str, step: int, skip: frozenset[int], where: int) -> None:
        if action == "train":
            self.loss(step, skip).backward()
        elif action == "two forwards":
            (self.loss(step, skip) * self.loss(step + 100, frozenset())).backward()
        elif action == "forward only":
            self.log.append(self.loss(step, skip).detach())
        elif action == "sample":
            with torch.no_grad():
                self.log.append(self.loss(step, skip))
        elif action == "begin":
            self.open.append(self.loss(step, skip))
        elif action == "end" and self.open:
            self.open.pop(where % len(self.open)).backward()
        elif action == "break":
            self._break(step, where)
        elif action == "update":
            self.log += [p.grad.clone() for p in self.trained.values() if p.grad is not None]
            if not self.open:  # torch itself forbids to update what an open graph still needs
                self.optimizer.step()
            self.optimizer.zero_grad()
            if self.engine is not None:
                self.engine.step_end()

    def _break(self, step: int, where: int) -> None:
        """An error (out of memory, say) inside a block's forward, its second computation, or its backward."""
        blocks = [*self.net.pairs, *self.net.singles]
        layer = next(m for m in blocks[where % len(blocks)].modules() if isinstance(m, torch.nn.Linear))
        seen = 0

        def forward(*_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == 1 + where % 2:
                raise Broken

        def backward(module: object, args: object, out: torch.Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda _: (_ for _ in ()).throw(Broken()))

        handle = (
            layer.register_forward_pre_hook(forward) if where % 3 else layer.register_forward_hook(backward)
        )
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in self.trained.items()}
        try:
            self.loss(step, frozenset()).backward()
        except Broken:
            pass
        handle.remove()
        for name, parameter in self.trained.items():  # a loop drops the gradients of a broken step
            parameter.grad = gradients[name]


ACTIONS = [
    "train",
    "train",
    "two forwards",
    "forward only",
    "sample",
    "begin",
    "end",
    "break",
    "update",
    "resize",
]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
def test_random_interleavings_give_the_bits_of_the_plain_model(part: int) -> None:
    for seed in range(part * 25, part * 25 + 25):
        rng = random.Random(seed)
        setup = Setup(
            rng.choice(list(STYLES)),
            rng.choice([None, None, "all", (0, 2, 3)]),
            pairs=1,
            singles=4,
        )
        if setup.style.endswith("checkpoint"):
            setup.recompute = None
        plain = Run(setup, None)
        ours = Run(
            setup,
            lambda net, rng=rng, seed=seed: SwapEngine(
                net, LISTS, rng.randint(0, 5), CpuBackend(seed), slots=rng.randint(2, 3), smallest_bytes=0
            ).attach(),
        )
        for step in range(12):
            action = rng.choice(ACTIONS)
            skip = frozenset(rng.sample(range(5), 2)) if rng.random() < 0.2 else frozenset()
            where = rng.randrange(30)
            if action == "resize":
                assert ours.engine is not None
                ours.engine.resize(rng.randint(0, 5), rng.randint(2, 4))
                continue
            for run in (plain, ours):
                run.do(action, step, skip, where)
        for run in (plain, ours):
            run.do("update", 99, frozenset(), 0)
        assert len(plain.log) == len(ours.log) > 0
        for a, b in zip(plain.log, ours.log, strict=True):
            assert torch.equal(a, b), seed
            assert torch.isfinite(a).all()
