"""What the page's scripts ask about runs: /api/runs and below. Runs are named by their id, never by a path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from whitetuner.errors import UserError
from whitetuner.gui import results, starting, strengths
from whitetuner.gui.asked import Told, body_of, is_json, whole, word_of
from whitetuner.gui.run_reader import Reader
from whitetuner.gui.run_state import Runs, ask, film_beside, finals, job_of, previews_of
from whitetuner.gui.settings import Settings
from whitetuner.gui.told import told, translated
from whitetuner.runs.files import inside
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.jobs import Job
from whitetuner.runs.report import write_report

#: Kinds of files that are shown; anything else of a run's folder is never sent as a page.
_SHOWN = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
    ".gif": "image/gif",
}
_ALONE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
WISHES = ("stop", "now", "save", "preview", "cancel", "forget")

Answer = Callable[[Request], Any]


def routes(settings: Settings, runs: Runs) -> list[Route]:
    """Of runs outside of the roots of a confined page nothing is told."""
    roots = settings.paths()

    def asked_for(request: Request) -> Job:
        return job_of(request.path_params["ident"], roots)

    def listed(request: Request) -> Any:
        there = [row for row in runs.listed() if roots.allows(Path(row["run"]))]
        return {"runs": there, "machine": runs.machine()}

    def shown(request: Request) -> Any:
        job = asked_for(request)
        found = runs.shown(job)
        reason = found.get("reason") or {}
        if isinstance(reason.get("text"), str):
            reason["text"] = translated(reason["text"], _language(request))
        found["messages"] = [[how, translated(text, _language(request))] for how, text in found["messages"]]
        return {
            **found,
            "origin": origin(job, lambda reader: {"previews": previews_of(reader)}),
            "machine": runs.machine(),
            "comfyui": results.comfyui_folder(roots),
            "comfyui_loads": results.comfyui_loads(found["family"]),
        }

    def origin(job: Job, facts: Callable[[Reader], dict[str, Any]]) -> dict[str, Any] | None:
        """Of the run that this one was forked from: {name, at: the step, and these facts}."""
        found = runs.origin(job, roots)
        return (
            None if found is None else {"name": found[0].folder.path.name, "at": found[1], **facts(found[0])}
        )

    def curve(request: Request) -> Any:
        job = asked_for(request)
        reader = runs.reader(job)
        if request.query_params.get("version") == str(reader.version):
            return {"version": reader.version}
        return {**reader.curve(), "origin": origin(job, Reader.mean)}

    def log(request: Request) -> Any:
        text = "\n".join(runs.log(asked_for(request)))
        return {"lines": translated(text, _language(request)).split("\n")}

    def preview(request: Request) -> Response:
        job = asked_for(request)
        forked = runs.origin(job, roots) if "origin" in request.query_params else None
        reader = forked[0] if forked else runs.reader(job)
        event = reader.previews.get(_number(request, "step"))
        number = _number(request, "number")
        if (
            event is None
            or number >= len(event.files)
            or (forked is None and "origin" in request.query_params)
        ):
            return JSONResponse({"error": "no such preview"}, 404)
        run = reader.folder.path
        if "film" not in request.query_params:
            return _file(run, event.files[number])
        place = film_beside(run, event.files[number])
        return JSONResponse({"error": "no such film"}, 404) if place is None else _file(run, place)

    def strength(request: Request) -> Response:
        run = Path(asked_for(request).run)
        place = strengths.picture(RunFolder(run), _number(request, "percent"))
        return _file(run, place.relative_to(run).as_posix())

    def final(request: Request) -> Response:
        job = asked_for(request)
        number = _number(request, "number")
        files = finals(RunFolder(Path(job.run)))
        if number >= len(files):
            return JSONResponse({"error": "no such file"}, 404)
        path = inside(Path(job.run), files[number]["place"])
        if path is None:
            return JSONResponse({"error": "no such file"}, 404)
        return FileResponse(path, media_type="application/octet-stream", filename=files[number]["name"])

    def report(request: Request) -> Response:
        path = write_report(Path(asked_for(request).run))
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": _ALONE})

    async def wished(request: Request) -> Any:
        wish = (await _body(request)).get("wish")
        if wish not in WISHES:
            raise UserError("there is nothing of that name to ask for")
        await asyncio.to_thread(ask, asked_for(request), wish)
        runs.changed()
        return {"ok": True}

    async def resumed(request: Request) -> Any:
        body = await _body(request)
        more = body.get("more")
        job = await asyncio.to_thread(
            starting.resume, asked_for(request), more if isinstance(more, int) else 0
        )
        runs.changed()
        return {"id": job.id}

    async def started(request: Request) -> Any:
        body = await _body(request)
        given = [word_of(body, name) for name in ("tab", "text", "gpus", "existing")]
        found = await asyncio.to_thread(starting.start_form, settings, *given)
        runs.changed()
        return found

    async def tried(request: Request) -> Any:
        job = await asyncio.to_thread(starting.start_trial, settings)
        runs.changed()
        return {"id": job.id}

    async def strengthened(request: Request) -> Any:
        number = (await _body(request)).get("number")
        await asyncio.to_thread(strengths.begin, asked_for(request), number if isinstance(number, int) else 0)
        return {"ok": True}

    async def copied(request: Request) -> Any:
        body = await _body(request)
        path = await asyncio.to_thread(
            results.copy_to_comfyui, settings, asked_for(request), word_of(body, "folder")
        )
        return {"path": str(path)}

    one = "/api/runs/{ident}"
    return [
        Route("/api/runs", _get(listed)),
        Route("/api/start", _post(started), methods=["POST"]),
        Route("/api/try", _post(tried), methods=["POST"]),
        Route(one, _get(shown)),
        Route(f"{one}/curve", _get(curve)),
        Route(f"{one}/log", _get(log)),
        Route(f"{one}/report", _get(report)),
        Route(f"{one}/preview/{{step}}/{{number}}", _get(preview)),
        Route(f"{one}/final/{{number}}", _get(final)),
        Route(f"{one}/strength/{{percent}}", _get(strength)),
        Route(f"{one}/strengths", _post(strengthened), methods=["POST"]),
        Route(f"{one}/ask", _post(wished), methods=["POST"]),
        Route(f"{one}/resume", _post(resumed), methods=["POST"]),
        Route(f"{one}/comfyui", _post(copied), methods=["POST"]),
    ]


async def _body(request: Request) -> dict[str, Any]:
    """The command's JSON. Raises UserError for anything else."""
    body = await body_of(request) if is_json(request) else None
    if body is None:
        raise UserError("the request is no JSON")
    return body


