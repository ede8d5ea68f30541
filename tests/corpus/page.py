"""Wrong requests to the page. They are answered with 200 and what is refused: the page shows it, in its language."""

from __future__ import annotations

from case import Case, Place, Typed

AREA = "page"
TAB = "flux2-klein-t2i"
_GOOD = '[run]\nname = "cat"\n'


def _asked(fault: str, address: str, body: object, *says: str, code: int = 200) -> Case:
    """In English; in Chinese it has to be refused, too."""

    def make(place: Place) -> list[Typed]:
        return [[address, body]]

    return Case(AREA, fault, make, says, code)


def _started(fault: str, text: str, *says: str, **more: object) -> Case:
    def make(place: Place) -> list[Typed]:
        model, data, out = (place.folder / name for name in ("model", "data", "out"))
        filled = text.replace("{model}", str(model)).replace("{data}", str(data)).replace("{out}", str(out))
        return [["/api/start", {"tab": TAB, "text": filled, "existing": "", **more}]]

    return Case(AREA, fault, make, says, 200)


_WHOLE = """\
[run]
name = "cat"
output_dir = "{out}"
[model]
family = "flux2-klein"
path = "{model}"
[data]
images = "{data}"
resolution = 64
"""

CASES = [
    _asked("a request of zero bytes", "/api/start", b"", "refused"),
    _asked("a request that is no JSON", "/api/start", b"{oops", "refused"),
    _asked("a request that is a list", "/api/start", b"[1]", "refused"),
    _asked("a request of a hundred thousand brackets", "/api/start", b"[" * 100_000, "refused"),
    _asked("a form that there is not", "/api/start", {"tab": "sdxl", "text": ""}, "refused"),
    _asked("a change of a form that there is not", "/api/form/sdxl/change", {"text": ""}, "refused"),
    _asked(
        "a change of an option that there is not",
        f"/api/form/{TAB}/change",
        {"text": _GOOD, "changes": {"run.stepz": 3}},
        "run.stepz",
    ),
    _asked(
        "a letter where a number belongs",
        f"/api/form/{TAB}/change",
        {"text": _GOOD, "changes": {"run.steps": "many"}},
        "run.steps",
        "whole number",
    ),
    _asked(
        "a number below its least",
        f"/api/form/{TAB}/change",
        {"text": _GOOD, "changes": {"run.steps": -1}},
        "run.steps",
        "at least 1",
    ),
    _asked(
        "half a character",
        f"/api/form/{TAB}/change",
        {"text": _GOOD, "changes": {"run.name": "\ud800"}},
        "run.name",
    ),
    _asked("a config that is torn", f"/api/form/{TAB}/change", {"text": "[run\n"}, "line 1"),
    _asked(
        "a config file that is none",
        f"/api/form/{TAB}/imported",
        {"text": "<html>", "name": "x.toml"},
        "refused",
    ),
    _asked("a preset that there is not", f"/api/form/{TAB}/preset", {"name": "nope"}, "refused", "nope"),
    _asked(
        "a folder that is not there",
        "/api/data/look",
        {"tab": TAB, "text": "[model]\nfamily = 'flux2-klein'\n[data]\nimages = '/nowhere at all'\n"},
        "nowhere at all",
    ),
    _started(
        "a start without a model",
        '[run]\nname = "cat"\n[model]\nfamily = "flux2-klein"\n[data]\nimages = "{data}"\n',
        "model.path",
    ),
    _started(
        "a start without pictures", '[model]\nfamily = "flux2-klein"\npath = "{model}"\n', "data.images"
    ),
    _started("a start with a mistake in it", _WHOLE + "[optimizer]\nlr = -1\n", "optimizer.lr"),
    _started("a start on a device that is none", _WHOLE, "no such device", gpus="0; rm"),
    _started("a start into a run that has ended", _WHOLE.replace('"cat"', '"finished"'), "finished"),
    _asked("a run that there is not", "/api/runs/0123456789abcdef/ask", {"word": "stop"}, "refused"),
    _asked(
        "a caption for a picture elsewhere",
        "/api/data/caption",
        {"tab": TAB, "text": _GOOD, "path": "/etc/passwd", "caption": "x"},
        "refused",
    ),
]
