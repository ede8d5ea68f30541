"""Runs a training script of a diffusers checkout as it stands, in a process of its own, with the stand-ins beside it.

    python -m benchmarks.learning.theirs [--record FILE] SCRIPT.py --its-own arguments

diffusers and transformers decide first that there is no torchvision; the script alone sees the stand-in. --record writes what its
transformer was given and asked for at each step, and its adapter before and after (draws.py); its numbers stay what they are.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor
from transformers.utils import is_torchvision_available

STANDINS = Path(__file__).parent / "standins"


class Recorder:
    """x0 and noise are what `torch.randn_like` was last called with and gave: the script draws the noise of its latents so."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.start: dict[str, Tensor] = {}
        self.module: torch.nn.Module | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None

    def listen(self) -> None:
        draw, forward = torch.randn_like, diffusers.Flux2Transformer2DModel.forward

        def drawn(like: Tensor, *given: Any, **named: Any) -> Tensor:
            noise = draw(like, *given, **named)
            self._drawn = (like.clone(), noise.clone())
            return noise

        def seen(module: torch.nn.Module, *given: Any, **named: Any) -> Any:
            if torch.is_grad_enabled():
                self._step(module, named)
            return forward(module, *given, **named)

        torch.randn_like = drawn
        diffusers.Flux2Transformer2DModel.forward = seen

    def _step(self, module: torch.nn.Module, named: dict[str, Any]) -> None:
        assert self._drawn is not None, "the script draws the noise before it asks its transformer"
        if self.module is None:
            self.module, self.start = module, _learning(module)
        x0, noise = self._drawn
        sigma, words = named["timestep"].clone(), named["encoder_hidden_states"].clone()
        self.steps.append({"x0": x0, "noise": noise, "sigma": sigma, "prompt_embeds": words})

    def write(self, file: Path) -> None:
        assert self.module is not None
        torch.save({"steps": self.steps, "start": self.start, "end": _learning(self.module)}, file)


def _learning(module: torch.nn.Module) -> dict[str, Tensor]:
    """The adapter's numbers, by the names that ours have."""
    found = {}
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            found[name.replace("_orig_mod.", "").replace(".default", "")] = parameter.detach().clone()
    return found


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
    recorder = None
    if sys.argv[0] == "--record":
        recorder, file = Recorder(), Path(sys.argv[1])
        recorder.listen()
        sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if recorder is not None:
        recorder.write(file)


if __name__ == "__main__":
    main()
