"""The embedded model's training from nothing: one loop, resumable, and a script that ends in a pipeline folder."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whitetuner.nano import dit, edges, pretrain, vae
from whitetuner.nano.check import look
from whitetuner.nano.draw import draw_set
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


def test_the_edges_need_a_finished_transformer(tmp_path, monkeypatch, capsys):
    nothing = Plan(steps=0, warmup=1, decay=0.5, ema=0.9)
    monkeypatch.setattr(pretrain, "VAE_PLAN", nothing)
    monkeypatch.setattr(pretrain, "DECODER_PLAN", nothing)
    assert pretrain.main(["--out", str(tmp_path), "--stage", "edges", "--threads", "1"]) == 2
    assert "--stage dit" in capsys.readouterr().err


def test_tokens_become_the_latents_they_came_from():
    model, pictures = _vae_and_pictures(4)
    model.bn.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    model.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    latents = model.encode(pictures).latent_dist.mode()
    assert torch.allclose(vae.untokenized(model, vae.latent_tokens(model, pictures)), latents, atol=1e-5)


def test_a_place_between_two_colours_and_the_width_of_an_edge_are_measured_as_drawn():
    _, pictures = _vae_and_pictures(4)
    ground = pictures[:, :, :1, :1].expand_as(pictures)
    ink = pictures[:, :, 32:33, 32:33].expand_as(pictures)
    for share in (0, 0.25, 1):
        place = edges.place_of((1 - share) * ground + share * ink, pictures)
        assert torch.allclose(place, torch.full_like(place, share), atol=1e-4)
    assert edges.between(torch.tensor([0, 0.5, 1])).tolist() == [0, 1, 0]
    smooth = F.avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)
    for images in (pictures, smooth):
        widths = edges.edge_width_px(edges.place_of(images, pictures))
        judged = [look(image.permute(1, 2, 0).add(1).mul(127.5).round().numpy()).edge_px for image in images]
        assert widths.tolist() == pytest.approx(judged, rel=0.1)
    assert widths.min() > 3


def test_the_loss_of_the_edges_has_a_gradient_for_pictures_of_one_colour_too(monkeypatch):
    model, pictures = _vae_and_pictures(4)
    edges.optimizers(model)
    lesson = object.__new__(edges.Lesson)
    lesson.pictures, lesson.latents = pictures, model.encode(pictures).latent_dist.mode().detach()
    monkeypatch.setattr(edges, "blobs", lambda n, generator: torch.full((n, 3, 64, 64), 0.3))
    lesson.loss_of(model, torch.Generator().manual_seed(0), False).backward()
    for name, weight in model.named_parameters():
        assert weight.requires_grad == name.startswith(("decoder.", "post_quant_conv.")), name
        assert weight.grad is None or weight.grad.isfinite().all(), name


def _vae_and_pictures(n):
    """Filled shapes: the middle pixel is ink."""
    drawings = draw_set(n, 5, ("circle", "square"))
    return vae.new_vae(0), torch.stack([vae.as_tensor(drawing.image) for drawing in drawings])


@pytest.mark.slow
def test_two_steps_of_each_stage_end_in_a_pipeline_folder_with_a_card(tmp_path, monkeypatch):
    plan = Plan(steps=2, warmup=1, decay=0.5, ema=0.9)
    for name in ("VAE_PLAN", "DECODER_PLAN", "DIT_PLAN", "EDGES_PLAN"):
        monkeypatch.setattr(pretrain, name, plan)
    monkeypatch.setattr(pretrain, "SCORED", 4)
    monkeypatch.setattr(dit, "PICTURES", 512)
    monkeypatch.setattr(edges, "PICTURES", 100)
    assert pretrain.main(["--out", str(tmp_path), "--threads", "1"]) == 0
    images = draw_with(load_pipeline(tmp_path / "model"), ["a red circle on blue"], seed=0, steps=2)
    assert images[0].size == (64, 64)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| dit | 2 of 2 |" in card
    assert "| edges | 2 of 2 |" in card
    assert "| fresh captions | 4 |" in card
