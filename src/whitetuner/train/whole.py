"""A denoiser that learns with its own weights: blocks are updated as their backward ends (memory/fused.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.family import Part
from whitetuner.memory.fit import Fitted
from whitetuner.memory.fused import BlockUpdates, Unit
from whitetuner.memory.luggage import Luggage
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.state import StateRing, bring
from whitetuner.train.block_optimizer import BlockOptimizer, Make, decaying
from whitetuner.train.ema import HostEma
from whitetuner.train.guard import NotFinite
from whitetuner.train.learner import STATE
from whitetuner.train.precision import Precision, key_of

#: File of a denoiser's weights in diffusers layout.
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Numbers of each tensor that `weight_change` looks at.
_SAMPLED = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class WholeSettings:
    """seed: of the run;  clip: what max_grad_norm is held against;  at_once: see BlockOptimizer"""

    seed: int
    precision: Precision
    clip: Literal["previous", "block"] = "previous"
    at_once: bool = False


class WholeLearner:
    """A denoiser whose weights train, with one optimizer for each block and (optionally) their running average.

    trained: name -> parameter, those that train; all others are frozen
    turns_on: the device that it shares with others in turns; None: it stays where it is
    share:   see BlockUpdates: averages gradients between ranks, block by block
    """

    kind = "full"
    in_passes = True

    def __init__(
        self,
        part: Part,
        module: nn.Module,
        trained: Mapping[str, nn.Parameter],
        make: Make,
        settings: WholeSettings,
        fitted: Fitted,
        device: torch.device,
        ema_decay: float = 0.0,
        turns_on: torch.device | None = None,
        share: Callable[[str, dict[str, Tensor]], None] | None = None,
    ) -> None:
        self.part, self.module, self.trained, self.fitted = part, module, dict(trained), fitted
        self.settings, self.device, self.steps, self.norm = settings, device, 0, 0.0
        self.updates = BlockUpdates(
            module, part.block_lists, trained, self._update, lambda: self.engine, share
        )
        decays = decaying(module, trained)
        self.optimizers = {
            unit.name: BlockOptimizer(
                unit.parameters,
                decays,
                make,
                settings.precision,
                device,
                at_once=settings.at_once,
            )
            for unit in self.updates.units
        }
        self.states = StateRing()
        self.luggage = None if turns_on is None else Luggage(self._tensors, turns_on)
        for unit in self.updates.units:
            if not self.states.waits(fitted.engine, unit.index):
                bring(self.optimizers[unit.name].tensors(), device)
        self.ema = HostEma(self.values(), ema_decay) if ema_decay else None
        self._lr, self._limit, self._squares = 0.0, 0.0, 0.0
        self._places = {name: self._sampled(p) for name, p in trained.items()}
        self._start = self._sample()

    @property
    def engine(self) -> SwapEngine | None:
        """Of the blocks; it may come later, when memory runs out."""
        engine = self.fitted.engine
        if engine is not None:
            engine.after_backward = self.updates.block_ends
        return engine

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains. Their gradients never are there all at once."""
        return list(self.trained.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.trained.items()

    def leave(self) -> None:
        """For another's turn: nothing of it stays on the device."""
        self.states.release(self.engine)
        self.fitted.make_way()
        if self.luggage is not None:
            self.luggage.pack()

    def come(self) -> None:
        """Its turn begins; blocks come with the first forward."""
        if self.luggage is not None:
            self.luggage.unpack()

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()
        for optimizer in self.optimizers.values():
            yield from optimizer.tensors()

    # ---- a step

    def run(self, passes: Callable[[], T], lr: float, max_norm: float) -> T:
        """All forward and backward passes of a step, in the last of which the weights are updated.

        max_norm: gradients are scaled down by what the settings' clip says; 0: never
        When memory runs out before anything was updated, again with fewer blocks on the device. Raises NotFinite, and
        UserError when memory runs out later.
        """
        self._lr, self._limit = lr, max_norm

        def whole() -> T:
            assert self.engine is None or self.engine.after_backward is not None
            self.updates.begin_step()
            self._squares = 0.0
            return passes()

        done = self.fitted.run(whole, self._forget)
        self.fitted.step_end()
        return done

    def _forget(self) -> None:
        if self.updates.applied:
            raise UserError(
                "memory ran out in the middle of an update: some blocks hold this step already, others do not",
                where="memory",
                mend="go on from the last checkpoint with --resume latest and a lower memory.vram_gb, data.resolution or "
                "batch_size",
                code=EXIT_FAILED,
            )
        self.updates.begin_step()

    def pass_begins(self, last: bool) -> None:
        self.updates.begin_pass(last)

    def pass_ends(self) -> None:
        self.updates.end_pass()

    def clipped(self, max_norm: float) -> float:
        """The norm of the step's whole gradient, which was used already."""
        return math.sqrt(self._squares)

    def apply(self, lr: float) -> None:
        """The end of a step: all was applied in the passes."""
        self.norm = math.sqrt(self._squares)
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.values())

    def drop(self) -> None:
        """Forgets gradients that are not to be applied."""
        self.updates.begin_step()

    def _update(self, unit: Unit, gradients: dict[str, Tensor]) -> None:
        norms = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in gradients.values()]
        square = float(torch.stack(norms).square().sum())
        if not math.isfinite(square):
            raise self._not_finite(unit, gradients)
        self._squares += square
        against = math.sqrt(square) if self.settings.clip == "block" else self.norm
        scale = self._limit / against if 0 < self._limit < against else 1.0
        optimizer, step = self.optimizers[unit.name], self.steps
        with self.states.present(self.engine, unit.index, optimizer.tensors):
            optimizer.step(
                gradients,
                self._lr,
                scale,
                lambda name: key_of(self.settings.seed, step, f"{self.part.name}.{name}"),
            )

    def _not_finite(self, unit: Unit, gradients: Mapping[str, Tensor]) -> NotFinite:
        bad = next((name for name, one in gradients.items() if not torch.isfinite(one).all()), unit.name)
        return NotFinite(
            "the gradient of {name} is not finite in step {step}, after the blocks behind it were updated",
            where="training",
            mend="go on from the last checkpoint with --resume latest; lower optimizer.lr, or set memory.dtype = 'fp32' "
            "in a new run",
            code=EXIT_FAILED,
            name=bad,
            step=self.steps + 1,
        )

    # ---- weights as they are

    @torch.no_grad()
    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Names and present values of what trains, wherever they are (memory shared): host masters of swapped blocks."""
        engine = self.fitted.engine
        if engine is not None:
            engine.flush()
        homes = {} if engine is None else engine.homes()
        for name, parameter in self.trained.items():
            yield name, homes.get(id(parameter), parameter.data)

    @torch.no_grad()
    def fill(self, value: Callable[[str], Tensor]) -> None:
        """Sets everything that trains."""
        self.fitted.make_room()  # each tensor lies in its master now
        for name, parameter in self.trained.items():
            parameter.data.copy_(value(name))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds its running average (if there is one): what previews, validation and files show."""
        if self.ema is None:
            yield
            return
        before = {name: one.to("cpu", copy=True) for name, one in self.values()}
        self.fill(self.ema.average.__getitem__)
        try:
            yield
        finally:
            self.fill(before.__getitem__)

    def weights(self) -> dict[str, Tensor]:
        """The whole denoiser in diffusers names, as its class keeps them (memory shared)."""
        if self.fitted.engine is not None:
            self.fitted.engine.flush()
        return self.module.state_dict()

    def _sampled(self, parameter: nn.Parameter) -> Tensor:
        count = parameter.numel()
        generator = torch.Generator().manual_seed(count)
        return torch.randint(count, (min(count, _SAMPLED),), generator=generator)

    def _sample(self) -> dict[str, Tensor]:
        engine = self.fitted.engine
        if engine is not None:
            engine.backend.drain()  # residents are looked at where they are: their masters may be older
        homes = {} if engine is None else engine.homes(away=True)
        each = ((name, homes.get(id(p), p.data)) for name, p in self.trained.items())
        return {name: one.reshape(-1)[self._places[name].to(one.device)].float().cpu() for name, one in each}

    def weight_change(self) -> float:
        """Root mean square distance from where the run began, of up to 1024 numbers of each tensor weighed by its size."""
        total = count = 0.0
        for name, now in self._sample().items():
            size = self.trained[name].numel()
            total += float((now - self._start[name]).square().mean()) * size
            count += size
        return math.sqrt(total / count)

    # ---- checkpoints

    def save(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """(tensors by file, documents by file) of a checkpoint; memory is shared, so write them before going on."""
        self.states.release(self.engine)
        tensors: dict[str, Tensor] = {}
        documents: dict[str, Any] = {}
        for name, optimizer in self.optimizers.items():
            own, documents[name] = optimizer.save()
            tensors.update({f"{name}:{key}": one for key, one in own.items()})
        files: dict[str, Mapping[str, Tensor]] = {f"{self.part.name}/{WEIGHTS}": self.weights()}
        if tensors:
            files[f"{self._state('optimizer')}.safetensors"] = tensors
        step = {"steps": self.steps, "norm": self.norm, "precision": self.settings.precision}
        found: dict[str, Any] = {
            f"{self._state('optimizer')}.json": {"units": documents, **step},
            f"{self.part.name}/config.json": self.described(),
        }
        if self.ema is not None:
            files[f"{self._state('ema')}.safetensors"] = self.ema.average
            found[f"{self._state('ema')}.json"] = {"updates": self.ema.updates}
        return files, found

    def described(self) -> dict[str, Any]:
        """config.json of the denoiser in diffusers layout; says nothing of where it was read from."""
        return described(self.module)

    def _state(self, name: str) -> str:
        return f"{STATE}/{self.part.file(name).removesuffix('.safetensors')}"

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> None:
        """Back to a checkpoint, to the bit. Raises UserError when it does not fit this run's settings."""
        name = f"{self.part.name}/{WEIGHTS}"
        saved = documents.get(f"{self._state('optimizer')}.json", {})
        refuse_other_state(name, name in tensors, saved, self.settings.precision, self.optimizers.keys())
        weights = tensors[name]
        self.fill(weights.__getitem__)
        state = tensors.get(f"{self._state('optimizer')}.safetensors", {})
        self.states.forget(self.fitted.engine)
        for unit in self.updates.units:
            optimizer = self.optimizers[unit.name]
            optimizer.load(_Under(state, f"{unit.name}:"), saved["units"][unit.name])
            self.states.adopt(self.fitted.engine, unit.index, optimizer.tensors())
        self.steps, self.norm = int(saved["steps"]), float(saved["norm"])
        if self.ema is not None:
            ema = tensors.get(f"{self._state('ema')}.safetensors")
            refuse_without_average(ema)
            assert ema is not None
            self.ema.load(ema, int(documents[f"{self._state('ema')}.json"]["updates"]))


def described(module: nn.Module) -> dict[str, Any]:
    """config.json of a denoiser in diffusers layout; says nothing of where it was read from."""
    found: dict[str, Any] = json.loads(module.to_json_string())  # type: ignore[operator]
    return {key: value for key, value in found.items() if key != "_name_or_path"}


def refuse_other_state(
    name: str, there: bool, saved: Mapping[str, Any], precision: str, units: Collection[str]
) -> None:
    """Raises UserError when a checkpoint is not of this kind of full training. saved: of its optimizer; name: of its weights."""
    if not there or "units" not in saved:
        raise UserError(
            "the checkpoint holds no {name}",
            where="--resume",
            mend="resume with the method.kind the run began with",
            code=EXIT_FAILED,
            name=name,
        )
    if saved["precision"] != precision or saved["units"].keys() != set(units):
        raise UserError(
            "the saved state is of a run with other method.precision or method.targets ({saved}; now {own})",
            where="--resume",
            mend="resume with the method the run began with",
            code=EXIT_FAILED,
            saved=saved["precision"],
            own=precision,
        )


def refuse_without_average(average: Mapping[str, Tensor] | None) -> None:
    """Raises UserError when a checkpoint lacks the running average that the config asks for."""
    if average is None:
        raise UserError(
            "the checkpoint holds no running average, but optimizer.ema is set now",
            where="optimizer.ema",
            mend="set optimizer.ema = 0 as when the run began, or start a new run",
        )


class _Under(Mapping[str, Tensor]):
    """The tensors whose names begin so, by the rest of their names; each is read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], lead: str) -> None:
        self._tensors, self._lead = tensors, lead

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._lead + name]

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self._lead) for n in self._tensors if n.startswith(self._lead))

    def __len__(self) -> int:
        return sum(1 for _ in self)
