"""The data page: a data set as training will see it, with every finding; captions can be changed, files added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from whitetuner.data.captions import CAPTION_ENDINGS, tidy, with_trigger
from whitetuner.data.media import PICTURES, sniff
from whitetuner.data.problems import Problem
from whitetuner.data.video import VIDEOS
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.gui import words
from whitetuner.gui.asked import Told, plain, whole
from whitetuner.gui.caption_edits import CaptionEdits
from whitetuner.gui.caption_run import CaptionRuns
from whitetuner.gui.data_look import FOLDER_RESOLUTION, OF_CAPTIONS, Look, Looks, Row
from whitetuner.gui.form_api import said, text_of, verb
from whitetuner.gui.pickers import Roots, cleaned
from whitetuner.gui.thumbs import Thumbs

SCRIPT = "/static/data.js"
#: Rows of one answer, and the largest file that is taken. The server in front must let bodies of that size through.
PAGE_ROWS, LARGEST_FILE = 96, 128 << 20
#: What a picture's first bytes must be, whatever its name says.
_KINDS = ("jpeg", "png", "webp", "bmp", "avif", "heic")


def draw(language: str) -> None:
    """The page, inside a tab of `gr.Blocks`: elem_id "tab-data", titled words.texts("form", language)["data_tab"]."""
    import gradio as gr

    gr.HTML(
        value="",
        html_template='<div class="wt-data"></div>',
        js_on_load=f"import({json.dumps(SCRIPT)}).then((data) => data.mount("
        f'element.querySelector(".wt-data"), {json.dumps(language)}));',
        elem_id="holder-data",
        apply_default_css=False,
    )


def routes(roots: Roots, state: Path) -> list[BaseRoute]:
    """All of /api/data/.... state: the page's own folder (small pictures, steps back of captions)."""
    api = DataApi(roots, state)
    return [
        Route("/api/data/words", api.words, methods=["GET"]),
        Route("/api/data/items", api.items, methods=["GET"]),
        Route("/api/data/thumb", api.thumb, methods=["GET"]),
        Route("/api/data/upload", api.upload, methods=["POST"]),
        verb("/api/data/look", api.look),
        verb("/api/data/caption", api.caption),
        verb("/api/data/undo", api.undo),
        verb("/api/data/write", api.write),
        verb("/api/data/writing", api.writing),
    ]


