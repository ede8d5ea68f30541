"""Where the embedded models lie and how they want to be used. Loads nothing."""

from __future__ import annotations

from pathlib import Path

#: Text tokens, padding included, in training and sampling alike: the transformer attends to padding, so
#: another length is something it has never seen. The chat template takes 12, the longest caption 9.
MAX_SEQUENCE_LENGTH = 28
#: Sampling: Euler steps and guidance scale.
STEPS = 8
CFG = 2.0

#: What is said for a model folder -> the folder here.
MODELS = {
    "builtin:nano": "model",
    "builtin:nano-edit": "edit",
    "builtin:nano-zimage": "zimage",
    "builtin:nano-wan": "wan",
}
#: Parts that lie in the first one's folder and that the others take from there where they have none of their own.
SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")


def builtin_path(name: str = "builtin:nano") -> Path:
    """The folder of an embedded model. `builtin:nano` is a diffusers folder, a real `Flux2KleinPipeline`; of the others
    only what they do not share.
    """
    return Path(__file__).parent / MODELS[name]


def shared_parts(name: str) -> dict[str, Path]:
    """Part -> where it lies, of those that are not in this embedded model's own folder."""
    own, first = builtin_path(name), builtin_path()
    return {part: first / part for part in SHARED if not (own / part).is_dir()}
