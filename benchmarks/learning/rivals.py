"""Do our adapters learn what those of PEFT and lycoris-lora learn, at equal steps? Judged by a program.

The same embedded model, pictures, batches, noise, noise levels, optimizer, average and loop for all; only what hangs on the
layers differs: White Tuner's LoRA and LoKr, PEFT's LoRA and LoKr, lycoris-lora's LoKr, of equal rank or factor over the same
layers. A rival begins as its library begins it (from the same seed), or, "our start", with the very numbers that ours has.
Layers this small say nothing about time: benchmarks/cpu/adapter_layer.py times them at real width.

With DIFFUSERS_DIR, the folder of a diffusers checkout, its examples/dreambooth/train_dreambooth_lora_flux2_klein.py is one
more: its own loop, layers and optimizer over the same model and pictures (both sets in equal parts), at our rank, rate, batch,
layers, steps, caption dropout, warm-up and noise levels. It knows no average of the weights, and holds no pictures out: "as the
script" is ours without them. Seen with commit 58eb52c. peers.py adds whole trainers in the same way.

    python -m benchmarks.learning.rivals [--seeds 3] [--steps 200] [--concept zorp|duo|nook] [--minutes 15]

The table may be killed and goes on; `python -m benchmarks.learning.laboratory --write-docs` shows it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.learning import peers
from benchmarks.learning.laboratory import begin, command_of, lesson_of, parser_for, result_of, seeds_of
from benchmarks.learning.suites import LORA, lokr
from benchmarks.learning.table import Table
from benchmarks.learning.teach import Lesson, judged, measured
from diffusers import Flux2Transformer2DModel
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from whitetuner import recipe
from whitetuner.adapters.attach import Adapter
from whitetuner.adapters.choose import choose
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH, builtin_path
from whitetuner.rehearsal import optimizer_for
from whitetuner.train.ema import Ema
from whitetuner.train.learner import Learner
from whitetuner.train.team import Team

RANK, FACTOR = 16, 4
#: PEFT and lycoris-lora keep LoKr's second factor full when half of its longer side is not above the rank.
FULL_RANK = 10_000

#: module path -> name as in `Delta.named_parameters` -> parameter
Parameters = dict[str, dict[str, nn.Parameter]]


def peft_lora(module: nn.Module, paths: list[str]) -> Parameters:
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths), module)
    layers = {path: module.get_submodule(path) for path in paths}
    return {
        path: {name: getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B")}
        for path, layer in layers.items()
    }


def peft_lokr(module: nn.Module, paths: list[str]) -> Parameters:
    config = LoKrConfig(
        r=FULL_RANK,
        alpha=FULL_RANK,
        decompose_factor=FACTOR,
        init_weights="lycoris",
        target_modules=paths,
    )
    inject_adapter_in_model(config, module)
    layers = {path: module.get_submodule(path) for path in paths}
    return {
        path: {name: getattr(layer, name)["default"] for name in ("lokr_w1", "lokr_w2")}
        for path, layer in layers.items()
    }


def lycoris_lokr(module: nn.Module, paths: list[str]) -> Parameters:
    found: Parameters = {}
    for path in paths:
        layer = module.get_submodule(path)
        theirs = LokrModule(
            path.replace(".", "_"), layer, lora_dim=1, alpha=1, factor=FACTOR, full_matrix=True
        )
        theirs.apply_to()  # the layer's forward is theirs from now on
        found[path] = dict(theirs.named_parameters())
    return found


@dataclass(frozen=True)
class Rival:
    """put_on: hangs theirs on the plain layers, None: ours stay; our_start: with our numbers; gaussian: ours begins as PEFT's
    init_lora_weights="gaussian", which is what the script asks for: normal numbers of deviation 1 / rank, whatever the width."""

    ours: dict[str, Any]
    put_on: Callable[[nn.Module, list[str]], Parameters] | None = None
    our_start: bool = False
    gaussian: bool = False

    def told(self) -> dict[str, Any]:
        who = "White Tuner" if self.put_on is None else self.put_on.__name__
        start = {"start": "gaussian"} if self.gaussian else {}
        return {**self.ours, "adapter": who, "our_start": self.our_start, **start}


OUR_LORA, _LOKR = {**LORA, "method.rank": RANK}, lokr(FACTOR)
#: What the script has not: an average of the weights, a rate that does not end at 0, pictures held out.
PLAIN = {
    "optimizer.ema": 0.0,
    "optimizer.min_lr_ratio": 0.0,
    "validation.every": 0,
    "validation.share": 0.0,
}
RIVALS = {
    "LoRA 16: White Tuner": Rival(OUR_LORA),
    "LoRA 16: White Tuner, as the script": Rival({**OUR_LORA, **PLAIN}),
    "LoRA 16: White Tuner, as the script, its start": Rival({**OUR_LORA, **PLAIN}, gaussian=True),
    "LoRA 16: PEFT": Rival(OUR_LORA, peft_lora),
    "LoRA 16: PEFT, our start": Rival(OUR_LORA, peft_lora, our_start=True),
    "LoKr 4: White Tuner": Rival(_LOKR),
    "LoKr 4: lycoris-lora": Rival(_LOKR, lycoris_lokr),
    "LoKr 4: lycoris, our start": Rival(_LOKR, lycoris_lokr, our_start=True),
    "LoKr 4: PEFT": Rival(_LOKR, peft_lokr),
    "LoKr 4: PEFT, our start": Rival(_LOKR, peft_lokr, our_start=True),
}


SCRIPT = "LoRA 16: diffusers' script"
_SCRIPT_FILE = "examples/dreambooth/train_dreambooth_lora_flux2_klein.py"


def cells() -> dict[str, dict[str, Any]]:
    """The script and other trainers are cells where their checkouts are named."""
    found = {name: rival.told() for name, rival in RIVALS.items()}
    if "DIFFUSERS_DIR" in os.environ:
        found[SCRIPT] = {**OUR_LORA, "adapter": "the script's own loop"}
    return {**found, **peers.cells(OUR_LORA)}


def made(lesson: Lesson, cell: str, seed: int) -> dict[str, Any]:
    if cell == SCRIPT:
        return script_taught(lesson, seed)
    if cell in peers.PEERS:
        return peers.taught(lesson, cell, seed, OUR_LORA, learning_layers())
    return taught(lesson, RIVALS[cell], seed)


def learning_layers(model: Path | None = None) -> list[str]:
    """Paths of the layers that our adapters hang on. model: not the embedded one."""
    with torch.device("meta"):
        config = Flux2Transformer2DModel.load_config((model or builtin_path()) / "transformer")
        module = Flux2Transformer2DModel.from_config(config)
    return choose(module, registry.spec("flux2-klein").adapter_targets)


def script_words(lesson: Lesson, seed: int, out: Path) -> list[str]:
    """What the script is told. Its noise level is 1 - u of a logit-normal u: the mean's sign is the other way round.

    Its text layers are not the released pipeline's (10, 20, 30 by default), so they are given.
    """
    config = lesson.config("rival", seed, OUR_LORA).config
    layers_that_learn = ",".join(learning_layers(lesson.model))
    noise, optimizer, layers = config.noise, config.optimizer, config.model_options().text_encoder_out_layers  # type: ignore[attr-defined]
    given: dict[str, Any] = {
        "pretrained_model_name_or_path": lesson.model or builtin_path(),
        "dataset_name": lesson.folder / "data",
        "image_column": "image",
        "caption_column": "text",
        "instance_prompt": "unused",
        "output_dir": out,
        "seed": seed,
        "resolution": 64,
        "rank": RANK,
        "lora_alpha": RANK,
        "lora_layers": layers_that_learn,
        "learning_rate": optimizer.lr,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler": "linear",
        "lr_warmup_steps": optimizer.warmup_steps,
        "train_batch_size": lesson.batch,
        "max_train_steps": lesson.steps,
        "checkpointing_steps": lesson.steps + 1,
        "caption_dropout": config.data.caption_dropout,
        "weighting_scheme": "logit_normal",
        "logit_mean": -noise.sigmoid_bias,
        "logit_std": noise.sigmoid_scale,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "mixed_precision": "no",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [
        *words,
        "--text_encoder_out_layers",
        *map(str, layers),
        "--cache_latents",
        "--skip_final_inference",
    ]


def script_command(lesson: Lesson, seed: int, out: Path) -> list[str]:
    """Raises UserError when the checkout has no such script."""
    script = Path(os.environ["DIFFUSERS_DIR"]) / _SCRIPT_FILE
    if not script.is_file():
        raise UserError("there is no {script}", where="DIFFUSERS_DIR", script=script)
    program = [sys.executable, "-m", "benchmarks.learning.theirs", str(script)]
    return [*program, *script_words(lesson, seed, out)]


def script_taught(lesson: Lesson, seed: int) -> dict[str, Any]:
    """Runs it and judges the adapter that it wrote. Raises UserError with its last line where it fails."""
    out = lesson.folder / "script"
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    peers.finished(script_command(lesson, seed, out), "the script", out)
    seconds = time.perf_counter() - began
    row = judged(lesson, lambda pipeline: pipeline.load_lora_weights(str(out)))
    shutil.rmtree(out)
    return {**row, "seconds_whole": round(seconds, 1)}


class Foreign:
    """Another library's parameters, as the loop wants an adapter."""

    def __init__(self, parameters: Parameters) -> None:
        self.of = parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, named in self.of.items():
            for name, parameter in named.items():
                yield f"{path}.{name}", parameter

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def begin_as(self, ours: Adapter) -> None:
        for path, delta in ours.deltas.items():
            own = dict(delta.named_parameters())
            assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in self.of[path].items()}
            for name, parameter in own.items():
                self.of[path][name].copy_(parameter)


