"""Optimizers by name, their state as tensors and numbers, the course of the learning rate, clipping.

No pickle and no scheduler object: an optimizer's state goes into safetensors and JSON to the last bit, and
the learning rate is a function of the step, so that a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whitetuner.errors import EXIT_ENVIRONMENT, UserError

Betas = tuple[float, float]

#: Key of a group whose learning rate is so many times the run's; groups without it have the run's own.
LR_RATIO = "lr_ratio"


def make_optimizer(
    name: str,
    params: Sequence[torch.nn.Parameter],
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    args: Mapping[str, Any] | None = None,
    faster: Sequence[torch.nn.Parameter] = (),
    ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """An optimizer over these parameters, which must be on their device already.

    name: adamw         torch's; fused, where the device has it, it is the fastest; the same result every time
          adamw8bit     bitsandbytes', states of one byte (tensors under 4096 numbers keep four)
          adafactor     transformers', second moment factored, lr as given. Not torch's, which multiplies lr by
                        the size of each parameter: an adapter's factor that starts at zero would stand still
          prodigy       prodigyopt's, by the authors of the method (Mishchenko, Defazio 2023): finds its own
                        step, lr = 1. Without the stochastic rounding of others, whose generator is in no state
          module:Class  any torch.optim.Optimizer; gets lr, weight_decay, betas and eps where it has them
    args: further arguments by keyword, winning over the above
    faster: a second group behind `params`, whose learning rate is always `ratio` times the first one's (`set_lr`)

    betas and eps are of the Adam family; Adafactor has no such.
    Raises UserError: unknown name or argument, a package that is not installed, a class that is no optimizer,
    a value the optimizer refuses.
    """
    if ":" in name:
        cls, known = _import_class(name), {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        given = {key: value for key, value in known.items() if _takes(cls, key, value)}
    elif name in OPTIMIZERS:
        cls, given = OPTIMIZERS[name](params, lr, weight_decay, betas, eps)
    else:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        raise UserError(
            "'{name}' is no optimizer{near}",
            where="optimizer.name",
            mend='use one of {names}, or "module:Class" for any other',
            name=name,
            near=f" (did you mean '{near[0]}'?)" if near else "",
            names=", ".join(OPTIMIZERS),
        )
    accepted = _parameters(cls)
    for key in args or {}:
        if key not in accepted and "**" not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            raise UserError(
                "{name} has no argument '{key}'{near}",
                where="optimizer.args",
                mend="it knows {accepted}",
                name=name,
                key=key,
                near=f" (did you mean '{near[0]}'?)" if near else "",
                accepted=", ".join(sorted(accepted)),
            )
    if faster and cls.__module__.partition(".")[0] == "prodigyopt":
        raise UserError(
            "prodigy finds one step size for all factors, so none can learn {ratio:g} times as fast",
            where="optimizer.lora_plus",
            mend="set optimizer.lora_plus = 1, or take another optimizer (adamw)",
            ratio=ratio,
        )
    groups: list[Any] = list(params)
    if faster:
        groups = [{"params": groups}, {"params": list(faster), "lr": lr * ratio, LR_RATIO: ratio}]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some greet on standard output, which is for results
            return cls(groups, **{**given, **(args or {})})
    except (TypeError, ValueError) as error:
        raise UserError(
            "{name} refuses its settings: {reason}",
            where="[optimizer]",
            mend="change the value it names; it knows {accepted}",
            name=name,
            reason=error,
            accepted=", ".join(sorted(accepted)),
        ) from error


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; a group that learns faster keeps its ratio to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_RATIO] if LR_RATIO in group else lr


Made = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def _adamw(params: Sequence[Tensor], lr: float, weight_decay: float, betas: Betas, eps: float) -> Made:
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
    return torch.optim.AdamW, {
        "lr": lr,
        "weight_decay": weight_decay,
        "betas": betas,
        "eps": eps,
        "fused": fused,
    }


def _adamw8bit(params: Sequence[Tensor], lr: float, weight_decay: float, betas: Betas, eps: float) -> Made:
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns of 4-bit kernels that are not used here
    module = _optional("bitsandbytes", "adamw8bit", "quant")
    return module.optim.AdamW8bit, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}


def _adafactor(params: Sequence[Tensor], lr: float, weight_decay: float, betas: Betas, eps: float) -> Made:
    from transformers.optimization import Adafactor

    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor, {"lr": lr, "weight_decay": weight_decay, **fixed}


def _prodigy(params: Sequence[Tensor], lr: float, weight_decay: float, betas: Betas, eps: float) -> Made:
    module = _optional("prodigyopt", "prodigy", "prodigy")
    return module.Prodigy, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}


OPTIMIZERS: Mapping[str, Callable[[Sequence[Tensor], float, float, Betas, float], Made]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
}


def _optional(package: str, name: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            "the optimizer {name} needs the package {package} ({reason})",
            where="optimizer.name",
            mend="pip install whitetuner[{extra}]",
            code=EXIT_ENVIRONMENT,
            name=name,
            package=package,
            extra=extra,
            reason=error,
        ) from error


def _import_class(name: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UserError(
            "the module '{module}' cannot be imported ({reason})",
            where="optimizer.name",
            mend="install its package into this environment, or correct the name",
            module=module_name,
            reason=error,
        ) from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        found = sorted(key for key, value in vars(module).items() if isinstance(value, type))
        optimizers = [key for key in found if issubclass(getattr(module, key), torch.optim.Optimizer)]
        near = difflib.get_close_matches(class_name, optimizers, n=3, cutoff=0.3) or optimizers[:5]
        raise UserError(
            "'{cls}' of {module} is no torch.optim.Optimizer",
            where="optimizer.name",
            mend="it has: {found}",
            cls=class_name,
            module=module_name,
            found=", ".join(near) or "no optimizers",
        )
    return cls


def _parameters(cls: type) -> set[str]:
    """Names of the arguments that a class takes besides the parameters; "**" when it takes any."""
    kinds = inspect.Parameter
    taken = list(inspect.signature(cls).parameters.values())[1:]
    names = {p.name for p in taken if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    return names | ({"**"} if any(p.kind == kinds.VAR_KEYWORD for p in taken) else set())


def _takes(cls: type, key: str, value: object) -> bool:
    """Whether a class has an argument of this name that means the same: torch's Adafactor has a pair for
    eps."""
    argument = inspect.signature(cls).parameters.get(key)
    if argument is None:
        return False
    same_kind = isinstance(argument.default, (int, float)) == isinstance(value, (int, float))
    return argument.default is inspect.Parameter.empty or argument.default is None or same_kind


def lr_factor(
    step: int, steps: int, schedule: str = "constant", warmup_steps: int = 0, min_ratio: float = 0.0
) -> float:
    """What the learning rate is multiplied by at a step, in (0, 1].

    step: 0-based, of `steps` in all. The warm-up rises evenly and reaches 1 with its last step; then
          constant, linear or
    cosine (Loshchilov and Hutter 2016) towards min_ratio, which would be reached one step after the last, so
    that no step is without effect. A warm-up as long as the run is all there is.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "linear":
        left = 1.0 - done
    elif schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        raise UserError(
            "'{schedule}' is no schedule",
            where="optimizer.schedule",
            mend="use constant, linear or cosine",
            schedule=schedule,
        )
    return min_ratio + (1.0 - min_ratio) * left


