"""The training tabs: one for each family and task that has landed, in the seed's order; the left column of each is its form.

`draw_form` draws inside `gr.Blocks`; the form itself is static/form.js and talks to `form_api.routes`. `forms.loaded(text, tab)`
makes the run's config of what it shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from whitetuner.families import registry
from whitetuner.gui.fields import open_tasks

#: The seed's tabs in its order: (family, first task) -> its name of the tab. Others that land follow behind.
_SEED = {
    ("flux2-klein", "edit"): "FLUX.2 Klein Edit",
    ("flux2-klein", "t2i"): "FLUX.2 Klein T2I",
    ("wan", "i2v"): "WAN I2V",
    ("qwen-image", "t2i"): "Qwen T2I",
    ("qwen-image", "edit"): "Qwen Edit",
    ("zimage", "t2i"): "ZImage",
    ("zimage-v2", "t2i"): "ZImage V2",
    ("glm-image", "t2i"): "GLM-Image",
}
#: Tasks that have no tab of their own: they are chosen inside another one.
_INSIDE = {("wan", "t2v"): ("wan", "i2v"), ("glm-image", "edit"): ("glm-image", "t2i")}
#: The form's script, which fetches its style and texts by itself.
SCRIPT = "/static/form.js"


@dataclass(frozen=True)
class Tab:
    """One training page. tasks: the first is the tab's own, more are chosen inside it."""

    key: str
    family: str
    tasks: tuple[str, ...]
    title_en: str
    title_zh: str

    def title(self, language: str) -> str:
        return self.title_zh if language == "zh" else self.title_en


def tabs() -> tuple[Tab, ...]:
    """Those of families and tasks that are there."""
    landed = {name: open_tasks(name) for name in registry.FAMILIES}
    found: list[Tab] = []
    for (family, task), title in _SEED.items():
        inside = [other for (of, other), home in _INSIDE.items() if home == (family, task) and of == family]
        tasks = tuple(one for one in (task, *inside) if one in landed.get(family, ()))
        if tasks:
            found.append(Tab(f"{family}-{task}", family, tasks, title, title))
    shown = {(tab.family, task) for tab in found for task in tab.tasks}
    for family, tasks in landed.items():
        for task in tasks:
            if (family, task) not in shown:
                spec = registry.spec(family)
                name = f"{spec.title} {task.upper()}", f"{spec.title_zh} {task.upper()}"
                found.append(Tab(f"{family}-{task}", family, (task,), *name))
    return tuple(found)


def tab_of(key: str) -> Tab | None:
    """The tab of this key, if there is one."""
    return next((tab for tab in tabs() if tab.key == key), None)


def tab_for(family: str, task: str) -> Tab | None:
    """The tab where a config belongs."""
    return next((tab for tab in tabs() if tab.family == family and task in tab.tasks), None)


def draw_form(tab: Tab, language: str) -> None:
    """The form, inside a column of `gr.Blocks`. It fills itself once it is seen."""
    import gradio as gr

    gr.HTML(
        value="",
        html_template=f'<div class="wt-form" id="form-{tab.key}"></div>',
        js_on_load=f"import({json.dumps(SCRIPT)}).then((form) => form.mount("
        f'element.querySelector(".wt-form"), {json.dumps(tab.key)}, {json.dumps(language)}));',
        elem_id=f"holder-{tab.key}",
        apply_default_css=False,
    )
