"""Broken model folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from case import FAILED, Case, Place, Typed
from safetensors.torch import load_file, save_file
from sets import half

from whitetuner.families import registry

AREA = "model"


def weights(model: Path, part: str) -> Path:
    return next((model / part).glob("*.safetensors"))


def _another_class(model: Path) -> None:
    file = model / "transformer" / "config.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**document, "_class_name": "ZImageTransformer2DModel"}), encoding="utf-8")


def _other_size(model: Path) -> None:
    other = model.with_name(model.name + " 9b")
    registry.make_tiny("flux2-klein", str(other), "base-9b")
    shutil.copy(weights(other, "transformer"), weights(model, "transformer"))


def _pickled(model: Path) -> None:
    weights(model, "transformer").unlink()
    torch.save({}, model / "transformer" / "diffusion_pytorch_model.bin")


def _rewritten(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        file = weights(model, part)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return apply


def _header(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """The transformer's file, its bytes changed."""
    return lambda model: (file := weights(model, "transformer")).write_bytes(change(file.read_bytes()))


def _settings(part: str, **changes: object) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        file = model / part / "config.json"
        document = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**document, **changes}), encoding="utf-8")

    return apply


def _write(*parts: str, text: str) -> Callable[[Path], object]:
    return lambda model: model.joinpath(*parts).write_text(text, encoding="utf-8")


def _model(fault: str, break_it: Callable[[Path], object], *says: str) -> Case:
    """Told by check and train, and drawing ends, too."""

    def make(place: Place) -> list[Typed]:
        model = place.copy("model", "broken")
        break_it(model)
        config = place.config("m", **{"model.path": str(model)})
        return [["check", config], ["train", config]]

    return Case(AREA, fault, make, says)


def _draws(fault: str, break_it: Callable[[Path], object], *says: str, code: int = 2) -> Case:
    def make(place: Place) -> list[Typed]:
        model = place.copy("model", "broken")
        break_it(model)
        return [["sample", model, "--size", "64x64", "--steps", "1", "--out", place.folder / "drawn.png"]]

    return Case(AREA, f"{fault} (drawing)", make, says, code)


def _not_finite(part: str, ending: str) -> Callable[[Path], None]:
    return _rewritten(
        part, lambda t: next(v for k, v in t.items() if k.endswith(ending)).view(-1)[:1].fill_(torch.nan)
    )


_gone = {
    part: (lambda model, part=part: shutil.rmtree(model / part))
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
}

