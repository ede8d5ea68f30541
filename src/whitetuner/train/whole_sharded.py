"""A denoiser that learns with its own weights, of which each rank holds and updates a share (memory/shard.py).

Weights, gradients, what the optimizer remembers and the running average are DTensors or cut as they are: nothing of the model
is whole on a card but the block that runs. Unlike train/whole.py the update comes after the passes, when all gradients are
there, in shares; it is the same arithmetic with the same optimizer for each block, and the checkpoint is the same, too:
rank 0 gathers it tensor by tensor into the host's memory, while the others keep nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.family import Part
from whitetuner.memory.fused import units_of
from whitetuner.memory.shard import Sharded
from whitetuner.train.block_optimizer import BESIDE, BlockOptimizer, Make, decaying
from whitetuner.train.ema import HostEma
from whitetuner.train.learner import STATE
from whitetuner.train.precision import key_of
from whitetuner.train.whole import WEIGHTS, WholeSettings, refuse_other_state, refuse_without_average

T = TypeVar("T")


class WholeSharded:
    """One of all ranks, which do everything here together.

    module: its weights are DTensors of the mesh; those with requires_grad train
    described: config.json of the denoiser (FSDP gives its class another name)
    """

    kind = "full"
    in_passes = True

    def __init__(
        self,
        part: Part,
        module: nn.Module,
        described: Mapping[str, Any],
        make: Make,
        settings: WholeSettings,
        fitted: Sharded,
        mesh: DeviceMesh,
        device: torch.device,
        ema_decay: float = 0.0,
    ) -> None:
        self.part, self.module, self.settings, self.fitted, self.mesh = part, module, settings, fitted, mesh
        self._described, self.steps, self.norm = dict(described), 0, 0.0
        self.first = mesh.get_rank() == 0
        self.whole = {name: p for name, p in module.named_parameters() if p.requires_grad}
        #: The share of each, of the same memory.
        self.trained = {name: nn.Parameter(_local(p), requires_grad=False) for name, p in self.whole.items()}
        self.units = {
            unit.name: {name: self.trained[name] for name in unit.parameters}
            for unit in units_of(module, part.block_lists, self.whole)
        }
        decays = decaying(module, self.whole)
        self.optimizers = {
            name: BlockOptimizer(own, decays, make, settings.precision, device)
            for name, own in self.units.items()
        }
        for optimizer in self.optimizers.values():
            for name, kept in optimizer.kept.items():
                optimizer.kept[name] = None if kept is None else kept.to(device)
        self.ema = HostEma(self.trained.items(), ema_decay) if ema_decay else None
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}
        self._limit = 0.0
        self._start = {name: one.detach().to("cpu", copy=True) for name, one in self._sample()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """This rank's shares."""
        return list(self.trained.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.trained.items()

    def leave(self) -> None:
        return

    def come(self) -> None:
        return

    # ---- a step

    def run(self, passes: Callable[[], T], lr: float, max_norm: float) -> T:
        """All forward and backward passes of a step; nothing is applied in them."""
        self.drop()
        return self.fitted.run(passes, self.drop)

    def pass_begins(self, last: bool) -> None:
        return

    @torch.no_grad()
    def pass_ends(self) -> None:
        """Sums over passes are of float32, as without sharding."""
        for name, parameter in self.whole.items():
            if parameter.grad is not None:
                gradient = _local(parameter.grad).float()
                self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
                parameter.grad = None

    def clipped(self, max_norm: float) -> float:
        """The norm of the step's whole gradient; how far each block is scaled down follows from it (optimizer.clip)."""
        nothing = torch.zeros((), device=self.parameters[0].device)
        of_units = []
        for own in self.units.values():
            norms = [torch.linalg.vector_norm(self._sums[name]) for name in own if name in self._sums]
            of_units.append(torch.stack(norms).square().sum() if norms else nothing)
        squares = self._summed(torch.stack(of_units))
        self._squares = dict(zip(self.units, squares, strict=True))
        self._limit = max_norm
        return math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan

    def apply(self, lr: float) -> None:
        for name, own in self.units.items():
            against = math.sqrt(self._squares[name]) if self.settings.clip == "block" else self.norm
            scale = self._limit / against if 0 < self._limit < against else 1.0
            gradients = {key: self._sums.pop(key) for key in own if key in self._sums}
            self.optimizers[name].step(gradients, lr, scale, self._key)
        self.norm = math.sqrt(sum(self._squares.values()))
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.trained.items())

    def _key(self, name: str) -> int:
        return key_of(self.settings.seed, self.steps, f"{self.part.name}.{name}@{self.mesh.get_rank()}")

    def drop(self) -> None:
        self._sums.clear()
        for parameter in self.whole.values():
            parameter.grad = None

    def _summed(self, mine: Tensor) -> list[float]:
        with self.fitted.together():
            dist.all_reduce(mine, group=self.mesh.get_group())
        return mine.tolist()

    # ---- weights as they are

    @torch.no_grad()
    def fill(self, value: Callable[[str], Tensor]) -> None:
        """Sets this rank's share of everything that trains."""
        for name, parameter in self.trained.items():
            parameter.copy_(value(name))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See WholeLearner.averaged."""
        if self.ema is None:
            yield
            return
        before = {name: one.detach().to("cpu", copy=True) for name, one in self.trained.items()}
        self.fill(self.ema.average.__getitem__)
        try:
            yield
        finally:
            self.fill(before.__getitem__)

    def weights(self) -> dict[str, Tensor]:
        """The whole denoiser in diffusers names, on the CPU of rank 0, the same as without sharding; the others get nothing."""
        found = {}
        with self.fitted.together():
            for name, tensor in self.module.state_dict().items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.first:
                    found[name] = whole.cpu()
        return found

    def described(self) -> dict[str, Any]:
        """config.json of the denoiser in diffusers layout."""
        return dict(self._described)

    def _sample(self) -> Iterator[tuple[str, Tensor]]:
        """Of the shares every so many numbers, about 1024 of each."""
        for name, one in self.trained.items():
            yield name, one.detach().reshape(-1)[:: max(1, one.numel() // 1024)].float().cpu()

    def weight_change(self) -> float:
        """Root mean square distance from where the run began, of some numbers of each tensor, weighed by its size."""
        total = count = 0.0
        for name, now in self._sample():
            if now.numel():
                size = self.trained[name].numel()
                total += float((now - self._start[name]).square().mean()) * size
                count += size
        sums = torch.tensor([total, count], device=self.parameters[0].device)
        total, count = self._summed(sums)
        return math.sqrt(total / count)

    # ---- checkpoints

    def save(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """As of WholeLearner, on rank 0; the others hand over their shares and get nothing."""
        files: dict[str, Mapping[str, Tensor]] = {f"{self.part.name}/{WEIGHTS}": self.weights()}
        tensors: dict[str, Tensor] = {}
        units: dict[str, Any] = {}
        for name, optimizer in self.optimizers.items():
            own, document = optimizer.save()
            order = self._order(optimizer)
            units[name] = {**document, "shapes": [list(self.whole[one].shape) for one in order]}
            for key, one in own.items():
                whole = self._gathered(_owner(key, order), one)
                if self.first:
                    tensors[f"{name}:{key}"] = whole.cpu()
        if tensors:
            files[f"{self._state('optimizer')}.safetensors"] = tensors
        step = {"steps": self.steps, "norm": self.norm, "precision": self.settings.precision}
        documents: dict[str, Any] = {
            f"{self._state('optimizer')}.json": {"units": units, **step},
            f"{self.part.name}/config.json": self.described(),
        }
        if self.ema is not None:
            whole_average = {name: self._gathered(name, one) for name, one in self.ema.average.items()}
            files[f"{self._state('ema')}.safetensors"] = whole_average if self.first else {}
            documents[f"{self._state('ema')}.json"] = {"updates": self.ema.updates}
        return files, documents

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> None:
        """Back to a checkpoint, of sharded training or not. Raises UserError when it does not fit this run's settings."""
        name, state = f"{self.part.name}/{WEIGHTS}", self._state("optimizer")
        saved = documents.get(f"{state}.json", {})
        refuse_other_state(name, name in tensors, saved, self.settings.precision, self.optimizers.keys())
        weights = tensors[name]
        self.fill(lambda key: self._share(key, weights[key]))
        remembered = tensors.get(f"{state}.safetensors", {})
        for unit, optimizer in self.optimizers.items():
            order, document = self._order(optimizer), dict(saved["units"][unit])
            if document["shapes"] == [list(self.whole[one].shape) for one in order]:
                document["shapes"] = [list(self.trained[one].shape) for one in order]
            lead = f"{unit}:"
            own = {
                key.removeprefix(lead): self._share(_owner(key.removeprefix(lead), order), remembered[key])
                for key in remembered
                if key.startswith(lead)
            }
            optimizer.load(own, document)
        self.steps, self.norm = int(saved["steps"]), float(saved["norm"])
        if self.ema is not None:
            average = tensors.get(f"{self._state('ema')}.safetensors")
            refuse_without_average(average)
            assert average is not None
            shares = {key: self._share(key, average[key]) for key in average if key in self.whole}
            self.ema.load(shares, int(documents[f"{self._state('ema')}.json"]["updates"]))

    def _state(self, name: str) -> str:
        return f"{STATE}/{self.part.file(name).removesuffix('.safetensors')}"

    def _order(self, optimizer: BlockOptimizer) -> list[str]:
        """Names in the order in which the optimizer numbers them."""
        names = {id(work): name for name, work in optimizer.works.items()}
        return [names[id(p)] for group in optimizer.optimizer.param_groups for p in group["params"]]

    def _gathered(self, name: str, share: Tensor) -> Tensor:
        """The whole of what is cut as a parameter is; a counter as it is."""
        if share.shape != self.trained[name].shape or not share.ndim:
            return share
        whole = self.whole[name]
        kind = share.dtype
        bits = share.view(torch.bfloat16) if kind == torch.int16 else share  # gloo sends no int16
        cut = DTensor.from_local(
            bits.to(self.trained[name].device),
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        with self.fitted.together():
            return cut.full_tensor().view(kind).to(share.device)

    def _share(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of what is cut as a parameter is."""
        if whole.shape != self.whole[name].shape or not whole.ndim:
            return whole
        cut = distribute_tensor(
            whole.to(self.trained[name].device), self.mesh, [Shard(0)], src_data_rank=None
        )
        return cut.to_local()


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def _owner(key: str, order: list[str]) -> str:
    """The parameter that something remembered is of: "3.exp_avg", "beside.NAME"."""
    lead, _, rest = key.partition(".")
    return rest if lead == BESIDE else order[int(lead)]


def refuse_mixed(module: nn.Module, block_lists: Sequence[str]) -> None:
    """Raises UserError where weights of several number formats train in a block: FSDP adds its gradients up in one."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for unit in units_of(module, block_lists, trained):
        kinds = {str(p.dtype).removeprefix("torch.") for p in unit.parameters.values()}
        if len(kinds) > 1:
            raise UserError(
                "weights of several number formats train in {unit} ({kinds}), which cannot be sharded",
                where="memory.shard",
                mend="set memory.dtype = 'fp32', name weights of one format in method.targets, or set memory.shard = false",
                code=EXIT_FAILED,
                unit=unit.name,
                kinds=", ".join(sorted(kinds)),
            )
