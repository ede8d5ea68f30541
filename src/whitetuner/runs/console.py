"""A run's events as a person reads them in a terminal: one live line where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import atexit
import time
from collections import deque
from statistics import fmean, median

from rich.console import Console as Screen
from rich.live import Live
from rich.text import Text

from whitetuner.runs import events
from whitetuner.tongue import say, told

PHASES = {
    "scan": "looking at the pictures",
    "load": "loading the model",
    "train": "training",
    "export": "writing the final files",
}
#: Seconds between plain lines: a log file should stay readable.
PLAIN_EVERY_S = 2.0


def phase(name: str) -> str:
    """A phase in words; "cache vae" is the encoder named vae at work."""
    kind, _, what = name.partition(" ")
    return f"encoding: {what or 'pictures and captions'}" if kind == "cache" else PHASES.get(name, name)


def duration(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    total = round(seconds)
    hours, minutes, rest = total // 3600, total % 3600 // 60, total % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Listener of a run. steps: how many there will be, for the ETA; previews and saving are not counted in it."""

    def __init__(self, steps: int | None = None, every: int = 1, plain: bool | None = None) -> None:
        self.steps, self.every = steps, every
        self.screen = Screen(highlight=False, soft_wrap=True)
        self.plain = not self.screen.is_terminal or self.screen.is_dumb_terminal if plain is None else plain
        self.live: Live | None = None
        self.seconds: deque[float] = deque(maxlen=50)
        self.losses: deque[float] = deque(maxlen=50)
        self.samples: deque[int] = deque(maxlen=50)
        self.last_line = 0.0

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            self.steps = event.steps or self.steps
            self._say(
                f"{event.name}: "
                + (f"goes on from step {event.resumed_from}" if event.resumed_from else "starts")
            )
        elif isinstance(event, events.Phase):
            self.steps = event.total if event.name == "train" and event.total else self.steps
            self._say(phase(event.name))
        elif isinstance(event, events.Progress):
            self._status(
                f"{told(phase(event.phase))} {event.done}/{event.total}",
                event.done == event.total,
            )
        elif isinstance(event, events.StepDone):
            self._step(event)
        elif isinstance(event, events.Validation):
            self._say(f"step {event.step}: validation loss {event.loss:.4f}")
        elif isinstance(event, events.Preview):
            self._say(f"step {event.step}: {len(event.files)} previews ({event.seconds:.1f} s)")
        elif isinstance(event, events.Saved):
            self._say(f"step {event.step}: saved {event.path}")
        elif isinstance(event, events.Message):
            self._say(f"{event.level}: {event.text}")
        elif isinstance(event, events.Failed):
            self._end(f"failed: {event.reason}")
        elif isinstance(event, events.Ended):
            self._end(f"{event.status} at step {event.step}")

    def _step(self, event: events.StepDone) -> None:
        self.seconds.append(event.seconds)
        self.losses.append(event.loss)
        self.samples.append(event.samples)
        pace = median(self.seconds)  # the first steps and the odd hiccup say nothing of the rest
        of = f"/{self.steps}" if self.steps else ""
        left = f"  ETA {duration(pace * (self.steps - event.step))}" if self.steps else ""
        pictures = fmean(self.samples) / max(1e-9, pace)
        line = (  # the first 80 columns are all that a narrow terminal shows
            f"step {event.step}{of}{left}  loss {event.loss:.4f} (mean {fmean(self.losses):.4f})  {pace:.2f} s/step  "
            f"{pictures:.1f} samples/s  lr {event.lr:.2e}"
        )
        if not self.plain or event.step % self.every == 0:
            self._status(line, event.step in (1, self.steps))

    def _status(self, line: str, must: bool) -> None:
        if not self.plain:
            if self.live is None:
                self.live = Live(console=self.screen, refresh_per_second=4, transient=True)
                self.live.start()
                atexit.register(self.close)  # an unforeseen end must give the terminal its cursor back
            self.live.update(Text(line))
            return
        now = time.monotonic()
        if must or now - self.last_line >= PLAIN_EVERY_S:
            self.last_line = now
            print(line, flush=True)

    def _say(self, line: str) -> None:
        if self.plain:
            say(line)
        else:
            self.screen.print(Text(told(line)))

    def _end(self, line: str) -> None:
        self.close()
        self._say(line)

    def close(self) -> None:
        """Ends the live line."""
        if self.live is not None:
            self.live.stop()
            self.live = None
            atexit.unregister(self.close)
