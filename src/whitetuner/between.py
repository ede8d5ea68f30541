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


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether what comes every so many steps (0: never), and after the last of them, comes now."""
    return bool(every) and (step % every == 0 or step == steps)


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
    share: tuple[int, int] = (0, 1),
) -> list[events.Event]:
    """Draws into the run's samples/ with the averaged weights; the decoder goes back to the host after.

    company: ranks that have to draw together, of a sharded model; what others than the first draw is thrown away.
    share:   (number, count): every so manieth scene, see `shared_previews`
    """
    told: list[events.Event] = []
    numbers = range(share[0], len(data.scenes), share[1])
    if not numbers:
        return told
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
            numbers,
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
    prompts = [data.scenes[number].text for number in numbers[: len(files)]]
    told.append(events.Preview(step=step, files=files, prompts=prompts, seconds=drawn.seconds))
    return told


def shared_previews(
    ranks: Ranks, step: int, able: bool, draw: Callable[[tuple[int, int]], list[events.Event]]
) -> list[events.Event]:
    """Previews of replicas: each rank of rank 0's machine draws its share into the run's folder; rank 0 gets what to tell.

    able: this rank can draw;  draw: asked with (number, count). Raises what another rank failed with.
    """
    told = ranks.told(able and 0 in ranks.ranks_here)
    drawing = [rank for rank in range(ranks.world) if told[rank]]
    mine: list[events.Event] = []
    with ranks.phase():
        if ranks.rank in drawing:
            mine = draw((drawing.index(ranks.rank), len(drawing)))
    words = [(one.level, one.text) for one in mine if isinstance(one, events.Message)]
    drawn = [(one.files, one.prompts, one.seconds) for one in mine if isinstance(one, events.Preview)]
    rows = ranks.told((words, drawn))
    if not ranks.first:
        return []
    found: list[events.Event] = [
        events.Message(level=how, text=text) for said, _ in rows for how, text in said
    ]
    parts = [part for _, of_rank in rows for part in of_rank]
    if parts:
        each = [pair for files, prompts, _ in parts for pair in zip(files, prompts, strict=True)]
        each.sort(key=lambda pair: (len(pair[0]), pair[0]))  # 100.png behind 11.png
        files, prompts = [file for file, _ in each], [prompt for _, prompt in each]
        seconds = max(seconds for _, _, seconds in parts)
        found.append(events.Preview(step=step, files=files, prompts=prompts, seconds=seconds))
    return found


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
