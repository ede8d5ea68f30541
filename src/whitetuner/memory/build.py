"""Makes a module from a component folder without ever holding it twice: skeleton first, then tensor by
tensor.

The skeleton has its parameters on the meta device and its computed buffers (rotary tables, masks) for real.
Each tensor of the safetensors files is then cast, quantised where asked, placed, and only then is the next
one read: neither host nor device holds the bf16 model whole when a quantised one is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whitetuner.errors import UserError
from whitetuner.memory.quantize import Kind, QuantLinear, quantize_linears, quantize_weight
from whitetuner.memory.relaid import Relaid, open_weights
from whitetuner.memory.skeleton import empty_module, float32_names, recast_of
from whitetuner.memory.weights import FP8_EXTRAS, SCALE_NAMES, TensorFiles, first_five


@dataclass(frozen=True)
class Build:
    """A BuildFn (whitetuner.family) with the memory choices of a run: `build(cls, folder, keep_precise=...)`.

    dtype:        of every floating tensor that is not quantised (see build_module for the exceptions)
    device:       where tensors end up;  host: fnmatch patterns of tensor names that end up on the CPU instead
    quantize:     None, "int8", "fp8" or "nf4"
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    quantize: Kind | None = None
    host: Sequence[str] = field(default=())
    freeze: bool = True
    host_absent: bool = False

    def __call__(self, cls: type, folder: Path, *, keep_precise: Sequence[str] = ()) -> Any:
        return build_module(
            cls,
            folder,
            keep_precise=keep_precise,
            dtype=self.dtype,
            device=self.device,
            quantize=self.quantize,
            host=self.host,
            freeze=self.freeze,
            host_absent=self.host_absent,
        )


def build_module(
    cls: type,
    folder: Path,
    *,
    keep_precise: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Kind | None = None,
    host: Sequence[str] = (),
    freeze: bool = True,
    host_absent: bool = False,
    overrides: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    config: Path | None = None,
) -> Any:
    """A diffusers ModelMixin or transformers PreTrainedModel from its folder, in eval mode.

    folder:       config.json and *.safetensors (sharded or not), or one safetensors file when `config` is
                  given
    keep_precise: fnmatch patterns of parameter names whose linear is never quantised
    dtype:        of floating tensors; what the class keeps in float32 (`_keep_in_fp32_modules`) stays float32
    host:         fnmatch patterns of names that end up on the CPU though `device` is another (blocks to be
                  swapped)
    freeze:       requires_grad False everywhere (else True for floating parameters)
    host_absent:  what matches `host` is not read: memory that nobody touches stands for it until it is bound to another
                  process' copy (swap/arena.py)
    overrides:    values that replace those of config.json;  ignore: patterns of tensors in the file to leave
                  out
    config:       folder of config.json when it is not `folder`
    A class's `recast` (whitetuner.family) is followed: other names, several from one tensor, additions.
    Else it equals `cls.from_pretrained(folder, torch_dtype=dtype)` in every tensor when nothing is quantised.
    Raises UserError naming the file and the tensors when they are missing, unexpected, of the wrong shape or
    damaged.
    """
    module = empty_module(cls, config or folder, overrides)
    device = torch.device(device)
    with open_weights(folder) as source:
        scales = _scales(source)
        pairs = _target_names(
            module, [n for n in source if not _matches(n, FP8_EXTRAS) and n not in scales.values()]
        )
        pairs = _checked(module, source, pairs, ignore, folder)
        additions = recast_of(cls).additions
        precise = float32_names(module, dtype)
        if quantize is not None:
            kept = frozenset(
                n for n, _ in module.named_parameters() if _matches(n, keep_precise) or n in precise
            )
            module.requires_grad_(False)
            quantize_linears(module, quantize, kept)
        holders = _holders(module)
        first_value: dict[int, torch.Tensor] = {}
        for source_name, name in pairs:
            if host_absent and _matches(name, host):
                continue
            tensor = source[source_name]
            home = torch.device("cpu") if _matches(name, host) else device
            scale = source[scales[source_name]] if source_name in scales else None
            if name in additions:
                tensor = (tensor.float() if scale is None else _dequantized(tensor, scale)) + additions[
                    name
                ]()
                scale = None
            owner = module.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, QuantLinear) and name.endswith(".weight"):
                _fill_quantized(owner, tensor, scale, device, home, name, folder)
                continue
            if scale is not None:
                tensor = _dequantized(tensor, scale)
            wanted = tensor.dtype
            if tensor.is_floating_point():
                wanted = torch.float32 if name in precise else dtype
            _assign(holders, first_value, owner, name, _own(tensor, wanted, home))
    if host_absent:
        _stand_in(module, holders, precise, dtype)
    for child in module.modules():
        for key, buffer in child._buffers.items():
            if buffer is not None and buffer.device != device and key in child._non_persistent_buffers_set:
                child._buffers[key] = buffer.to(device)
    left = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not left, f"not filled: {left[:5]}"
    for parameter in module.parameters():
        parameter.requires_grad_(not freeze and parameter.is_floating_point() and quantize is None)
    return module.eval()


