"""What somebody wants to teach, as a few settings: the first choice on a form, and `init PRESET --goal`.

Each proposal stands with where it comes from; none of them changes what a preset says of the model or the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomlkit

from whitetuner.errors import UserError


@dataclass(frozen=True)
class Goal:
    """changes: config key -> (value, why);  tasks: those it is for;  titles, helps: (Chinese, English)"""

    key: str
    titles: tuple[str, str]
    helps: tuple[str, str]
    changes: Mapping[str, tuple[Any, str]]
    tasks: tuple[str, ...] = ("t2i", "edit", "i2v", "t2v")

    def title(self, language: str) -> str:
        return self.titles[0 if language == "zh" else 1]

    def help(self, language: str) -> str:
        return self.helps[0 if language == "zh" else 1]

    def values(self) -> Iterator[tuple[str, Any]]:
        """(config key, value)."""
        yield from ((key, value) for key, (value, _) in self.changes.items())


_MUCH = {
    "noise.timesteps": (
        "shift",
        "towards much noise: an outline and a texture are learned there (docs/laboratory.md)",
    ),
    "noise.shift": (
        3.0,
        "of Esser et al. 2024 (section 5.3.2) at 1024 px; docs/laboratory.md's, too",
    ),
}
_PICTURES, _VIDEOS = ("t2i", "edit"), ("i2v", "t2v")


def goals(tasks: tuple[str, ...] | None = None) -> tuple[Goal, ...]:
    """tasks: only those for one of these. What the noise levels do is the seed README's advice on them ("如何选择时间步采样"),
    but for what docs/laboratory.md shows otherwise: its blend leaves an outline all but unlearned, its sigmoid a texture.
    """
    every = (
        Goal(
            "general",
            ("通用", "General"),
            ("均匀的时间步，什么都学一点", "uniform timesteps: a bit of everything"),
            {"noise.timesteps": ("linear", "uniform: a bit of everything")},
        ),
        Goal(
            "character",
            ("人物", "A person or character"),
            ("兼顾构图和细节；给它一个触发词", "composition and detail; give it a trigger word"),
            _MUCH,
            _PICTURES,
        ),
        Goal(
            "character",
            ("人物", "A person or character"),
            ("布局和动作的噪声强度；给它一个触发词", "layout and motion; give it a trigger word"),
            {"noise.timesteps": ("shift", "towards much noise, where the model itself spends its steps")},
            _VIDEOS,
        ),
        Goal(
            "object",
            ("物品", "A thing"),
            ("兼顾构图和细节；给它一个触发词", "composition and detail; give it a trigger word"),
            _MUCH,
            _PICTURES,
        ),
        Goal(
            "style",
            ("画风 / 纹理", "A style or texture"),
            ("集中在中间的时间步：细节、纹理、风格", "timesteps around the middle: detail, texture, style"),
            {
                "noise.timesteps": ("sigmoid", "around the middle: detail, texture, style"),
                "noise.sigmoid_bias": (
                    0.6,
                    "a little towards much noise: taught a texture that 0 did not (docs/laboratory.md)",
                ),
            },
        ),
        Goal(
            "composition",
            ("构图", "Composition"),
            ("偏向高噪声：快速学会画面的布局", "towards much noise: learns the layout fast"),
            {
                "noise.timesteps": (
                    "shift",
                    "towards much noise: layout is learned there alone (docs/laboratory.md)",
                )
            },
        ),
        Goal(
            "edit",
            ("编辑", "An edit"),
            ("均匀的时间步：改动可大可小", "uniform timesteps: what changes may be large or small"),
            {"noise.timesteps": ("linear", "uniform: what changes may be layout or detail")},
            ("edit",),
        ),
        Goal(
            "motion",
            ("动作", "A motion"),
            ("偏向高噪声：动作在那里决定", "towards much noise, where motion is decided"),
            {
                "noise.timesteps": ("shift", "towards much noise, where motion is decided"),
                "data.clips": ("uniform", "clips from all over a video, not its beginning alone"),
            },
            _VIDEOS,
        ),
    )
    return every if tasks is None else tuple(one for one in every if set(one.tasks) & set(tasks))


def with_goal(text: str, key: str) -> str:
    """A config's text with what the goal proposes, each with why. Raises UserError for a goal that its task does not have."""
    document = tomlkit.parse(text)
    task = str(document.get("model", {}).get("task", "t2i"))
    known = goals((task,))
    found = next((one for one in known if one.key == key), None)
    if found is None:
        raise UserError(
            "there is no goal '{key}' for {task}",
            where="--goal",
            mend="use one of: {known}",
            key=key,
            task=task,
            known=", ".join(one.key for one in known),
        )
    for name, (value, why) in found.changes.items():
        _set(document, name, value, why)
    return tomlkit.dumps(document)


def with_memory(text: str, vram_gb: float) -> str:
    """A config's text for a card of which so many GB may be used. Raises UserError for what no card has."""
    if not 0 < vram_gb <= 4096:
        raise UserError(
            "{gb} GB is no card's memory",
            where="--vram",
            mend="give the GB of your card, e.g. 12",
            gb=vram_gb,
        )
    document = tomlkit.parse(text)
    value = int(vram_gb) if vram_gb == int(vram_gb) else vram_gb
    _set(document, "memory.vram_gb", value, "the one number: `whitetuner plan FILE` shows what comes of it")
    return tomlkit.dumps(document)


def _set(document: tomlkit.TOMLDocument, key: str, value: Any, why: str) -> None:
    section, _, name = key.partition(".")
    if section not in document:
        document[section] = tomlkit.table()
    item = tomlkit.item(value)
    item.comment(why)
    document[section][name] = item  # type: ignore[index]
