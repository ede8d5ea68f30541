"""The validations of a run: when they come, and the held-out loss that a checkpoint carries along."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from whitetuner.assemble import step_settings
from whitetuner.between import validation_of
from whitetuner.config.schema import Config
from whitetuner.family import Family
from whitetuner.prepared import Prepared
from whitetuner.runs import events
from whitetuner.runs.best import HELD_OUT_LOSS
from whitetuner.runs.cadence import Cadence
from whitetuner.runs.folder import RunFolder
from whitetuner.train.distributed import Ranks
from whitetuner.train.team import Team

#: Key of run.json for what was measured.
PACE = "validation_pace"


class Validating:
    """Asked by the session between steps; it hears every event of the run.

    team: who learns then; company: ranks that validate together (a sharded model), in which the first one's clock counts
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        team: Callable[[], Team],
        data: Prepared,
        folder: RunFolder,
        device: torch.device,
        company: Ranks,
        tell: Callable[[events.Event], None],
    ) -> None:
        self.company, self.folder, self.tell = company, folder, tell
        pace = folder.document().get(PACE) if company.first else None
        self.cadence = Cadence(config.validation.every, data.steps, config.save.every, pace)
        settings = partial(step_settings, config, data.shift)
        where = (data, settings, config.validation.sigmas, device, company)
        self._make = lambda step: validation_of(step, family, team(), *where)
        last = events.last_of(folder.events, (events.Validation,))
        self.last = last if isinstance(last, events.Validation) else None
        if self.cadence.open and company.first:
            for event in events.read(folder.events)[0]:  # of a run that was stopped in its first steps
                self.hear(event)

    def begin(self, step: int) -> None:
        """Before the first step; and where `auto` would have nothing to go by (a fork)."""
        if self.cadence.every == 0:
            return
        if self.company.from_first(lambda: step == 0 or (self.cadence.open and not self.cadence.heard_one)):
            self.now(step)

    def due(self, step: int) -> bool:
        if self.cadence.every != "auto":
            return self.cadence.due(step)
        return bool(self.company.from_first(lambda: self.cadence.due(step)))

    def now(self, step: int) -> None:
        """Validates and tells it; nothing where there are no pictures for it."""
        event = self._make(step)
        if event is not None:
            self.last = event
            self.tell(event)

    def hear(self, event: events.Event) -> None:
        if self.cadence.hear(event) and self.company.first:
            self.folder.update(**{PACE: self.cadence.document()})
            self.tell(events.Message(level="info", text=self.cadence.words()))

    def held_out_loss(self, step: int) -> dict[str, float | None]:
        """For the state document of this step's checkpoint."""
        last = self.last
        return {
            HELD_OUT_LOSS: last.loss if last is not None and last.step == step and last.held_out else None
        }
