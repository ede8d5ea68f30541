"""The words of the command line about a config before it is trained: init writes one, check looks it over."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from whitetuner.errors import EXIT_USE, UserError
from whitetuner.tongue import say


def init(
    preset: str | None,
    tiny: Path | None,
    out: Path | None,
    foreign: Path | None = None,
    data: Path | None = None,
    family: str | None = None,
    goal: str | None = None,
    vram_gb: float | None = None,
) -> int:
    """Prints or writes a commented config; foreign: of another trainer, told on standard error what became of it.

    goal, vram_gb: what is taught and how much of the card may be used, written into a preset
    """
    from whitetuner.config.goals import with_goal, with_memory
    from whitetuner.config.migrate import stamped
    from whitetuner.config.preset import preset_text, presets
    from whitetuner.config.sources import with_sources

    if (goal or vram_gb is not None) and (preset is None or foreign or tiny):
        raise UserError("--goal and --vram go with a preset", where="init", mend="name one: whitetuner init")
    if foreign is not None:
        from whitetuner.importers import reading

        found = reading.import_config(foreign, data, family)
        say(reading.report(found), wrong=True)
        text = reading.as_toml(found)
    elif tiny is not None:
        from whitetuner.tiny import tiny_text

        text = tiny_text(tiny)
    elif preset is None:
        say("presets:\n" + "\n".join(f"  {name:<28} {title}" for name, title in presets().items()))
        return 0
    else:
        text = with_sources(preset_text(preset))
        text = text if goal is None else with_goal(text, goal)
        text = text if vram_gb is None else with_memory(text, vram_gb)
    text = stamped(text)
    if out is None:
        print(text)
        return 0
    if out.exists():
        raise UserError(
            "{path} is there already", where="-o", mend="give another name, or remove it first", path=out
        )
    out.write_text(text, encoding="utf-8")
    say(
        f"wrote {out}; next: set the paths in it, then\n  python launch.py check {out}\n  python launch.py train {out}"
    )
    return 0


def check(given: argparse.Namespace) -> int:
    """A folder of pictures, or a config with everything it names. Exit code 2 when something stands in the way."""
    from whitetuner.checks import check_config, check_folder

    what, convert = given.what, given.convert_captions and (given.encoding or True)
    if what.is_dir() and given.migrate:
        raise UserError("a folder has no config to rewrite", where="--migrate", mend="give a config file")
    if what.is_dir():
        report = check_folder(what, deep=given.deep, convert=convert)
    else:
        looks = {"deep": given.deep, "model": not given.no_model, "migrate": given.migrate}
        report = check_config(what, given.overrides, convert=convert, **looks)
    if given.json:
        print(json.dumps(report.as_json(), indent=1, ensure_ascii=False))
    else:
        say(report.as_text())
    return EXIT_USE if report.errors else 0