def _get(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    async def asked(request: Request) -> Response:
        return await _told(request, asyncio.to_thread(answer, request))

    return asked


def _post(answer: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
    async def asked(request: Request) -> Response:
        return await _told(request, answer(request))

    return asked


def _language(request: Request) -> str:
    return "zh" if request.headers.get("x-language") == "zh" else "en"


async def _told(request: Request, answer: Awaitable[Any]) -> Response:
    """The answer; what the user can mend as {"refused": the message in the page's language}, what cannot be read as 500."""
    try:
        found = await answer
    except UserError as error:
        language = _language(request)
        # An expected answer to a command is no failed request: the browser's console shall stay empty.
        return Told({"refused": told(error, language)}, 404 if request.method == "GET" else 200)
    except OSError as error:
        return Told({"refused": f"{error.filename or ''}: {error.strerror or error}"}, 500)
    if isinstance(found, Response):
        return found
    return Told(found, headers={"cache-control": "no-store"})


def _number(request: Request, name: str) -> int:
    """A number of the address. Raises UserError when it is none (or one that no run counts to)."""
    found = whole(request.path_params[name])
    if found is None:
        raise UserError("there is nothing of that name to ask for")
    return found


def _file(run: Path, place: str) -> Response:
    """A picture or clip of the run's own folder: links out of it and other kinds are refused."""
    path = inside(run, place)
    kind = None if path is None else _SHOWN.get(path.suffix.lower())
    if path is None or kind is None:
        return JSONResponse({"error": "not shown"}, 404)
    return FileResponse(path, media_type=kind, headers={"cache-control": "private, max-age=60"})