class DataApi:
    """The verbs of the page."""

    def __init__(self, roots: Roots, state: Path) -> None:
        self.roots, self.looks = roots, Looks(roots)
        self.thumbs, self.edits, self.writer = Thumbs(state), CaptionEdits(state), CaptionRuns()

    def words(self, request: Request) -> Response:
        return JSONResponse(words.texts("data", _language(request.query_params)))

    def look(self, body: Mapping[str, Any], language: str) -> dict[str, Any]:
        """body: tab and text of a form, or folder, conditions (lines) and resolution; deep."""
        deep = body.get("deep") is True
        if isinstance(body.get("tab"), str):
            found = self.looks.of_form(body["tab"], text_of(body), deep)
        else:
            sides = cleaned(str(body.get("resolution") or ""))
            side = whole(sides, None if sides else FOLDER_RESOLUTION)
            if side is None:
                raise UserError("{value} is not a whole number", where="data.resolution", value=sides)
            lines = str(body.get("conditions") or "").split("\n")
            found = self.looks.of_folder(str(body.get("folder") or ""), lines, side, deep)
        self.thumbs.tidy()
        return found.summary(language)

    def items(self, request: Request) -> Response:
        """Rows of a look: kind (of findings), start, count."""
        query = request.query_params
        language = _language(query)
        try:
            look = self.looks.get(query.get("look"))
        except UserError as error:
            return Told({"refused": said(error, language)})
        start, count = whole(query.get("start"), 0), min(PAGE_ROWS, whole(query.get("count"), PAGE_ROWS))
        numbers = look.numbers(query.get("kind", ""))
        rows = [self._row(look, number, language) for number in numbers[start : start + count]]
        return Told({"total": len(numbers), "rows": rows})

    def _row(self, look: Look, number: int, language: str) -> dict[str, Any]:
        file = look.rows[number].caption_file
        return {**look.row(number, language), "undo": file is not None and self.edits.changed(file)}

    def thumb(self, request: Request) -> Response:
        """A small picture: look, n, c (0: the picture itself, 1...: its conditions), side; k: of a video the clip of that number,
        its frames cut as they are learned.
        """
        query = request.query_params
        try:
            look = self.looks.get(query.get("look"))
            number, which = whole(query.get("n"), 0), whole(query.get("c"), 0)
            placed = look.rows[number].placed
            path = (placed.path, *placed.conditions)[which]
            if not self.roots.allows(path):
                return Response(status_code=403)
            clips = placed.film.clips if placed.film is not None else ()
            frames = clips[whole(query.get("k"), 0)] if clips else ()
            size = placed.size if "k" in query else None
            data = self.thumbs.get(path, whole(query.get("side"), 256), frames, size)
        except (UserError, IndexError):
            return Response(
                status_code=204
            )  # a broken picture is no news: the row says what is wrong with it
        headers = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}
        return Response(data, media_type="image/webp", headers=headers)

    def caption(self, body: Mapping[str, Any], language: str) -> dict[str, Any]:
        """body: look, n, text, before (what the page showed; null: no file)."""
        look, number, row, file = self._captioned(body)
        before = body.get("before")
        text = self.edits.write(file, text_of(body), before if isinstance(before, str) else None)
        _settle(look, row, text)
        return self._row(look, number, language)

    def undo(self, body: Mapping[str, Any], language: str) -> dict[str, Any]:
        """body: look, n."""
        look, number, row, file = self._captioned(body)
        _settle(look, row, self.edits.undo(file))
        return self._row(look, number, language)

    def write(self, body: Mapping[str, Any], language: str) -> dict[str, Any]:
        """Captions for those that have none, by a model. body: look, model, instruction, trigger, most (3: to try; null: all)."""
        look, most = self.looks.get(body.get("look")), body.get("most")
        options = look.report.sets[0].options if look.report.sets else None
        if options is None or options.prompt is not None:
            raise UserError("one prompt serves the whole set", mend="change it on the form: data.prompt")
        self.writer.start(
            self.roots.path(str(look.folders[0])),
            self.roots.path(str(body.get("model") or "")),
            options.caption_ext,
            instruction=plain(str(body.get("instruction") or "")),
            trigger=plain(str(body.get("trigger") or "")),
            recursive=options.recursive,
            most=most if isinstance(most, int) and most > 0 else None,
        )
        return self.writer.state(language)

    def writing(self, body: Mapping[str, Any], language: str) -> dict[str, Any]:
        """How far that is. body: stop."""
        if body.get("stop") is True:
            self.writer.stop()
        return self.writer.state(language)

    def _captioned(self, body: Mapping[str, Any]) -> tuple[Look, int, Row, Path]:
        look, number = self.looks.get(body.get("look")), body.get("n")
        if not isinstance(number, int) or not 0 <= number < len(look.rows):
            raise UserError("there is no such picture", mend="look again")
        row = look.rows[number]
        if row.caption_file is None:
            raise UserError("one prompt serves the whole set", mend="change it on the form: data.prompt")
        return look, number, row, self.roots.path(str(row.caption_file))

    async def upload(self, request: Request) -> Response:
        """One file, its bytes as the body: look, name, into (0: the set's own folder, 1...: its condition folders)."""
        query = request.query_params
        language = _language(query)
        try:
            look = self.looks.get(query.get("look"))
            target = self._target(look, query.get("name", ""), whole(query.get("into"), 0))
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_FILE:
                    raise UserError(
                        "{name} is larger than {limit} MB",
                        mend="make it smaller",
                        name=target.name,
                        limit=LARGEST_FILE >> 20,
                    )
            await run_in_threadpool(_add, target, bytes(body))
        except UserError as error:
            return Told({"refused": said(error, language)})
        return Told({"name": target.name})

    def _target(self, look: Look, name: str, into: int) -> Path:
        """Where a file of this name goes. Raises UserError for names that are none, and for what is there already."""
        plain = name.replace("\\", "/").rpartition("/")[2].strip()
        ending = Path(plain).suffix.lower()
        if (
            not plain
            or plain.startswith(".")
            or any(char in plain for char in '<>:"|?*\0')
            or not plain.isprintable()
        ):
            raise UserError("{name} is no file name", mend="rename it", name=name[:80])
        if ending not in (*PICTURES, *VIDEOS, *CAPTION_ENDINGS):
            raise UserError(
                "{kind} files are left out", mend="convert to png, jpg or webp", kind=ending or plain
            )
        if not 0 <= into < len(look.folders):
            raise UserError("there is no such folder", mend="look again")
        folder = self.roots.path(str(look.folders[into]))
        target = folder / plain
        if target.exists() or not self.roots.allows(target):
            raise UserError(
                "{name} is there already", mend="rename it; files are never replaced here", name=plain
            )
        return target


def _add(target: Path, data: bytes) -> None:
    """Writes a new file; one of the same name that has appeared meanwhile stays. Raises UserError."""
    kind = sniff(data[:64])
    if (target.suffix.lower() in PICTURES and kind not in _KINDS) or kind in ("web page", "zip", "pdf"):
        raise UserError("{name} is no picture", mend="choose another file", name=target.name)
    try:
        with target.open("xb") as file:
            try:
                file.write(data)
                file.flush()
            except OSError:
                target.unlink()  # half a picture on a full disk
                raise
    except FileExistsError as error:
        raise UserError(
            "{name} is there already", mend="rename it; files are never replaced here", name=target.name
        ) from error
    except OSError as error:
        raise UserError(
            "{name} cannot be written ({reason})",
            mend="mend the folder's rights, or make room on the disk",
            code=EXIT_ENVIRONMENT,
            name=target.name,
            reason=error.strerror or error,
        ) from error


def _settle(look: Look, row: Row, text: str | None) -> None:
    """The row after its caption has changed, without looking at everything again."""
    row.raw = text
    row.problems = [one for one in row.problems if one.kind not in OF_CAPTIONS]
    if text is None:
        error = UserError(
            "no caption file (same name, ending in {ext}) beside the picture",
            where=str(row.placed.path),
            ext=row.caption_file.suffix if row.caption_file else "",
        )
        row.problems.append(Problem("no caption", "error", row.placed.path, error))
    elif not tidy(text):
        empty = UserError(
            "the caption file is empty: the picture is learned without text", where=str(row.placed.path)
        )
        row.problems.append(Problem("empty caption", "warning", row.placed.path, empty))
    final = None if text is None else with_trigger(tidy(text), look.trigger)
    row.placed = replace(row.placed, caption=final)


def _language(query: Mapping[str, str]) -> str:
    return "zh" if query.get("language") == "zh" else "en"