CASES = [
    *(
        _model(f"the part {part} is missing", _gone[part], f"no part '{part}'")
        for part in ("transformer", "vae", "text_encoder", "tokenizer")
    ),
    _draws("the part transformer is missing", _gone["transformer"], "transformer"),
    _draws("the VAE is missing", _gone["vae"], "vae"),
    _model(
        "model_index.json is missing",
        lambda m: (m / "model_index.json").unlink(),
        "model_index.json is missing",
    ),
    _model("model_index.json is torn", _write("model_index.json", text="{"), "model_index.json"),
    _model("another class of denoiser", _another_class, "ZImageTransformer2DModel"),
    _model(
        "the denoiser's settings are a list",
        _write("transformer", "config.json", text="[]"),
        "transformer",
        "config.json cannot be read",
    ),
    _model(
        "the denoiser's settings are missing",
        lambda m: (m / "transformer" / "config.json").unlink(),
        "config.json",
    ),
    _model("a setting of the denoiser is a word", _settings("transformer", num_layers="many"), "transformer"),
    _model("a setting of the denoiser is negative", _settings("transformer", num_layers=-1), "transformer"),
    _model(
        "a setting of the denoiser is huge",
        _settings("transformer", num_attention_heads=10**9),
        "transformer",
    ),
    _model(
        "the text encoder's settings are torn",
        _write("text_encoder", "config.json", text="{oops"),
        "text_encoder",
        "config.json",
    ),
    _model(
        "the tokenizer is torn",
        _write("tokenizer", "tokenizer.json", text="{oops"),
        "tokenizer.json cannot be read",
    ),
    _model(
        "the scheduler is torn",
        _write("scheduler", "scheduler_config.json", text="{"),
        "scheduler_config.json",
    ),
    _model(
        "the denoiser is cut in half",
        lambda m: half(weights(m, "transformer")),
        "cut off",
        "download it again",
    ),
    _model("the VAE is cut in half", lambda m: half(weights(m, "vae")), "vae", "cut off"),
    _model(
        "the text encoder is cut in half",
        lambda m: half(weights(m, "text_encoder")),
        "text_encoder",
        "cut off",
    ),
    _model("a weight file of zero bytes", lambda m: weights(m, "vae").write_bytes(b""), "0 bytes"),
    _model("no weight file at all", lambda m: weights(m, "transformer").unlink(), "holds no weights"),
    _model("a pickle in place of safetensors", _pickled, "pickle"),
    _model("a web page in place of safetensors", _header(lambda b: b"<html>" * 99), "transformer"),
    _model(
        "a header that says it is 2^60 bytes long",
        _header(lambda b: (1 << 60).to_bytes(8, "little") + b[8:]),
        "transformer",
    ),
    _model("a header that is no JSON", _header(lambda b: b[:8] + b"x" + b[9:]), "transformer"),
    _model(
        "a Git LFS pointer in place of weights",
        _header(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "transformer",
    ),
    _model("weights of another size", _other_size, "config.json does not have", "another model or size"),
    _model(
        "a weight of another shape",
        _rewritten("transformer", lambda t: t.update({"x_embedder.weight": torch.zeros(3, 3)})),
        "x_embedder.weight",
        "shape",
    ),
    _model(
        "a weight is missing",
        _rewritten("transformer", lambda t: t.pop("x_embedder.weight")),
        "x_embedder.weight",
    ),
    Case(
        AREA,
        "NaN in the denoiser",
        lambda p: (
            _not_finite("transformer", "attn.to_q.weight")(p.copy("model", "broken")),
            [["train", p.config("m", **{"model.path": str(p.folder / "broken")})]],
        )[1],
        ("transformer_blocks.0.attn.to_q", "not finite", "damaged"),
        FAILED,
    ),
    Case(
        AREA,
        "NaN in the VAE",
        lambda p: (
            _not_finite("vae", "encoder.conv_in.weight")(p.copy("model", "broken")),
            [["train", p.config("m", **{"model.path": str(p.folder / "broken")})]],
        )[1],
        ("'vae'", "0.png", "not finite"),
        FAILED,
    ),
    Case(
        AREA,
        "NaN in the text encoder",
        lambda p: (
            _not_finite("text_encoder", "q_proj.weight")(p.copy("model", "broken")),
            [["train", p.config("m", **{"model.path": str(p.folder / "broken")})]],
        )[1],
        ("'text'", "picture", "not finite"),
        FAILED,
    ),
    _draws("NaN in the denoiser", _not_finite("transformer", "attn.to_q.weight"), "not finite", code=FAILED),
    Case(
        AREA,
        "the folder is not there",
        lambda p: [["train", p.config("m", **{"model.path": str(p.folder / "nope")})]],
        ("model.path", "nope"),
    ),
    Case(
        AREA,
        "a folder of pictures for a model",
        lambda p: [["train", p.config("m", **{"model.path": str(p.folder / "data")})]],
        ("model.path", "data"),
    ),
    Case(
        AREA,
        "an adapter file for a model",
        lambda p: [["train", p.config("m", **{"model.path": str(p.adapter)})]],
        ("model.transformer", "inspect"),
    ),
    Case(
        AREA,
        "a single file that is a picture",
        lambda p: [["train", p.config("m", **{"model.transformer": str(p.folder / "data" / "0.png")})]],
        ("0.png", "safetensors"),
    ),
    Case(
        AREA,
        "a VAE that is an adapter file",
        lambda p: [["train", p.config("m", **{"model.vae": str(p.adapter)})]],
        ("vae",),
    ),
    Case(
        AREA,
        "a built-in model that is none",
        lambda p: [["train", p.config("m", **{"model.path": "builtin:giga"})]],
        ("builtin:",),
    ),
]
