"""Gradio's two pages, one in each language: the seed's tabs in the seed's order, and what goes beside them."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which asks for it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from fastapi import FastAPI

from whitetuner.families import registry
from whitetuner.gui.access import UPLOAD
from whitetuner.gui.settings import Settings
from whitetuner.gui.shell import LANGUAGES

#: (family, task) in the seed's order -> the seed's name of the tab; families that have not landed show none.
TABS = {
    ("flux2-klein", "edit"): "FLUX.2 Klein Edit",
    ("flux2-klein", "t2i"): "FLUX.2 Klein T2I",
    ("wan", "i2v"): "WAN I2V",
    ("wan", "t2v"): "WAN T2V",
    ("qwen-image", "t2i"): "Qwen T2I",
    ("qwen-image", "edit"): "Qwen Edit",
    ("zimage", "t2i"): "ZImage",
    ("zimage-v2", "t2i"): "ZImage V2",
    ("glm-image", "t2i"): "GLM-Image",
    ("glm-image", "edit"): "GLM-Image Edit",
}
FONTS = ["system-ui", "Microsoft YaHei", "PingFang SC", "Noto Sans CJK SC", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "Noto Sans Mono CJK SC", "monospace"]


def training_tabs() -> list[tuple[str, str, str]]:
    """(family, task, name) of the tabs that there are today."""
    landed = {(name, task) for name in registry.FAMILIES for task in registry.spec(name).tasks}
    more = [
        (pair, f"{registry.spec(pair[0]).title} {pair[1].upper()}") for pair in sorted(landed - set(TABS))
    ]
    return [(*pair, name) for pair, name in [*TABS.items(), *more] if pair in landed]


def blocks(settings: Settings, language: str) -> gr.Blocks:
    """The page in one language. Everything it shows comes from files, so it can be built again at any time."""
    with gr.Blocks(
        title="White Tuner", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        gr.HTML("<h1>White Tuner</h1>")
        with gr.Tabs(elem_id="tabs"):
            for family, task, name in training_tabs():
                with gr.Tab(name, id=f"{family}-{task}", elem_id=f"tab-{family}-{task}"):
                    gr.Markdown(name)
    return page


def mounted(settings: Settings) -> FastAPI:
    """Both pages in one application that is run beside the server's own."""
    host = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Soft(font=FONTS, font_mono=MONO)
    for language in LANGUAGES:
        gr.mount_gradio_app(
            host,
            blocks(settings, language),
            path=f"/{language}",
            server_name=settings.host,
            server_port=settings.port,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            show_error=True,
            max_file_size=UPLOAD,
            theme=theme,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
        )
    return host
