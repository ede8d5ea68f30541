"""Runs over the tiny models of the registry: they learn, resume to the bit, and fail in the user's words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from whitetuner import recipe
from whitetuner.config.load import dump_config, load_config
from whitetuner.errors import UserError
from whitetuner.evidence import checkpoint, digest, losses, start_training
from whitetuner.families import registry
from whitetuner.records import Batch
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

FAMILIES = [
    name for name in registry.FAMILIES if "t2i" in registry.spec(name).tasks
]  # videos: test_video_run.py


def pictures(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    for index in range(count):
        pixels = np.random.default_rng(index).integers(
            0, 255, (96, 96 if index % 2 else 128, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture number {index}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dotted config values of a short run over a tiny model, 5 pictures of two shapes."""
    folder = tmp_path_factory.mktemp(request.param)
    registry.make_tiny(request.param, str(folder / "model"))
    return tiny_values(request.param, folder / "model", pictures(folder / "data"), folder)


def train(place: Mapping[str, Any], name: str, resume: str | None = None, **more: Any) -> recipe.Result:
    return recipe.run(load_config(None, base={**place, "run.name": name, **more}), resume=resume)


def happened(folder: Path) -> list[events.Event]:
    return events.read(folder / "events.jsonl")[0]


def test_a_run_lowers_its_validation_loss_and_leaves_every_file(place: dict[str, Any]) -> None:
    more = {
        "run.steps": 60,
        "validation.every": 30,
        "preview.every": 30,
        "preview.prompts": [{"text": "picture number 1", "steps": 2}],
        "save.every": 30,
        "optimizer.ema": 0.9,
        "log.tensorboard": True,
    }
    result = train(place, "learns", **more)
    found = happened(result.folder)
    validation = {event.step: event.loss for event in found if isinstance(event, events.Validation)}
    assert list(validation) == [0, 30, 60] and validation[60] < validation[0]
    for path in (
        "config.toml",
        "run.json",
        "report.html",
        "samples/step-000000/00.png",
        "samples/step-000060/00.png",
    ):
        assert (result.folder / path).is_file(), path
    assert next(result.folder.glob("tensorboard/train_60steps_1gpu_*/events*")).stat().st_size > 0
    named, plain, diffusers = result.final
    assert plain.read_bytes() == named.read_bytes() and diffusers.is_file()
    assert "random" in (result.folder / "report.html").read_text(encoding="utf-8")
    changes = [event.weight_change for event in found if isinstance(event, events.StepDone)]
    assert changes[-1] > changes[0] > 0


def test_stopped_and_resumed_is_never_interrupted(place: dict[str, Any]) -> None:
    """E8 within one process: every tensor, loss and noise level; dropout, EMA and uneven batches included."""
    more = {
        "run.steps": 9,
        "save.every": 3,
        "optimizer.ema": 0.9,
        "data.caption_dropout": 0.5,
        "validation.every": 4,
    }
    whole = train(place, "whole", **more)
    train(place, "parts", **{**more, "run.steps": 3})
    first = checkpoint(whole.folder.parent / "parts", 3)
    assert digest(first) == digest(checkpoint(whole.folder, 3))
    parts = train(place, "parts", "latest", **{**more, "run.steps": 7, "memory.gradient_checkpointing": True})
    parts = train(place, "parts", "latest", **more)
    assert digest(checkpoint(parts.folder, 9)) == digest(checkpoint(whole.folder, 9))
    assert losses(parts.folder) == losses(whole.folder)
    assert parts.final[0].read_bytes() != b"" and digest(load_file(parts.final[0])) == digest(
        load_file(whole.final[0])
    )


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor", "prodigy", "torch.optim:SGD"])
def test_every_optimizer_resumes_to_the_bit(place: dict[str, Any], name: str) -> None:
    short = name.replace(":", ".")
    more = {"run.steps": 6, "save.every": 3, "optimizer.name": name, "optimizer.lr": 1e-3}
    whole = train(place, f"w-{short}", **more)
    train(place, f"p-{short}", **{**more, "run.steps": 3})
    parts = train(place, f"p-{short}", "latest", **more)
    assert digest(checkpoint(parts.folder, 6)) == digest(checkpoint(whole.folder, 6))


