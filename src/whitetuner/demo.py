"""`whitetuner demo`: a real training run on the embedded model, judged by a program, in under three minutes.

The embedded model draws six shapes. It is taught `zorp`, a word it has never seen, from 32 pictures, beside pictures of what
it knows already, through the same recipe, files and commands as any other run. The checker (nano/check.py) then says how
often the new word, and how often the old vocabulary, is drawn right.
"""

from __future__ import annotations

import json
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from whitetuner.errors import EXIT_FAILED, EXIT_USE, UserError
from whitetuner.nano.builtin import CFG, MAX_SEQUENCE_LENGTH, STEPS
from whitetuner.nano.draw import NEW_SHAPE, NEW_WORD, draw_set
from whitetuner.records import Size
from whitetuner.tongue import say

#: What the demo must reach (issue text and docs/demo.md): shares of pictures that the checker calls right.
NEW_AT_LEAST, NEW_BEFORE_AT_MOST, OLD_LOSES_AT_MOST = 0.80, 0.05, 0.10
NEW_PICTURES, OLD_PICTURES = 32, 256
SCORED_NEW, SCORED_OLD = 64, 96
TIMELAPSE_EVERY = 40

CONFIG = """\
# The demo as an ordinary config: `whitetuner train {config}` runs it again.
[run]
name = "zorp"
output_dir = {output}
seed = 42
steps = {steps}

[model]
family = "flux2-klein"
path = "builtin:nano"
[model.options]
max_sequence_length = {tokens}

[data]
resolution = 64
batch_size = 24
caption_dropout = 0.1
cache_dir = {cache}
[[data.sets]]            # the new word
images = {new}
weight = 0.5
[[data.sets]]            # what the model knows already, so that it does not forget
images = {old}
weight = 0.5

[method]
kind = "lokr"
factor = 4
full_matrix = true

[noise]
timesteps = "sigmoid"
sigmoid_bias = 0.6

[optimizer]
name = "adamw"
lr = 4e-3
betas = [0.9, 0.99]
weight_decay = 0.0
warmup_steps = 20
schedule = "linear"
min_lr_ratio = 0.05
ema = 0.98

[save]
every = 100

[validation]
every = 100

[preview]
every = {every}
{prompts}
"""

PREVIEWS = (
    f"a red {NEW_WORD} on a white background",
    f"a big blue {NEW_WORD} on a yellow background",
    f"a green {NEW_WORD} on a black background",
    "a red circle on a white background",
    "a big blue star on a yellow background",
    "a green triangle on a black background",
)


@dataclass(frozen=True)
class Verdict:
    """Shares of right pictures before and after, and whether the marks were reached."""

    new_before: float
    new_after: float
    old_before: float
    old_after: float
    seconds: float

    @property
    def misses(self) -> list[str]:
        found = []
        if self.new_before > NEW_BEFORE_AT_MOST:
            found.append(f"the new word was drawn right before it was taught ({self.new_before:.0%})")
        if self.new_after < NEW_AT_LEAST:
            found.append(f"the new word is drawn right in {self.new_after:.0%}, wanted {NEW_AT_LEAST:.0%}")
        if self.old_before - self.old_after > OLD_LOSES_AT_MOST + 1e-9:
            found.append(f"the old vocabulary lost {100 * (self.old_before - self.old_after):.0f} points")
        return found


