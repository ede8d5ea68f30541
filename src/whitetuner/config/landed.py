"""Options whose feature is not there yet are refused, by name, instead of being read and ignored."""

from __future__ import annotations

from collections.abc import Callable

from whitetuner.config.schema import Config
from whitetuner.errors import UserError, UserErrors

_SET: dict[str, str] = {
    "target": "edit data sets",
    "conditions": "edit data sets",
    "condition_resolution": "edit data sets",
    "videos": "video data sets",
    "num_frames": "video data sets",
    "fps": "video data sets",
}

#: dotted key -> (is it asked for?, what it would need)
_REFUSED: dict[str, tuple[Callable[[Config], bool], str]] = {
    "model.task": (lambda c: c.model.task != "t2i", "tasks other than t2i"),
    "model.transformer_2": (lambda c: c.model.transformer_2 is not None, "models with two denoisers"),
    "model.image_encoder": (lambda c: c.model.image_encoder is not None, "models with an image encoder"),
    "method.kind": (lambda c: c.method.kind == "full", "full fine-tuning"),
    "memory.vram_gb": (lambda c: c.memory.vram_gb != "auto", "the memory plan"),
    "memory.base": (lambda c: c.memory.base not in ("auto", "bf16"), "a quantised base"),
    "memory.blocks_to_swap": (lambda c: c.memory.blocks_to_swap not in ("auto", 0), "block swap"),
    "memory.activation_offload": (lambda c: c.memory.activation_offload, "activation offload"),
    "memory.compile": (lambda c: c.memory.compile, "torch.compile"),
    "memory.attention": (lambda c: c.memory.attention != "auto", "a choice of attention kernels"),
    "preview.prompts": (lambda c: any(p.images for p in c.preview.prompts), "previews with given pictures"),
    **{
        f"data.{name}": (
            lambda c, name=name: any(getattr(one, name) not in (None, []) for one in (c.data, *c.data.sets)),
            feature,
        )
        for name, feature in _SET.items()
    },
}


def not_landed() -> dict[str, str]:
    """Key -> feature, of everything that is refused today."""
    return {key: feature for key, (_, feature) in _REFUSED.items()}


def refuse_not_landed(config: Config) -> None:
    """Raises UserErrors naming every option asked for whose feature is not there yet."""
    errors = [
        UserError(
            "{feature}: not there yet",
            where=key,
            mend="leave {key} out; the support table in README.md says what works",
            feature=feature,
            key=key,
        )
        for key, (asked, feature) in _REFUSED.items()
        if asked(config)
    ]
    if errors:
        raise UserErrors(errors)
