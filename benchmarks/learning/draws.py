"""What of a difference between our loop and diffusers' own script is arithmetic, and what is the luck of the draws?

The embedded model learns a word from pictures, LoRA of rank 16, as in rivals.py ("as the script"). A run is a sequence of draws
(which picture, dropped or not, noise, noise level, the layers' start) and an arithmetic that makes an adapter of them. Both loops
are run over both sequences: diffusers' script runs as it stands and its batches are recorded; our loss, clipping and optimizer
then learn from the very same batches. And our run's batches are learned from by the script's arithmetic: PEFT's layers, its loss
formula, torch's AdamW. The two schedules differ in one thing, which each sequence keeps: the script's warm-up begins at a rate of
0, ours one step later in it. Told is how far the adapters end apart (the largest relative distance of a tensor) and how many of
the pictures that they draw a program finds right.

    DIFFUSERS_DIR=... python -m benchmarks.learning.draws [--seeds 5] [--steps 100]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from benchmarks.learning import peers
from benchmarks.learning.laboratory import RESULTS
from benchmarks.learning.rivals import OUR_LORA, PLAIN, RANK, learning_layers, script_command
from benchmarks.learning.teach import Lesson, judged
from benchmarks.paired import environment
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import whitetuner.train.step as step_module
from whitetuner import recipe
from whitetuner.assemble import step_settings
from whitetuner.nano.builtin import builtin_path
from whitetuner.records import Batch
from whitetuner.train.learner import Learner
from whitetuner.train.optim import lr_factor
from whitetuner.train.step import loss_at

RESULT = RESULTS / "draws.json"
#: steps: {"x0", "noise": (B, C, H, W), "sigma": (B,), "prompt_embeds": (B, L, D)}; start, end: adapter's name -> numbers.
Recorded = dict[str, Any]
Rates = Callable[[int], float]


def script_recorded(lesson: Lesson, seed: int) -> Recorded:
    """Runs the script. Raises UserError with its last line where it fails."""
    out, file = lesson.folder / "script", lesson.folder / "script.pt"
    shutil.rmtree(out, ignore_errors=True)
    words = script_command(lesson, seed, out)
    at = words.index("benchmarks.learning.theirs") + 1
    words[at:at] = ["--record", str(file)]
    peers.finished(words, "the script", file)
    recorded: Recorded = torch.load(file, weights_only=True)
    shutil.rmtree(out)
    file.unlink()
    return recorded


@contextmanager
def ours(lesson: Lesson, seed: int) -> Iterator[tuple[recipe.Session, Learner]]:
    """Our run as the script's, ready for its first step."""
    shutil.rmtree(lesson.folder / "draws", ignore_errors=True)
    with recipe.Session.open(lesson.config("draws", seed, {**OUR_LORA, **PLAIN})) as session:
        session.prepare()
        (learner,) = session.team.learners
        assert isinstance(learner, Learner)
        yield session, learner
    shutil.rmtree(lesson.folder / "draws")


def numbers(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.adapter.named_parameters()}


def ours_recorded(lesson: Lesson, seed: int) -> tuple[Recorded, float]:
    """Our run, its batches written down, and what its pictures are judged."""
    steps: list[dict[str, Tensor]] = []
    before = step_module.loss_at

    def seen(
        family: Any, modules: Any, part: str, batch: Batch, sigma: Tensor, noise: Tensor, *rest: Any
    ) -> Any:
        x0, words = batch["latent"], batch["prompt_embeds"]
        assert isinstance(x0, Tensor) and isinstance(words, Tensor)
        steps.append({"x0": x0.float(), "noise": noise, "sigma": sigma, "prompt_embeds": words.float()})
        return before(family, modules, part, batch, sigma, noise, *rest)

    with ours(lesson, seed) as (session, learner):
        start = numbers(learner)
        step_module.loss_at = seen  # type: ignore[assignment]
        try:
            session.advance(lesson.steps)
        finally:
            step_module.loss_at = before
        right = shown(lesson, learner.module)
        return {"steps": steps, "start": start, "end": numbers(learner)}, right


def ours_over(lesson: Lesson, seed: int, recorded: Recorded, rates: Rates) -> tuple[dict[str, Tensor], float]:
    """Our loss, clipping and optimizer over recorded batches. Returns the adapter and what its pictures are judged."""
    with ours(lesson, seed) as (session, learner):
        config = session.config
        own = dict(learner.adapter.named_parameters())
        assert own.keys() == recorded["start"].keys()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(recorded["start"][name])
        settings = step_settings(config, session.data.shift, learner.part)
        device = torch.device("cpu")
        modules, part = {learner.part.name: learner.module}, learner.part.name
        items = tuple(session.data.items[: lesson.batch])  # of weight 1; their own pictures are not looked at
        for step, one in enumerate(recorded["steps"]):
            fields = {"latent": one["x0"], "prompt_embeds": one["prompt_embeds"]}
            batch = Batch(items, (0,) * lesson.batch, fields)
            given = (one["sigma"].float(), one["noise"], settings, device)
            loss_at(session.family, modules, part, batch, *given).weighted.mean().backward()
            learner.clipped(config.optimizer.max_grad_norm)
            learner.apply(config.optimizer.lr * rates(step))
        return numbers(learner), shown(lesson, learner.module)


