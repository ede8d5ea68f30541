"""What the ranks of a run settle before they train: that they mean the same run, who encodes what, what a step is made of."""

from __future__ import annotations

import secrets
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from whitetuner.checkpoint.store import Checkpoint, read
from whitetuner.config.full import refuse_wrong_full
from whitetuner.config.landed import refuse_not_landed
from whitetuner.config.load import differences
from whitetuner.config.schema import Config
from whitetuner.config.shard import refuse_wrong_shard
from whitetuner.data.order import Shares
from whitetuner.data.scan import Scan
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.family import Family
from whitetuner.memory.swap.arena import Arenas, Link, kind_for
from whitetuner.memory.weights import weight_files
from whitetuner.planning import Shape, Way, way_of
from whitetuner.prepared import Progress, data_hash, find_items
from whitetuner.resolve import Resolved
from whitetuner.resuming import find_checkpoint
from whitetuner.runs import events
from whitetuner.runs.best import STATE_FILE
from whitetuner.runs.folder import RunFolder
from whitetuner.train.distributed import Ranks
from whitetuner.train.team import Team

T = TypeVar("T")
#: What each rank may have of its own.
_OWN = ("memory.device", "memory.vram_gb", "run.resume", "data.workers")


def refuse_wrong(ranks: Ranks, config: Config) -> None:
    """Raises UserError for what the config alone shows to be wrong, and for ranks whose configs differ."""
    refuse_wrong_full(config)
    refuse_wrong_shard(config, ranks.world)
    refuse_not_landed(config)
    same_config(ranks, config)


def mesh_of(ranks: Ranks, device: torch.device) -> DeviceMesh:
    """All ranks in one row, for FSDP. They make it together."""
    return init_device_mesh(device.type, (ranks.world,))


def in_turns(ranks: Ranks, work: Callable[[], T]) -> T:
    """Of the ranks of a machine one works after the other: what each needs for it on the host is there once."""
    per_machine = Counter(one.machine for one in ranks.presences)
    mine = list(ranks.ranks_here).index(ranks.rank)
    done: list[T] = []
    for turn in range(max(per_machine.values(), default=1)):
        if turn == mine:
            done.append(work())
        ranks.meet()
    return done[0]


def same_config(ranks: Ranks, config: Config) -> None:
    """Raises UserError when ranks were started with configs that would learn something else."""
    told = ranks.told(config.model_dump(mode="json"))
    for rank, other in enumerate(told):
        for key, first, here in differences(told[0], other):
            if key not in _OWN:
                raise UserError(
                    "rank {rank} was started with {here}, rank 0 with {first}",
                    where=key,
                    mend="give all ranks the same config file and the same --set values",
                    rank=rank,
                    here=here,
                    first=first,
                )


def checkpoint_of(
    ranks: Ranks, resume: str | None, folder: RunFolder, earlier: Mapping[str, Any], config: Config
) -> tuple[Checkpoint | None, list[events.Event]]:
    """What rank 0 finds to go on from (resuming.find_checkpoint), on all ranks."""
    if resume is None:
        return None, []
    found: list[tuple[Checkpoint | None, list[events.Event]]] = []

    def find() -> str | None:
        found.append(find_checkpoint(resume, folder, earlier, config))
        checkpoint = found[0][0]
        return None if checkpoint is None else str(checkpoint.path.resolve())

    path = ranks.from_first(find)
    if ranks.first:
        return found[0]
    if path is None:
        return None, []
    if not (Path(path) / STATE_FILE).is_file():
        raise UserError(
            "this machine does not see the checkpoint that rank 0 goes on from",
            where=path,
            mend="put run.output_dir on a disk that all machines share, under one path",
            code=EXIT_ENVIRONMENT,
        )
    return read(Path(path)), []


def items_of(
    ranks: Ranks, config: Config, family: Family, progress: Progress | None = None
) -> tuple[Scan, str]:
    """(prepared.find_items, data hash); on every machine the first rank looks first, so that the others find the hashes.

    Raises UserError when ranks see other pictures or captions than rank 0.
    """
    found = find_items(config, family, progress) if ranks.first_here else None
    ranks.meet()
    found = find_items(config, family) if found is None else found
    digest = data_hash(found, config)
    for rank, (other, count) in enumerate(ranks.told([digest, len(found.items)])):
        if other != digest:
            raise UserError(
                "rank {rank} sees another data set here: {there} pictures and clips, rank {mine}: {here}",
                where="[data]",
                mend="copy the same pictures and captions to every machine, or put them on a disk that all share",
                rank=rank,
                there=count,
                mine=ranks.rank,
                here=len(found.items),
            )
    return found, digest


def way_together(
    ranks: Ranks, config: Config, resolved: Resolved, found: Scan, earlier: Mapping[str, Any]
) -> Way:
    """How the denoiser fits every rank's own card, from the sizes of the pictures (planning.way_of).

    earlier: what the run began with; where cards come to different bases, all ranks take the smaller one
    """
    batch = config.data.batch_size
    shapes = sorted({Shape(item.size, batch, item.condition_sizes) for item in found.items}, key=str)
    ask = (config, resolved.family, resolved.device, resolved.dtype, shapes)
    way = way_of(*ask, earlier)
    told = ranks.told((way.base, way.quantize, dict(way.encoding.quantised)))
    smaller = next((base for base, quantize, _ in told if quantize), told[0][0])
    encoders = {name: kind for _, _, held in told for name, kind in held.items()}
    if way.base == smaller and dict(way.encoding.quantised) == encoders:
        return way
    return way_of(*ask, {**earlier, "base": smaller, "encoder_base": encoders})