@torch.no_grad()
def clip_grad_norm(params: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scales all gradients down together so that their norm is at most max_norm; 0: leaves them.

    Returns the norm before. Where it is not finite nothing is scaled, so that the guilty gradient can still
    be found.
    """
    gradients = [p.grad for p in params if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if 0 < max_norm < norm and math.isfinite(norm):
        factor = max_norm / norm
        for gradient in gradients:
            gradient.mul_(factor)
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that an optimizer remembers: (tensors for safetensors, a document for JSON). Memory is shared.

    Of the groups' settings (lr, betas, ...) only what the run itself changed is kept, such as Prodigy's
    estimate; the settings come from the config. A tensor that several parameters share, as the code books of
    bitsandbytes are, is kept once. Raises UserError when the optimizer keeps something that is neither tensor
    nor number nor text.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[object, ...], str] = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def unsaveable(value: Any, name: str) -> UserError:
        return UserError(
            "the optimizer {optimizer} keeps a {kind} ({name}), which cannot be saved without running code "
            "on loading",
            where="optimizer.name",
            mend="use another optimizer",
            optimizer=type(optimizer).__name__,
            kind=type(value).__name__,
            name=name,
        )

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            memory = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.dtype)
            key = memory if value.numel() else (id(value),)
            if key not in seen:
                seen[key] = name
                tensors[name] = value.detach()
            return {"tensor": seen[key]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [plain(one, f"{name}.{i}") for i, one in enumerate(value)]}
        if isinstance(value, dict):
            return {"dict": {str(key): plain(one, f"{name}.{key}") for key, one in value.items()}}
        raise unsaveable(value, name)

    own = {id(parameter) for parameter in params}
    for key, value in optimizer.state.items():
        if id(key) not in own:
            raise unsaveable(value, f"the state of {key!r}")
    state = {}
    for index, parameter in enumerate(params):
        if parameter in optimizer.state:
            state[str(index)] = {k: plain(v, f"{index}.{k}") for k, v in optimizer.state[parameter].items()}
    groups = [
        {
            key: plain(value, f"group{number}.{key}")
            for key, value in group.items()
            if key != "params" and not _same(value, optimizer.defaults.get(key, _ABSENT))
        }
        for number, group in enumerate(optimizer.param_groups)
    ]
    document = {
        "class": f"{type(optimizer).__module__}:{type(optimizer).__qualname__}",
        "shapes": [list(parameter.shape) for parameter in params],
        "state": state,
        "groups": groups,
    }
    return tensors, document


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Back to what `optimizer_tensors` gave, to the bit; tensors are copied to the parameters' devices.

    Raises UserError when it is the state of another optimizer or of other parameters; nothing is changed
    then.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = f"{type(optimizer).__module__}:{type(optimizer).__qualname__}"
    if document["class"] != own or len(document["groups"]) != len(optimizer.param_groups):
        raise UserError(
            "the saved state is that of {saved}, this run uses {own}",
            where="optimizer.name",
            mend="resume with the optimizer the run began with; method.init_from begins a new run from the "
            "adapter",
            saved=document["class"],
            own=own,
        )
    if document["shapes"] != [list(parameter.shape) for parameter in params]:
        raise UserError(
            "the saved optimizer state belongs to other parameters",
            where="--resume",
            mend="resume with the method.targets, rank, factor and full_matrix the run began with",
        )
    made: dict[tuple[str, torch.device], Tensor] = {}

    def value_of(saved: Any, device: torch.device) -> Any:
        if not isinstance(saved, dict):
            return saved
        ((kind, content),) = saved.items()
        if kind == "tensor":
            if (content, device) not in made:
                made[content, device] = tensors[content].to(device, copy=True)
            return made[content, device]
        if kind == "dict":
            return {key: value_of(one, device) for key, one in content.items()}
        return (tuple if kind == "tuple" else list)(value_of(one, device) for one in content)

    cpu = torch.device("cpu")
    numbers = itertools.count()
    for number, group in enumerate(optimizer.param_groups):
        group.update({key: value_of(saved, cpu) for key, saved in document["groups"][number].items()})
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            saved = document["state"].get(str(next(numbers)))
            if saved is None:
                continue
            optimizer.state[parameter] = {
                # torch keeps step counters on the CPU unless the kernel reads them
                # (Optimizer.load_state_dict)
                key: value_of(one, parameter.device if key != "step" or on_device else cpu)
                for key, one in saved.items()
            }


_ABSENT = object()


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(default, Tensor):
        return value is default
    return type(value) is type(default) and value == default