def exchanged(learner: Learner, rival: Rival, config: Any) -> Learner:
    """The learner with theirs in the place of ours, of as many numbers."""
    assert rival.put_on is not None
    ours = learner.adapter
    ours.detach()
    torch.manual_seed(config.run.seed)  # their start comes from the global generator
    theirs = Foreign(rival.put_on(learner.module, list(ours.deltas)))
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    if rival.our_start:
        theirs.begin_as(ours)
    parameters = theirs.parameters()
    return Learner(
        learner.part,
        learner.module,
        theirs,  # type: ignore[arg-type]
        learner.kind,
        optimizer_for(config, parameters),
        Ema(parameters, config.optimizer.ema),
        learner.fitted,
    )


@torch.no_grad()
def begin_gaussian(adapter: Adapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for delta in adapter.deltas.values():
        dict(delta.named_parameters())["lora_A"].normal_(std=1 / RANK, generator=generator)


def taught(lesson: Lesson, rival: Rival, seed: int) -> dict[str, Any]:
    """Trains one and judges it as it lies in memory, average included."""
    folder = lesson.folder / "rival"
    shutil.rmtree(folder, ignore_errors=True)
    with recipe.Session.open(lesson.config("rival", seed, rival.ours)) as session:
        session.prepare()
        (learner,) = session.team.learners
        assert isinstance(learner, Learner)
        if rival.gaussian:
            begin_gaussian(learner.adapter, seed)
        if rival.put_on is not None:
            session.team = Team([exchanged(learner, rival, session.config)])
        if not session.advance(session.data.steps):
            raise KeyboardInterrupt
        with session.team.averaged():
            module = session.team.learners[0].module
            row = judged(lesson, lambda pipeline: setattr(pipeline, "transformer", module))
    row = {**row, **measured(folder)}
    shutil.rmtree(folder)
    return row


def run(given: argparse.Namespace) -> Table:
    lesson = lesson_of(given)
    table = Table(
        result_of(given, "rivals"),
        cells(),
        {"suite": "rivals", **lesson.settings()},
        seeds_of(given),
    )
    begin(table, lesson, command_of(given, "benchmarks.learning.rivals"))
    began = time.monotonic()
    table.fill(
        lambda cell, seed: made(lesson, cell, seed),
        lambda: time.monotonic() - began > 60 * given.minutes,
        given.only,
    )
    return table


def main() -> None:
    given = parser_for(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    run(given)


if __name__ == "__main__":
    main()
