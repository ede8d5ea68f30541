"""Everything a run needs of its data before the denoiser loads: items, encoded; their order; previews; validation."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from whitetuner.config.schema import Config
from whitetuner.data.cache import Cached, Inputs, build_cache
from whitetuner.data.loader import Loader, stack
from whitetuner.data.mask_fields import MaskEncoder, counting
from whitetuner.data.order import ALL, Order, Shares
from whitetuner.data.scan import PictureSet, Scan, scan
from whitetuner.encoding import Encoding, encoding_of
from whitetuner.errors import UserError
from whitetuner.family import BuildFn, Encoder, Family
from whitetuner.memory.build import Build
from whitetuner.memory.phases import PhaseBuild, device_budget
from whitetuner.models import films_of
from whitetuner.records import Batch, Item
from whitetuner.resolve import Resolved, resolve
from whitetuner.scenes import check_previews, scene_of, sides_of
from whitetuner.tongue import say
from whitetuner.train.preview import Scene

#: (phase, done, total); it may raise to stop, what is cached stays.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """items: trained on; validation: batches at fixed noise, held_out when they are not trained on; shift: of the noise
    schedule; steps: optimizer steps of the run."""

    items: tuple[Item, ...]
    sets: tuple[PictureSet, ...]
    cached: Cached
    order: Order
    steps: int
    shift: float
    data_hash: str
    validation: list[Batch] = field(default_factory=list)
    held_out: bool = False
    scenes: list[Scene] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shares: Shares = ALL

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        sizes = Counter(
            f"{item.size.width}x{item.size.height}" + (f"x{item.size.frames}" if item.clips else "")
            for item in self.items
        )
        return {
            "data_hash": self.data_hash,
            "items": len(self.items),
            "sizes": dict(sizes.most_common()),
            "batches_per_epoch": self.order.batches_per_epoch,
            "steps": self.steps,
            "shift": self.shift,
            "batches_per_step": self.shares.per_step,
        }

    def loader(self, start: int) -> Loader:
        """Batches of this rank's share from the step after `start` steps on."""
        return Loader(self.cached, self.items, self.order, self.sets, start=start, shares=self.shares)


def find_items(config: Config, family: Family, progress: Progress | None = None) -> Scan:
    """The pictures of the config's data sets, cut to this model's sizes. Raises UserErrors with everything to mend."""
    return scan(
        config.data_sets(),
        family.stride(),
        min_size_px=min(family.spec.min_size_px, *_smallest(config)),
        most_conditions=family.spec.references_at_most(family.options, family.paths),
        index_folder=cache_folder(config),
        films=films_of(config, family.spec, family.options, family.paths),
        progress=None if progress is None else lambda done, total: progress("scan", done, total),
    )


def cache_folder(config: Config) -> Path:
    """Where the encoded data set lies: data.cache_dir, else "cache" beside the runs."""
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.run.output_dir) / "cache"


def prepare_data(
    config: Config,
    resolved: Resolved,
    build: BuildFn,
    progress: Progress | None = None,
    found: Scan | None = None,
    encoding: Encoding | None = None,
    *,
    shares: Shares | None = None,
    cache_share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] | None = None,
) -> Prepared:
    """Scans (unless that was done already), encodes and orders. Raises UserError(s); what was encoded stays.

    encoding: how the encoders are held; None: as the config says, begun anew
    shares: of each step; None: one process has all; cache_share, wait: see build_cache
    """
    shares = Shares(config.optimizer.gradient_accumulation) if shares is None else shares
    family = resolved.family
    if encoding is None:
        encoding = encoding_of(config, family, resolved.device, resolved.dtype)
    found = find_items(config, family, progress) if found is None else found
    notes = found.notes()
    training, held = _split(found.items, config.validation.share, config.run.seed)
    check_previews(config, family)
    # Whether a batch can be filled does not hang on shapes: told before hours of encoding.
    Order(training, [0] * len(training), found.sets, config.data.batch_size, config.run.seed)
    prompts = config.preview.prompts if config.preview.every else []
    wanted = [one for prompt in prompts for one in sides_of(prompt, config, family, training[0].size)]
    cached = _cache(config, resolved, build, found, wanted, progress, encoding, cache_share, wait)
    order = Order(
        training,
        [cached.shape_key(item) for item in training],
        found.sets,
        config.data.batch_size,
        config.run.seed,
    )
    if order.small_batches:
        notes.append(
            f"{order.small_batches} of {order.batches_per_epoch} batches an epoch are smaller than {config.data.batch_size}: "
            "the pictures of a size do not divide evenly; every picture counts the same"
        )
    chosen = (held or list(training))[: config.validation.items] if config.validation.every else []
    return Prepared(
        items=tuple(training),
        sets=found.sets,
        cached=cached,
        order=order,
        steps=_steps(config, order, shares.per_step),
        shift=shift_of(config, family, found),
        data_hash=data_hash(found, config),
        validation=[stack([cached.sample(item, 0)], cached) for item in chosen],
        held_out=bool(held),
        scenes=[scene_of(prompt, config, family, cached, training[0].size) for prompt in prompts],
        notes=notes,
        shares=shares,
    )


