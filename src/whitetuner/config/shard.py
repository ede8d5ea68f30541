"""Sharded training: what of the config does not go together with memory.shard."""

from __future__ import annotations

from whitetuner.config.schema import Config
from whitetuner.errors import UserError, UserErrors

_QUANTISED = ("int8", "fp8", "nf4", "qint8", "qfloat8")


def refuse_wrong_shard(config: Config, world: int | None = None) -> None:
    """Raises UserError(s) for what cannot be sharded, each with what to do. world: ranks of the run; None: not known yet."""
    memory = config.memory
    if not memory.shard:
        return
    errors = []
    if world == 1:
        errors.append(
            UserError(
                "sharding shares the weights out among several GPUs, and this run has one",
                where="memory.shard",
                mend="start it with --gpus 0,1 (or torchrun), or set memory.shard = false: one GPU swaps blocks instead "
                "(memory.blocks_to_swap)",
            )
        )
    if memory.blocks_to_swap not in ("auto", 0):
        errors.append(
            UserError(
                "blocks either wait on the host or lie on all GPUs in shares, not both",
                where="memory.blocks_to_swap",
                mend='set memory.blocks_to_swap = "auto", or memory.shard = false',
            )
        )
    if memory.base in _QUANTISED:
        errors.append(
            UserError(
                "a {base} base cannot be sharded: its codes and scales belong together",
                where="memory.base",
                mend='set memory.base = "bf16" (or "auto"), or memory.shard = false: a smaller base may fit each GPU whole',
                base=memory.base,
            )
        )
    if memory.compile:
        errors.append(
            UserError(
                "torch.compile was not tried on sharded blocks",
                where="memory.compile",
                mend="set memory.compile = false, or memory.shard = false",
            )
        )
    if config.method.kind == "full" and config.optimizer.name != "adamw":
        errors.append(
            UserError(
                "{name} needs each weight as a whole, or is not known to do without",
                where="optimizer.name",
                mend='set optimizer.name = "adamw": its state is shared out, too; or set memory.shard = false',
                name=config.optimizer.name,
            )
        )
    if errors:
        raise UserErrors(errors) if len(errors) > 1 else errors[0]
