"""What somebody wants to teach, as a few settings: the first choice on a form, with where each proposal comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """changes: what the form's controls then hold."""

    key: str
    titles: tuple[str, str]
    helps: tuple[str, str]
    changes: Mapping[str, Any]

    def title(self, language: str) -> str:
        return self.titles[0 if language == "zh" else 1]

    def help(self, language: str) -> str:
        return self.helps[0 if language == "zh" else 1]


def goals() -> tuple[Goal, ...]:
    """The timestep advice is the seed README's ("如何选择时间步采样"); dropping captions keeps guidance working."""
    return (
        Goal(
            "general",
            ("通用", "General"),
            ("均匀的时间步，什么都学一点", "uniform timesteps: a bit of everything"),
            {"noise.timesteps": "linear"},
        ),
        Goal(
            "subject",
            ("人物 / 物品", "A person or thing"),
            ("兼顾构图和细节；给它一个触发词", "composition and detail; give it a trigger word"),
            {"noise.timesteps": "lognorm_blend", "data.caption_dropout": "0.05"},
        ),
        Goal(
            "style",
            ("画风 / 纹理", "A style or texture"),
            ("集中在中间的时间步：细节、纹理、风格", "timesteps around the middle: detail, texture, style"),
            {"noise.timesteps": "sigmoid", "data.caption_dropout": "0.1"},
        ),
        Goal(
            "composition",
            ("构图", "Composition"),
            ("偏向高噪声：快速学会画面的布局", "towards much noise: learns the layout fast"),
            {"noise.timesteps": "shift"},
        ),
    )
