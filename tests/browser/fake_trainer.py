"""A run without a model: `fake_trainer.py RUN [STEPS] [SECONDS]` writes what a training writes and hears what one hears."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from PIL import Image

from whitetuner.runs import events, jobs
from whitetuner.runs.folder import RunFolder

NASTY = '<img src=x onerror=alert(1)> \u4e00\u53ea\u732b & "quotes"'


def preview(folder: RunFolder, step: int) -> None:
    place = folder.samples / f"step-{step:06d}"
    place.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (step % 256, 40 + 100 * number, 200 - step % 200)).save(
            place / f"{number:02d}.png"
        )
    files = [f"samples/{place.name}/{number:02d}.png" for number in range(2)]
    folder.append(events.Preview(step=step, files=files, prompts=[NASTY, "a dog"], seconds=0.1))


def main(run: Path, steps: int, seconds: float) -> None:
    with jobs.claimed(run, run / "config.toml", gpus="cpu", resume=None, wait=True):
        with RunFolder.open(run, resume=True) as folder:
            config = {
                "run": {"name": run.name, "steps": steps},
                "model": {"family": "flux2-klein", "task": "t2i"},
                "method": {"kind": "lokr"},
            }
            folder.begin("", config)
            folder.append(events.RunStarted(name=run.name, steps=steps))
            folder.append(events.Phase(name="cache text", total=4))
            folder.append(events.Progress(phase="cache text", done=4, total=4))
            folder.append(events.Phase(name="train", total=steps))
            preview(folder, 0)
            for step in range(1, steps + 1):
                time.sleep(seconds)
                loss = 1.0 / step + 0.01 * (step % 7)
                folder.append(
                    events.StepDone(
                        step=step,
                        loss=loss,
                        lr=1e-4,
                        grad_norm=1.0,
                        seconds=seconds,
                        samples=2,
                        memory_mb=2048,
                    )
                )
                if folder.take("preview") or step % 10 == 0:
                    preview(folder, step)
                    folder.append(events.Validation(step=step, loss=loss, by_sigma={}, seconds=0.1))
                if folder.take("save"):
                    folder.append(events.Saved(step=step, path=f"checkpoints/checkpoint-{step}", seconds=0.1))
                if folder.asked("stop"):
                    folder.append(events.Saved(step=step, path=f"checkpoints/checkpoint-{step}", seconds=0.1))
                    folder.append(events.Ended(status="stopped", step=step))
                    return
            folder.append(events.Ended(status="finished", step=steps))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]) if len(sys.argv) > 2 else 100,
        float(sys.argv[3]) if len(sys.argv) > 3 else 0.05,
    )
