"""WAN with one convention wrong at a time; families/contract.py has to tell each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whitetuner.families.contract import Mutant, Mutate, encoder_method, method
from whitetuner.families.wan.encoders import moments_of

Right = Callable[..., Any]
_I2V = ("i2v",)


def _text(name: str, wrong: Callable[[Right], Right]) -> Mutate:
    return encoder_method("text", name, wrong)


def _vae(name: str, wrong: Callable[[Right], Right]) -> Mutate:
    return encoder_method("vae", name, wrong)


def _first(name: str, wrong: Callable[[Right], Right]) -> Mutate:
    return encoder_method("first-frame", name, wrong)


def _sampled(right: Right) -> Right:
    def latent(vae: Any, slices: Any) -> Tensor:
        encoder = right.__self__  # type: ignore[attr-defined]
        source = torch.Generator().manual_seed(0)
        drawn = torch.cat([one.sample(source) for one in encoder.moments(vae, slices)], 2)
        return encoder.normalise(vae, drawn)[0]

    return latent


def _multiplied(right: Right) -> Right:
    def normalise(vae: Any, latent: Tensor) -> Tensor:
        mean, deviation = moments_of(vae, latent)
        return (latent - mean) * deviation

    return normalise


def _noise_after_text(right: Right) -> Right:
    """The text repeated into the filling, where zeros belong."""

    def text(texts: Any) -> Tensor:
        found = right(texts)
        for row, one in zip(found, texts):
            row[len(one) :] = one[-1]
        return found

    return text


MUTANTS: dict[str, Mutant] = {
    "frames in reverse order": Mutant(
        "E1",
        method(
            "predict",
            lambda right: lambda m, part, batch, x, s: right(m, part, batch, x.flip(2), s).flip(2),
        ),
    ),
    "text filled up with its last token": Mutant("E1", method("text", _noise_after_text)),
    "end of the text left out": Mutant("E2", _text("kept", lambda right: lambda mask: right(mask) - 1)),
    "filling's states kept": Mutant("E1", _text("kept", lambda right: lambda mask: mask.shape[1])),
    "latent not normalised": Mutant("E2", _vae("normalise", lambda right: lambda vae, x: x)),
    "latent multiplied by the deviation": Mutant("E2", _vae("normalise", _multiplied)),
    "latent drawn instead of the mode": Mutant("E2", _vae("latent", _sampled)),
    "pixels in [0, 1]": Mutant("E2", _vae("pixels", lambda right: lambda frames: (right(frames) + 1) / 2)),
    "blue before red": Mutant("E2", _vae("pixels", lambda right: lambda frames: right(frames).flip(1))),
    "frames of the clip in reverse": Mutant(
        "E2", _vae("pixels", lambda right: lambda frames: right(frames).flip(2))
    ),
    "condition not normalised": Mutant("E2", _first("normalise", lambda right: lambda vae, x: x), _I2V),
    "condition drawn instead of the mode": Mutant("E2", _first("latent", _sampled), _I2V),
}
#: Conventions of one kind of WAN alone; the tests of the family ask them of it. The 14B I2V: mask and condition beside the clip.
OF_14B_I2V: dict[str, Mutant] = {
    "condition before the mask": Mutant(
        "E1",
        method("beside", lambda right: lambda x, mask, first: right(x, first, mask)),
    ),
    "every frame known by the mask": Mutant(
        "E1",
        method("mask", lambda right: lambda first: torch.ones_like(right(first))),
    ),
    "no frame known by the mask": Mutant(
        "E1",
        method("mask", lambda right: lambda first: torch.zeros_like(right(first))),
    ),
    "frames that are not known black": Mutant(
        "E2",
        _first("unknown", lambda right: lambda first: right(first) - 1),
    ),
    "frames that are not known like the first": Mutant(
        "E2",
        _first("unknown", lambda right: lambda first: first),
    ),
}
OF_2_1: dict[str, Mutant] = {
    **OF_14B_I2V,
    "last layer of CLIP": Mutant(
        "E2", encoder_method("clip", "layer", lambda right: lambda states: states[-1])
    ),
    "first layer of CLIP": Mutant(
        "E2", encoder_method("clip", "layer", lambda right: lambda states: states[0])
    ),
}
OF_2_2: dict[str, Mutant] = {
    **OF_14B_I2V,
    "experts exchanged": Mutant(
        "E1",
        method(
            "denoiser",
            lambda right: (
                lambda modules, part: modules[
                    {"transformer": "transformer_2", "transformer_2": "transformer"}[part]
                ]
            ),
        ),
    ),
    "high-noise expert everywhere": Mutant(
        "E1", method("denoiser", lambda right: lambda modules, part: modules["transformer"])
    ),
}
OF_5B: dict[str, Mutant] = {
    "first frame noisy": Mutant("E1", method("kept", lambda right: lambda x, clean: x)),
    "first frame at the others' noise level": Mutant(
        "E1",
        method(
            "token_clock",
            lambda right: lambda clock, x: right(clock, x) * 0 + clock[:, None],
        ),
    ),
    "last frame free of noise instead of the first": Mutant(
        "E1", method("token_clock", lambda right: lambda clock, x: right(clock, x).flip(1))
    ),
    "first frame moved by the model": Mutant(
        "E1", method("to_clean", lambda right: lambda said, x, clean, sigma: said)
    ),
}