def test_recompute_changes_no_bit(place: dict[str, Any]) -> None:
    """E6, through the whole recipe; that k x b accumulates to 1 x kb is in selftest and tests/numerics."""
    plain = checkpoint(train(place, "plain", **{"run.steps": 3}).folder, 3)
    again = checkpoint(
        train(place, "again", **{"run.steps": 3, "memory.gradient_checkpointing": True}).folder, 3
    )
    assert digest(again) == digest(plain)


def test_lora_learns_too_and_begins_from_a_file(place: dict[str, Any]) -> None:
    result = train(place, "lora", **{"method.kind": "lora", "method.rank": 4, "run.steps": 6})
    assert (result.folder / "final" / "lora" / "lora_diffusers.safetensors").is_file()
    more = {"method.kind": "lora", "method.rank": 4, "run.steps": 1, "optimizer.lr": 1e-12, "save.every": 1}
    again = train(place, "lora2", **more, **{"method.init_from": str(result.final[1])})
    before, after = checkpoint(result.folder, 6), checkpoint(again.folder, 1)
    name = next(key for key in before if "lora_B" in key)
    assert torch.allclose(before[name], after[name], atol=1e-6)


def test_nan_stops_before_it_is_applied_and_names_the_module(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from whitetuner.train import loop

    original, calls = loop.step_loss, []

    def poisoned(family: Any, modules: Any, part: str, batch: Batch, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) >= 4:
            batch = Batch(
                batch.items, batch.visits, {**batch.fields, "latent": batch["latent"] * float("inf")}
            )
        return original(family, modules, part, batch, *rest)

    monkeypatch.setattr(loop, "step_loss", poisoned)
    with pytest.raises(UserError) as caught:
        train(place, "nan", **{"run.steps": 9, "save.every": 0})
    # What sees the picture first, of our families; of another one: a module of its denoiser.
    sees = dict.fromkeys(("flux2-klein", "zimage", "zimage-v2"), "x_embedder")
    sees |= {"qwen-image": "img_in", "glm-image": "image_projector"}
    named = re.search(r"first bad: ([\w.-]+);", str(caught.value))
    assert caught.value.code == 1 and "step 4" in str(caught.value) and named is not None
    assert sees.get(place["model.family"], named[1]) in named[1]
    folder = Path(place["run.output_dir"]) / "nan"
    saved = checkpoint(folder, 3)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values() if tensor.is_floating_point())


def test_changed_data_is_refused_on_resume(place: dict[str, Any]) -> None:
    train(place, "data", **{"run.steps": 2})
    caption = Path(place["data.images"]) / "0.txt"
    before = caption.read_text(encoding="utf-8")
    try:
        caption.write_text("something else", encoding="utf-8")
        with pytest.raises(UserError, match="not those this run began with"):
            train(place, "data", "latest", **{"run.steps": 4})
    finally:
        caption.write_text(before, encoding="utf-8")


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_used(place: dict[str, Any]) -> None:
    more = {"run.steps": 6, "save.every": 2}
    whole = train(place, "torn", **more)
    expected = digest(checkpoint(whole.folder, 6))
    file = whole.folder / "checkpoints" / "checkpoint-6" / "lokr" / "lokr.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    again = train(place, "torn", "latest", **more)
    assert digest(checkpoint(again.folder, 6)) == expected
    warnings = [
        e.text for e in happened(again.folder) if isinstance(e, events.Message) and e.level == "warning"
    ]
    assert any("torn" in text for text in warnings)


def test_resume_with_nothing_saved_starts_anew_and_says_so(place: dict[str, Any]) -> None:
    result = train(place, "anew", "latest", **{"run.steps": 2})
    assert any("starts anew" in e.text for e in happened(result.folder) if isinstance(e, events.Message))


