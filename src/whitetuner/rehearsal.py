"""What a run needs of its model, tried on the model's skeleton before anything big is read or a folder is made.

A wrong optimizer, pattern or adapter file, a torn download and weights of another size are so told in seconds, not after
hours of encoding.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from whitetuner.adapters.attach import Adapter, attach, layer_sizes
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings, reading_limits
from whitetuner.checkpoint.export import check_names
from whitetuner.checkpoint.original import to_original
from whitetuner.config.schema import Config
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.family import Family, Part
from whitetuner.memory.build import rehearse_module
from whitetuner.memory.kernels import backend_named, set_attention
from whitetuner.memory.weights import read_header, weight_files
from whitetuner.records import Size
from whitetuner.runs.follow import refuse_missing
from whitetuner.scenes import check_previews
from whitetuner.train.optim import make_optimizer


def rehearse(config: Config, family: Family, *, here: bool = True) -> None:
    """Raises UserError for what would stop the run once the model is loaded. Reads headers and config files only.

    here: on this machine, not only planned on it for another: its packages and devices count, too
    """
    backend_named(config.memory.attention)
    if here:
        refuse_missing(config.log.elsewhere)
    if config.memory.shard and len(family.spec.parts(family.options)) > 1:
        raise UserError(
            "two experts that take turns cannot be sharded",
            where="memory.shard",
            mend="set memory.shard = false: blocks wait on the host instead (memory.blocks_to_swap)",
        )
    check_weights(family)
    check_previews(config, family)
    modules = family.load(rehearse_module)
    for part in family.spec.parts(family.options):
        if config.method.kind == "full":
            module: Any = modules[part.name]
            optimizer_for(config, list(trained_of(config, module).values()))
            to_original(module.state_dict(), family.keys, module.config)  # as the final file will be written
        else:
            adapter, _ = adapter_for(config, family, part, modules[part.name], torch.device("cpu"))
            adapter_optimizer(config, adapter)
        if here:
            set_attention(modules[part.name], config.memory.attention)


def cache_bytes(
    family: Family,
    dtype: torch.dtype,
    shapes: Sequence[tuple[Size, tuple[Size, ...]]],
    task: str = "",
    texts: Sequence[int] = (),
) -> list[int]:
    """What the cache holds of a sample of each (size, sizes of given pictures), on disk, its text at its longest.

    dtype: that encoders are made in, and so what they say is kept in; texts: of each sample, where captions are shuffled in
    this task. Reads headers and config files only.
    """
    module = family.load(rehearse_module)[family.spec.parts(family.options)[0].name]
    sketch, stride, wide = registry.sketch(family.spec.name), family.stride(), dtype.itemsize
    encoders = family.encoders(task) if texts else []
    spoken = {name for one in encoders if "caption" in one.reads for name in one.fields}
    found: dict[tuple[Size, tuple[Size, ...]], tuple[int, int]] = {}
    for size, given in shapes:
        if (size, given) not in found:
            fields = sketch.blank(module, family.options, size, stride, given)
            sizes = {
                name: one.numel() * (wide if one.is_floating_point() else one.element_size())
                for name, one in fields.items()
            }
            found[size, given] = (
                sum(sizes.values()),
                sum(many for name, many in sizes.items() if name in spoken),
            )
    more = [count - 1 for count in texts] or [0] * len(shapes)
    return [found[shape][0] + extra * found[shape][1] for shape, extra in zip(shapes, more, strict=True)]


def check_weights(family: Family) -> None:
    """Every part that is a model has its weight files, whole by their headers. Raises UserError naming the file."""
    for name in family.spec.components_of(family.options, family.paths):
        component = family.paths.component(name)
        if (component / "config.json").is_file():  # a tokenizer or a scheduler has no file of this name
            for file in weight_files(component):
                read_header(file)


def adapter_for(
    config: Config, family: Family, part: Part, module: torch.nn.Module, device: torch.device
) -> tuple[Adapter, list[UserError]]:
    """The config's adapter on this denoiser, begun from method.init_from if that is set, and who will not read its files.

    init_from may be a folder as a run leaves it (final/lokr): each part takes its own file there.
    """
    settings = adapter_settings(config)
    paths = choose(module, config.method.targets or list(family.spec.adapter_targets))
    for naming in ("comfyui", "diffusers"):  # the two that the final files have
        check_names(paths, family.keys, naming)
    limits = list(reading_limits(layer_sizes(module, paths), settings))
    adapter = attach(module, paths, settings, seed=config.run.seed, device=device)
    if config.method.init_from:
        begun = Path(config.method.init_from)
        if begun.is_dir():
            begun = begun / part.file(settings.kind)
        elif part.suffix and len(family.spec.parts(family.options)) > 1:
            raise UserError(
                "two experts cannot begin from one file",
                where="method.init_from",
                mend="give the folder that holds {name} and its companion, e.g. a run's final/{kind}",
                name=part.file(settings.kind),
                kind=settings.kind,
            )
        adapter.load_file(begun, family.keys)
    return adapter, limits


def adapter_settings(config: Config) -> AdapterSettings:
    """The config's [method]."""
    assert config.method.kind != "full", "full training has no adapter"
    return AdapterSettings(
        kind=config.method.kind,
        rank=config.method.rank,
        alpha=config.method.alpha,
        factor=config.method.factor,
        full_matrix=config.method.full_matrix,
    )


