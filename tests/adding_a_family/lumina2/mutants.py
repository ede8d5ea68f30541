"""Lumina-Image 2.0 with one convention wrong at a time; families/contract.py has to tell each of them."""

from __future__ import annotations

from dataclasses import replace

from whitetuner.families.contract import Mutant, encoder_method, method

MUTANTS: dict[str, Mutant] = {
    "what the model says taken as it is": Mutant("E1", method("velocity", lambda right: lambda said: said)),
    "told sigma instead of 1 - sigma": Mutant("E1", method("clock", lambda right: lambda sigma: sigma)),
    "a system prompt before the negative text too": Mutant(
        "E1",
        encoder_method(
            "text", "text", lambda right: lambda given: right(replace(given, unconditional=False))
        ),
    ),
    "caption without the system prompt": Mutant(
        "E2", encoder_method("text", "text", lambda right: lambda given: given.caption)
    ),
    "text from the last layer": Mutant(
        "E2", encoder_method("text", "chosen", lambda right: lambda states: states[-1])
    ),
    "text from one layer before": Mutant(
        "E2", encoder_method("text", "chosen", lambda right: lambda states: states[-3])
    ),
    "latent not shifted": Mutant(
        "E2",
        encoder_method("vae", "normalise", lambda right: lambda vae, z: z * vae.config.scaling_factor),
    ),
    "latent scaled before it is shifted": Mutant(
        "E2",
        encoder_method(
            "vae",
            "normalise",
            lambda right: lambda vae, z: z * vae.config.scaling_factor - vae.config.shift_factor,
        ),
    ),
    "pixels in [0, 1]": Mutant(
        "E2", encoder_method("vae", "pixels", lambda right: lambda picture: (right(picture) + 1) / 2)
    ),
}
