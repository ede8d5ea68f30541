"""How often a run validates: every so many steps, or as often as a small share of its time allows.

`auto` is resolved once, from seconds that a steady clock measured in the run's own first steps, and kept in run.json. So
clocks decide when something is looked at, never what is learned, and a run that goes on looks at the same steps as one that
was never stopped.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from whitetuner.runs import events

#: Validation stays below this share of a run's time; it is planned with less, for a machine that gets busier.
SHARE, PLANNED = 0.03, 0.025
#: Steps that the pace is told from, after some that are slower than the rest.
SEEN, SKIPPED = 10, 2
#: However cheap they are: so many points make a curve.
MOST = 100


@dataclass(frozen=True)
class Pace:
    """Seconds of one validation and of one step, as they were measured."""

    validation_s: float
    step_s: float

    def share(self, interval: int, steps: int) -> float:
        """Of the run's time, with one validation before the first step and one after the last."""
        spent = (1 + math.ceil(steps / interval)) * self.validation_s
        return spent / max(1e-12, spent + steps * self.step_s)


def interval_of(pace: Pace, steps: int, save_every: int) -> int:
    """Steps between validations, so that all of them together stay below SHARE; `steps`: only after the last one.

    Where checkpoints come every so many steps, validations meet them: every saved step is measured, or every so manieth.
    """
    allowed = min(MOST, int(PLANNED * steps * pace.step_s / max(pace.validation_s, 1e-12)) - 1)
    if allowed < 1:
        return steps
    least = math.ceil(steps / allowed)
    if 0 < save_every < least:
        return min(steps, math.ceil(least / save_every) * save_every)
    if save_every:
        return next(one for one in range(least, save_every + 1) if save_every % one == 0)
    power = 10 ** int(math.log10(least))
    return min(steps, next(one * power for one in (1, 2, 5, 10) if one * power >= least))


class Cadence:
    """When to validate.

    every:      steps between validations, 0: never, or "auto"
    steps, save_every: of the run, as it goes now: with others `auto` comes to another interval of the same pace
    pace:       measured earlier (a run that goes on), as `document` gave it; None: not yet, or not by a run of ours
    """

    def __init__(
        self,
        every: int | Literal["auto"],
        steps: int,
        save_every: int,
        pace: Any = None,
    ) -> None:
        self.every, self.steps, self.save_every = every, steps, save_every
        self.pace = _read(pace)
        self._validation_s: float | None = None
        self._steps_s: list[float] = []

    @property
    def open(self) -> bool:
        """`auto`, and what it comes to is not known yet."""
        return self.every == "auto" and self.pace is None

    @property
    def heard_one(self) -> bool:
        """A validation was timed."""
        return self._validation_s is not None

    @property
    def interval(self) -> int:
        """Steps between validations; 0: none but the last one (or none at all)."""
        if self.every != "auto":
            return int(self.every)
        return 0 if self.pace is None else interval_of(self.pace, self.steps, self.save_every)

    def hear(self, event: events.Event) -> bool:
        """True when `auto` comes to something with this event."""
        if not self.open:
            return False
        if isinstance(event, events.Validation):
            self._validation_s = event.seconds
        elif isinstance(event, events.StepDone):
            self._steps_s.append(event.seconds)
        if self._validation_s is None or len(self._steps_s) < SKIPPED + SEEN:
            return False
        self.pace = Pace(self._validation_s, median(self._steps_s[SKIPPED : SKIPPED + SEEN]))
        return True

    def due(self, step: int) -> bool:
        """Now, after this step?"""
        if self.every == 0:
            return False
        return step == self.steps or (bool(self.interval) and step % self.interval == 0)

    def document(self) -> dict[str, float]:
        """Of the pace, for run.json."""
        return {} if self.pace is None else asdict(self.pace)

    def words(self) -> str:
        """What `auto` came to."""
        assert self.pace is not None, "not measured yet"
        share = f"{self.pace.share(self.interval, self.steps):.1%} of the time"
        if self.interval >= self.steps:
            return (
                f"a validation takes {self.pace.validation_s:.3g} s and a step {self.pace.step_s:.3g} s: validated before the "
                f"first step and after the last alone ({share}); fewer validation.items or sigmas are cheaper"
            )
        return f"validated every {self.interval} steps ({self.pace.validation_s:.3g} s each, {share})"


def _read(pace: Any) -> Pace | None:
    """The folder may come from anybody."""
    if not isinstance(pace, dict):
        return None
    found = [pace.get(name) for name in ("validation_s", "step_s")]
    if not all(isinstance(one, float) and 0 <= one < 1e9 for one in found):
        return None
    return Pace(*found)  # type: ignore[arg-type]  # told by the line above