def trained_of(config: Config, module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Full training: what of the denoiser learns, by name, in its order; the rest is frozen. Sets requires_grad.

    method.targets are fnmatch patterns of parameters, of modules or of what they are in ("transformer_blocks.3"). Raises
    UserError for one that matches nothing.
    """
    patterns = config.method.targets
    names = [name for name, p in module.named_parameters() if p.is_floating_point()]
    chosen = set(names)
    if patterns is not None:
        chosen = set()
        for pattern in patterns:
            found = {name for name in names if any(fnmatchcase(one, pattern) for one in _above(name))}
            if not found:
                known = sorted({one for name in names for one in _above(name)})
                near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
                raise UserError(
                    "'{pattern}' matches nothing in this model; the nearest: {near}",
                    where="method.targets",
                    mend='name modules or weights as the model calls them, e.g. "transformer_blocks.*.attn.*"; unset: everything',
                    pattern=pattern,
                    near=", ".join(near),
                )
            chosen |= found
    trained = {}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name in chosen:
            trained[name] = parameter
    return trained


def _above(name: str) -> list[str]:
    """ "a.b.weight" -> itself, "a.b", "a"."""
    pieces = name.split(".")
    return [".".join(pieces[:count]) for count in range(len(pieces), 0, -1)]


def adapter_optimizer(config: Config, adapter: Adapter) -> torch.optim.Optimizer:
    """The config's optimizer over an adapter; with optimizer.lora_plus the factors behind the rank are a group of their own.

    Raises UserError where no layer of it has such a factor.
    """
    ratio = config.optimizer.lora_plus
    if ratio == 1.0:
        return optimizer_for(config, adapter.parameters())
    others, faster = adapter.by_speed()
    if not faster:
        raise UserError(
            "lora_plus is for two low-rank factors, and this LoKr has a full second factor in every layer",
            where="optimizer.lora_plus",
            mend="set method.full_matrix = false with a rank well below half of what a layer has by method.factor, or take "
            'method.kind = "lora", or optimizer.lora_plus = 1',
        )
    return optimizer_for(config, others, faster=faster, ratio=ratio)


def optimizer_for(
    config: Config,
    parameters: Sequence[torch.nn.Parameter],
    decay: bool = True,
    faster: Sequence[torch.nn.Parameter] = (),
    ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """The config's optimizer over these parameters. decay: whether weight decay acts on them; faster, ratio: make_optimizer."""
    o = config.optimizer
    return make_optimizer(
        o.name,
        parameters,
        lr=o.lr,
        weight_decay=o.weight_decay if decay else 0.0,
        betas=o.betas,
        eps=o.eps,
        args=o.args,
        faster=faster,
        ratio=ratio,
    )
