"""Faster kernels for the blocks: torch.compile block by block, and the attention backends that can train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import attention_backend
from torch import nn

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.memory.blocks import Patch, blocks_of

#: Config name -> backend of diffusers' dispatcher, of those that have a backward pass and download nothing.
ATTENTION = {
    "native": "native",
    "math": "_native_math",
    "efficient": "_native_efficient",
    "cudnn": "_native_cudnn",
    "native_flash": "_native_flash",
    "flash": "flash",
    "flash_varlen": "flash_varlen",
    "flash_3": "_flash_3",
    "flex": "flex",
    "xformers": "xformers",
}


def backend_named(name: str) -> str | None:
    """The backend of diffusers' dispatcher that memory.attention names; None for "auto".

    Raises UserError for one that cannot train (sage) or is unknown.
    """
    if name == "auto":
        return None
    backend = ATTENTION.get(name, name if name in ATTENTION.values() else None)
    if backend is None:
        raise UserError(
            "the attention backend '{name}' cannot be trained with (it has no backward pass) or is not known",
            where="memory.attention",
            mend='use one of: {known}, or "auto"',
            name=name,
            known=", ".join(ATTENTION),
        )
    return backend


def set_attention(module: Any, name: str) -> None:
    """Sets the attention backend of a diffusers model; "auto" leaves torch's own choice.

    Raises UserError as `backend_named`, and for a backend whose package or hardware is missing.
    """
    backend = backend_named(name)
    if backend is None:
        return
    try:
        # The method sets the choice of every model in the process, too; leaving the context takes that back.
        with attention_backend("native"):
            module.set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(
            "the attention backend '{name}' does not run here: {error}",
            where="memory.attention",
            mend='install its package, or use memory.attention = "auto"',
            code=EXIT_ENVIRONMENT,
            name=name,
            error=str(error).splitlines()[0],
        ) from error


class Compiled:
    """Handle of compiled blocks."""

    def __init__(self, patches: list[Patch]) -> None:
        self._patches = patches

    def remove(self) -> None:
        for patch in self._patches:
            patch.remove()
        self._patches = []


def compile_blocks(module: nn.Module, block_lists: Sequence[str], backend: str = "inductor") -> Compiled:
    """Compiles each block's forward; equal blocks share the code. To be done before recomputation and swap.

    Weights may be rebound afterwards without a new compilation. CUDA graphs (mode "reduce-overhead") want
    fixed addresses and are therefore not used.
    """
    return Compiled(
        [
            Patch(block, torch.compile(block.forward, backend=backend, dynamic=False))
            for _, block in blocks_of(module, block_lists)
        ]
    )
