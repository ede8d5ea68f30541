"""The training tabs: one for each family and task that has landed, in the seed's order; the left column of each is its form.

What the page's frame connects (all of it works inside `gr.Blocks`):

    for tab in tabs():
        with gr.Tab(tab.title(language), id=tab.key):
            with gr.Row():
                with gr.Column():
                    draw_form(tab, language)
                with gr.Column():
                    start = gr.Button(...);  text = gr.Textbox(visible=False)
                    start.click(begin, inputs=[text], outputs=[...], js=text_js(tab))

`text_js` hands over the TOML that the form shows at that moment; `forms.loaded(text, tab)` makes the run's config of it or
raises UserError(s), which `told.told` puts in the page's language. The form itself talks to `form_api.routes`.
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


def text_js(tab: Tab) -> str:
    """For `js=` of an event with one text input: the TOML that the form shows, after pending changes have been taken in."""
    return f"async () => [await (await import({json.dumps(SCRIPT)})).text({json.dumps(tab.key)})]"
