"""The embedded model's training from nothing: one loop, resumable, and a script that ends in a pipeline folder."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from whitetuner.nano import dit, pretrain
from whitetuner.nano.fit import Fit, Plan
from whitetuner.nano.score import draw_with, load_pipeline

PLAN = Plan(steps=12, warmup=3, decay=0.5, ema=0.9)
NEVER = float("inf")


def _fit(path):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    fit = Fit("small", model, [torch.optim.AdamW(model.parameters(), 1e-2)], PLAN, path)
    fit.load()

    def loss_of(generator, step):
        return (model(torch.randn(8, 4, generator=generator)) - 1).square().mean()

    return fit, loss_of


def test_the_rate_warms_up_holds_and_falls_to_nothing():
    rates = [PLAN.rate(step) for step in range(PLAN.steps)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[3:7] == [1] * 4
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert 0 < rates[-1] < 0.2


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, loss_of = _fit(tmp_path / "whole.pt")
    assert whole.run(loss_of, seed=3, deadline=NEVER)

    first, loss_of = _fit(tmp_path / "parts.pt")
    first.plan = _same_rates_but_ends_at(5)
    first.run(loss_of, seed=3, deadline=NEVER)
    second, loss_of = _fit(tmp_path / "parts.pt")
    assert second.progress.step == 5
    assert second.run(loss_of, seed=3, deadline=NEVER)

    for key, weight in whole.weights.items():
        assert torch.equal(weight, second.weights[key])
        assert torch.equal(whole.average[key], second.average[key])


def _same_rates_but_ends_at(steps):
    class Shorter(Plan):
        def rate(self, step):
            return PLAN.rate(step)

    return Shorter(steps=steps, warmup=PLAN.warmup, decay=PLAN.decay, ema=PLAN.ema)


def test_a_deadline_stops_and_saves(tmp_path):
    fit, loss_of = _fit(tmp_path / "late.pt")
    assert not fit.run(loss_of, seed=0, deadline=time.monotonic() - 1)
    assert fit.progress.step == 0
    assert (tmp_path / "late.pt").exists()


def test_a_folder_with_a_training_in_it_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "state").mkdir()
    assert pretrain.main(["--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_the_transformer_needs_its_autoencoder(tmp_path, capsys):
    assert pretrain.main(["--out", str(tmp_path), "--stage", "dit"]) == 2
    assert "--stage vae" in capsys.readouterr().err


@pytest.mark.slow
def test_two_steps_of_each_stage_end_in_a_pipeline_folder_with_a_card(tmp_path, monkeypatch):
    plan = Plan(steps=2, warmup=1, decay=0.5, ema=0.9)
    for name in ("VAE_PLAN", "DECODER_PLAN", "DIT_PLAN"):
        monkeypatch.setattr(pretrain, name, plan)
    monkeypatch.setattr(pretrain, "SCORED", 4)
    monkeypatch.setattr(dit, "PICTURES", 512)
    assert pretrain.main(["--out", str(tmp_path), "--threads", "1"]) == 0
    images = draw_with(load_pipeline(tmp_path / "model"), ["a red circle on blue"], seed=0, steps=2)
    assert images[0].size == (64, 64)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| dit | 2 of 2 |" in card
    assert "| fresh captions | 4 |" in card
