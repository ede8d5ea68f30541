"""Gradio's two pages, one in each language: the seed's tabs in the seed's order, and what goes beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which asks for it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from fastapi import FastAPI

from whitetuner.gui import data_page, frame
from whitetuner.gui.access import UPLOAD
from whitetuner.gui.frame import word
from whitetuner.gui.settings import Settings
from whitetuner.gui.shell import LANGUAGES
from whitetuner.gui.training_tabs import draw_form, tabs
from whitetuner.gui.words import texts

FONTS = ["system-ui", "Microsoft YaHei", "PingFang SC", "Noto Sans CJK SC", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "Noto Sans Mono CJK SC", "monospace"]


def blocks(settings: Settings, language: str) -> gr.Blocks:
    """The page in one language. Everything it shows comes from files, so it can be built again at any time."""
    titles = {
        "home": word("tab_home", language),
        **{tab.key: tab.title(language) for tab in tabs()},
        "data": texts("form", language)["data_tab"],
        "runs": word("tab_runs", language),
        "results": word("tab_results", language),
        "tensorboard": "TensorBoard",
    }
    with gr.Blocks(
        title="White Tuner", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        _html(frame.title(language, settings.password is not None, titles))
        with gr.Tabs(elem_id="tabs"):
            with _tab("home", titles):
                _html(frame.element("wt-home", language))
            for tab in tabs():
                with _tab(tab.key, titles), gr.Row():
                    with gr.Column(scale=6, min_width=360):
                        draw_form(tab, language)
                    with gr.Column(scale=5, min_width=360):
                        _html(frame.training(tab, language))
            with _tab("data", titles):
                data_page.draw(language)
            with _tab("runs", titles):
                _html(frame.element("wt-runs", language, view="wt-run"))
            with _tab("results", titles):
                _html(frame.element("wt-runs", language, view="wt-result"))
            with _tab("tensorboard", titles):
                _html(frame.element("wt-board", language))
    return page


def _tab(key: str, titles: Mapping[str, str]) -> gr.Tab:
    return gr.Tab(titles[key], id=key, elem_id=f"tab-{key}")


def _html(text: str) -> gr.HTML:
    return gr.HTML(text, apply_default_css=False)


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
            head=frame.HEAD,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
        )
    return host
