"""A run's events as TensorBoard curves. The writer comes with tensorboard itself; torch is not needed for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from whitetuner.runs import events

#: Loss is also shown by noise level, in so many equal parts of [0, 1].
SIGMA_PARTS = 5
#: Seconds until what is written can be seen; a kill loses so much of the curves (never of events.jsonl).
FLUSH_S = 5


class Board:
    """Listener of a run that writes tensorboard/train_{steps}steps_{gpus}gpu_{time}/ inside the run's folder."""

    def __init__(self, folder: Path, steps: int, gpus: int = 1) -> None:
        stamp = time.strftime("%Y%m%d_%H%M%S")
        self.folder = folder / f"train_{steps}steps_{gpus}gpu_{stamp}"
        self.writer: Any = None

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            self._write(
                event,
                {
                    "train/loss": event.loss,
                    "train/learning_rate": event.lr,
                    "train/grad_norm": event.grad_norm,
                    "train/weight_change": event.weight_change,
                    "train/memory_mb": event.memory_mb,
                    "train/step_time": event.seconds,
                    **self._by_sigma(event),
                },
            )
        elif isinstance(event, events.Validation):
            by_sigma = {
                f"validation/sigma_{float(level):.2f}": loss for level, loss in event.by_sigma.items()
            }
            self._write(event, {"validation/loss": event.loss, **by_sigma})
        elif isinstance(event, (events.Ended, events.Failed)):
            self.close()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _by_sigma(self, event: events.StepDone) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for sigma, loss in zip(event.sigmas, event.losses):
            part = min(SIGMA_PARTS - 1, int(sigma * SIGMA_PARTS))
            found.setdefault(
                f"loss_by_sigma/{part / SIGMA_PARTS:.1f}-{(part + 1) / SIGMA_PARTS:.1f}", []
            ).append(loss)
        return {name: sum(losses) / len(losses) for name, losses in found.items()}

    def _write(self, event: events.StepDone | events.Validation, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self.writer is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self.writer = EventFileWriter(str(self.folder), flush_secs=FLUSH_S)
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self.writer.add_event(Event(step=event.step, wall_time=event.time, summary=summary))
