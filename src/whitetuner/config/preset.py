"""Configs to begin with: the commented presets that come with the program."""

from __future__ import annotations

from importlib import resources

from whitetuner.errors import UserError


def presets() -> dict[str, str]:
    """Name -> first line (what it is for) of each preset."""
    folder = resources.files("whitetuner.config") / "presets"
    files = sorted((one for one in folder.iterdir() if one.name.endswith(".toml")), key=lambda one: one.name)
    return {
        one.name.removesuffix(".toml"): one.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")
        for one in files
    }


def preset_text(name: str) -> str:
    """The commented TOML of a preset. Raises UserError with the known names."""
    known = presets()
    if name not in known:
        raise UserError(
            "there is no preset '{name}'",
            where="PRESET",
            mend="use one of: {known}",
            name=name,
            known=", ".join(known),
        )
    return (resources.files("whitetuner.config") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
