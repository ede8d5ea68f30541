"""[method], [noise] and [optimizer]: what learns, at which noise levels, and how a step is taken."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from whitetuner.config.section import Section
from whitetuner.paths import PathText


class Method(Section):
    """[method]: what of the model learns."""

    kind: Literal["lokr", "lora", "full"] = Field("lokr", description="LoKr, LoRA, or the whole model")
    rank: int = Field(
        16, ge=1, le=8192, description="of LoRA; of LoKr's second factor when full_matrix is false"
    )
    alpha: float | None = Field(
        None, gt=0, description="what is learned is scaled by alpha / rank; unset: alpha = rank, scale 1"
    )
    factor: int = Field(
        8,
        ge=-1,
        le=8192,
        description="LoKr: side of the first factor; smaller: more is learned; -1: as square as possible",
    )
    full_matrix: bool = Field(
        True, description="LoKr: the second factor is a full matrix, and rank is not used"
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="patterns (fnmatch) of the modules that learn; unset: the family's own; full: everything",
    )
    precision: Literal["auto", "bf16_stochastic", "kahan", "fp32_master", "fp32"] = Field(
        "auto",
        description="full: how weights keep small steps (bf16 rounded at random; bf16 and 2 bytes more a weight, the rest of "
        "the sum or of a float32 weight; float32); auto: bf16_stochastic, where weights are fp32: fp32",
    )
    init_from: PathText | None = Field(None, description="adapter file to begin from")

    @field_validator("factor")
    @classmethod
    def _factor(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be -1 or at least 1")
        return value


class Noise(Section):
    """[noise]: the noise levels that are learned (t = 1000 sigma; 1000 is pure noise)."""

    timesteps: Literal["linear", "sigmoid", "weighted", "shift", "lognorm_blend"] = Field(
        "sigmoid",
        description="density of the noise levels (uniform; logit-normal; uniform with a weight; shifted; blend)",
    )
    sigmoid_scale: float = Field(
        1.0, gt=0, le=10, description="sigmoid: deviation of the normal; larger: broader"
    )
    sigmoid_bias: float = Field(
        0.0, ge=-10, le=10, description="sigmoid: mean of the normal; above 0: more noise (composition)"
    )
    shift: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = Field(
        3.0,
        description='shift: s of s u / (1 + (s - 1) u); above 1: more noise; "auto": the model\'s own for the picture size',
    )
    lognorm_alpha: float = Field(
        0.75, ge=0, le=1, description="lognorm_blend: share of the log-normal, the rest is uniform"
    )
    min_timestep: float = Field(0.0, ge=0, le=1000, description="noise levels below are drawn again")
    max_timestep: float = Field(1000.0, ge=0, le=1000, description="noise levels above are drawn again")
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap", "min_snr"] = Field(
        "none", description="weight of a noise level in the loss"
    )
    min_snr_gamma: float = Field(
        5.0,
        gt=0,
        le=1000,
        description="min_snr: bound of the signal-to-noise ratio; smaller: levels of little noise count less",
    )
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="deviation of a constant added to each channel's noise; 0: none"
    )

    @model_validator(mode="after")
    def _range(self) -> Noise:
        if self.min_timestep >= self.max_timestep:
            raise ValueError("min_timestep must be below max_timestep")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """[optimizer]: how a step is taken."""

    name: str = Field("adamw", description='adamw, adamw8bit, adafactor, prodigy, or "module:Class"')
    lr: float = Field(1e-4, gt=0, le=10, description="learning rate; prodigy: 1")
    weight_decay: float = Field(0.01, ge=0, le=10, description="decoupled weight decay; 0: none")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="running means of gradient and square (adamw, adamw8bit, prodigy)"
    )
    eps: float = Field(
        1e-8, gt=0, le=1, description="added to the root of the square (adamw, adamw8bit, prodigy)"
    )
    warmup_steps: int = Field(0, ge=0, description="steps from 0 to the full learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up"
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="linear, cosine: they end at this share of lr")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: never")
    clip: Literal["previous", "block"] = Field(
        "previous",
        description="full: max_grad_norm is held against the whole gradient's norm of the step before (the first step is not "
        "scaled), or against each block's own",
    )
    gradient_accumulation: int = Field(1, ge=1, le=4096, description="passes whose gradients make one step")
    lora_plus: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="LoRA+: how many times lr the factor behind the rank gets (lora_B; lokr_w2_a), e.g. 16; 1: all the same",
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the running average that is previewed and saved, e.g. 0.99; 0: none",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description='further arguments of a "module:Class" optimizer'
    )
