"""KeyMap of models whose modules have one name in every layout: nothing is renamed or fused, only what stands before differs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.family import Naming

_PREFIXES = ("diffusion_model.", "transformer.", "")


class PlainKeys:
    """Adapters know linear layers only; full states know every tensor.

    linears: path of each linear layer, # for the number of its block in `transformer_blocks`
    tensors: names of all tensors of a full state, written the same way
    comfyui: what stands before a path in files for ComfyUI; "lycoris_": with underscores for dots
    foreign: name -> why it is none of this model's
    left_out: tensors of a full file that are marks for other programs
    """

    def __init__(
        self,
        linears: Sequence[str],
        tensors: Collection[str],
        *,
        comfyui: str,
        foreign: Callable[[str], UserError],
        left_out: Collection[str] = (),
    ) -> None:
        self.linears, self.tensors = frozenset(linears), frozenset(tensors)
        self.comfyui, self.foreign, self.left_out = comfyui, foreign, frozenset(left_out)
        self._flat = {path.replace(".", "_"): path for path in linears}

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        """diffusers: transformer.X; lycoris: lycoris_X with underscores; comfyui: as told."""
        lead = {"diffusers": "transformer.", "lycoris": "lycoris_", "comfyui": self.comfyui}[naming]
        return lead + (module_path.replace(".", "_") if lead == "lycoris_" else module_path)

    def module_path(self, prefix: str) -> str | None:
        """Also of bare paths and of lora_unet_ names with underscores."""
        for lead in ("lycoris_", "lora_unet_"):
            if prefix.startswith(lead):
                flat, number = _general(prefix.removeprefix(lead), "_")
                return self._flat[flat].replace("#", number) if flat in self._flat else None
        for lead in _PREFIXES:
            if prefix.startswith(lead):
                general, _ = _general(prefix.removeprefix(lead), ".")
                if general in self.linears:
                    return prefix.removeprefix(lead)
        return None

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same names. Raises UserError for one that is not this model's."""
        for name in state:
            if _general(name, ".")[0] not in self.tensors:
                raise self.foreign(name)
        return dict(state)

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_original`; `diffusion_model.` or `model.diffusion_model.` before the names is understood too.

        Raises UserError for a name that is not this model's.
        """
        found = {}
        for given, tensor in state.items():
            name = given.removeprefix("model.").removeprefix("diffusion_model.")
            if name in self.left_out:
                continue
            if _general(name, ".")[0] not in self.tensors:
                raise self.foreign(given)
            found[name] = tensor
        return found


def _general(path: str, between: str) -> tuple[str, str]:
    """(path with # for the block's number, that number). A path with a # of its own is none of ours."""
    if "#" in path:
        return "", ""
    lead = f"transformer_blocks{between}"
    block = re.fullmatch(rf"{re.escape(lead)}(\d+)({re.escape(between)}.+)", path)
    return (path, "") if block is None else (f"{lead}#{block[2]}", block[1])