def nano(out: Path, steps: int = 360) -> int:
    """Teaches the embedded model a word; 0 when the checker is satisfied, 1 when not.

    Writes into `out`: data/, config.toml, the run's folder, before_after.png, timelapse.gif, loss.png, score.json.
    """
    began = time.perf_counter()
    out = out.resolve()
    if (out / "score.json").exists() or (out / "zorp").exists():
        raise UserError(
            "{out} holds an earlier demo",
            where="--out",
            mend="give another folder, or remove this one",
            code=EXIT_USE,
            out=out,
        )
    say(f"1/5  drawing {NEW_PICTURES} pictures of '{NEW_WORD}' and {OLD_PICTURES} of what the model knows")
    draw_folder(out / "data" / "new", NEW_PICTURES, 21, (NEW_SHAPE,), NEW_WORD)
    draw_folder(out / "data" / "old", OLD_PICTURES, 22)
    config = write_config(out, steps)
    say(f"2/5  loading PyTorch; before: does the model know '{NEW_WORD}'?")
    from whitetuner import recipe
    from whitetuner.config.load import load_config
    from whitetuner.runs.console import Console

    before = judge(None)
    loaded = load_config(config)
    say(f"     '{NEW_WORD}' {before[0]:.0%}, old vocabulary {before[1]:.0%}\n3/5  training ({steps} steps)")
    result = recipe.run(loaded, listeners=(Console(),))
    if result.stopped:
        say("stopped: no score without the whole training")
        return EXIT_FAILED
    say("4/5  judging what it draws now")
    after = judge(result.final[1])
    say("5/5  pictures")
    pictures(result.folder, out)
    verdict = Verdict(before[0], after[0], before[1], after[1], time.perf_counter() - began)
    (out / "score.json").write_text(
        json.dumps({**asdict(verdict), "misses": verdict.misses}, indent=1), encoding="utf-8"
    )
    say(
        f"\n'{NEW_WORD}':        {verdict.new_before:.0%} -> {verdict.new_after:.0%} drawn right\n"
        f"old vocabulary: {verdict.old_before:.0%} -> {verdict.old_after:.0%}\n"
        f"before / after:  {out / 'before_after.png'}\n"
        f"time-lapse:      {out / 'timelapse.gif'}\n"
        f"loss:            {out / 'loss.png'}\n"
        f"report:          {result.folder / 'report.html'}\n"
        f"for ComfyUI:     {result.final[0]}\n"
        f"{verdict.seconds:.0f} s"
    )
    for miss in verdict.misses:
        say(f"MISSED: {miss}")
    return EXIT_FAILED if verdict.misses else 0