def test_held_out_pictures_are_not_trained_on(place: dict[str, Any]) -> None:
    result = train(place, "held", **{"run.steps": 4, "validation.every": 4, "validation.share": 0.4})
    document = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    assert document["resolved"]["items"] == 3
    found = [e for e in happened(result.folder) if isinstance(e, events.Validation)]
    assert [e.step for e in found] == [0, 4] and all(e.held_out for e in found)
    for event in found:
        losses = list(event.by_picture.values())
        assert len(losses) == 2 and losses == sorted(losses, reverse=True)
        assert sum(losses) / 2 == pytest.approx(event.loss)


def wait_for(folder: Path, process: subprocess.Popen[bytes], step: int) -> None:
    while process.poll() is None:
        found, _ = events.read(folder / "events.jsonl")
        if any(isinstance(e, events.StepDone) and e.step >= step for e in found):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended ({process.returncode}) before step {step}")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_a_signal_saves_and_exits_with_130_and_resume_is_exact(place: dict[str, Any]) -> None:
    values = {**place, "run.steps": 400, "run.name": "signal"}
    config = Path(place["run.output_dir"]) / "signal.toml"
    config.write_text(dump_config(load_config(None, base=values).config), encoding="utf-8")
    folder = Path(place["run.output_dir"]) / "signal"
    process = start_training(config)
    wait_for(folder, process, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    last = happened(folder)[-1]
    assert isinstance(last, events.Ended) and last.status == "stopped"
    step = last.step
    whole = train(place, "unsignalled", **{"run.steps": step})
    assert digest(checkpoint(folder, step)) == digest(checkpoint(whole.folder, step))


def test_the_command_line_says_two_for_a_second_start(place: dict[str, Any]) -> None:
    values = {**place, "run.steps": 1, "run.name": "twice"}
    config = Path(place["run.output_dir"]) / "twice.toml"
    config.write_text(dump_config(load_config(None, base=values).config), encoding="utf-8")
    train(place, "twice", **{"run.steps": 1})
    done = subprocess.run(
        [sys.executable, "-m", "whitetuner", "train", str(config)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 2 and "--resume latest" in done.stderr and "Traceback" not in done.stderr


def test_the_python_entrance_steps_saves_and_goes_on(place: dict[str, Any]) -> None:
    from whitetuner import Trainer

    values = {**place, "run.name": "api", "run.steps": 6}
    with Trainer(values) as trainer:
        first = [trainer.train_step() for _ in range(3)]
        assert trainer.step == 3 and trainer.save_checkpoint().name == "checkpoint-3"
    with Trainer(values) as trainer:
        trainer.load_checkpoint("latest")
        assert trainer.step == 3
        result = trainer.train()
    whole = train(place, "api-whole", **{"run.steps": 6})
    assert digest(checkpoint(result.folder, 6)) == digest(checkpoint(whole.folder, 6))
    assert first == [row[1] for row in losses(whole.folder)[:3]]


def test_a_base_of_bf16_trains_in_bf16_and_resumes_to_the_bit(place: dict[str, Any]) -> None:
    more = {"run.steps": 4, "save.every": 2, "memory.base": "bf16"}
    whole = train(place, "bf16", **more)
    assert (
        json.loads((whole.folder / "run.json").read_text(encoding="utf-8"))["resolved"]["dtype"] == "bfloat16"
    )
    train(place, "bf16-parts", **{**more, "run.steps": 2})
    parts = train(place, "bf16-parts", "latest", **more)
    assert digest(checkpoint(parts.folder, 4)) == digest(checkpoint(whole.folder, 4))


@pytest.mark.parametrize("change", [{"memory.dtype": "bf16"}, {"noise.shift": 2.0}, {"data.batch_size": 1}])
def test_a_refused_resume_leaves_every_file_as_it_was(place: dict[str, Any], change: dict[str, Any]) -> None:
    name = "refused-" + next(iter(change))
    result = train(place, name, **{"run.steps": 3, "save.every": 2})
    before = {path: path.read_bytes() for path in sorted(result.folder.rglob("*")) if path.is_file()}
    with pytest.raises(UserError):
        train(place, name, "latest", **{"run.steps": 5, **change})
    assert {path: path.read_bytes() for path in sorted(result.folder.rglob("*")) if path.is_file()} == before
