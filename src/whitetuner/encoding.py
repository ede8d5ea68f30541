"""How the encoders' models are held while they encode: as released, quantised, whole or streamed, and how long that takes.

An encoder that says its word in one pass is never quantised unasked: streamed it waits about a second for its weights, once for
each caption, and says the same to the bit. One that writes token by token (GLM-Image's language model) goes through all its
weights more than a thousand times for one plan: where it does not fit on the card as released, int8 turns hours into minutes.
Chosen by the card's size and not by what is free at the moment, so that the next run finds the same entries in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from whitetuner.config.schema import Config
from whitetuner.family import BuildFn, Encoder, Family, passes_of
from whitetuner.memory.machine import CONTEXT_BYTES, GIB
from whitetuner.memory.phases import PhaseBuild, held_within, longest_list
from whitetuner.memory.plan import in_seconds
from whitetuner.memory.quantize import Kind, QuantLinear
from whitetuner.memory.skeleton import sketch_module
from whitetuner.memory.weigh import Weights, weigh
from whitetuner.records import Size

_QUANTISED: dict[str, Kind] = {"int8": "int8", "fp8": "fp8"}
#: Of one token at the least, whatever the card. GLM-Image's README: a picture of 1024 px takes 64 s on an H100, 1280 of its
#: 1380 passes through a model are the language model's.
_TOKEN_S = 0.05


@dataclass(frozen=True)
class Looked:
    """An encoder's model in shapes, as released and quantised. passes: through the weights, for one caption or picture."""

    encoder: str
    folder: Path
    passes: int
    weights: Mapping[str, Weights]


@dataclass(frozen=True)
class Held:
    """One encoder's model. base: "bf16", "fp32", "int8" or "fp8"; streamed, blocks: of its blocks; seconds: of one caption or
    picture, at least, 0 where it does not wait for weights; too_large: GB that it needs though streamed, where there are fewer"""

    encoder: str
    part: str
    base: str
    gb: float
    streamed: int
    blocks: int
    seconds: float
    why: str = ""
    too_large: float = 0.0

    def sentence(self) -> str:
        if self.too_large:
            return f"{self.part} does not fit on the card though streamed: it needs {self.too_large:.1f} GB for {self.encoder}"
        where = f"{self.streamed} of {self.blocks} blocks streamed" if self.streamed else "all on the card"
        where = f"{where}, about {in_seconds(self.seconds)} a caption" if self.seconds else where
        where = f"{where} ({self.why})" if self.why else where
        return f"{self.part} while caching: {self.base}, {self.gb:.1f} GB, {where}"


@dataclass(frozen=True)
class Encoding:
    """What a run does with its encoders.

    quantised: name of an encoder -> format of its weights, for those that are not as released;  folders: the same by the folder
    that the model is read from;  held: on a card, every encoder's model whose weights could be quantised
    """

    quantised: Mapping[str, Kind] = field(default_factory=dict)
    folders: Mapping[Path, Kind] = field(default_factory=dict)
    held: tuple[Held, ...] = ()

    def build(self, phase: BuildFn) -> BuildFn:
        """The same BuildFn with each model in the format chosen for it."""
        if not self.folders:
            return phase
        assert isinstance(phase, PhaseBuild)

        def built(cls: type, folder: Path, *, keep_precise: Sequence[str] = ()) -> Any:
            return phase(cls, folder, keep_precise=keep_precise, quantize=self.folders.get(folder))

        return built

    def facts(self) -> dict[str, Any]:
        """For run.json: what an "auto" came to."""
        return {"encoder_base": dict(self.quantised)}

    def words(self) -> list[str]:
        return [one.sentence() for one in self.held]

    def to_json(self) -> list[dict[str, Any]]:
        return [{**asdict(one), "sentence": one.sentence()} for one in self.held]


def encoding_of(
    config: Config,
    family: Family,
    device: torch.device,
    dtype: torch.dtype,
    earlier: Mapping[str, Any] | None = None,
) -> Encoding:
    """What a run does on this device. earlier: `resolved` of run.json, whose choice an "auto" keeps. Reads config files only."""
    before = (
        earlier.get("encoder_base", {}) if earlier else None
    )  # a run older than this choice had none quantised
    return encoding_on(
        config.memory.encoder_base,
        family,
        config.model.task,
        dtype,
        card_bytes(device, config.memory.limit_gb),
        size=family.spec.default_size,
        before=before,
    )


