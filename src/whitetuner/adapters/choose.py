"""Which layers an adapter goes on: patterns over the module paths of the model."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from whitetuner.adapters.deltas import Attached
from whitetuner.errors import UserError, UserErrors

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def choose(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Paths of the linear layers that match one of the patterns (fnmatch, `*` matches dots too), in the
    model's order.

    A linear layer is an nn.Linear or a leaf with in_features and out_features, as a quantised one has. Where
    a pattern matches linear and other modules, the linear ones are meant. Raises UserError for each pattern
    that matches no linear layer: the nearest names, or why a convolution is no target.
    """
    if not patterns:
        raise UserError(
            "no layers are named",
            where="method.targets",
            mend='name some, such as "transformer_blocks.*.attn.to_q"',
        )
    modules = {
        path: part for path, part in module.named_modules() if path and not _inside_attached(module, path)
    }
    linear = [path for path, part in modules.items() if is_linear(part)]
    chosen: set[str] = set()
    errors: list[UserError] = []
    for pattern in patterns:
        found = [path for path in linear if fnmatch.fnmatchcase(path, pattern)]
        chosen.update(found)
        if not found:
            errors.append(_no_layer(pattern, modules, linear))
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)
    return [path for path in linear if path in chosen]


def is_linear(part: nn.Module) -> bool:
    """nn.Linear, an Attached one, or a leaf that has in_features and out_features."""
    if isinstance(part, (nn.Linear, Attached)):
        return True
    sizes = getattr(part, "in_features", None), getattr(part, "out_features", None)
    return all(isinstance(size, int) for size in sizes) and not any(True for _ in part.children())


def linear_at(module: nn.Module, path: str) -> nn.Linear:
    """The layer at this path, called nn.Linear for its manners: a quantised one has the same attributes."""
    layer = module.get_submodule(path)
    assert is_linear(layer), f"{path} is a {type(layer).__name__}"
    return cast(nn.Linear, layer)


def _inside_attached(module: nn.Module, path: str) -> bool:
    parents = [path[: match.start()] for match in re.finditer(r"\.", path)]
    return any(isinstance(module.get_submodule(parent), Attached) for parent in parents)


def _no_layer(pattern: str, modules: Mapping[str, nn.Module], linear: Sequence[str]) -> UserError:
    others = {path: part for path, part in modules.items() if fnmatch.fnmatchcase(path, pattern)}
    convolution = next((path for path, part in others.items() if isinstance(part, CONVOLUTIONS)), None)
    if convolution is not None:
        return UserError(
            "'{pattern}' names a convolution ({path}); adapters go on linear layers only, because programs "
            "compute those of convolutions differently, some of them wrongly",
            where="method.targets",
            mend="leave it out",
            pattern=pattern,
            path=convolution,
        )
    inside = [path for path in linear if any(path.startswith(f"{other}.") for other in others)]
    if inside:
        return UserError(
            "'{pattern}' names a group of layers, not a linear layer",
            where="method.targets",
            mend="write '{wider}' for the {count} linear layers inside",
            pattern=pattern,
            wider=f"{pattern}.*",
            count=len(inside),
        )
    if others:
        path, part = next(iter(others.items()))
        return UserError(
            "'{pattern}' names no linear layer ({path} is a {kind})",
            where="method.targets",
            mend="leave it out",
            pattern=pattern,
            path=path,
            kind=type(part).__name__,
        )
    general = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in linear))
    near = difflib.get_close_matches(pattern, [*general, *linear], n=3, cutoff=0.4) or general[:3]
    return UserError(
        "'{pattern}' matches no layer of this model",
        where="method.targets",
        mend="the nearest names are: {near}",
        pattern=pattern,
        near=", ".join(near) or "none (the model has no linear layers)",
    )