def rehearse_module(cls: type, folder: Path, *, keep_precise: Sequence[str] = ()) -> Any:
    """A BuildFn that reads no weight: the skeleton, held against the headers of its files."""
    module = empty_module(cls, folder)
    with open_weights(folder) as source:
        beside = {*_scales(source).values(), *(name for name in source if _matches(name, FP8_EXTRAS))}
        _checked(module, source, _target_names(module, [n for n in source if n not in beside]), (), folder)
    return module


def _target_names(module: nn.Module, source_names: list[str]) -> list[tuple[str, str]]:
    """(name in the files, name in the module); a name of a file comes twice when two tensors are made of it.

    transformers renames keys of older checkpoints; so do its own loaders.
    """
    if not hasattr(module, "base_model_prefix"):
        targets = recast_of(type(module)).targets
        return [(name, target) for name in source_names for target in targets(name)]
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(module)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    others = [c for c in conversions if not isinstance(c, WeightRenaming)]
    known = module.state_dict()
    result = []
    for name in source_names:
        renamed, converted = rename_source_key(name, renamings, others, module.base_model_prefix, known)
        if converted is not None:
            raise UserError(
                "{cls} stores tensor {name} in an older layout that is not read here",
                mend="load it once with transformers' from_pretrained and save it with save_pretrained",
                cls=type(module).__name__,
                name=name,
            )
        result.append((name, renamed))
    return result


def _checked(
    module: nn.Module,
    source: TensorFiles | Relaid,
    pairs: list[tuple[str, str]],
    ignore: Sequence[str],
    folder: Path,
) -> list[tuple[str, str]]:
    """The pairs without the ignorable; raises UserError on what is unexpected, missing or of the wrong
    shape.
    """
    wanted = module.state_dict(keep_vars=True)
    cls = type(module).__name__
    pairs = [
        (name, target)
        for name, target in pairs
        if target in wanted or not (_matches(name, ignore) or _belongs_elsewhere(module, target, wanted))
    ]
    unexpected = [name for name, target in pairs if target not in wanted]
    given = {id(wanted[target]) for _, target in pairs if target in wanted}
    missing = [name for name, tensor in wanted.items() if id(tensor) not in given]
    if missing:
        raise UserError(
            "{count} of the {total} tensors of {cls} are not in the files: {names}",
            where=str(folder),
            mend="download the whole folder again; if its config.json is of another model, that is the cause",
            count=len(missing),
            total=len(wanted),
            cls=cls,
            names=first_five(missing),
        )
    if unexpected:
        raise UserError(
            "the files hold {count} tensors that {cls} with this config.json does not have: {names}",
            where=str(folder),
            mend="the weights belong to another model or size than config.json; download both from one place",
            count=len(unexpected),
            cls=cls,
            names=first_five(unexpected),
        )
    wrong = [(s, n) for s, n in pairs if source.entries[s].shape != wanted[n].shape]
    if wrong:
        name, target = wrong[0]
        raise UserError(
            "tensor {name} has shape {found}, but config.json asks for {wanted} ({count} tensors differ)",
            where=str(source.entries[name].file),
            mend="the weights are of another size of this model than config.json; take both from one place",
            name=name,
            found=list(source.entries[name].shape),
            wanted=list(wanted[target].shape),
            count=len(wrong),
        )
    return pairs


