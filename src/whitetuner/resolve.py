"""From a config to what it means on this machine: the model's folder, the family object, device and number format.

Everything that is `auto` in the config is decided here, once, and written to run.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from whitetuner.config.full import dtype_wanted, precision_of
from whitetuner.config.kinds import refuse_wrong_data
from whitetuner.config.schema import Config
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.families import registry
from whitetuner.family import Family
from whitetuner.models import is_random, model_paths


@dataclass(frozen=True)
class Resolved:
    """family: with options and paths; device; dtype of the frozen weights that are not quantised, or of those that train.

    precision: of full training, see config/full.py
    """

    family: Family
    device: torch.device
    dtype: torch.dtype
    precision: str | None = None

    def facts(self) -> dict[str, Any]:
        """What goes into run.json and must be the same on resume."""
        more = {} if self.precision is None else {"precision": self.precision}
        return more | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device_type": self.device.type,
            "random_weights": is_random(self.family.paths),
        }


def resolve(config: Config, local_rank: int = 0) -> Resolved:
    """Checks that the model is there, of the right family and for this kind of data, without loading a weight.

    local_rank: see choose_device. Raises UserError.
    """
    refuse_wrong_data(config)
    device = choose_device(config.memory.device, local_rank)
    memory = config.memory
    # base = "bf16" says the same of the frozen weights as dtype does, unless dtype says otherwise.
    asked = "bf16" if memory.base == "bf16" and memory.dtype == "auto" else memory.dtype
    dtype = choose_dtype(dtype_wanted(config) or asked, device)
    precision = precision_of(config, "fp32" if dtype == torch.float32 else "bf16")
    return Resolved(open_family(config), device, dtype, precision if config.method.kind == "full" else None)


def open_family(config: Config) -> Family:
    """The config's family over the config's model folder."""
    return registry.load(config.model.family, config.model_options(), model_paths(config))


def choose_device(asked: str, local_rank: int = 0) -> torch.device:
    """ "auto": the first CUDA device, else the CPU. local_rank: the number among the run's ranks on this machine."""
    if asked == "auto":
        asked = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    if asked.isdigit():
        asked = f"cuda:{asked}"
    if asked.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(asked.partition(":")[2] or 0)
        if index >= count:
            raise UserError(
                "GPU {index} was asked for, but PyTorch sees {count} GPUs",
                where="--gpus / memory.device",
                mend="use a number below {count}, or 'cpu'"
                if count
                else "use 'cpu'; with a GPU in the machine: install its driver and a CUDA build of PyTorch",
                code=EXIT_ENVIRONMENT,
                index=index,
                count=count,
            )
    return torch.device(asked)


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """ "auto": bf16 on a GPU (adapters stay fp32), fp32 on a CPU, where bf16 saves little and costs exactness."""
    if asked == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[asked]