def card_bytes(device: torch.device, limit_gb: float | None) -> int | None:
    """What may be used of a card, whatever else is on it just now; None on a CPU, where nothing is saved by streaming."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return total if limit_gb is None else min(total, int(limit_gb * GIB))


def encoding_on(
    asked: str,
    family: Family,
    task: str,
    dtype: torch.dtype,
    card: int | None,
    *,
    size: Size,
    link_bytes_per_s: float = 12e9,
    before: Mapping[str, str] | None = None,
) -> Encoding:
    """asked: memory.encoder_base; card: bytes of it that may be used, None: there is none."""
    if card is None and asked in ("auto", "bf16") and not before:
        return Encoding()
    looked = look_at(family.encoders(task), dtype, _QUANTISED.get(asked, "int8"), size)
    return chosen(looked, asked, dtype, card, link_bytes_per_s, before)


def look_at(encoders: Sequence[Encoder], dtype: torch.dtype, kind: Kind, size: Size) -> tuple[Looked, ...]:
    """Every encoder's model that quantising changes, in shapes. kind: the format besides the one released."""
    found: list[Looked] = []
    for encoder in encoders:

        def build(cls: type, folder: Path, *, keep_precise: Sequence[str] = (), by: Encoder = encoder) -> Any:
            module = sketch_module(cls, folder, keep_precise=keep_precise, dtype=dtype)
            small = sketch_module(cls, folder, keep_precise=keep_precise, dtype=dtype, quantize=kind)
            if any(isinstance(one, QuantLinear) for one in small.modules()):
                weights = {_name(dtype): _weighed(module), kind: _weighed(small)}
                found.append(Looked(by.name, folder, passes_of(by, size), weights))
            return module

        encoder.load(build)
        encoder.free()
    return tuple(found)


def chosen(
    looked: Sequence[Looked],
    asked: str,
    dtype: torch.dtype,
    card: int | None,
    link_bytes_per_s: float,
    before: Mapping[str, str] | None = None,
) -> Encoding:
    """The format of each. before: what an "auto" came to when the run began."""
    quantised: dict[str, Kind] = {}
    folders: dict[Path, Kind] = {}
    held: list[Held] = []
    for one in looked:
        kind, why = _QUANTISED.get(asked), ""
        if asked == "auto" and before is not None:
            kind = _QUANTISED.get(before.get(one.encoder, ""))
        elif asked == "auto" and card is not None and one.passes > 1:
            whole = held_within(one.weights[_name(dtype)], card - CONTEXT_BYTES)
            if whole.residents is not None:
                kind = "int8"
                size = sum(one.weights[_name(dtype)].blocks) + one.weights[_name(dtype)].rest
                why = f"as {_name(dtype)} it has {size / GIB:.1f} GB, more than the card"
        if kind is not None:
            quantised[one.encoder] = folders[one.folder] = kind
        if card is not None:
            held.append(_held(one, kind or _name(dtype), card - CONTEXT_BYTES, link_bytes_per_s, why))
    return Encoding(quantised, folders, tuple(held))


def _held(one: Looked, base: str, budget: int, link_bytes_per_s: float, why: str) -> Held:
    weights = one.weights[base]
    within = held_within(weights, budget)
    kept = within.residents
    streamed = [] if kept is None else [size for i, size in enumerate(weights.blocks) if i not in kept]
    seconds = sum(streamed) / link_bytes_per_s
    if one.passes > 1:
        seconds = one.passes * max(seconds, _TOKEN_S)
    return Held(
        one.encoder,
        one.folder.name,
        base,
        (sum(weights.blocks) + weights.rest) / GIB,
        len(streamed),
        len(weights.blocks),
        seconds,
        why,
        within.needed_bytes / GIB if within.needed_bytes > budget else 0.0,
    )


def _weighed(module: torch.nn.Module) -> Weights:
    lists = longest_list(module)
    if lists:
        return weigh(module, lists)
    tensors = (*module.parameters(), *module.buffers())
    return Weights((), sum(one.numel() * one.element_size() for one in tensors))


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
