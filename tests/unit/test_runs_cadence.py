"""`validation.every = "auto"`: a share of the time that holds, steps that meet the saved ones, the same after a resume."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whitetuner.runs import events
from whitetuner.runs.cadence import MOST, SEEN, SHARE, SKIPPED, Cadence, Pace, interval_of

SECONDS = st.floats(1e-3, 1e3)
STEPS = st.integers(1, 5000)
SAVES = st.integers(0, 1500)


class Run:
    """A run on a clock of its own: each step and each validation takes its seconds, and says so in its event."""

    def __init__(self, steps: int, save_every: int, step_s: float, validation_s: float) -> None:
        self.steps, self.save_every, self.step_s, self.validation_s = steps, save_every, step_s, validation_s
        self.happened: list[events.Event] = []
        self.clock = self.validating = 0.0
        self.at: list[int] = []
        self.pace: dict[str, float] = {}

    def go(self, start: int = 0, until: int | None = None, slow: float = 1.0) -> None:
        """slow: factor of this visit's clock, as on a busier machine."""
        cadence = Cadence("auto", self.steps, self.save_every, self.pace)
        for event in self.happened:
            cadence.hear(event)
        if start == 0:
            self.validate(cadence, 0, slow)
        for step in range(start + 1, (until or self.steps) + 1):
            seconds = self.step_s * slow * (5.0 if step <= SKIPPED else 1.0)
            self.clock += seconds
            self.hear(
                cadence,
                events.StepDone(step=step, loss=1.0, lr=1.0, grad_norm=1.0, seconds=seconds, samples=1),
            )
            if cadence.due(step):
                self.validate(cadence, step, slow)

    def validate(self, cadence: Cadence, step: int, slow: float) -> None:
        self.clock += self.validation_s * slow
        self.validating += self.validation_s * slow
        self.at.append(step)
        self.hear(
            cadence, events.Validation(step=step, loss=1.0, by_sigma={}, seconds=self.validation_s * slow)
        )

    def hear(self, cadence: Cadence, event: events.Event) -> None:
        self.happened.append(event)
        if cadence.hear(event):
            self.pace = cadence.document()


@given(STEPS, SAVES, SECONDS, SECONDS)
def test_validation_stays_below_its_share_and_meets_the_saved_steps(
    steps: int, save_every: int, step_s: float, validation_s: float
) -> None:
    """Whatever the speeds: below 3 % of the run's time, except where two validations are more than that already."""
    run = Run(steps, save_every, step_s, validation_s)
    run.go()
    assert run.at[0] == 0 and run.at[-1] == steps
    share = run.validating / run.clock
    assert share < SHARE or run.at == [0, steps]
    assert len(run.at) <= MOST + 1
    if steps < SKIPPED + SEEN:
        assert run.at == [0, steps]
        return
    interval = interval_of(Pace(validation_s, step_s), steps, save_every)
    known = range(SKIPPED + SEEN, steps + 1)
    assert run.at == [0, *(step for step in known if step % interval == 0 or step == steps)]
    assert interval == steps or not save_every or interval % save_every == 0 or save_every % interval == 0


@given(STEPS, SAVES, SECONDS, SECONDS, st.data())
def test_a_run_that_goes_on_looks_at_the_steps_of_an_unbroken_one(
    steps: int, save_every: int, step_s: float, validation_s: float, data: st.DataObject
) -> None:
    """Stopped anywhere once the pace is known, and resumed on a machine of another speed; before that on the same."""
    whole = Run(steps, save_every, step_s, validation_s)
    whole.go()
    at = data.draw(st.integers(1, steps))
    parts = Run(steps, save_every, step_s, validation_s)
    parts.go(until=at)
    slow = data.draw(st.floats(0.1, 10)) if at >= SKIPPED + SEEN else 1.0
    parts.go(start=at, slow=slow)
    assert parts.at == whole.at


@pytest.mark.parametrize(
    ("validation_s", "steps", "save_every", "interval"),
    [
        (0.1, 2000, 500, 20),  # cheap: a hundred points, and every saved step is one
        (
            5.0,
            2000,
            500,
            250,
        ),  # nine in all are allowed (2.5 % of 2000 s, one of them at the start): 223 -> 250
        (10.0, 2000, 500, 500),
        (15.0, 2000, 500, 1000),  # one at the end and one between: every other saved step
        (20.0, 2000, 500, 2000),
        (100.0, 2000, 500, 2000),  # too dear: the end alone
        (5.0, 2000, 0, 500),  # nothing to meet: a round number
        (5.0, 2000, 7000, 250),
    ],
)
def test_intervals_of_a_run_of_a_second_a_step(
    validation_s: float, steps: int, save_every: int, interval: int
) -> None:
    assert interval_of(Pace(validation_s, 1.0), steps, save_every) == interval


def test_a_number_is_every_so_many_steps_and_the_last_and_zero_is_never() -> None:
    assert [step for step in range(1, 12) if Cadence(4, 11, 3).due(step)] == [4, 8, 11]
    assert not any(Cadence(0, 11, 3).due(step) for step in range(12))


def test_one_odd_step_and_slow_first_ones_do_not_decide() -> None:
    cadence = Cadence("auto", 2000, 500)
    cadence.hear(events.Validation(step=0, loss=1.0, by_sigma={}, seconds=5.0))
    for step in range(1, SKIPPED + SEEN + 1):
        seconds = 90.0 if step <= SKIPPED or step == 7 else 1.0
        done = events.StepDone(step=step, loss=1.0, lr=1.0, grad_norm=1.0, seconds=seconds, samples=1)
        assert cadence.hear(done) == (step == SKIPPED + SEEN)
    assert cadence.pace == Pace(5.0, 1.0) and cadence.interval == 250
    assert cadence.words().startswith("validated every 250 steps (5 s each, 2.2% of the time)")
    more = Cadence("auto", 300, 500, cadence.document())
    assert more.interval == 300 and "after the last alone" in more.words()


@pytest.mark.parametrize(
    "pace", [None, {}, [], {"validation_s": "1", "step_s": 1.0}, {"validation_s": 1.0, "step_s": math.nan}, 3]
)
def test_a_pace_that_is_none_is_measured_anew(pace: object) -> None:
    assert Cadence("auto", 100, 10, pace).open
