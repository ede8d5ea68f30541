"""Runs a training script of a diffusers checkout as it stands, in a process of its own, with the stand-ins beside it.

    python -m benchmarks.learning.theirs SCRIPT.py --its-own arguments

diffusers and transformers decide first that there is no torchvision; the script alone sees the stand-in.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from transformers.utils import is_torchvision_available

STANDINS = Path(__file__).parent / "standins"


def main() -> None:
    torch.set_num_threads(1)
    is_torchvision_available()  # remembered from here on
    for name in (
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        "AutoencoderKLFlux2",
        "AutoPipelineForText2Image",
    ):
        getattr(diffusers, name)
    for name in ("Qwen2TokenizerFast", "Qwen3ForCausalLM"):
        getattr(transformers, name)
    sys.path.insert(0, str(STANDINS))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