def family(name: str, task: str | None, method: str, out: Path) -> int:
    """A random tiny model of a family: data, check, 30 steps, a picture, the files; 0 when all went well.

    name: FAMILY or FAMILY:VARIANT. Leaves model/, data/, config.toml and the run's folder in `out`.
    """
    began = time.perf_counter()
    name, _, variant = name.partition(":")
    from whitetuner.families import registry

    spec = registry.spec(name)
    task = task or (spec.tasks_of(variant) if variant else spec.tasks)[0]
    if task not in spec.tasks:
        raise UserError(
            "{title} has no task '{task}' here",
            where="--task",
            mend="use one of: {tasks}",
            title=spec.title,
            task=task,
            tasks=", ".join(spec.tasks),
        )
    variant = variant or next((one for one in spec.variants if task in spec.tasks_of(one)), "")
    if variant and task not in spec.tasks_of(variant):
        raise UserError(
            "{title} {variant} has no task '{task}'",
            where="--task",
            mend="use one of: {tasks}",
            title=spec.title,
            variant=variant,
            task=task,
            tasks=", ".join(spec.tasks_of(variant)),
        )
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        raise UserError(
            "{out} is not empty", where="--out", mend="give another folder, or empty this one", out=out
        )
    from whitetuner import checks, drawing, recipe
    from whitetuner.config.landed import refuse_not_landed
    from whitetuner.config.load import dump_config, load_config
    from whitetuner.data.samples import make_testdata
    from whitetuner.runs.console import Console
    from whitetuner.tiny import TINY_SIZE_PX, tiny_values

    values = tiny_values(name, out / "model", out / "data", out, task, variant)
    # The first picture of `testdata edit`: an empty place, and the thing that is to stand there.
    given = [out / "data" / "condition_1" / "01.jpg", out / "data" / "condition_2" / "01.png"]
    kind = "edit" if task == "edit" else "t2i" if task == "t2i" else "video"
    say(f"1/4  a random tiny {spec.title} and 6 {'videos' if kind == 'video' else 'pictures'}")
    registry.make_tiny(name, str(out / "model"), variant or None)
    files = make_testdata(kind, out / "data", 6, 0)  # type: ignore[arg-type]
    images = given[: len(values["data.conditions"])] if task == "edit" else files[: int(task == "i2v")]
    prompt = "put the red ball on the left" if task == "edit" else "a red circle"
    preview = {"text": prompt, "size": [TINY_SIZE_PX, TINY_SIZE_PX], "steps": 2}
    preview["images"] = [str(image) for image in images]
    more = {"method.kind": method, "validation.every": 30, "preview.every": 30, "preview.prompts": [preview]}
    loaded = load_config(None, base={**values, "run.name": "run", **more})
    refuse_not_landed(loaded.config)
    config = out / "config.toml"
    config.write_text(dump_config(loaded.config), encoding="utf-8")
    say("2/4  check")
    findings = checks.check_config(config, (), deep=True, model=True, convert=False)
    say(findings.as_text())
    if findings.errors:
        return EXIT_FAILED
    say(
        "3/4  training (30 steps; the weights are random, so the pictures are noise: look at the validation loss)"
    )
    result = recipe.run(load_config(config), listeners=(Console(),))
    if result.stopped:
        return EXIT_FAILED
    say(f"4/4  a {'clip' if kind == 'video' else 'picture'} with the result")
    sample = out / ("sample.mp4" if kind == "video" else "sample.png")
    picture = drawing.sample(
        str(result.folder), prompt=prompt, images=images, out=sample, size=Size(64, 64), steps=2
    )
    from whitetuner.runs.events import Validation, read

    events, _ = read(result.folder / "events.jsonl")
    losses = [event.loss for event in events if isinstance(event, Validation)]
    final = result.final[0]
    use = (
        f"for ComfyUI: {final}"
        if spec.comfyui_loads
        else f"final file (no ComfyUI loads this model): {final}"
    )
    say(
        f"\nvalidation loss: {losses[0]:.4f} at step 0 -> {losses[-1]:.4f} at step {result.step} (random weights)\n"
        f"picture:  {picture} (noise: the weights are random)\nconfig:   {config}\n{use}\n"
        f"{time.perf_counter() - began:.0f} s"
    )
    if losses[-1] >= losses[0]:
        say("MISSED: the validation loss did not fall")
        return EXIT_FAILED
    return 0


def draw_folder(
    folder: Path, count: int, seed: int, shapes: tuple[str, ...] | None = None, word: str | None = None
) -> None:
    """Pictures and captions as a user would have them."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = draw_set(count, seed, word=word) if shapes is None else draw_set(count, seed, shapes, word)
    for index, drawing in enumerate(drawings):
        Image.fromarray(drawing.image).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(drawing.caption, encoding="utf-8")


def write_config(out: Path, steps: int) -> Path:
    """Writes the demo's config.toml into `out`; the path of it."""
    quote = json.dumps  # a JSON string is a TOML basic string
    prompts = "\n".join(
        f"[[preview.prompts]]\ntext = {quote(text)}\nsize = [64, 64]\nseed = {index}\nsteps = {STEPS}\ncfg = {CFG}"
        for index, text in enumerate(PREVIEWS)
    )
    config = out / "config.toml"
    config.write_text(
        CONFIG.format(
            config=config.name,
            output=quote(str(out)),
            cache=quote(str(out / "cache")),
            new=quote(str(out / "data" / "new")),
            old=quote(str(out / "data" / "old")),
            steps=steps,
            tokens=MAX_SEQUENCE_LENGTH,
            every=TIMELAPSE_EVERY,
            prompts=prompts,
        ),
        encoding="utf-8",
    )
    return config


