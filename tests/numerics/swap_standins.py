"""Small models whose blocks are called in all the ways that real ones are, and one training run over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from whitetuner.memory.quantize import Kind, quantize_linears
from whitetuner.memory.recompute import checkpoint_blocks
from whitetuner.memory.swap.backend import Backend, Counters, CpuBackend
from whitetuner.memory.swap.engine import SwapEngine

torch.set_num_threads(1)
WIDTH = 16


class Block(nn.Module):
    """A frozen block with its own modulation of temb, a norm whose weight is used directly, and a low-rank adapter."""

    def __init__(self, hidden: int, adapter: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.modulation = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(WIDTH))
        self.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(WIDTH, 3) * 0.1) if adapter else None
        self.b = nn.Parameter(torch.randn(3, hidden) * 0.1) if adapter else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states) * (1 + self.modulation(temb)) + self.table
        up = self.up(normed)
        if self.a is not None:
            up = up + normed @ self.a @ self.b
        return hidden_states + self.down(F.gelu(up))


class PairBlock(nn.Module):
    """Two streams in and out, as FLUX's double blocks; the text stream of the last one is never used."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.image, self.text = Block(hidden), Block(hidden)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = hidden_states + encoder_hidden_states.mean()
        return self.text(encoder_hidden_states, temb=temb), self.image(mixed, temb=temb)


class Net(nn.Module):
    """Pairs, then single blocks of half the size. style: how the blocks are called."""

    def __init__(
        self, pairs: int = 2, singles: int = 4, hidden: int = 24, prefix_adapter: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.pairs = nn.ModuleList(PairBlock(hidden) for _ in range(pairs))
        self.singles = nn.ModuleList(Block(hidden, prefix_adapter or i > 1) for i in range(singles))
        self.out = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.style: Callable[..., Any] = with_keywords

    def forward(self, x: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        temb = self.time(sigma)
        x = self.embed(x)
        for pair in self.pairs:
            text, x = self.style(pair, hidden_states=x, encoder_hidden_states=text, temb=temb)
        for single in self.singles:
            x = self.style(single, hidden_states=x, temb=temb)
        return self.out(x)


LISTS = ("pairs", "singles")


def with_keywords(block: nn.Module, **inputs: torch.Tensor) -> Any:
    return block(**inputs)


def with_positions(block: nn.Module, **inputs: torch.Tensor) -> Any:
    return block(*inputs.values())


def outer_checkpoint(block: nn.Module, **inputs: torch.Tensor) -> Any:
    if not torch.is_grad_enabled():
        return block(**inputs)
    return checkpoint(block, **inputs, use_reentrant=False)


def reentrant_checkpoint(block: nn.Module, **inputs: torch.Tensor) -> Any:
    if not torch.is_grad_enabled():
        return block(**inputs)
    return checkpoint(block, *inputs.values(), use_reentrant=True)


STYLES = {f.__name__: f for f in (with_keywords, with_positions, outer_checkpoint, reentrant_checkpoint)}


@dataclass
class Setup:
    """One case of the grid. recompute: of our own checkpoints; residents None: no swap at all."""

    style: str = "with_keywords"
    recompute: str | tuple[int, ...] | None = None
    temb_trains: bool = True
    input_trains: bool = True
    pairs: int = 2
    singles: int = 4
    quantize: Kind | None = None
    slots: int = 2
    steps: int = 3
    prefix_adapter: bool = True
    compile: bool = False
    forwards: int = 1


@dataclass
class Result:
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    counters: list[Counters]
    runs: list[int] | None

    def same_bits(self, other: Result) -> bool:
        return (
            self.losses == other.losses
            and self.gradients.keys() == other.gradients.keys()
            and all(torch.equal(g, other.gradients[n]) for n, g in self.gradients.items())
            and all(torch.equal(w, other.weights[n]) for n, w in self.weights.items())
        )


def build(setup: Setup) -> Net:
    torch.manual_seed(0)
    net = Net(setup.pairs, setup.singles, prefix_adapter=setup.prefix_adapter)
    net.time.requires_grad_(setup.temb_trains)
    net.embed.requires_grad_(setup.input_trains)
    if setup.quantize is not None:
        for block in (*net.pairs, *net.singles):
            quantize_linears(block, setup.quantize)
    net.style = STYLES[setup.style]
    if setup.compile:
        for block in (*net.pairs, *net.singles):
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    return net


def inputs(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, text, sigma = (torch.randn(2, n, WIDTH, generator=generator) for n in (5, 3, 1))
    return x, text, sigma


def train(setup: Setup, residents: int | frozenset[int] | None, backend: Backend | None = None) -> Result:
    """Three AdamW steps; gradients are those of the last."""
    net = build(setup)
    handle = checkpoint_blocks(net, LISTS, setup.recompute) if setup.recompute is not None else None
    engine = None
    if residents is not None:
        backend = backend or CpuBackend()
        engine = SwapEngine(net, LISTS, residents, backend, slots=setup.slots, smallest_bytes=0).attach()
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses, gradients, counters = [], {}, []
    for step in range(setup.steps):
        optimizer.zero_grad()
        if handle is not None:
            handle.reset_counts()
        loss = net(*inputs(step)).square().mean()
        for more in range(1, setup.forwards):
            loss = loss * net(*inputs(step + 10 * more)).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        optimizer.step()
        if engine is not None:
            counters.append(engine.step_end())
    return Result(
        losses,
        gradients,
        {n: p.detach().clone() for n, p in trained.items()},
        counters,
        handle.runs if handle is not None else None,
    )
