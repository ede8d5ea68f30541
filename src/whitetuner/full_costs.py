"""What full training with a config costs for each number that trains: for the plan."""

from __future__ import annotations

from whitetuner.config.full import precision_of
from whitetuner.config.schema import Config
from whitetuner.memory.weigh import Remembered
from whitetuner.train.precision import BESIDE

#: Bytes that an optimizer keeps for each number of large weights: 8-bit states have a scale for 256 of them, Adafactor a row
#: and a column; others are taken for two float32 numbers.
_STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.04, "adafactor": 0.02}


def remembered(config: Config, dtype: str) -> Remembered:
    """Bytes that are kept and moved for each number. dtype: of the weights, "fp32" or "bf16"."""
    o, precision = config.optimizer, precision_of(config, dtype)
    bf16 = precision != "fp32"
    return Remembered(
        state=_STATE_BYTES.get(o.name, 8.0) + BESIDE[precision],
        average=(6 if bf16 else 8) if o.ema else 0,  # float32, and the weights kept while it is shown
        sums=4 if o.gradient_accumulation > 1 else 0,
        copies=(8 if bf16 else 0) + (8 if o.name not in ("adamw", "adamw8bit") else 0),
        touched=100 if bf16 else 40,
    )


def sentence(config: Config, dtype: str) -> str:
    """Full training in a sentence of the plan."""
    return (
        f"full training: {precision_of(config, dtype)} weights, {config.optimizer.name}; each block is updated as its backward "
        "ends, so that the gradients of one block live at a time"
    )