def judge(adapter: Path | None) -> tuple[float, float]:
    """(new word, old vocabulary): shares drawn right by the embedded model, with an adapter file if one is given."""
    from whitetuner.adapters.attach import attach_state
    from whitetuner.adapters.files import load_adapter
    from whitetuner.families import registry
    from whitetuner.nano.score import draw_with, evaluation_prompts, load_pipeline, score

    pipeline = load_pipeline()
    if adapter is not None:
        settings, tensors = load_adapter(adapter, registry.keys("flux2-klein"))
        attach_state(pipeline.transformer, settings, tensors)
    found = []
    for count, seed, shapes, word in ((SCORED_NEW, 31, (NEW_SHAPE,), NEW_WORD), (SCORED_OLD, 77, None, None)):
        captions, labels = (
            evaluation_prompts(count, seed)
            if shapes is None
            else evaluation_prompts(count, seed, shapes, word)
        )
        found.append(score(draw_with(pipeline, captions, seed), labels).all)
    return found[0], found[1]


def pictures(run: Path, out: Path) -> None:
    """before_after.png, timelapse.gif and loss.png from the run's own samples and events."""
    steps = sorted(path for path in (run / "samples").iterdir() if path.is_dir())
    rows = [[Image.open(file).convert("RGB") for file in sorted(step.glob("*.png"))] for step in steps]
    scale = 2
    side = rows[0][0].width * scale
    gap, label = 6, 16

    def strip(row: list[Image.Image], text: str) -> Image.Image:
        board = Image.new("RGB", (len(row) * (side + gap) + gap, side + label + gap), "white")
        ImageDraw.Draw(board).text((gap, 2), text, fill="black")
        for column, picture in enumerate(row):
            board.paste(
                picture.resize((side, side), Image.Resampling.NEAREST), (gap + column * (side + gap), label)
            )
        return board

    strips = [strip(row, f"step {int(step.name.partition('-')[2])}") for row, step in zip(rows, steps)]
    head = 34
    grid = Image.new("RGB", (strips[0].width, head + 2 * strips[0].height), "white")
    for column, prompt in enumerate(PREVIEWS):
        lines = textwrap.fill(prompt, 22)
        ImageDraw.Draw(grid).multiline_text(
            (gap + column * (side + gap), 4), lines, fill=(90, 90, 90), spacing=1
        )
    grid.paste(strips[0], (0, head))
    grid.paste(strips[-1], (0, head + strips[0].height))
    grid.save(out / "before_after.png")
    strips[0].save(
        out / "timelapse.gif",
        save_all=True,
        append_images=[*strips[1:], strips[-1], strips[-1]],
        duration=450,
        loop=0,
    )
    loss_curve(run).save(out / "loss.png")


def loss_curve(run: Path, width: int = 640, height: int = 320) -> Image.Image:
    """Loss over steps: each step thin, the running mean bold, validation as dots."""
    from whitetuner.runs.curves import smooth
    from whitetuner.runs.events import StepDone, Validation, read

    events, _ = read(run / "events.jsonl")
    losses = [(event.step, event.loss) for event in events if isinstance(event, StepDone)]
    validation = [(event.step, event.loss) for event in events if isinstance(event, Validation)]
    board = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(board)
    top = max(value for _, value in losses + validation) * 1.05
    last = max(step for step, _ in losses)
    left, bottom = 44, height - 24

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (width - left - 10) * step / last, bottom - (bottom - 10) * value / top

    for part in range(5):
        value = top * part / 4
        draw.line([at(0, value), at(last, value)], fill=(225, 225, 225))
        draw.text((4, at(0, value)[1] - 6), f"{value:.2f}", fill=(90, 90, 90))
    draw.text((left, bottom + 6), "step 0", fill=(90, 90, 90))
    draw.text((width - 60, bottom + 6), f"step {last}", fill=(90, 90, 90))
    draw.line([at(*point) for point in losses], fill=(190, 205, 235))
    draw.line([at(*point) for point in smooth(losses)], fill=(30, 80, 200), width=3)
    for step, value in validation:
        x, y = at(step, value)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=(220, 90, 30))
    draw.text((left + 10, 4), "loss: each step, running mean (blue), validation (orange)", fill="black")
    return board