def cache_only(config: Config) -> tuple[int, float]:
    """(pictures encoded or found so, seconds): the `cache` word."""
    began = time.perf_counter()
    resolved = resolve(config)
    build = phase_build(config, resolved, say)
    encoding = encoding_of(config, resolved.family, resolved.device, resolved.dtype)
    for line in encoding.words():
        say(line)
    try:
        made = prepare_data(config, resolved, build, encoding=encoding)
        return len(made.items), time.perf_counter() - began
    finally:
        build.release()


def phase_build(config: Config, resolved: Resolved, tell: Callable[[str], None]) -> PhaseBuild:
    """Makes encoders and decoders within the memory that the config allows."""
    budget = device_budget(resolved.device, config.memory.limit_gb)
    return PhaseBuild(Build(resolved.dtype, resolved.device), budget, tell=tell)


def encoded_twice(
    config: Config, family: Family, build: BuildFn
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(from the cache, encoded just now) for every item: E9."""
    resolved = Resolved(family, torch.device("cpu"), torch.float32)
    found = find_items(config, family)
    cached = _cache(config, resolved, build, found, [], None, Encoding())
    before: dict[str, torch.Tensor] = {}
    now: dict[str, torch.Tensor] = {}
    for encoder in _encoders(config, family, found):
        encoder.load(build)
        facts = next(one for one in cached.encoders if one.name == encoder.name)
        for item in found.items:
            inputs = Inputs.of(item)
            said = encoder.encode(facts.give(inputs)) if facts.applies(inputs) else {}
            if inputs.mask is not None and "mask" in said:
                said["mask"] = counting(said["mask"], inputs.mask.floor, now[f"{item.id}/latent"])
            now.update({f"{item.id}/{name}": tensor for name, tensor in said.items()})
        encoder.free()
    for item in found.items:
        before.update({f"{item.id}/{name}": tensor for name, tensor in cached.sample(item, 0).fields.items()})
    return before, now


def _encoders(config: Config, family: Family, found: Scan) -> list[Encoder]:
    """Those of the family, and after them that of the masks where there are any."""
    masks: list[Encoder] = [MaskEncoder()] if any(item.mask is not None for item in found.items) else []
    return [*family.encoders(config.model.task), *masks]


def _cache(
    config: Config,
    resolved: Resolved,
    build: BuildFn,
    found: Scan,
    prompts: list[Inputs],
    progress: Progress | None,
    encoding: Encoding,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] | None = None,
) -> Cached:
    return build_cache(
        found.items,
        _encoders(config, resolved.family, found),
        encoding.build(build),
        cache_folder(config),
        extra=prompts,
        uncond=any(one.caption_dropout > 0 for one in found.sets),
        precision=str(resolved.dtype),
        quantised=encoding.quantised,
        workers=None if config.data.workers == "auto" else config.data.workers,
        share=share,
        wait=wait,
        progress=None
        if progress is None
        else lambda name, done, total, seconds: progress(f"cache {name}", done, total),
    )


def _split(items: tuple[Item, ...], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(trained on, held out): chosen by content, so that adding a picture moves no other one across."""
    if share <= 0:
        return list(items), []
    count = min(len(items) - 1, max(1, round(share * len(items))))
    by_lot = sorted(items, key=lambda item: hashlib.blake2b(f"{seed}|{item.digest}".encode()).digest())
    held = {item.id for item in by_lot[:count]}
    return [item for item in items if item.id not in held], [item for item in items if item.id in held]


def _steps(config: Config, order: Order, per_step: int) -> int:
    if config.run.epochs is not None:
        return max(1, math.ceil(order.batches_before(config.run.epochs) / per_step))
    return 2000 if config.run.steps is None else config.run.steps


def shift_of(config: Config, family: Family, found: Scan) -> float:
    """Of the noise schedule: the config's, or the model's own for the most frequent size. Raises UserError if it has none."""
    if config.noise.shift != "auto":
        return float(config.noise.shift)
    if family.spec.auto_shift is None:
        raise UserError(
            "{title} has no noise schedule of its own to take the shift from",
            where="noise.shift",
            mend="give a number, e.g. 3.0",
            title=family.spec.title,
        )
    training, _ = _split(found.items, config.validation.share, config.run.seed)
    size = Counter(item.size for item in training).most_common(1)[0][0]
    return float(family.spec.auto_shift(family.spec.tokens(size, family.stride())))


def data_hash(found: Scan, config: Config) -> str:
    """Changes when something else would be learned from: pictures, captions, sizes, make-up of the sets and batches."""
    return hashlib.blake2b(
        json.dumps([found.digest(), config.validation.share, config.data.batch_size]).encode(), digest_size=16
    ).hexdigest()


def _smallest(config: Config) -> list[int]:
    """Resolutions asked for: a data set for a tiny model may be smaller than the family would like."""
    found = []
    for one in config.data_sets():
        found += one.resolution if isinstance(one.resolution, list) else [one.resolution]
    return found
