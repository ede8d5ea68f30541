"""The form's side of the server: its document is changed, checked, imported, planned for, and kept as a draft.

Every answer is JSON. What the user can mend comes back as {"refused": [[where, what, mend]]} in the page's language, with status
200: browsers write other answers into their console as errors, which a mistake on a form is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from whitetuner.config.document import parse
from whitetuner.config.goals import goals
from whitetuner.config.migrate import rewritten
from whitetuner.config.preset import preset_text, presets
from whitetuner.errors import UserError
from whitetuner.gui import forms, made, plan_card
from whitetuner.gui.asked import Told, body_of, is_json, plain, word_of
from whitetuner.gui.commands_shown import commands
from whitetuner.gui.document import NAME, changed, inner_value, with_row, without_row
from whitetuner.gui.drafts import LARGEST_BYTES, Drafts
from whitetuner.gui.fields import FormField
from whitetuner.gui.pickers import Roots, ask, can_ask, listing
from whitetuner.gui.told import each, parts, where
from whitetuner.gui.training_tabs import Tab, tab_for, tab_of
from whitetuner.importers.reading import as_toml, document_of, import_document, is_foreign

#: No card has more memory.
_LARGEST_GB = 10_000
Body = Mapping[str, Any]
Verb = Callable[[Body, str], dict[str, Any]]


def routes(roots: Roots, state: Path) -> list[BaseRoute]:
    """All of /api/form/... and /api/path/.... state: the page's own folder (drafts, presets, plans).

    The login, the check of foreign pages and the bound on bodies are in front of them (access.py).
    """
    api = FormApi(roots, Drafts(state), state)
    return [
        Route("/api/form/{tab}", api.opened, methods=["GET"]),
        *(verb(f"/api/form/{{tab}}/{name}", getattr(api, name)) for name in FormApi.VERBS),
        verb("/api/path/list", api.listed),
        verb("/api/path/ask", api.asked),
    ]


def verb(path: str, run: Callable[..., dict[str, Any]]) -> Route:
    """A POST of JSON, answered in a thread so that a slow disk holds up nobody else."""

    async def answer(request: Request) -> Response:
        body = await body_of(request)
        if not is_json(request) or body is None:
            status = 400 if is_json(request) else 415
            return JSONResponse({"refused": [["", "JSON is expected", ""]]}, status_code=status)
        language = "zh" if body.get("language") == "zh" else "en"
        try:
            return Told(await run_in_threadpool(run, body, language, **request.path_params))
        except UserError as error:
            return Told({"refused": said(error, language)})
        except OSError as error:  # the page's own folder or a disk, full or gone
            return Told(
                {"refused": [[error.filename or "", error.strerror or str(error), ""]]}, status_code=500
            )

    return Route(path, answer, methods=["POST"])


def said(error: UserError, language: str) -> list[list[str]]:
    """[where, what, mend] of each mistake."""
    return [[where(one.where, language), *parts(one, language)] for one in each(error)]


def text_of(body: Body, name: str = "text") -> str:
    """A text of the request. Raises UserError when it is none, or too long for a config."""
    text = body.get(name)
    if not isinstance(text, str) or len(text) > LARGEST_BYTES:
        raise UserError("the text is too long for a config", mend="shorten it")
    return plain(text)


@dataclass(frozen=True)
class FormApi:
    """The verbs of the form."""

    roots: Roots
    drafts: Drafts
    state: Path

    VERBS = ("change", "preset", "keep_preset", "drop_preset", "imported", "command", "make", "plan")

    def opened(self, request: Request) -> Response:
        """What the page needs to draw a form, with the draft that was left on it."""
        language = "zh" if request.query_params.get("language") == "zh" else "en"
        tab = tab_of(request.path_params["tab"])
        if tab is None:
            return JSONResponse({"refused": [["", "there is no such form", ""]]}, status_code=404)
        text = self.drafts.draft(tab.key)
        return Told(self._whole(tab, forms.fresh(tab) if text is None else text, language))

    def _whole(self, tab: Tab, text: str, language: str) -> dict[str, Any]:
        return {
            "spec": forms.spec_json(tab, language, text),
            "state": self._state(tab, text, language),
            "presets": [[name, title] for name, title in presets().items() if self._fits(name, tab)],
            "own_presets": [name for name, one in self.drafts.presets().items() if _is_of(one, tab)],
            "goals": [[one.key, one.title(language), one.help(language)] for one in goals(tab.tasks)],
            "native": self.roots.native and can_ask(),
        }

    def _state(self, tab: Tab, text: str, language: str) -> dict[str, Any]:
        return forms.state(tab, text, language, self.roots)

    def _fits(self, preset: str, tab: Tab) -> bool:
        return _is_of(preset_text(preset), tab)

    def change(self, body: Body, language: str, tab: str) -> dict[str, Any]:
        """One or several values, a row more or less, or another text as a whole; kept as the draft.

        body: text; changes {key: what the control holds, null: nothing}, add "data.sets", remove ["data.sets", 1], goal
        """
        of = _tab(tab)
        text = text_of(body)
        fields = _by_key(forms.fields_of(of, text))
        wrong: dict[str, list[list[str]]] = {}
        changes = body.get("changes") or {}
        if not isinstance(changes, dict):
            raise UserError("the request is not understood", mend="load the page again")
        if isinstance(body.get("goal"), str):
            changes = {**self._of_goal(of, text, body["goal"], language), **changes}
        for key, given in changes.items():
            if key == "model.task" and given in of.tasks:
                text = with_task(text, given)
                continue
            try:
                text = changed(text, fields, {key: given})
            except UserError as error:
                wrong[key] = [list(parts(one, language)) for one in each(error)]
            except KeyError:
                wrong[""] = [[f"{key}?", ""]]
        lists = [key for key, field in fields.items() if field.kind == "rows"]
        if body.get("add") in lists:
            text = with_row(text, body["add"], {"text": ""} if body["add"] == "preview.prompts" else {})
        match body.get("remove"):
            case [str(key), int(number)] if key in lists and number >= 0:
                text = without_row(text, key, number)
        self.drafts.keep(of.key, text)
        found = self._state(of, text, language)
        for key, messages in wrong.items():
            found["errors"].setdefault(key, []).extend(messages)
            found["ok"] = False
        return found

    def _of_goal(self, tab: Tab, text: str, key: str, language: str) -> dict[str, str | None]:
        """The changes that a goal asks for: what an earlier one set, and still stands, goes with it."""
        known = {one.key: {name: _shown(value) for name, value in one.values()} for one in goals(tab.tasks)}
        if key not in known:
            return {}
        stands = self._state(tab, text, language)["values"]
        earlier = {
            name: None for one in known.values() for name, value in one.items() if stands.get(name) == value
        }
        return {**earlier, **known[key]}

    def preset(self, body: Body, language: str, tab: str) -> dict[str, Any]:
        """A preset in place of all that was there. body: name, own: one of the user's."""
        of, name = _tab(tab), str(body.get("name", ""))
        own = self.drafts.presets()
        text = own[name] if body.get("own") and name in own else preset_text(name)
        self.drafts.keep(of.key, text)
        return self._whole(of, text, language)

    def keep_preset(self, body: Body, language: str, tab: str) -> dict[str, Any]:
        name = self.drafts.keep_preset(str(body.get("name", "")), text_of(body))
        return {"name": name, **self._whole(_tab(tab), text_of(body), language)}

    def drop_preset(self, body: Body, language: str, tab: str) -> dict[str, Any]:
        self.drafts.drop_preset(str(body.get("name", "")))
        return self._whole(_tab(tab), text_of(body), language)

    def imported(self, body: Body, language: str, tab: str) -> dict[str, Any]:
        """A config file's text: it becomes the draft of the tab where it belongs; another trainer's is translated first,
        one of an earlier version is put into today's words.

        body: text, name (of the file). Raises UserError when it is neither.
        """
        text = text_of(body).lstrip("\ufeff").replace("\r\n", "\n")
        name = word_of(body, "name") or NAME
        there = document_of(text, name if Path(name).suffix else f"{name}.toml")
        left, moved = 0, 0
        if is_foreign(there):
            found = import_document(there, name)
            text, left = as_toml(found), len(found.left)
        else:
            text, changes = rewritten(text)
            moved = len(changes)
        values = parse(text, NAME)
        family, task = inner_value(values, "model.family"), inner_value(values, "model.task") or "t2i"
        home = tab_for(family, task) if isinstance(family, str) and isinstance(task, str) else None
        of = home or _tab(tab)
        self.drafts.keep(of.key, text)
        told = {"tab": of.key, "title": of.title(language), "left": left, "moved": moved}
        return {**told, **self._whole(of, text, language)}

    def command(self, body: Body, language: str, tab: str) -> dict[str, Any]:
        """What to type instead."""
        return commands(text_of(body), _tab(tab))

    def make(self, body: Body, language: str, tab: str) -> dict[str, Any]:
        """A tiny model or sample data, made by a child process; the form is told where it lies. body: text, what."""
        of, text = _tab(tab), text_of(body)
        task = forms.task_of(of, text)
        fields = _by_key(forms.fields_of(of, text))
        variant = inner_value(parse(text, NAME), "model.options.variant")
        made_at, changes = (
            made.tiny_model(of.family, task, self.roots, variant if isinstance(variant, str) else None)
            if body.get("what") == "model"
            else made.sample_data(task, self.roots)
        )
        text = changed(text, fields, {key: one for key, one in changes.items() if key in fields})
        self.drafts.keep(of.key, text)
        return {"path": str(made_at), "state": self._state(of, text, language)}

    def plan(self, body: Body, language: str, tab: str) -> dict[str, Any]:
        """What fits the card. body: text, vram: GB or null for this machine's own."""
        of, text = _tab(tab), text_of(body)
        config = forms.loaded(text, of, self.roots).config
        vram = body.get("vram")
        vram_gb = None
        if isinstance(vram, (int, float)) and not isinstance(vram, bool) and 0 < vram < _LARGEST_GB:
            vram_gb = float(vram)
        if forms.needed(config):
            return plan_card.plan_released(config, vram_gb, language)
        return plan_card.plan(text, vram_gb, language, self.state / "plans")

    def listed(self, body: Body, language: str) -> dict[str, Any]:
        """What a folder holds, for the page's own file browser."""
        return listing(self.roots, str(body.get("path") or ""))

    def asked(self, body: Body, language: str) -> dict[str, Any]:
        """A native dialog's choice, where the page runs on the user's own desktop."""
        if not self.roots.native:
            raise UserError(
                "no dialog can be shown here ({reason})",
                mend="paste the path, or use the page's own list",
                reason="--server",
            )
        wants = body.get("wants")
        return {
            "path": ask(
                wants if wants in ("folder", "file", "any") else "folder", str(body.get("start") or "")
            )
        }


def with_task(text: str, task: str) -> str:
    """The document with another task of the same tab."""
    field = FormField("model.task", "choice", "basic", choices=("t2i", "edit", "i2v", "t2v"))
    return changed(text, {"model.task": field}, {"model.task": task})


def _shown(value: Any) -> str:
    """As the form writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _tab(key: str) -> Tab:
    tab = tab_of(key)
    if tab is None:
        raise UserError("there is no form '{name}'", mend="load the page again", name=key)
    return tab


def _is_of(text: str, tab: Tab) -> bool:
    """Whether a document is for this tab; one that cannot be read is for none."""
    try:
        values = parse(text, NAME)
    except UserError:
        return False
    task = inner_value(values, "model.task") or "t2i"
    return inner_value(values, "model.family") == tab.family and task in tab.tasks


def _by_key(fields: tuple[FormField, ...]) -> dict[str, FormField]:
    return {one.key: one for field in fields for one in (field, *field.rows)}
