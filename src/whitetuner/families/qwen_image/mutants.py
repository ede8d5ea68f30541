"""Qwen-Image with one convention wrong at a time; families/contract.py has to tell each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whitetuner.families.contract import Mutant, Mutate, encoder_method, method
from whitetuner.families.qwen_image.encoders import SYSTEM, at_area, moments_of

Right = Callable[..., Any]
_EDIT = ("edit",)


def _text(name: str, wrong: Callable[[Right], Right]) -> Mutate:
    return encoder_method("text", name, wrong)


def _vae(name: str, wrong: Callable[[Right], Right]) -> Mutate:
    return encoder_method("vae", name, wrong)


def _references(name: str, wrong: Callable[[Right], Right]) -> Mutate:
    return encoder_method("references", name, wrong)


def _other_template(right: Right) -> Right:
    def template(words: str) -> str:
        mine, other = (
            SYSTEM[name][0] for name in sorted(SYSTEM, key=lambda name: SYSTEM[name][0] not in right(words))
        )
        return str(right(words)).replace(mine, other)

    return template


def _layer_before(right: Right) -> Right:
    """What the last layer was given, after the final norm."""

    def encode(given: Any) -> Any:
        encoder = right.__self__  # type: ignore[attr-defined]
        language = encoder._model.language_model
        layers, language.layers = language.layers, language.layers[:-1]
        try:
            return right(given)
        finally:
            language.layers = layers

    return encode


def _sampled(right: Right) -> Right:
    def latent(vae: Any, picture: Any) -> Tensor:
        encoder = right.__self__  # type: ignore[attr-defined]
        drawn = vae.encode(encoder.pixels(picture)).latent_dist.sample(torch.Generator().manual_seed(0))
        return encoder.normalise(vae, drawn)[0, :, 0]

    return latent


def _multiplied(right: Right) -> Right:
    def normalise(vae: Any, latent: Tensor) -> Tensor:
        mean, deviation = moments_of(vae, latent)
        return (latent - mean) * deviation

    return normalise


def _reordered(right: Right) -> Right:
    def pack(latent: Tensor) -> Tensor:
        tokens = right(latent)
        return tokens.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)

    return pack


def _turned(right: Right) -> Right:
    def shapes(rows: int, columns: int, references: Any) -> Any:
        others = right(rows, columns, references)[1:]
        return [(1, columns, rows), *others]

    return shapes


def _references_turned(right: Right) -> Right:
    def shapes(rows: int, columns: int, references: Any) -> Any:
        (first, *others) = right(rows, columns, references)
        return [first, *((1, b, a) for _, a, b in others)]

    return shapes


def _references_first(right: Right) -> Right:
    """Target and references exchanged on the time axis: the target's positions come last."""

    def denoise(transformer: Any, tokens: Tensor, references: Any, shapes: Any, **given: Any) -> Tensor:
        if references is None:
            return right(transformer, tokens, references, shapes, **given)
        swapped = [*shapes[1:], shapes[0]]
        beside = torch.cat([references.to(tokens), tokens], 1)
        said = transformer(
            hidden_states=beside,
            img_shapes=[swapped] * len(tokens),
            guidance=None,
            return_dict=False,
            **given,
        )[0]
        return said[:, -tokens.shape[1] :]

    return denoise


def _without_references(right: Right) -> Right:
    return lambda transformer, tokens, references, shapes, **given: right(
        transformer, tokens, None, shapes[:1], **given
    )


MUTANTS: dict[str, Mutant] = {
    "tokens packed column by column": Mutant(
        "E1", method("pack", lambda right: lambda latent: right(latent.mT))
    ),
    "patch before channel in the tokens": Mutant("E1", method("pack", _reordered)),
    "rows and columns exchanged in the positions": Mutant("E1", method("shapes", _turned)),
    "text filled up on the left": Mutant(
        "E1",
        method(
            "text",
            lambda right: lambda texts: right([torch.nn.functional.pad(one, (0, 0, 3, 0)) for one in texts]),
        ),
    ),
    "another one's turn after the caption": Mutant(
        "E1", _text("template", lambda right: lambda words: right(words).replace("assistant", "user"))
    ),
    "template of the other task": Mutant("E2", _text("template", _other_template)),
    "system's words not dropped": Mutant("E1", _text("dropped", lambda right: lambda: 0)),
    "one token of the user's dropped": Mutant("E2", _text("dropped", lambda right: lambda: right() + 1)),
    "one layer of the language model left out": Mutant("E2", _text("encode", _layer_before)),
    "latent not normalised": Mutant("E2", _vae("normalise", lambda right: lambda vae, x: x)),
    "latent multiplied by the deviation": Mutant("E2", _vae("normalise", _multiplied)),
    "latent drawn instead of the mode": Mutant("E2", _vae("latent", _sampled)),
    "pixels in [0, 1]": Mutant("E2", _vae("pixels", lambda right: lambda picture: (right(picture) + 1) / 2)),
    "blue before red": Mutant("E2", _vae("pixels", lambda right: lambda picture: right(picture).flip(1))),
    "references left out": Mutant("E1", method("denoise", _without_references), _EDIT),
    "references before the target": Mutant("E1", method("denoise", _references_first), _EDIT),
    "rows and columns of references exchanged": Mutant("E1", method("shapes", _references_turned), _EDIT),
    "references not normalised": Mutant(
        "E1", _references("normalise", lambda right: lambda vae, x: x), _EDIT
    ),
    "references drawn instead of the mode": Mutant("E2", _references("latent", _sampled), _EDIT),
    "pictures after the words": Mutant(
        "E2",
        _text("instruction", lambda right: lambda caption, n: caption + right("", n)),
        _EDIT,
    ),
    "pictures without rows and columns": Mutant(
        "E2", _text("picture_tokens", lambda right: lambda ids: torch.zeros_like(ids).int()), _EDIT
    ),
    "pictures seen at another size": Mutant(
        "E2",
        _text("seen", lambda right: lambda given: [at_area(one, 64 * 64) for one in right(given)]),
        _EDIT,
    ),
}