def theirs_over(lesson: Lesson, recorded: Recorded, rates: Rates) -> tuple[dict[str, Tensor], float]:
    """The script's arithmetic over recorded batches, nothing of ours in it."""
    o = lesson.config("draws", 0, OUR_LORA).config.optimizer
    module = Flux2Transformer2DModel.from_pretrained(
        builtin_path() / "transformer", torch_dtype=torch.float32
    )
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=learning_layers()), module)
    learning = {
        name.replace(".default", ""): parameter
        for name, parameter in module.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(recorded["start"][name])
    optimizer = torch.optim.AdamW(
        learning.values(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )
    module.train()
    for step, one in enumerate(recorded["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = o.lr * rates(step)
        sigma = one["sigma"].view(-1, 1, 1, 1)
        said = module(
            hidden_states=Flux2KleinPipeline._pack_latents((1.0 - sigma) * one["x0"] + sigma * one["noise"]),
            timestep=one["sigma"],
            encoder_hidden_states=one["prompt_embeds"],
            txt_ids=Flux2KleinPipeline._prepare_text_ids(one["prompt_embeds"]),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(one["x0"]),
            guidance=None,
            return_dict=False,
        )[0]
        loss = (
            (said - Flux2KleinPipeline._pack_latents(one["noise"] - one["x0"]))
            .square()
            .flatten(1)
            .mean(1)
            .mean()
        )
        loss.backward()
        nn.utils.clip_grad_norm_(learning.values(), o.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in learning.items()}, shown(lesson, module)


def shown(lesson: Lesson, module: nn.Module) -> float:
    return judged(lesson, lambda pipeline: setattr(pipeline, "transformer", module), what=("new",))["new"]


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest relative distance of a tensor."""
    assert one.keys() == other.keys()
    return max(
        float((tensor - other[name]).norm() / other[name].norm().clamp(min=1e-12))
        for name, tensor in one.items()
    )


def schedules(lesson: Lesson, seed: int) -> tuple[Rates, Rates]:
    """(ours, the script's: diffusers' linear one, whose first step has no rate)."""
    o = lesson.config("draws", seed, {**OUR_LORA, **PLAIN}).config.optimizer
    warm, steps = o.warmup_steps, lesson.steps

    def script(step: int) -> float:
        return step / warm if step < warm else (steps - step) / (steps - warm)

    return lambda step: lr_factor(step, steps, o.schedule, warm, o.min_lr_ratio), script


def row_of(lesson: Lesson, seed: int) -> dict[str, Any]:
    our_rates, script_rates = schedules(lesson, seed)
    script = script_recorded(lesson, seed)
    theirs, script_right = theirs_over(lesson, script, script_rates)
    mine, mine_right = ours_over(lesson, seed, script, script_rates)
    own, own_right = ours_recorded(lesson, seed)
    plain, plain_right = theirs_over(lesson, own, our_rates)
    return {
        "seed": seed,
        "script's draws": {
            "the script": script_right,
            "ours": mine_right,
            "apart": apart(mine, script["end"]),
            "its arithmetic here, apart": apart(theirs, script["end"]),
        },
        "our draws": {
            "ours": own_right,
            "the script's arithmetic": plain_right,
            "apart": apart(plain, own["end"]),
        },
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations of what was drawn right, and the largest distance."""
    found: dict[str, Any] = {}
    for draws in ("script's draws", "our draws"):
        for name in rows[0][draws]:
            values = [row[draws][name] for row in rows]
            if "apart" in name:
                found[f"{draws}: {name}"] = max(values)
            else:
                deviation = stdev(values) if len(values) > 1 else 0.0
                found[f"{draws}: {name}"] = [round(fmean(values), 4), round(deviation, 4)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("output/draws"), help="pictures and cache")
    given = parser.parse_args()
    if "DIFFUSERS_DIR" not in os.environ:
        parser.error("DIFFUSERS_DIR names no checkout of diffusers")
    torch.set_num_threads(1)
    lesson = Lesson((given.folder / "zorp").resolve(), "zorp", given.steps, 12, 64, 96)
    lesson.prepare()
    rows: list[dict[str, Any]] = []
    for seed in range(42, 42 + given.seeds):
        rows.append(row_of(lesson, seed))
        print(json.dumps(rows[-1]), flush=True)
        document = {
            "environment": {
                **environment("torch", "diffusers", "peft"),
                "command": f"python -m benchmarks.learning.draws --seeds {given.seeds} --steps {given.steps}",
            },
            "summary": summary(rows),
            "rows": rows,
        }
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
