"""Files that are no adapter, or none for this model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from case import Case, Place, Typed
from safetensors.torch import load_file, save_file

AREA = "adapter"
Make = Callable[[Path, Path], object]


def _raw(header: object, body: bytes = b"") -> Callable[[Path, Path], object]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda file, good: file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def _changed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Make:
    return lambda file, good: save_file(change(load_file(good)), file)


def _everywhere(fault: str, make_file: Make, *says: str, inspect: bool = False, export: bool = True) -> Case:
    """Exporting, drawing with it and training from it all refuse it; inspect: so does `inspect`; export: so does that."""

    def make(place: Place) -> list[Typed]:
        file = place.folder / "given.safetensors"
        make_file(file, place.adapter)
        out = place.folder / "never.safetensors"
        words: list[Typed] = [["inspect", file]] if inspect else []
        words += [["export", file, out, "--to", "comfyui"]] if export else []
        draw = [
            "sample",
            place.folder / "model",
            "--adapter",
            file,
            "--size",
            "64x64",
            "--out",
            out.with_suffix(".png"),
        ]
        return [*words, draw, ["train", place.config("a"), "--set", f"method.init_from='{file}'"]]

    # Training from a file of another size names the option instead.
    return Case(AREA, fault, make, (*(["given.safetensors"] if export else []), *says))


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name, tensor in tensors.items() if tensor.ndim == 2)


CASES = [
    _everywhere("the file is not there", lambda f, g: None, inspect=True),
    _everywhere("a folder in place of the file", lambda f, g: f.mkdir(), inspect=True),
    _everywhere("zero bytes", lambda f, g: f.write_bytes(b""), "0 bytes", inspect=True),
    _everywhere("cut off at its end", lambda f, g: f.write_bytes(g.read_bytes()[:-100]), inspect=True),
    _everywhere("cut off in its header", lambda f, g: f.write_bytes(g.read_bytes()[:100]), inspect=True),
    _everywhere("bytes too many", lambda f, g: f.write_bytes(g.read_bytes() + b"more"), inspect=True),
    _everywhere("a web page", lambda f, g: f.write_bytes(b"<html>" * 99), inspect=True),
    _everywhere("a pickle", lambda f, g: torch.save({"a": torch.zeros(2)}, f), "pickle", inspect=True),
    _everywhere("a header of 2^63 bytes", lambda f, g: f.write_bytes(b"\xff" * 8 + b"{}"), inspect=True),
    _everywhere("a header that is a list", _raw([]), inspect=True),
    _everywhere("a header that is no text", _raw(b"\xff\xfe{}"), inspect=True),
    _everywhere("a header without tensors", _raw({}), inspect=False),
    _everywhere(
        "a dtype that is not there",
        _raw({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        inspect=True,
    ),
    _everywhere(
        "a shape that the bytes do not have",
        _raw({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, bytes(4)),
        inspect=True,
    ),
    _everywhere(
        "a shape of 2^62 x 4",
        _raw({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}}, bytes(4)),
        inspect=True,
    ),
    _everywhere(
        "bytes beyond the file",
        _raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4000, 4004]}}, bytes(4)),
        inspect=True,
    ),
    _everywhere(
        "two tensors over the same bytes",
        _raw({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
        inspect=True,
    ),
    _everywhere(
        "some tensor that is no adapter's",
        lambda f, g: save_file({"foo.weight": torch.zeros(3)}, f),
        "inspect",
    ),
    _everywhere("numbers that are not finite", _changed(lambda t: {k: v * torch.nan for k, v in t.items()})),
    _everywhere(
        "whole numbers", _changed(lambda t: {k: v.to(torch.int8) for k, v in t.items()}), "whole numbers"
    ),
    _everywhere(
        "half of a layer is missing", _changed(lambda t: {k: v for k, v in t.items() if k != _first(t)})
    ),
    _everywhere(
        "factors that do not fit each other", _changed(lambda t: {**t, _first(t): torch.zeros(3, 3, 3)})
    ),
    _everywhere(
        "layers that this model does not have", _changed(lambda t: {f"nowhere.{k}": v for k, v in t.items()})
    ),
    _everywhere(
        "an adapter of another size of model",
        _changed(lambda t: {k: torch.zeros(8, 8) if k.endswith("w1") else v for k, v in t.items()}),
        "another",
        export=False,
    ),
    _everywhere(
        "a LoHa", lambda f, g: save_file({"diffusion_model.a.hada_w1_a": torch.zeros(2, 2)}, f), "LoHa"
    ),
    _everywhere(
        "a DoRA",
        lambda f, g: save_file(
            {
                "transformer.a.lora_A.weight": torch.zeros(2, 4),
                "transformer.a.lora_B.weight": torch.zeros(4, 2),
                "transformer.a.lora_magnitude_vector": torch.zeros(4),
            },
            f,
        ),
    ),
    _everywhere(
        "a whole model",
        lambda f, g: f.write_bytes(
            next((g.parents[4] / "model" / "transformer").glob("*.safetensors")).read_bytes()
        ),
        "no LoKr or LoRA",
        export=False,
    ),
    Case(
        AREA,
        "exported onto itself",
        lambda p: [["export", p.adapter, p.adapter, "--to", "diffusers"]],
        ("same file",),
    ),
    Case(
        AREA,
        "exported for a program that is not known",
        lambda p: [["export", p.adapter, p.folder / "o.safetensors", "--to", "a1111"]],
        ("--to", "comfyui"),
    ),
    Case(
        AREA,
        "exported into a folder that is a file",
        lambda p: [["export", p.adapter, p.folder / "finished.toml" / "o.safetensors", "--to", "diffusers"]],
        ("o.safetensors",),
        1,
    ),
    Case(
        AREA,
        "exported for a family that is not known",
        lambda p: [
            ["export", p.adapter, p.folder / "o.safetensors", "--to", "diffusers", "--family", "sdxl"]
        ],
        ("sdxl", "flux2-klein"),
    ),
    Case(
        AREA,
        "a LoRA run from a LoKr file",
        lambda p: [
            ["train", p.config("a", **{"method.kind": "lora"}), "--set", f"method.init_from='{p.adapter}'"]
        ],
        ("method",),
    ),
]
