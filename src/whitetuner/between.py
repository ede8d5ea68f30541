"""What a run looks at between its steps: validation loss and previews, told as events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from whitetuner.family import Family, Part
from whitetuner.prepared import Prepared
from whitetuner.runs import events
from whitetuner.runs.folder import RunFolder
from whitetuner.train.distributed import Ranks
from whitetuner.train.loop import ALONE
from whitetuner.train.preview import draw_previews
from whitetuner.train.step import StepSettings
from whitetuner.train.team import Team
from whitetuner.train.validate import sigma_grid, validate


def validation_of(
    step: int,
    family: Family,
    team: Team,
    data: Prepared,
    settings: Callable[[Part], StepSettings],
    sigmas: int,
    device: torch.device,
    company: Ranks = ALONE,
) -> events.Validation | None:
    """The loss on fixed noise at so many sigmas of each part's range, of the averaged weights; None without pictures for it.

    company: see previews_of
    """
    if not data.validation:
        return None
    began = time.perf_counter()
    by_sigma: dict[str, float] = {}
    by_item: dict[str, float] = {}
    with team.averaged(), team.guests(), company.together():
        for learner in team.learners:
            team.make_way_for(learner)
            part = learner.part
            grid = sigma_grid(sigmas, *part.sigma_range)
            modules = {part.name: learner.module}
            found = validate(family, modules, part.name, data.validation, grid, settings(part), device)
            by_sigma |= {str(sigma): loss for sigma, loss in found.by_sigma.items()}
            for item, loss in found.by_item.items():
                by_item[item] = by_item.get(item, 0.0) + loss / len(team.learners)
    places = {
        item.id: f"{item.target.parent.name}/{item.target.name}"
        for batch in data.validation
        for item in batch.items
    }
    ranked = sorted(by_item, key=lambda item: -by_item[item])
    return events.Validation(
        step=step,
        loss=sum(by_sigma.values()) / len(by_sigma),
        by_sigma=by_sigma,
        seconds=time.perf_counter() - began,
        held_out=data.held_out,
        by_picture={places[item]: by_item[item] for item in ranked},
    )


def previews_of(
    step: int,
    family: Family,
    team: Team,
    decoder: torch.nn.Module,
    data: Prepared,
    folder: RunFolder,
    max_seconds: float,
    device: torch.device,
    company: Ranks = ALONE,
) -> list[events.Event]:
    """Draws into the run's samples/ with the averaged weights; the decoder goes back to the host after.

    company: ranks that have to draw together, of a sharded model; what others than the first draw is thrown away.
    """
    told: list[events.Event] = []
    with (
        _drawn_into(folder, company) as samples,
        company.together(),
        team.averaged(),
        team.guests(),
        decoding_in_room(decoder, team.make_room()),
        team.one_at_a_time() as modules,
    ):
        draw = partial(
            draw_previews,
            family,
            modules,
            decoder.to(device),
            data.scenes,
            samples,
            step,
            max_seconds,
            partial(_one_word, company),
        )
        try:
            drawn = draw()
        except torch.OutOfMemoryError:
            if company.world > 1:  # the others are in the middle of a picture
                raise
            drawn = None
        if drawn is None:
            told.append(
                _warning(f"out of memory while drawing previews of step {step}: decoded in tiles now")
            )
            if hasattr(decoder, "enable_tiling"):
                decoder.enable_tiling()  # type: ignore[operator]
            for make_room in team.make_room():
                make_room()
            try:
                drawn = draw()
            except torch.OutOfMemoryError:
                told.append(_warning(f"no previews of step {step}: the card has no memory for their size"))
    if device.type != "cpu":
        decoder.to("cpu")
    if drawn is None or not company.first:
        return told
    if drawn.skipped:
        text = f"{drawn.skipped} previews of step {step} left out: preview.max_seconds was reached"
        told.append(events.Message(level="info", text=text))
    files = [path.relative_to(folder.path).as_posix() for path in drawn.files]
    prompts = [scene.text for scene in data.scenes[: len(files)]]
    told.append(events.Preview(step=step, files=files, prompts=prompts, seconds=drawn.seconds))
    return told


def _one_word(ranks: Ranks, late: bool) -> bool:
    """Rank 0's clock counts."""
    return ranks.from_first(lambda: late)


@contextmanager
def _drawn_into(folder: RunFolder, company: Ranks) -> Iterator[Path]:
    if company.first:
        yield folder.samples
        return
    with TemporaryDirectory() as elsewhere:
        yield Path(elsewhere)


def _warning(text: str) -> events.Event:
    return events.Message(level="warning", text=text)


@contextmanager
def decoding_in_room(decoder: Any, make_room: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Within it the denoisers' blocks leave the device before a picture is decoded; they come back when they are called."""
    if not make_room:
        yield
        return
    decode = decoder.decode

    def in_room(*args: Any, **kwargs: Any) -> Any:
        for one in make_room:
            one()
        return decode(*args, **kwargs)

    decoder.decode = in_room
    try:
        yield
    finally:
        del decoder.decode
