"""When a number stops being finite: nothing is applied, and the first module that made it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from whitetuner.errors import EXIT_FAILED, UserError


class NotFinite(UserError):
    """The loss or a gradient is NaN or infinite; the weights are still those of the last good step."""


def first_bad_module(
    modules: Iterable[tuple[str, torch.nn.Module]], forward: Callable[[], object]
) -> str | None:
    """Runs `forward` again and returns the path of the first module, in running order, whose output is not finite.

    A module that got bad input is not blamed: the one that made it is reported. None when all outputs are finite.
    """
    found: list[str] = []

    def tensors(value: object) -> Iterable[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            for one in value:
                yield from tensors(one)

    def watch(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
            if not found and any(
                t.is_floating_point() and not torch.isfinite(t).all() for t in tensors(output)
            ):
                found.append(path)

        return hook

    handles = [
        module.register_forward_hook(watch(path))
        for path, module in modules
        if path and not list(module.children())
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def damaged_weights(module: torch.nn.Module, culprit: str) -> NotFinite | None:
    """The error to raise when the first bad layer's own frozen weights are what is not finite; None when they are sound."""
    path = culprit.removesuffix(".base")
    layer = dict(module.named_modules()).get(culprit)
    frozen = [] if layer is None else [p for p in layer.parameters(recurse=False) if not p.requires_grad]
    if all(bool(torch.isfinite(p).all()) for p in frozen):
        return None
    return NotFinite(
        "the model's weights of {layer} are not finite numbers",
        where="model.path",
        mend="its file is damaged: download this part of the model again",
        code=EXIT_FAILED,
        layer=path,
    )


def not_finite(step: int, what: str, culprit: str, items: str) -> NotFinite:
    """What is told when a loss or gradient is not finite; culprit: the module, items: the pictures."""
    return NotFinite(
        "the {quantity} of step {step} is not a finite number; first bad: {culprit}; pictures: {items}. "
        "Nothing of it was applied; the state of step {last} is the last good one",
        where="training",
        mend="lower optimizer.lr, then --resume latest; if a picture is at fault, `whitetuner fork` goes on with another data "
        "set; memory.dtype = 'fp32' takes a new run (method.init_from takes the adapter along)",
        code=EXIT_FAILED,
        quantity=what,
        step=step,
        culprit=culprit,
        items=items,
        last=step - 1,
    )
