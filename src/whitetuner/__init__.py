"""White Tuner trains image and video diffusion models on the graphics cards that people own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from whitetuner.version import __version__

if TYPE_CHECKING:
    from whitetuner.api import Config, Trainer

__all__ = ["Config", "Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that `import whitetuner` (and with it `--help`) costs no torch.
    if name in ("Config", "Trainer"):
        from whitetuner import api

        return getattr(api, name)
    raise AttributeError(f"module 'whitetuner' has no attribute {name!r}")
