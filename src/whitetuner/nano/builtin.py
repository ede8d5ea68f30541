"""Where the embedded model lies and how it wants to be used. Loads nothing."""

from __future__ import annotations

from pathlib import Path

#: Text tokens, padding included, in training and sampling alike: the transformer attends to padding, so
#: another length is something it has never seen. The chat template takes 12, the longest caption 9.
MAX_SEQUENCE_LENGTH = 28
#: Sampling: Euler steps and guidance scale.
STEPS = 8
CFG = 2.0


def builtin_path() -> Path:
    """The diffusers folder of the embedded model (`model.path = "builtin:nano"`), a real
    `Flux2KleinPipeline`.
    """
    return Path(__file__).parent / "model"
