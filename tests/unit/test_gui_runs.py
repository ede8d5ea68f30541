"""What the page's scripts are answered about runs, and what they are not: files outside of a run, paths outside of the roots."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gui_page import client, made, place, preview, step
from PIL import Image
from starlette.testclient import TestClient

from whitetuner.cli import make_parser
from whitetuner.errors import UserError
from whitetuner.gui import starting, strengths
from whitetuner.gui.app import bound, make_app
from whitetuner.gui.run_reader import POINTS, Reader, log_lines
from whitetuner.gui.settings import Settings
from whitetuner.gui.tensorboard import folders, free_port
from whitetuner.runs import events, jobs, start
from whitetuner.runs.folder import RunFolder

__all__ = ["place"]  # the fixture


def test_a_run_is_told_with_its_curve_and_what_can_be_asked(place: Path) -> None:
    job = made(
        place / "output" / "cat",
        step(1),
        step(2, float("nan")),
        events.Validation(step=2, loss=0.4, by_sigma={}, seconds=0.1),
    )
    page = client()
    shown = page.get(f"/api/runs/{job.id}").json()
    assert (shown["state"], shown["numbers"]["step"], shown["numbers"]["loss"]) == ("crashed", 2, None)
    assert shown["reason"]["kind"] in ("gone", "reboot") and "resume" in shown["can"]
    curve = page.get(f"/api/runs/{job.id}/curve").json()
    assert curve["step"] == [1] and curve["validation"] == [[2, 0.4]]
    assert page.get(f"/api/runs/{job.id}/curve?version={curve['version']}").json() == {
        "version": curve["version"]
    }
    assert [row["name"] for row in page.get("/api/runs").json()["runs"]] == ["cat"]
    assert "validation loss" in "\n".join(page.get(f"/api/runs/{job.id}/log").json()["lines"])


@pytest.mark.parametrize(
    ("ident", "status"),
    [("nothing", 404), ("..", 404), ("..%2f..%2fsecret", 404), ("%2e%2e", 404), ("0" * 16, 404)],
)
def test_a_run_is_known_by_its_id_alone(place: Path, ident: str, status: int) -> None:
    (place / "secret.json").write_text('{"run": "/etc", "config": "", "cwd": ""}', encoding="utf-8")
    for path in ("", "/curve", "/log", "/report", "/preview/0/0", "/final/0"):
        assert client().get(f"/api/runs/{ident}{path}").status_code == status


def test_only_pictures_of_the_runs_own_folder_are_sent(place: Path) -> None:
    run = place / "output" / "cat"
    outside = place / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    names = [
        "samples/good.png",
        "../../outside.png",
        str(outside),
        "samples/page.html",
        "samples/link.png",
        "samples/gone.png",
    ]
    job = made(run, preview(run, 1, *names))
    (run / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(run / "samples" / "good.png")
    (run / "samples" / "page.html").write_text("<script>alert(1)</script>", encoding="utf-8")
    if os.name != "nt":
        (run / "samples" / "link.png").symlink_to(outside)
    page = client()
    answers = [page.get(f"/api/runs/{job.id}/preview/1/{number}") for number in range(len(names) + 1)]
    assert [one.status_code for one in answers] == [200, 404, 404, 404, 404, 404, 404]
    assert (
        answers[0].headers["content-type"] == "image/png"
        and answers[0].headers["x-content-type-options"] == "nosniff"
    )
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"):
        assert page.get(path).status_code == 404


def test_a_report_is_sent_as_a_page_that_can_do_nothing(place: Path) -> None:
    job = made(
        place / "output" / "cat", step(1), events.Message(level="info", text="<script>alert(1)</script>")
    )
    answer = client().get(f"/api/runs/{job.id}/report")
    assert answer.status_code == 200 and answer.headers["content-security-policy"].startswith(
        "default-src 'none'"
    )
    assert "<script>alert" not in answer.text


def test_commands_are_json_and_known(place: Path) -> None:
    job = made(place / "output" / "cat")
    page = client()
    path = f"/api/runs/{job.id}/ask"
    assert "refused" in page.post(path, data={"wish": "now"}).json()  # what a form of a foreign page can send
    assert "refused" in page.post(path, content=b"{", headers={"content-type": "application/json"}).json()
    for wish in ("../../x", "rm", None, {"a": 1}, "request"):
        assert "refused" in page.post(path, json={"wish": wish}).json()
    answer = page.post(path, json={"wish": "stop"}, headers={"x-language": "zh"})
    assert re.search("[\u4e00-\u9fff]", answer.json()["refused"])
    assert page.get(path).status_code == 405
    assert page.post(path, json={"wish": "forget"}).json() == {"ok": True} and jobs.jobs() == []
    assert (place / "output" / "cat" / "run.json").is_file()


def form(place: Path, **more: str) -> str:
    (place / "inside" / "pictures").mkdir(parents=True, exist_ok=True)
    values = {
        "images": str(place / "inside" / "pictures"),
        "output": str(place / "inside" / "out"),
        "name": "cat",
        **more,
    }
    quoted = {name: json.dumps(value) for name, value in values.items()}
    return (
        f"[run]\nname = {quoted['name']}\noutput_dir = {quoted['output']}\n"
        f'[model]\nfamily = "flux2-klein"\npath = "builtin:nano"\n[data]\nimages = {quoted["images"]}\n'
    )


def test_a_confined_page_starts_nothing_outside_of_its_roots(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def record(config: Path, run: Path, **more: Any) -> jobs.Job:
        seen.append(run)
        return jobs.Job(run=str(run), config=str(config), cwd="")

    monkeypatch.setattr(start, "start", record)
    (place / "outside").mkdir()
    settings = {"server": True, "roots": (place / "inside",)}
    inside = place / "inside"
    inside.mkdir()
    wrong = [
        {"images": str(place / "outside")},
        {"output": str(place / "outside")},
        {"images": str(inside / ".." / "outside")},
        {"output": "out"},
    ]
    if os.name != "nt":
        (inside / "link").symlink_to(place / "outside")
        wrong.append({"images": str(inside / "link")})
        wrong.append({"output": str(inside / "link" / "out")})
    page = client(**settings)
    for more in wrong:
        answer = page.post("/api/start", json={"tab": "flux2-klein-t2i", "text": form(place, **more)})
        assert "refused" in answer.json(), more
    assert seen == []
    assert page.post("/api/start", json={"tab": "flux2-klein-t2i", "text": form(place)}).json()["id"]
    assert seen == [(inside / "out" / "cat").resolve()]


def test_a_confined_page_tells_nothing_of_runs_elsewhere(place: Path) -> None:
    inside, outside = made(place / "inside" / "cat", step(1)), made(place / "outside" / "dog", step(1))
    page = client(server=True, roots=(place / "inside",))
    assert [row["name"] for row in page.get("/api/runs").json()["runs"]] == ["cat"]
    for path in ("", "/curve", "/log", "/report"):
        assert page.get(f"/api/runs/{inside.id}{path}").status_code == 200
        assert page.get(f"/api/runs/{outside.id}{path}").status_code == 404
    assert "refused" in page.post(f"/api/runs/{outside.id}/ask", json={"wish": "forget"}).json()
    for job in (inside, outside):
        (Path(job.run) / "tensorboard").mkdir()
    assert folders(Settings(server=True, roots=(place / "inside",)).paths()) == [(place / "inside").resolve()]


def test_a_start_into_a_run_asks_first_and_overwrites_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Path, dict[str, Any]]] = []

    def record(config: Path, run: Path, **more: Any) -> jobs.Job:
        calls.append((run, more))
        return jobs.Job(run=str(run), config=str(config), cwd="")

    monkeypatch.setattr(start, "start", record)
    run = place / "inside" / "out" / "cat"
    job = made(run, step(1), events.Ended(status="stopped", step=1))
    settings = Settings()
    found = starting.start_form(settings, "flux2-klein-t2i", form(place), "", "")
    assert found == {"exists": "stopped", "name": "cat", "other": "cat-2"} and calls == []
    starting.start_form(settings, "flux2-klein-t2i", form(place), "", "resume")
    starting.start_form(settings, "flux2-klein-t2i", form(place) + '[memory]\ndevice = "1"\n', "", "other")
    assert calls[0][1]["gpus"] == "any"
    assert calls[0][0] == run.resolve() and calls[0][1]["resume"] == "latest"
    assert (
        calls[1][0].name == "cat-2"
        and calls[1][1]["overrides"] == ['run.name="cat-2"']
        and calls[1][1]["gpus"] == "1"
    )
    starting.resume(job, more=30)
    assert "run.steps=40" in calls[2][1]["overrides"] and calls[2][1]["resume"] == "latest"


def test_steps_are_added_to_a_running_run_by_stopping_it_first(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(start, "start", lambda config, run, **more: calls.append(more))
    job = made(place / "output" / "cat", step(3))
    with RunFolder.open(place / "output" / "cat", resume=True) as folder:
        assert starting.resume(job, more=5) == job and folder.asked("stop")
        time.sleep(0.8)
        assert calls == []
        folder.append(events.Ended(status="stopped", step=3))
    deadline = time.monotonic() + 20
    while not calls and time.monotonic() < deadline:
        time.sleep(0.05)
    assert calls[0]["resume"] == "latest" and "run.steps=15" in calls[0]["overrides"]


def test_a_final_file_is_copied_under_the_runs_name_and_over_nothing(place: Path) -> None:
    run = place / "output" / "cat"
    job = made(run)
    page = client()
    path, loras = f"/api/runs/{job.id}/comfyui", place / "ComfyUI" / "models" / "loras"
    assert "refused" in page.post(path, json={"folder": str(place)}).json()
    loras.mkdir(parents=True)
    assert "refused" in page.post(path, json={"folder": str(place / "ComfyUI")}).json()  # no final file yet
    (run / "final").mkdir()
    (run / "final" / "cat.safetensors").write_bytes(b"new")
    assert page.post(path, json={"folder": str(place / "ComfyUI")}).json()["path"] == str(
        loras / "cat.safetensors"
    )
    assert page.post(path, json={"folder": ""}).json()["path"] == str(
        loras / "cat.safetensors"
    )  # the folder is remembered
    (loras / "cat.safetensors").write_bytes(b"the user's own")
    assert page.post(path, json={"folder": ""}).json()["path"] == str(loras / "cat-2.safetensors")
    assert (loras / "cat.safetensors").read_bytes() == b"the user's own"
    confined = client(server=True, roots=(place / "output",))
    assert "refused" in confined.post(path, json={"folder": str(place / "ComfyUI")}).json()


def test_strengths_are_drawn_by_words_that_no_prompt_can_change(place: Path) -> None:
    run = place / "output" / "cat"
    prompt = {
        "text": "--out=/etc/x",
        "negative": "",
        "seed": 3,
        "size": [64, 64],
        "steps": 8,
        "cfg": None,
        "images": [],
    }
    config = {"method": {"kind": "lokr"}, "preview": {"prompts": [prompt]}}
    job = made(run, config={"model": {"family": "flux2-klein"}, **config})
    words = strengths.commands(run, 0)
    assert [one[-4:-3] for one in words] == [
        [f"--strength={percent / 100}"] for percent in strengths.PERCENTS
    ]
    assert all(one[1] == "--prompt=--out=/etc/x" and one[-2:] == ["--", str(run)] for one in words)
    assert make_parser().parse_args(words[0]).out == strengths.picture(RunFolder(run), 0)
    page = client()
    assert "refused" in page.post(f"/api/runs/{job.id}/strengths", json={"number": 0}).json()  # no final file
    assert "refused" in page.post(f"/api/runs/{job.id}/strengths", json={"number": 1}).json()
    assert page.get(f"/api/runs/{job.id}/strength/40").status_code == 404


def test_every_route_of_the_real_page_is_401_without_the_password() -> None:
    access = make_app(Settings(password="long enough"))
    page = TestClient(access, base_url="http://box")  # type: ignore[arg-type]
    paths = {
        "/zh/",
        "/en/",
        "/zh/config",
        "/en/gradio_api/info",
        "/tb",
        "/tb/data/runs",
        "/font-roboto/x",
        "/favicon.ico",
        "/lang/zh",
    }
    own = access.app.__closure__  # type: ignore[attr-defined]
    routes = next(cell.cell_contents.routes for cell in own or () if hasattr(cell.cell_contents, "routes"))
    paths |= {
        route.path.replace("{", "").replace("}", "").replace(":path", "").replace(":int", "")
        for route in routes
    }
    assert len(paths) > 25
    for path in sorted(paths):
        for method in ("GET", "POST"):
            assert page.request(method, path).status_code == 401, (method, path)


def test_a_reader_takes_in_what_came_and_starts_anew_when_a_resume_cut_the_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made(run, step(1), step(2))
    reader = Reader(RunFolder(run))
    reader.look()
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(events.as_line(step(3)) + events.as_line(step(4))[:-20])
    reader.look()
    assert reader.curve()["step"] == [1, 2, 3]
    folder = RunFolder(run)
    folder.begin("", {})
    folder.cut_events_after(2)
    folder.append(events.RunStarted(name="run", resumed_from=2, steps=10))
    for number in range(3, 9):
        folder.append(step(number, 0.25))
    reader.look()
    assert reader.curve()["step"] == list(range(1, 9)) and reader.curve()["low"][2] == 0.25
    (run / "events.jsonl").unlink()
    reader.look()
    assert reader.numbers(10) == {}


def test_thinning_leaves_no_extreme_out_and_the_mean_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = made(run)
    losses = np.random.default_rng(0).normal(1.0, 0.1, 20_000)
    losses[12_345], losses[77] = 99.0, -5.0
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(events.as_line(step(n + 1, float(loss))) for n, loss in enumerate(losses))
    reader = Reader(RunFolder(Path(job.run)))
    reader.look()
    curve = reader.curve()
    assert len(curve["step"]) <= POINTS and curve["step"][-1] == 20_000
    assert max(curve["high"]) == 99.0 and min(curve["low"]) == -5.0
    assert abs(curve["smooth"][-1] - losses[-4000:].mean()) < 0.05


def test_lines_of_other_shapes_are_read_one_by_one_or_passed_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made(run, step(1))
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            '{"kind": "of the future", "time": 1}\nnoise\n{"kind": "step", "tim\n' + events.as_line(step(2))
        )
    reader = Reader(RunFolder(run))
    reader.look()
    assert reader.curve()["step"] == [1, 2]


def test_a_log_is_read_from_its_end_and_a_carriage_return_begins_a_line_anew(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"x" * 100_000 + "\nfirst\n10 %\r50 %\r100 %\n\n最后\n".encode())
    assert log_lines(file)[-3:] == ["first", "100 %", "最后"]
    assert log_lines(tmp_path / "missing") == []


def test_a_busy_port_gives_way_to_the_next() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one = bound(Settings(port=port))
        assert port < one.getsockname()[1] < port + 20
        one.close()
        assert free_port(port) > port
    with pytest.raises(UserError, match="cannot be opened"):
        bound(Settings(host="203.0.113.7", port=port))


@pytest.mark.parametrize("glue", [b"\n", b"", b"\0\0\0\n"])
def test_a_line_torn_anywhere_costs_the_page_that_line_alone(tmp_path: Path, glue: bytes) -> None:
    run = RunFolder(tmp_path / "run")
    run.events.parent.mkdir(parents=True, exist_ok=True)
    step = events.StepDone(step=1, loss=0.5, lr=1e-4, grad_norm=0.1, seconds=0.2, samples=4)
    line = events.as_line(step).rstrip("\n").encode() + b"\n"
    for end in range(len(line) - 1):
        run.events.write_bytes(line + line[:end] + glue + line + line)
        reader = Reader(run)
        reader.look()
        assert len(reader.rows) >= 2 and set(reader.rows[:, 1]) == {0.5}, end
        assert reader.numbers(10)["loss"] == 0.5


def test_the_reason_of_a_failed_run_is_told_in_the_pages_language(place: Path) -> None:
    reason = "--resume: there is no checkpoint here\n  -> give 'latest'; this run has saved none yet"
    job = made(place / "output" / "a", step(1), events.Failed(reason=reason))
    english, chinese = (
        client().get(f"/api/runs/{job.id}", headers={"x-language": language}).json()["reason"]["text"]
        for language in ("en", "zh")
    )
    assert english == reason
    assert "这里没有" in chinese or "没有检查点" in chinese, chinese


def test_two_starts_never_look_at_a_folder_at_once() -> None:
    inside, seen = [], []

    @starting._one_at_a_time
    def start_one() -> None:
        inside.append(1)
        seen.append(len(inside))
        time.sleep(0.02)
        inside.pop()

    threads = [threading.Thread(target=start_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1, 1]