def cache_share(ranks: Ranks, folder: Path) -> tuple[int, int]:
    """(number, count) among the ranks that fill this cache folder together: all, or those of this machine alone."""
    if ranks.world == 1:
        return 0, 1
    mark = folder / f".seen-{secrets.token_hex(8)}"
    if ranks.first_here:
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text("", encoding="utf-8")
    try:
        marks = ranks.told(str(mark.name) if ranks.first_here else "")
        sees_all = all((folder / name).is_file() for name in marks if name)
        shared = all(ranks.told(sees_all))
    finally:
        mark.unlink(missing_ok=True)
    here = list(range(ranks.world)) if shared else list(ranks.ranks_here)
    return here.index(ranks.rank), len(here)


def shares_of(ranks: Ranks, config: Config, before: Mapping[str, Any]) -> Shares:
    """How the ranks share out a step. before: what the run began with (`resolved` of run.json), which it keeps."""
    accumulate = config.optimizer.gradient_accumulation
    begun = before.get("batches_per_step", accumulate) if before else accumulate * ranks.world
    if config.method.kind == "full" and ranks.world > int(begun):
        raise UserError(
            "full training gives every rank at least one batch of a step: this run has {batches}, and there are {world} ranks",
            where="--gpus",
            mend="go on with at most {batches} ranks",
            batches=int(begun),
            world=ranks.world,
        )
    if config.memory.shard and int(begun) % ranks.world:
        raise UserError(
            "sharded, all ranks make every pass together: this run has {batches} batches a step for {world} ranks",
            where="memory.shard",
            mend="go on with a number of ranks that divides {batches}, or set memory.shard = false",
            batches=int(begun),
            world=ranks.world,
        )
    return Shares(int(begun), ranks.rank, ranks.world)


def words_of(shares: Shares, config: Config) -> list[str]:
    """What a step is made of, where several ranks make it or did."""
    batch, accumulate = config.data.batch_size, config.optimizer.gradient_accumulation
    if shares.world == 1 and shares.per_step == accumulate:
        return []
    whole = f"a step learns from {shares.per_step * batch} samples"
    if shares.per_step == shares.world * accumulate:
        return [
            f"{whole}: {shares.world} ranks x batch_size {batch} x {accumulate} of gradient_accumulation. More ranks make "
            "not a step shorter but its batch larger: look at samples/s"
        ]
    ranks = "1 rank" if shares.world == 1 else f"{shares.world} ranks"
    told = [f"{whole}, as the run began: {shares.per_step} batches of {batch}, shared by {ranks}"]
    pieces = shares.per_step * min(batch, max(1, shares.world // shares.per_step))
    if pieces < shares.world:
        told.append(f"{shares.world - pieces} of {shares.world} ranks have nothing to do")
    return told


def arenas_of(
    ranks: Ranks, config: Config, resolved: Resolved, way: Way, tell: Callable[[str, str], None]
) -> Arenas | None:
    """What the ranks of this machine share of the weights that wait on the host; None where there is nothing to share.

    Experts on disk leave the host, and full training's running average takes the weights' place on rank 0 alone, while it is
    shown: then each rank has its own.
    """
    family = resolved.family
    turns = len(family.spec.parts(family.options)) > 1 and resolved.device.type == "cuda"
    streams = (way.residents is not None or turns) and resolved.device.type in ("cpu", "cuda")
    replaced = config.method.kind == "full" and config.optimizer.ema > 0
    rows = ranks.told(streams and not way.on_disk and not replaced)
    mates = [rank for rank in ranks.ranks_here if rows[rank]]
    if ranks.rank not in mates or len(mates) == 1:
        return None

    def link_of(name: str) -> Link:
        key = f"arena/{name}"
        return Link(
            leader=ranks.rank == mates[0],
            others=len(mates) - 1,
            say=lambda word, text: ranks.say(f"{key}/{word}", text),
            from_leader=lambda word: ranks.said(f"{key}/{word}", mates[0]),
            from_all=lambda word: [ranks.said(f"{key}/{word}", rank) for rank in mates],
        )

    kind, why = kind_for(link_of("probe"), _weights_bytes(family))
    if not kind:
        text = f"each of the {len(mates)} ranks of this machine holds its own copy of the weights that wait on the host: {why}"
        tell("warning", text)
        return None
    return Arenas(kind, link_of, ranks.rank == mates[0])


def _weights_bytes(family: Family) -> int:
    """Of the denoisers' files: more than what they take when they are quantised."""
    parts = family.spec.parts(family.options)
    folders = [family.paths.component(part.name) for part in parts]
    return sum(file.stat().st_size for one in folders for file in weight_files(one))


def residency(
    ranks: Ranks, team: Team, device: torch.device, tell: Callable[[str, str], None]
) -> list[dict[str, Any]]:
    """Where each rank trains and what of its model waits on the host, as run.json keeps it; several are told of."""
    away = total = 0
    for learner in team.learners:
        fitted = learner.fitted
        if fitted is not None:
            blocks = len(fitted.recompute.runs)
            total += blocks
            away += 0 if fitted.engine is None else blocks - len(fitted.engine.residents)
    own = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "CPU"
    hosts = [one.host for one in ranks.presences] or [socket.gethostname()]
    rows = [
        {"rank": rank, "host": hosts[rank], "device": name, "blocks": blocks, "waiting": waiting}
        for rank, (name, waiting, blocks) in enumerate(ranks.told((own, away, total)))
    ]
    for row in rows if ranks.world > 1 else ():
        tell(
            "info",
            "rank {rank}: {device} of {host}; {waiting} of {blocks} blocks wait on the host".format(**row),
        )
    return rows
