"""One cell of the laboratory: the demo's recipe with some settings changed, trained and judged.

All cells of a lesson share its pictures and its cache, so pictures and captions are encoded once.

A cell's values are config keys, and three of the pictures: "new" and "old" {key: value} change the two [[data.sets]] (folders are
those of `Lesson.prepare`; "old": None leaves that set out), "asked": "tags" judges by captions of tags in an order of lot.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from benchmarks.learning.concepts import CONCEPTS, Concept, known_right, mask_of, save, shuffled_tags, tags_of
from diffusers import Flux2Transformer2DModel

from whitetuner import recipe
from whitetuner.adapters.attach import attach_state
from whitetuner.adapters.files import load_adapter
from whitetuner.config.load import Loaded, load_config
from whitetuner.demo import NEW_PICTURES, OLD_PICTURES, draw_folder, write_config
from whitetuner.families import registry
from whitetuner.nano.draw import Drawing, draw_set
from whitetuner.nano.score import draw_with, load_pipeline
from whitetuner.runs import events

#: Noise and captions of the pictures that are judged; those of the pictures learned from are 21 and 22, as in the demo.
NEW_SEED, OLD_SEED = 31, 77


@dataclass(frozen=True)
class Lesson:
    """What is equal for all cells of a table.

    folder: pictures (data/new, data/old; more/masks of the new ones, more/tags: they with captions of tags), cache and the runs
    under way; judged_new, judged_old: pictures that are drawn and judged
    """

    folder: Path
    concept: str
    steps: int
    batch: int
    judged_new: int
    judged_old: int
    #: Steps after which the new pictures are judged on the way.
    moments: tuple[int, ...] = ()
    #: A model beside the embedded one, of its text encoder and VAE (real_width.py).
    model: Path | None = None

    def settings(self) -> dict[str, Any]:
        """What a figure depends on, beside the cell; where the pictures are kept is nobody's matter."""
        return {
            "concept": self.concept,
            "steps": self.steps,
            "batch": self.batch,
            "judged_new": self.judged_new,
            "judged_old": self.judged_old,
        }

    def prepare(self) -> None:
        """Draws the pictures, unless they are there."""
        data, more = self.folder / "data", self.folder / "more"
        if (more / "tags" / f"{NEW_PICTURES - 1:03d}.txt").exists():
            return
        drawn = CONCEPTS[self.concept].draw(NEW_PICTURES, 21)
        save(drawn, data / "new")
        draw_folder(data / "old", OLD_PICTURES, 22)
        (more / "masks").mkdir(parents=True, exist_ok=True)
        for index, drawing in enumerate(drawn):
            mask_of(drawing.image).save(more / "masks" / f"{index:03d}.png")
        save([Drawing(one.image, ", ".join(tags_of(one)), one.label) for one in drawn], more / "tags")

    def sets(self, new: Mapping[str, Any], old: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """[[data.sets]] of equal shares; their folders are named as in `prepare`."""
        found = []
        for own, given in (("new", new), ("old", old)):
            if given is not None:
                values = {"images": own, **given}
                for key in {"images", "mask_dir"} & {*values}:
                    of = "data" if values[key] in ("new", "old") else "more"
                    values[key] = str(self.folder / of / values[key])
                found.append({"weight": 0.5, **values})
        return found

    def config(self, name: str, seed: int, changes: Mapping[str, Any]) -> Loaded:
        """The demo's recipe, quiet, a tenth of the pictures held out for the validation loss."""
        quiet = {
            "run.name": name,
            "run.seed": seed,
            "data.batch_size": self.batch,
            "optimizer.warmup_steps": min(20, self.steps // 10),
            "save.every": 0,
            "preview.every": 0,
            "validation.every": self.steps,
            "validation.share": 0.1,
            "validation.items": 24,
            "log.tensorboard": False,
        }
        if self.model is not None:
            quiet["model.path"] = str(self.model)
        keys = {key: value for key, value in changes.items() if "." in key}
        if "new" in changes or "old" in changes:
            quiet["data.sets"] = self.sets(changes.get("new", {}), changes.get("old", {}))
        return load_config(write_config(self.folder, self.steps), base={**quiet, **keys})


def judged(
    lesson: Lesson,
    prepare: Callable[[Any], None] = lambda pipeline: None,
    by_tags: bool = False,
    what: tuple[str, ...] = ("new", "old"),
) -> dict[str, float]:
    """Shares of pictures drawn right, of the concept ("new") and of what the model knew ("old").

    prepare: puts on the pipeline what is to be judged; by_tags: the new ones are asked for by tags in an order of lot
    """
    pipeline = load_pipeline()
    prepare(pipeline)
    pipeline.transformer.eval()
    concept = CONCEPTS[lesson.concept]
    old = Concept("", "", lambda count, seed: draw_set(count, seed), known_right)
    found = {}
    for name, one, count, seed in (
        ("new", concept, lesson.judged_new, NEW_SEED),
        ("old", old, lesson.judged_old, OLD_SEED),
    ):
        if name not in what:
            continue
        asked = one.draw(count, seed)
        words = [drawing.caption for drawing in asked]
        if by_tags and name == "new":
            words = shuffled_tags(asked, seed)
        drawn = draw_with(pipeline, words, seed)
        found[name] = round(
            fmean(one.right(picture, a.label) for picture, a in zip(drawn, asked, strict=True)), 4
        )
    return found


def taught(lesson: Lesson, name: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a cell and judges its final file: the row of the table. The run's folder is removed at the end.

    Raises UserError when the recipe refuses the cell or its loss is not finite.
    """
    folder = lesson.folder / name
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    by_tags = changes.get("asked") == "tags"
    with recipe.Session.open(lesson.config(name, seed, changes)) as session:
        session.prepare()
        curve = {
            str(moment): on_the_way(lesson, session, moment, by_tags)
            for moment in lesson.moments
            if moment < lesson.steps
        }
        result = session.run()
    if result.stopped:
        raise KeyboardInterrupt
    row = {**judged(lesson, lambda pipeline: put_on(pipeline, result), by_tags), **measured(result.folder)}
    shutil.rmtree(folder)
    return {**row, "curve": {**curve, str(lesson.steps): row["new"]}} if curve else row


def on_the_way(lesson: Lesson, session: recipe.Session, moment: int, by_tags: bool) -> float:
    """The share of new ones drawn right after so many steps, average included; training goes on as if not asked."""
    if not session.advance(moment):
        raise KeyboardInterrupt
    module = session.team.learners[0].module
    learning = module.training
    with session.team.averaged():
        found = judged(lesson, lambda pipeline: setattr(pipeline, "transformer", module), by_tags, ("new",))
    module.train(learning)
    return found["new"]


def put_on(pipeline: Any, result: recipe.Result) -> None:
    """What a run made, from its final files: an adapter, or a whole transformer."""
    whole = result.folder / "final" / "transformer"
    if whole.exists():
        pipeline.transformer = Flux2Transformer2DModel.from_pretrained(whole, torch_dtype=torch.float32)
        return
    attach_state(pipeline.transformer, *load_adapter(result.final[1], registry.keys("flux2-klein")))


def measured(folder: Path) -> dict[str, Any]:
    """Validation loss before and after, where it was measured, and seconds of the steps, from the run's events."""
    told, _ = events.read(folder / "events.jsonl")
    losses = [one.loss for one in told if isinstance(one, events.Validation)]
    seconds = [one.seconds for one in told if isinstance(one, events.StepDone)]
    held_out = (
        {"validation_before": round(losses[0], 5), "validation": round(losses[-1], 5)} if losses else {}
    )
    return {
        **held_out,
        "seconds": round(sum(seconds), 2),
        "seconds_per_step": round(median(seconds), 4),
    }
