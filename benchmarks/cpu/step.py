"""What our loop costs beside a bare one: the whole step of a session against forward, backward, clip and update by hand.

    python -m benchmarks.cpu.step

Same model (the embedded one, LoKr attached), same batch size, same optimizer. Ours also reads the batch from the cache, draws
noise and level per sample, looks for NaN, writes the step's event and asks for stop. Target: at most 1.03x or 2 ms.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from benchmarks.paired import environment, paired

from whitetuner.config.load import load_config
from whitetuner.demo import draw_folder, write_config
from whitetuner.recipe import Session
from whitetuner.train.optim import clip_grad_norm

RESULT = Path(__file__).parents[1] / "results" / "step.json"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_folder(folder / "data" / "new", 16, 1)
        draw_folder(folder / "data" / "old", 16, 2)
        config = write_config(folder, 100_000)
        more = [
            "preview.every=0",
            "validation.every=0",
            "save.every=0",
            "optimizer.ema=0",
            "data.batch_size=8",
        ]
        with Session.open(load_config(config, more)) as session:
            session.prepare()
            learner, family = session.team.learners[0], session.family
            batch = next(iter(session._batches)).mine[0]
            x0, text = batch["latent"], batch["prompt_embeds"]
            bare_optimizer = torch.optim.AdamW(learner.parameters, 1e-9, fused=True)

            def bare() -> None:
                sigma = torch.rand(len(x0))
                noise = torch.randn_like(x0)
                level = sigma.view(-1, 1, 1, 1)
                said = family.predict(
                    {"transformer": learner.module},
                    "transformer",
                    batch,
                    (1 - level) * x0 + level * noise,
                    sigma,
                )
                torch.nn.functional.mse_loss(said, noise - x0).backward()
                clip_grad_norm(learner.parameters, 1.0)
                bare_optimizer.step()
                bare_optimizer.zero_grad(set_to_none=True)

            def ours() -> None:
                session.advance(session.step + 1)

            found = paired(ours, bare, pairs=60)
    found["extra_ms"] = 1000 * (found["a_seconds"] - found["b_seconds"])
    found["text_tokens"] = text.shape[1]
    print(json.dumps(found, indent=1))
    RESULT.write_text(
        json.dumps({"step": found, "environment": environment("torch", "diffusers")}, indent=1),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
