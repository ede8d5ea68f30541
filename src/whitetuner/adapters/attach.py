"""Adapters on a model: put on, saved, switched off, taken off, merged.

`attach` puts an Attached module in the place of each chosen layer. Module paths stay what they were; in the
state dict the layer's own tensors move from `<path>.weight` to `<path>.base.weight` (`base_state_dict` gives
the old names back) and the delta's are `<path>.delta.<name>`. The base needs nothing but `base(x)`, so it may
be quantised, swapped or both. An Adapter speaks of its tensors by diffusers path: `<path>.lokr_w1`,
`<path>.lora_A.weight`, as in its files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from whitetuner.adapters.choose import choose, is_linear, linear_at
from whitetuner.adapters.deltas import Attached, Delta, delta_from, initial_delta
from whitetuner.adapters.files import load_adapter
from whitetuner.adapters.names import Names
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.adapters.state import (
    BEHIND_RANK,
    SCALE_CARRIERS,
    by_module,
    describe,
    file_suffix,
    infer_settings,
    rank_of,
)
from whitetuner.errors import UserError

__all__ = [
    "Adapter",
    "AdapterSettings",
    "attach",
    "attach_state",
    "base_state_dict",
    "choose",
    "layer_sizes",
    "merged",
]

MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Adapter:
    """The deltas attached to one model, in the model's order.

    deltas: module path -> Delta, whose parameters are float32 and what is trained
    """

    def __init__(
        self, module: nn.Module, settings: AdapterSettings, attached: Mapping[str, Attached]
    ) -> None:
        self.settings, self._module, self._attached = settings, module, dict(attached)
        self.deltas = {path: layer.delta for path, layer in attached.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as in `state_dict`, always in the same order."""
        for path, delta in self.deltas.items():
            for name, parameter in delta.named_parameters():
                yield f"{path}.{file_suffix(name)}", parameter

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def by_speed(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(the others, the factors that LoRA+ lets learn faster), both in the order of `parameters`."""
        found: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for delta in self.deltas.values():
            for name, parameter in delta.named_parameters():
                found[name in BEHIND_RANK].append(parameter)
        return found

    def to(self, device: torch.device | str) -> Adapter:
        """Moves the deltas only; the base stays where the memory engine put it."""
        for delta in self.deltas.values():
            delta.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The float32 masters by diffusers name (memory shared); a scale other than 1 is told by
        `<path>.alpha`."""
        state = {name: parameter.detach() for name, parameter in self.named_parameters()}
        for path, delta in self.deltas.items():
            if delta.scale != 1.0:
                state[f"{path}.alpha"] = torch.tensor(
                    delta.scale * rank_of(delta.tensors()), dtype=torch.float32
                )
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes a state dict of an adapter of the same shape, to the bit.

        Raises UserError when names, shapes or the scale differ; nothing is changed then.
        """
        own = self.state_dict()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise UserError(
                "the saved adapter fits other layers: {missing} tensors are missing ({first_missing}), "
                "{extra} are too many ({first_extra})",
                mend="use the same method.targets, kind and shape as the run that saved it",
                missing=len(missing),
                first_missing=missing[0] if missing else "-",
                extra=len(extra),
                first_extra=extra[0] if extra else "-",
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    "the saved tensor {name} has the shape {saved}, this adapter's has {own}",
                    mend="use the same method.rank, factor and full_matrix as the run that saved it",
                    name=name,
                    saved=tuple(state[name].shape),
                    own=tuple(tensor.shape),
                )
            if name.endswith(".alpha") and not torch.equal(tensor, state[name].to(tensor)):
                raise UserError(
                    "the saved adapter was trained with alpha {saved}, this one has {own}",
                    where="method.alpha",
                    mend="use the same alpha",
                    saved=float(state[name]),
                    own=float(tensor),
                )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(state[name])

    def load_file(self, path: Path, keymap: Names) -> None:
        """Starts from an adapter file of any known naming. Raises UserError as `load_adapter` and
        `start_from`."""
        self.start_from(load_adapter(path, keymap)[1])

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Takes the values of another adapter's state dict; its scale is folded in where it is another.

        Raises UserError, changing nothing, unless it has the same modules and shapes.
        """
        modules = by_module(state)
        missing, extra = self.deltas.keys() - modules.keys(), modules.keys() - self.deltas.keys()
        if missing or extra:
            raise UserError(
                "the adapter to start from changes other layers: it lacks {missing} of {total} "
                "({first_missing}) and has {extra} more ({first_extra})",
                where="method.init_from",
                mend="set method.targets to the layers it was trained on",
                missing=len(missing),
                total=len(self.deltas),
                first_missing=min(missing, default="-"),
                extra=len(extra),
                first_extra=min(extra, default="-"),
            )
        for path, delta in self.deltas.items():
            theirs = {name: tuple(tensor.shape) for name, tensor in modules[path].tensors.items()}
            ours = {name: tuple(tensor.shape) for name, tensor in delta.tensors().items()}
            if theirs != ours:
                raise UserError(
                    "the adapter to start from has another shape: {path} is {theirs} in the file, {ours} "
                    "here",
                    where="method.init_from",
                    mend="set [method] as the file has it: {settings}",
                    path=path,
                    theirs=", ".join(f"{name} {shape}" for name, shape in theirs.items()),
                    ours=", ".join(f"{name} {shape}" for name, shape in ours.items()),
                    settings=describe(infer_settings(modules)),
                )
        with torch.no_grad():
            for path, delta in self.deltas.items():
                ratio = modules[path].scale / delta.scale
                for name, parameter in delta.named_parameters():
                    value = modules[path].tensors[name].to(parameter.device, torch.float32)
                    parameter.copy_(value * ratio if name in SCALE_CARRIERS and ratio != 1.0 else value)

    def enable(self, on: bool = True) -> None:
        """Off: the model computes exactly what it did without an adapter."""
        for layer in self._attached.values():
            layer.enabled = on

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone inside, whatever was set before after it."""
        before = {path: layer.enabled for path, layer in self._attached.items()}
        self.enable(False)
        try:
            yield
        finally:
            for path, on in before.items():
                self._attached[path].enabled = on

    @property
    def strength(self) -> float:
        """A factor on top of what was trained, 1 unless set; for trying an adapter out, never saved."""
        return next(iter(self.deltas.values())).strength

    @strength.setter
    def strength(self, strength: float) -> None:
        for delta in self.deltas.values():
            delta.strength = float(strength)

    def detach(self) -> None:
        """Puts the plain layers back in their places; the deltas live on in this object."""
        for path, layer in self._attached.items():
            assert self._module.get_submodule(path) is layer, (
                f"{path} was replaced after the adapter was attached"
            )
            _put(self._module, path, layer.base)

    def merge_into(self, module: nn.Module) -> None:
        """Adds every delta to the plain layer of the same path, in float32, rounded once to the layer's
        dtype.

        Raises UserError for a quantised layer, whose weight has no room for a delta.
        """
        layers = {path: linear_at(module, path) for path in self.deltas}
        for path, layer in layers.items():
            assert not isinstance(layer, Attached), "merging under an attached delta would count it twice"
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor) or weight.dtype not in MERGEABLE or weight.ndim != 2:
                raise UserError(
                    "{path} is quantised, so an adapter cannot be merged into it",
                    mend='load the model with memory.base = "bf16" for merging',
                    path=path,
                )
        with torch.no_grad():
            for path, layer in layers.items():
                layer.weight.copy_(merged(layer.weight, self.deltas[path].weight()))


def merged(weight: Tensor, delta: Tensor) -> Tensor:
    """weight + delta, summed in float32 or better and rounded once to the weight's dtype. Both (out, in)."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(precise) + delta.to(weight.device, precise)).to(weight.dtype)


def attach(
    module: nn.Module,
    paths: Sequence[str],
    settings: AdapterSettings,
    seed: int,
    device: torch.device | str | None = None,
) -> Adapter:
    """Puts fresh deltas, zero in effect, on these layers and freezes the layers.

    paths:  as `choose` gives them
    seed:   with the path it decides the start of each delta, whatever else is attached and in whatever order
    device: of the deltas; None: where the layer's own tensors are (CPU for a layer on "meta")
    """
    deltas = {}
    for path in paths:
        layer = linear_at(module, path)
        digest = hashlib.blake2b(f"{seed}|{path}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        deltas[path] = initial_delta(settings, layer.out_features, layer.in_features, generator)
    return _wrap(module, settings, deltas, device)


def attach_state(
    module: nn.Module,
    settings: AdapterSettings,
    state: Mapping[str, Tensor],
    device: torch.device | str | None = None,
    *,
    where: str = "",
) -> Adapter:
    """Puts an adapter as `load_adapter` gives it on a model, in whatever shapes it has: for drawing and
    merging.

    where: the adapter's file, for messages
    Raises UserError when the model lacks a layer of it or has it in another size.
    """
    layers = dict(module.named_modules())
    deltas = {}
    for path, given in by_module(state).items():
        if path not in layers or not is_linear(layers[path]):
            raise UserError(
                "the adapter changes {path}, which this model does not have",
                where=where,
                mend="use it with the model (and size) it was made for",
                path=path,
            )
        layer = linear_at(module, path)
        if given.size != (layer.out_features, layer.in_features):
            raise UserError(
                "the adapter is for a layer {path} of {theirs}, this model's is {ours}: another model size",
                where=where,
                mend="use it with the model (and size) it was made for",
                path=path,
                theirs="{}x{}".format(*given.size),
                ours=f"{layer.out_features}x{layer.in_features}",
            )
        deltas[path] = delta_from(given.tensors, given.scale)
    return _wrap(module, settings, deltas, device)


def layer_sizes(module: nn.Module, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """path -> (out, in), for `count_parameters` and `reading_limits`; works on the meta device."""
    layers = {path: linear_at(module, path) for path in paths}
    return {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}


def base_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as it was before attaching: old names, no deltas (memory shared)."""
    attached = [path for path, part in module.named_modules() if isinstance(part, Attached)]
    state = dict(module.state_dict())
    for path in attached:
        for name in [name for name in state if name.startswith(f"{path}.delta.")]:
            del state[name]
    prefixes = tuple(f"{path}.base." for path in attached)
    return {_without_base(name, prefixes): tensor for name, tensor in state.items()}


def _without_base(name: str, prefixes: tuple[str, ...]) -> str:
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if prefix is None else prefix.removesuffix("base.") + name.removeprefix(prefix)


def _wrap(
    module: nn.Module,
    settings: AdapterSettings,
    deltas: Mapping[str, Delta],
    device: torch.device | str | None,
) -> Adapter:
    attached = {}
    for path, delta in deltas.items():
        layer = module.get_submodule(path)
        assert not isinstance(layer, Attached), f"{path} carries an adapter already"
        layer.requires_grad_(False)
        if device is None:
            tensor = next((t for t in [*layer.parameters(), *layer.buffers()] if not t.is_meta), None)
            delta.to("cpu" if tensor is None else tensor.device)
        else:
            delta.to(device)
        attached[path] = Attached(layer, delta).train(layer.training)
        _put(module, path, attached[path])
    return Adapter(module, settings, attached)


def _put(module: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, part)  # registers in place: the order of the children stays
