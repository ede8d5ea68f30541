"""From a config to what learns: each denoiser loaded, made ready for its device, with what is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from whitetuner.companions import companion_of
from whitetuner.config.schema import Config
from whitetuner.diffusion.sigmas import SigmaSettings
from whitetuner.family import Family, Part
from whitetuner.memory.fused import units_of
from whitetuner.memory.shard import fit_sharded
from whitetuner.memory.swap.arena import Arena, Arenas
from whitetuner.planning import Way, denoiser_build, fit_denoiser, in_pieces, shelf_folder
from whitetuner.rehearsal import adapter_for, adapter_optimizer, optimizer_for, trained_of
from whitetuner.resolve import Resolved
from whitetuner.sharing import in_turns, mesh_of
from whitetuner.train.distributed import Ranks
from whitetuner.train.ema import Ema
from whitetuner.train.learner import Learner, Learns
from whitetuner.train.step import StepSettings
from whitetuner.train.team import Team
from whitetuner.train.whole import WholeLearner, WholeSettings, described
from whitetuner.train.whole_sharded import WholeSharded, refuse_mixed


def assemble(
    config: Config,
    family: Family,
    resolved: Resolved,
    way: Way,
    tell: Callable[[str, str], None],
    arenas: Arenas | None = None,
    ranks: Ranks | None = None,
) -> Team:
    """The team of a run, as new. tell: (level, text). Raises UserError for what does not go together.

    arenas: what waits on the host is shared with other ranks of this machine, and read by one of them
    ranks:  with which full training adds up its gradients, block by block
    """
    if config.memory.shard:
        assert ranks is not None, "sharding is for several ranks"
        return _sharded(config, family, resolved, way, tell, ranks)
    device, parts = resolved.device, family.spec.parts(family.options)
    # Parts of a family are of one architecture: what fits one fits each while the others are away.
    lists = parts[0].block_lists
    turns = len(parts) > 1
    absent = arenas is not None and not arenas.leader
    modules = family.load(denoiser_build(way, device, resolved.dtype, lists, turns, absent))
    learners: list[Learns] = []
    turns_on = device if turns and device.type != "cpu" else None
    for part in parts:
        module = modules[part.name]
        arena = None if arenas is None else arenas.of(part.name)
        if config.method.kind == "full":
            learners.append(_whole(config, resolved, way, part, module, tell, turns_on, ranks, arena))
            continue
        adapter, limits = adapter_for(config, family, part, module, device)
        for limit in limits:
            tell("warning", str(limit))
        fitted = fit_denoiser(
            config, way, module, part, device, lambda text: tell("info", text), turns, arena
        )
        parameters = list(adapter.parameters())
        optimizer = adapter_optimizer(config, adapter)
        ema = Ema(parameters, config.optimizer.ema) if config.optimizer.ema else None
        learners.append(Learner(part, module, adapter, config.method.kind, optimizer, ema, fitted, turns_on))
    planned = way.plan is None or way.plan.previews
    beside = companion_of(config, family, resolved, tell, shelf_folder(config, way), planned)
    return Team(learners, beside, way.turn_steps)


def _sharded(
    config: Config,
    family: Family,
    resolved: Resolved,
    way: Way,
    tell: Callable[[str, str], None],
    ranks: Ranks,
) -> Team:
    """One denoiser, its weights shared out among the ranks; with an adapter, that is whole on each."""
    device, (part,) = resolved.device, family.spec.parts(family.options)
    mesh = mesh_of(ranks, device)

    def load() -> Learns:
        build = denoiser_build(
            way, device, resolved.dtype, part.block_lists, turns=True
        )  # blocks on the host
        module = family.load(build)[part.name]
        in_pieces(module, part, way.pieces)
        fit = partial(
            fit_sharded,
            module,
            part.block_lists,
            mesh,
            plain=way.plain,
            inputs_on_host=config.memory.activation_offload,
            attention=config.memory.attention,
            together=ranks.together,
        )
        if config.method.kind == "full":
            trained_of(config, module)
            refuse_mixed(module, part.block_lists)
            config_json = described(module)
            make = partial(optimizer_for, config)
            return WholeSharded(
                part,
                module,
                config_json,
                make,
                _whole_settings(config, resolved),
                fit(),
                mesh,
                device,
                config.optimizer.ema,
            )
        adapter, limits = adapter_for(config, family, part, module, device)
        for limit in limits:
            tell("warning", str(limit))
        parameters = list(adapter.parameters())
        fitted = fit(whole=parameters)
        ema = Ema(parameters, config.optimizer.ema) if config.optimizer.ema else None
        return Learner(
            part, module, adapter, config.method.kind, adapter_optimizer(config, adapter), ema, fitted
        )

    learner = in_turns(ranks, load)
    tell("info", f"every rank holds 1/{ranks.world} of the weights of each block (FSDP2)")
    return Team([learner], companion_of(config, family, resolved, tell, shelf_folder(config, way), True))


def step_settings(config: Config, shift: float, part: Part) -> StepSettings:
    """What the loss of a part's steps is made of. shift: of the noise schedule, as it came out."""
    noise = config.noise
    sigmas = SigmaSettings(
        timesteps=noise.timesteps,
        sigmoid_scale=noise.sigmoid_scale,
        sigmoid_bias=noise.sigmoid_bias,
        shift=shift,
        lognorm_alpha=noise.lognorm_alpha,
        min_timestep=noise.min_timestep,
        max_timestep=noise.max_timestep,
        part_range=part.sigma_range,
    )
    return StepSettings(
        config.run.seed, sigmas, noise.loss_weighting, noise.noise_offset, noise.min_snr_gamma
    )


def _whole_settings(config: Config, resolved: Resolved) -> WholeSettings:
    return WholeSettings(
        config.run.seed,
        resolved.precision,  # type: ignore[arg-type]  # checked by the schema
        config.optimizer.clip,
        at_once=":" in config.optimizer.name,
    )


def _whole(
    config: Config,
    resolved: Resolved,
    way: Way,
    part: Part,
    module: torch.nn.Module,
    tell: Callable[[str, str], None],
    turns_on: torch.device | None,
    ranks: Ranks | None,
    arena: Arena | None,
) -> WholeLearner:
    """A denoiser that learns with its own weights."""
    o, device = config.optimizer, resolved.device
    trained = trained_of(config, module)
    turns = turns_on is not None
    fitted = fit_denoiser(config, way, module, part, device, lambda text: tell("info", text), turns, arena)
    settings = _whole_settings(config, resolved)
    make = partial(optimizer_for, config)
    units = {unit.name: unit.parameters for unit in units_of(module, part.block_lists, trained)}
    share = None if ranks is None else ranks.block_shares(units)
    return WholeLearner(part, module, trained, make, settings, fitted, device, o.ema, turns_on, share)
