"""The words of the command line that are a few lines each; the long ones have files of their own."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from whitetuner.errors import EXIT_FAILED, EXIT_STOPPED, UserError
from whitetuner.records import Size
from whitetuner.tongue import say

if TYPE_CHECKING:
    from whitetuner.config.load import Loaded
    from whitetuner.runs.place import Place


def train(
    config: Path, overrides: Sequence[str], resume: str | None, gpus: str | None, *, wait: bool = False
) -> int:
    """Trains; exit code 130 when stopped and saved. wait: until the devices are free, else a taken GPU is refused.

    Several devices: this process starts a rank for each and stays beside them. A rank, whoever started it, trains with the
    others.
    """
    from whitetuner.config.load import load_config
    from whitetuner.hub.fetching import fetch_for
    from whitetuner.runs.jobs import claimed
    from whitetuner.runs.place import entries, entry_of, place_here

    place = place_here()
    overrides = list(overrides)
    several = place is None and gpus is not None and ("," in gpus or gpus.startswith("any:"))
    device = gpus if place is None or gpus is None else entry_of(gpus, place.local_rank)
    device = device if place is None else place.device or device
    if device is not None and not several and not device.startswith("any"):
        overrides.append(f'memory.device="{device}"')
    loaded = load_config(config, overrides)
    if place is None or place.rank == 0:
        _tell(loaded)
    run = loaded.config.run
    folder = Path(run.output_dir) / run.name
    asked = gpus or loaded.config.memory.device
    if place is not None and place.launcher:
        return _train(loaded, config, resume, place)
    with claimed(folder, config, gpus=asked, resume=resume or run.resume, wait=wait) as held:
        fetch_for(loaded.config, say)  # once, before ranks are started
        if not several:
            return _train(loaded, config, resume, place)
        from whitetuner.runs.spawn import spawn

        words = ["train", *(f"--set={one}" for one in overrides)]
        words += [] if resume is None else [f"--resume={resume}"]
        return spawn([*words, "--", str(config)], folder, entries(asked, held))


def _tell(loaded: Loaded) -> None:
    """What the config says in an earlier version's words."""
    for note in loaded.notes:
        say(f"note: {note} (`whitetuner check --migrate {loaded.path}` rewrites the file)", wrong=True)


def _train(loaded: Loaded, config: Path, resume: str | None, place: Place | None) -> int:
    from whitetuner import recipe
    from whitetuner.resolve import choose_device
    from whitetuner.runs.console import Console
    from whitetuner.train.joining import joined

    device = choose_device(loaded.config.memory.device, 0 if place is None else place.local_rank)
    listeners = (Console(every=loaded.config.log.console_every),)
    with joined(place, device) as ranks:
        result = recipe.run(loaded, resume=resume, listeners=listeners, ranks=ranks)
    if place is not None and place.rank:
        return EXIT_STOPPED if result.stopped else 0
    if result.stopped:
        say(f"stopped and saved at step {result.step}; go on with: whitetuner train {config} --resume latest")
        return EXIT_STOPPED
    say("\n".join(["done:", *(f"  {path}" for path in result.final), f"  {result.folder / 'report.html'}"]))
    return 0


def fork(run: Path, at: int | str | None, overrides: Sequence[str], gpus: str | None, *, start: bool) -> int:
    """Makes a run that begins at a checkpoint of another, and trains it (unless start is False)."""
    from whitetuner.forking import fork as make

    loaded, changed = make(run, at, overrides)
    assert loaded.path is not None
    say("\n".join([f"{loaded.path.parent} begins at {run}", *(f"  {line}" for line in changed)]))
    if not start:
        say(f"to train it: whitetuner train {loaded.path} --resume latest")
        return 0
    return train(loaded.path, [], "latest", gpus)


def plan(given: argparse.Namespace) -> int:
    """How a config or a released model fits; the exit code is the refusal's when no plan does."""
    from whitetuner import plan_view
    from whitetuner.families import registry

    on = plan_view.machines(given.vram, given.host, given.measure)
    released = given.what.partition(":")[0] in registry.FAMILIES and not Path(given.what).exists()
    idle = {} if released else {"--size": given.size, "--task": given.task}
    for where, value in idle.items():
        if value:
            raise UserError(
                "this changes nothing in the plan of a {kind}",
                where=where,
                mend="leave it out: --size and --task are for a FAMILY",
                kind="config",
            )
    if released:
        found = plan_view.of_family(given.what, size_of(given.size), given.task, on, given.overrides)
    elif not Path(given.what).exists() and not given.what.endswith(".toml"):
        raise UserError(
            "neither a config file nor a model family",
            where=given.what,
            mend="give a .toml file that is there, or one of: {known}",
            known=", ".join(registry.FAMILIES),
        )
    else:
        found = plan_view.of_config(Path(given.what), given.overrides, on)
    if given.json:
        print(json.dumps(plan_view.as_json(found), indent=1))
    else:
        say(plan_view.as_text(found, given.verbose))
    refused = [one for _, one in found["plans"] if isinstance(one, UserError)]
    return refused[-1].code if len(refused) == len(found["plans"]) else 0


def cache(config: Path, overrides: Sequence[str]) -> int:
    """Encodes what is not encoded yet."""
    from whitetuner.config.load import load_config
    from whitetuner.hub.fetching import fetch_for
    from whitetuner.prepared import cache_only

    loaded = load_config(config, overrides)
    _tell(loaded)
    fetch_for(loaded.config, print)
    count, seconds = cache_only(loaded.config)
    say(f"{count} pictures are encoded ({seconds:.1f} s)")
    return 0


def fetch(name: str, family: str | None) -> int:
    """Fetches a model by its hub name; the family is told from the name of the model, or given."""
    from whitetuner.hub.fetching import fetch_named

    say(f"model.path = {str(fetch_named(name, family, say))!r}, or the name itself")
    return 0