def _belongs_elsewhere(module: nn.Module, name: str, wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor is part of a larger transformers checkpoint that this class leaves out (lm_head,
    decoder).
    """
    if not hasattr(module, "base_model_prefix"):
        return False
    patterns = set(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    if any(re.search(pattern, name) for pattern in patterns):
        return True
    first = name.split(".")[0]
    return not any(other.split(".")[0] == first for other in wanted)


def _holders(module: nn.Module) -> dict[str, list[tuple[nn.Module, str, bool]]]:
    """Name -> every (module, attribute, is a parameter) that holds this tensor; tied tensors have several."""
    by_tensor: dict[int, list[tuple[nn.Module, str, bool]]] = {}
    names: dict[str, int] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for table, is_parameter in ((child._parameters, True), (child._buffers, False)):
            for attribute, tensor in table.items():
                if tensor is None:
                    continue
                names[prefix + attribute] = id(tensor)
                holders = by_tensor.setdefault(id(tensor), [])
                if (child, attribute, is_parameter) not in holders:
                    holders.append((child, attribute, is_parameter))
    return {name: by_tensor[key] for name, key in names.items()}


def _assign(
    holders: dict[str, list[tuple[nn.Module, str, bool]]],
    first_value: dict[int, torch.Tensor],
    owner: nn.Module,
    name: str,
    tensor: torch.Tensor,
) -> None:
    """Puts the tensor into all its holders; a second, different value under another name of a tie unties
    it.
    """
    places = holders[name]
    before = first_value.setdefault(id(places), tensor)
    if before is not tensor:
        if torch.equal(before, tensor):
            return
        places = [place for place in places if place[0] is owner and place[1] == name.rpartition(".")[2]]
    parameter = nn.Parameter(tensor, requires_grad=False) if places[0][2] else None
    for child, attribute, is_parameter in places:
        if is_parameter:
            child._parameters[attribute] = parameter
        else:
            child._buffers[attribute] = tensor


def _stand_in(
    module: nn.Module,
    holders: dict[str, list[tuple[nn.Module, str, bool]]],
    precise: Collection[str],
    dtype: torch.dtype,
) -> None:
    """Tensors of the right size, whose memory is never touched, for all that was not read."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            layer = module.get_submodule(name.rpartition(".")[0])
            wanted = tensor.dtype
            if wanted.is_floating_point and not isinstance(layer, QuantLinear):
                wanted = torch.float32 if name in precise else dtype
            absent = torch.empty(tensor.shape, dtype=wanted)
            for child, attribute, is_parameter in holders[name]:
                if is_parameter:
                    child._parameters[attribute] = nn.Parameter(absent, requires_grad=False)
                else:
                    child._buffers[attribute] = absent


def _fill_quantized(
    layer: QuantLinear,
    tensor: torch.Tensor,
    scale: torch.Tensor | None,
    device: torch.device,
    home: torch.device,
    name: str,
    folder: Path,
) -> None:
    ready = tensor.dtype == torch.float8_e4m3fn and layer.kind == "fp8"
    if ready and (scale is None or scale.numel() in (1, tensor.shape[0])):
        codes = tensor.view(torch.int8).to(home, copy=True)
        rows = torch.ones(1) if scale is None else scale.float().flatten()
        row_scale = rows.expand(tensor.shape[0]).to(home, copy=True).contiguous()
    else:
        if scale is not None:
            tensor = _dequantized(tensor, scale)
        try:
            codes, row_scale = quantize_weight(tensor.to(device), layer.kind)
        except ValueError as error:
            raise UserError(
                "tensor {name} cannot be quantised: {error}",
                where=str(folder),
                mend="the file is damaged; download it again",
                name=name,
                error=error,
            ) from error
        codes, row_scale = codes.to(home), row_scale.to(home)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.scale = nn.Parameter(row_scale, requires_grad=False)


def _scales(source: TensorFiles | Relaid) -> dict[str, str]:
    """`X.weight` -> name of its scale, for fp8 weights that have one."""
    found = {}
    for name, entry in source.entries.items():
        if entry.dtype == torch.float8_e4m3fn and name.endswith(".weight"):
            stem = name.removesuffix("weight")
            for scale in SCALE_NAMES:
                if stem + scale in source:
                    found[name] = stem + scale
    return found


def _dequantized(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    factor = scale.float()
    if factor.ndim == 1 and factor.numel() == tensor.shape[0]:
        factor = factor[:, None]
    return tensor.float() * factor


def _own(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A copy that does not lie in the mapped file."""
    return tensor.to(device=device, dtype=dtype, copy=True).contiguous()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
