"""What of an event is a point of a curve, by the names that TensorBoard, wandb and SwanLab show."""

from __future__ import annotations

from whitetuner.runs import events

#: Loss is also shown by noise level, in so many equal parts of [0, 1].
SIGMA_PARTS = 5


def scalars(event: events.Event) -> tuple[int, dict[str, float]] | None:
    """(step, name -> value); None for events that are no points."""
    if isinstance(event, events.StepDone):
        return event.step, {
            "train/loss": event.loss,
            "train/learning_rate": event.lr,
            "train/grad_norm": event.grad_norm,
            "train/weight_change": event.weight_change,
            "train/memory_mb": event.memory_mb,
            "train/step_time": event.seconds,
            **_by_sigma(event),
        }
    if isinstance(event, events.Validation):
        by_sigma = {f"validation/sigma_{float(level):.2f}": loss for level, loss in event.by_sigma.items()}
        return event.step, {"validation/loss": event.loss, **by_sigma}
    return None


def _by_sigma(event: events.StepDone) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for sigma, loss in zip(event.sigmas, event.losses):
        part = min(SIGMA_PARTS - 1, int(sigma * SIGMA_PARTS))
        name = f"loss_by_sigma/{part / SIGMA_PARTS:.1f}-{(part + 1) / SIGMA_PARTS:.1f}"
        found.setdefault(name, []).append(loss)
    return {name: sum(losses) / len(losses) for name, losses in found.items()}