def stop(folder: Path, *, now: bool) -> int:
    """Asks a run to save and stop; with `now` the process is ended without saving. One that waits leaves the queue."""
    from whitetuner.runs import jobs
    from whitetuner.runs.folder import RunFolder

    run = RunFolder(folder)
    waits = jobs.read(jobs.id_of(folder.resolve()))
    if waits is not None and jobs.cancel(waits):
        say("taken out of the queue; it had not begun")
        return 0
    run.require()
    if now and run.running():
        run.end_process()
        say("ended; what was saved before stays")
        return 0
    run.request("stop")
    say("asked to save and stop; `whitetuner watch` shows when it has")
    return 0


def watch(folder: Path, *, once: bool) -> int:
    """Prints a run's events as they come, until it ends."""
    from whitetuner.runs.console import Console
    from whitetuner.runs.events import read
    from whitetuner.runs.folder import RunFolder

    run = RunFolder(folder)
    run.require()
    console, offset = Console(), 0
    while True:
        found, offset = read(run.events, offset)
        for event in found:
            console(event)
        status = run.status()
        if once or status != "running":
            say(f"{folder}: {status}")
            return 0
        time.sleep(0.5)


def families(*, as_json: bool) -> int:
    """What can be trained, with variants and tasks."""
    from whitetuner.families import registry

    specs = [registry.spec(name) for name in registry.FAMILIES]
    if as_json:
        rows = [
            {key: getattr(s, key) for key in ("name", "title", "tasks")}
            | {"variants": dict(s.variants), "licences": dict(s.licence)}
            for s in specs
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for s in specs:
        print(f"{s.name}  ({s.title}; tasks: {', '.join(s.tasks)})")
        for name, text in s.variants.items():
            print(f"    {name:<12} {text}  [{s.licence.get(name, 'licence not known')}]")
    return 0


def size_of(text: str | None) -> Size | None:
    """ "1024x768" -> Size, "832x480x33" with frames. Raises UserError."""
    if text is None:
        return None
    try:
        width, height, *frames = (int(side) for side in text.lower().split("x"))
        return Size(width, height, *frames)
    except (ValueError, TypeError) as error:
        raise UserError(
            "{given} is no size",
            where="--size",
            mend="write WIDTHxHEIGHT, e.g. 1024x768",
            given=text,
        ) from error


def sample(given: argparse.Namespace) -> int:
    """Draws one picture."""
    from whitetuner import drawing

    size = size_of(given.size)
    path = drawing.sample(
        given.model,
        adapter=given.adapter,
        checkpoint=given.checkpoint,
        strength=given.strength,
        prompt=given.prompt,
        negative=given.negative,
        images=given.image,
        out=given.out,
        family_name=given.family,
        size=size,
        frames=given.frames,
        steps=given.steps,
        cfg=given.cfg,
        seed=given.seed,
    )
    say(f"wrote {path}")
    return 0


def caption(given: argparse.Namespace) -> int:
    """Writes missing captions; exit code 1 when pictures could not be read."""
    from rich.progress import Progress

    from whitetuner.captioning import INSTRUCTION, caption_folder

    for name, value in (("--most", given.most), ("--max-tokens", given.max_tokens)):
        if value is not None and value < 1:
            raise UserError("{value} does not do here", where=name, mend="give 1 or more", value=value)
    with Progress(transient=True) as bar:
        task = bar.add_task("captions", total=None)

        def told(done: int, total: int, picture: Path, text: str) -> None:
            bar.update(task, completed=done, total=total)
            bar.console.print(f"{picture.name}: {text}", markup=False, highlight=False)

        found = caption_folder(
            given.dir,
            given.model,
            instruction=given.instruction or INSTRUCTION,
            trigger=given.trigger,
            ending=given.ext if given.ext.startswith(".") else f".{given.ext}",
            overwrite=given.overwrite,
            recursive=given.recursive,
            most=given.most,
            max_tokens=given.max_tokens,
            progress=told,
        )
    for error in found.failed:
        say(f"warning: {error}", wrong=True)
    say(f"{len(found.written)} captions written, {found.kept} were there and stay")
    if found.replaced:
        say(f"{len(found.replaced)} were replaced; the old ones are kept, e.g. {found.replaced[0]}")
    return EXIT_FAILED if found.failed else 0


def inspect(file: Path, *, as_json: bool) -> int:
    """Says what a safetensors file is."""
    from whitetuner.file_words import told_of

    found = told_of(file)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False, default=str))
    else:
        print("\n".join(f"{key:<12} {value}" for key, value in found.items()))
    return 0


def doctor(folder: Path, *, as_json: bool, bundle: Path | None, run: Path | None) -> int:
    """Looks the machine over; exit code 3 when something stands in the way of training."""
    from whitetuner import doctor as looks
    from whitetuner.bug_report import write_bundle

    if run is not None and bundle is None:
        raise UserError("--run is for --bundle", where="--run", mend="add --bundle FILE.zip, or leave it out")
    found = looks.examine(folder)
    print(json.dumps(looks.as_json(found), indent=1) if as_json else looks.as_text(found))
    if bundle is not None:
        names = write_bundle(bundle, found, run)
        say(f"wrote {bundle} ({', '.join(names)}); look into it before you send it", wrong=True)
    return looks.exit_code(found)


def jobs(*, as_json: bool) -> int:
    """Prints this user's runs on this machine, the newest last, and who has which device."""
    from whitetuner.runs.listing import as_text, rows

    found = rows()
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        say(as_text(found))
    return 0


def gui(given: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C."""
    from whitetuner.gui.app import serve
    from whitetuner.gui.settings import from_arguments

    return serve(from_arguments(given))
