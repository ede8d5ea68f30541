"""FLUX.2 Klein with one convention wrong at a time; families/contract.py has to tell each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from whitetuner.families.contract import Mutant, Mutate, encoder_method, method
from whitetuner.family import Family


def _option(name: str, value: Any) -> Mutate:
    def mutate(family: Family) -> Family:
        wrong: Any = type(family)
        return wrong(family.options.model_copy(update={name: value}), family.paths)

    return mutate


def _padding_left(right: Callable[..., Any]) -> Callable[..., Any]:
    def encode(given: Any) -> Any:
        tokenizer = right.__self__.tokenizer  # type: ignore[attr-defined]
        tokenizer.padding_side = "left"
        return right(given)

    return encode


def _without_epsilon(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def normalise(vae: Any, latent: Tensor) -> Tensor:
        mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        return (latent - mean) / variance.sqrt()

    return normalise


def _batch_statistics(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda vae, latent: (latent - latent.mean((0, 2, 3), True)) / latent.std((0, 2, 3), keepdim=True)


def _sampled(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def latent(vae: Any, picture: Any) -> Tensor:
        encoder = right.__self__  # type: ignore[attr-defined]
        drawn = vae.encode(encoder.pixels(picture)).latent_dist.sample(torch.Generator().manual_seed(0))
        return encoder.normalise(vae, torch.nn.functional.pixel_unshuffle(drawn, 2))[0]

    return latent


def _packed_by_columns(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda latent: right(latent.mT)


def _exchanged_axes(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda height, width, time=0: right(height, width, time)[:, [0, 2, 1, 3]]


def _patch_before_channel(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def latent(vae: Any, picture: Any) -> Tensor:
        found = right(vae, picture)
        return found.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)

    return latent


def _edit(caught_by: Literal["E1", "E2"], mutate: Mutate) -> Mutant:
    return Mutant(caught_by, mutate, ("edit",))


MUTANTS: dict[str, Mutant] = {
    "tokens packed column by column": Mutant("E1", method("pack", _packed_by_columns)),
    "rows and columns exchanged in the positions": Mutant("E1", method("image_ids", _exchanged_axes)),
    "target at the time of the first reference": Mutant(
        "E1", method("image_ids", lambda right: lambda height, width, time=0: right(height, width, time + 10))
    ),
    "text tokens all at position 0": Mutant("E1", method("text_ids", lambda right: lambda n: right(n) * 0)),
    "text tokens counted on the time axis": Mutant(
        "E1", method("text_ids", lambda right: lambda n: right(n).flip(1))
    ),
    "caption without its chat template": Mutant(
        "E1", encoder_method("text", "text", lambda right: lambda caption: caption)
    ),
    "template with thinking left on": Mutant(
        "E1",
        encoder_method(
            "text",
            "text",
            lambda right: lambda caption: right(caption).replace("<think>\n\n</think>\n\n", ""),
        ),
    ),
    "text padded on the left": Mutant("E1", encoder_method("text", "encode", _padding_left)),
    "text layers one too late": Mutant("E1", _option("text_encoder_out_layers", (10, 19, 28))),
    "text layers in another order": Mutant("E2", _option("text_encoder_out_layers", (27, 18, 9))),
    "text one token shorter": Mutant("E2", _option("max_sequence_length", 63)),
    "latent not normalised": Mutant("E2", encoder_method("vae", "normalise", lambda right: lambda vae, x: x)),
    "latent normalised without epsilon": Mutant("E2", encoder_method("vae", "normalise", _without_epsilon)),
    "latent normalised by its own statistics": Mutant(
        "E2", encoder_method("vae", "normalise", _batch_statistics)
    ),
    "latent drawn instead of the mode": Mutant("E2", encoder_method("vae", "latent", _sampled)),
    "patch before channel in the latent": Mutant(
        "E2", encoder_method("vae", "latent", _patch_before_channel)
    ),
    "references without distance on the time axis": _edit(
        "E1", method("reference_time", lambda right: lambda index: index + 1)
    ),
    "references all at one time": _edit("E1", method("reference_time", lambda right: lambda index: 10)),
    "references at the time of the target": _edit(
        "E1", method("reference_time", lambda right: lambda index: 10 * index)
    ),
    "references in the opposite order": _edit(
        "E2", encoder_method("references", "in_order", lambda right: lambda pictures: pictures[::-1])
    ),
    "references before the target": _edit(
        "E1", method("join", lambda right: lambda target, references: right(references, target))
    ),
    "references not normalised": _edit(
        "E2", encoder_method("references", "normalise", lambda right: lambda vae, latent: latent)
    ),
    "references drawn instead of the mode": _edit("E2", encoder_method("references", "latent", _sampled)),
    "pixels in [0, 1]": Mutant(
        "E2", encoder_method("vae", "pixels", lambda right: lambda picture: (right(picture) + 1) / 2)
    ),
    "blue before red": Mutant(
        "E2", encoder_method("vae", "pixels", lambda right: lambda p: right(p).flip(1))
    ),
}
