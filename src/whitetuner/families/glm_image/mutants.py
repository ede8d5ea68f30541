"""GLM-Image with one convention wrong at a time; families/contract.py has to tell each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whitetuner.families.contract import Mutant, Mutate, encoder_method, method
from whitetuner.families.glm_image.encoders import moments_of

Right = Callable[..., Any]
_EDIT = ("edit",)


def _glyphs(name: str, wrong: Callable[[Right], Right]) -> Mutate:
    return encoder_method("glyphs", name, wrong)


def _vae(name: str, wrong: Callable[[Right], Right]) -> Mutate:
    return encoder_method("vae", name, wrong)


def _denoise(**changed: Callable[[Any], Any]) -> Mutate:
    """The model given something else of what it is given."""
    names = ("x", "glyphs", "prior", "timestep", "dropped", "memories")

    def wrong(right: Right) -> Right:
        def denoise(transformer: Any, *given: Any) -> Any:
            told = dict(zip(names, given, strict=True))
            return right(transformer, *(changed.get(name, lambda same: same)(told[name]) for name in names))

        return denoise

    return method("denoise", wrong)


def _look(**changed: Callable[[Any], Any]) -> Mutate:
    """A given picture's pass told something else."""

    def wrong(right: Right) -> Right:
        def look(transformer: Any, picture: Tensor, prior: Tensor, kept: Any) -> Any:
            model = right.__self__  # type: ignore[attr-defined]
            glyphs = torch.zeros(len(picture), changed["words"](0), transformer.config.text_embed_dim)
            start = torch.full((len(picture),), float(changed["clock"](0)))
            model.denoise(
                transformer, picture, glyphs, changed["prior"](prior), start, changed["dropped"](False), kept
            )

        return look

    same: dict[str, Callable[[Any], Any]] = dict.fromkeys(
        ("words", "clock", "prior", "dropped"), lambda value: value
    )
    changed = {**same, **changed}
    return method("look", wrong)


def _remembered(right: Right) -> Right:
    """Given pictures on the unguided side too."""

    def groups(glyphs: Any, dropped: Any) -> Any:
        return [(False, rows) for _, rows in right(glyphs, dropped)]

    return groups


def _sampled(right: Right) -> Right:
    def latent(vae: Any, picture: Any) -> Tensor:
        encoder = right.__self__  # type: ignore[attr-defined]
        drawn = vae.encode(encoder.pixels(picture)).latent_dist.sample(torch.Generator().manual_seed(0))
        return encoder.normalise(vae, drawn)[0]

    return latent


def _multiplied(right: Right) -> Right:
    def normalise(vae: Any, latent: Tensor) -> Tensor:
        mean, deviation = moments_of(vae, latent)
        return (latent - mean) * deviation

    return normalise


def _undropped(right: Right) -> Right:
    return lambda given: {**right(given), "dropped": torch.tensor(False)}


MUTANTS: dict[str, Mutant] = {
    "the clock one thousandth late": Mutant(
        "E1", method("clock", lambda right: lambda sigma, shift: right(sigma, shift) + 1)
    ),
    "prior tokens column by column": Mutant(
        "E1", method("spread", lambda right: lambda prior: right(prior.mT.reshape(prior.shape)))
    ),
    "prior tokens four in a row": Mutant(
        "E1", method("spread", lambda right: lambda prior: prior.flatten(1).repeat_interleave(4, 1).long())
    ),
    "prior tokens repeated as tiles": Mutant(
        "E1", method("spread", lambda right: lambda prior: prior.repeat(1, 2, 2).flatten(1).long())
    ),
    "prior tokens always left out": Mutant("E1", _denoise(dropped=lambda value: True)),
    "prior tokens on the unguided side": Mutant("E1", _denoise(dropped=lambda value: False)),
    "the unguided side not known as such": Mutant("E1", _glyphs("encode", _undropped)),
    "width before height": Mutant("E1", method("size_of", lambda right: lambda x: right(x).flip(1))),
    "size of the latent instead of pixels": Mutant(
        "E1", method("size_of", lambda right: lambda x: right(x) / 8)
    ),
    "texts filled up with zeros": Mutant(
        "E1", _denoise(glyphs=lambda value: torch.nn.functional.pad(value, (0, 0, 2, 0)))
    ),
    "texts left out": Mutant("E1", _denoise(glyphs=lambda value: value[:, :0])),
    "the whole caption as text to draw": Mutant(
        "E2", _glyphs("texts", lambda right: lambda caption: [caption])
    ),
    "texts without end marks": Mutant(
        "E2",
        _glyphs("tokens", lambda right: lambda texts: [one[:-1] or [0] for one in right([*texts, "x"])[:-1]]),
    ),
    "a padding token before every text": Mutant(
        "E2", _glyphs("tokens", lambda right: lambda texts: [[0, *one] for one in right(texts)])
    ),
    "latent not normalised": Mutant("E2", _vae("normalise", lambda right: lambda vae, x: x)),
    "latent multiplied by the deviation": Mutant("E2", _vae("normalise", _multiplied)),
    "latent drawn instead of the mode": Mutant("E2", _vae("latent", _sampled)),
    "pixels in [0, 1]": Mutant("E2", _vae("pixels", lambda right: lambda picture: (right(picture) + 1) / 2)),
    "blue before red": Mutant("E2", _vae("pixels", lambda right: lambda picture: right(picture).flip(1))),
    "prior tokens of the mirrored picture": Mutant(
        "E2",
        encoder_method("prior", "tokens", lambda right: lambda picture: right(picture.transpose(0))),
    ),
    "given pictures left out": Mutant("E1", method("remember", lambda right: lambda *given: None), _EDIT),
    "given pictures on the unguided side": Mutant("E1", method("groups", _remembered), _EDIT),
    "given pictures without their tokens": Mutant("E1", _look(dropped=lambda value: True), _EDIT),
    "given pictures with other tokens": Mutant("E1", _look(prior=lambda prior: prior.flip(1)), _EDIT),
    "given pictures as pure noise": Mutant("E1", _look(clock=lambda start: 999), _EDIT),
    "given pictures one thousandth early": Mutant("E1", _look(clock=lambda start: -1), _EDIT),
    "a text beside given pictures": Mutant("E1", _look(words=lambda count: 1), _EDIT),
    "given pictures not normalised": Mutant(
        "E1", encoder_method("references", "normalise", lambda right: lambda vae, x: x), _EDIT
    ),
    "given pictures drawn instead of the mode": Mutant(
        "E2", encoder_method("references", "latent", _sampled), _EDIT
    ),
    "given pictures' tokens of mirrored ones": Mutant(
        "E2",
        encoder_method("reference-prior", "tokens", lambda right: lambda one: right(one.transpose(0))),
        _EDIT,
    ),
}

#: Told from the second step of a drawing on: at pure noise shifted and unshifted time are one.
LATER: dict[str, Mutant] = {
    "the clock told the shifted noise level": Mutant(
        "E1", method("clock", lambda right: lambda sigma, shift: right(sigma, 1.0))
    ),
    "the clock shifted again": Mutant(
        "E1", method("clock", lambda right: lambda sigma, shift: right(sigma, 1 / shift))
    ),
    "shift by the latent's numbers instead of tokens": Mutant(
        "E1", method("shift", lambda right: lambda x: right(torch.cat([x, x, x, x], -1)))
    ),
}
