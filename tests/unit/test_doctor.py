"""The check of a machine: what it refuses, that its advice exists, and that a bug report holds nobody's words or pictures."""

from __future__ import annotations

import json
import os
import socket
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from gui_page import made, place, step

from whitetuner import doctor
from whitetuner.bug_report import without_names, write_bundle
from whitetuner.cli import main
from whitetuner.errors import UserError
from whitetuner.install.launch import HELP
from whitetuner.install.machine import Driver
from whitetuner.runs import events

__all__ = ["place"]  # the fixture


@pytest.mark.parametrize(
    "built, driver, seen, archs, words",
    [
        ("CPU", None, False, (), ""),
        ("CPU", Driver((13, 0), (12, 0)), False, (), "--again"),
        ("CUDA 13.0", Driver((12, 8), (8, 9)), False, (), "cu126"),
        ("CUDA 13.0", Driver((13, 0), (8, 9)), True, ("sm_75", "sm_80", "sm_86", "sm_90"), ""),
        ("CUDA 13.0", Driver((13, 1), (6, 1)), True, ("sm_75", "sm_80", "sm_90"), "sm_61"),
        ("CUDA 12.6", Driver((13, 1), (12, 0)), True, ("sm_80", "sm_90"), "sm_120"),
        ("CUDA 12.6", Driver((12, 6), (8, 6)), False, (), "sees no GPU"),
        ("CUDA 12.6", Driver(), True, ("sm_80",), ""),
        ("ROCm 7.2", Driver((12, 6)), True, (), ""),
    ],
)
def test_a_build_that_does_not_serve_the_card_is_told(
    built: str, driver: Driver | None, seen: bool, archs: Sequence[str], words: str
) -> None:
    found = doctor.torch_problem(built, driver, seen, archs)
    assert words in found if words else found == ""
    for word in found.split():
        assert not word.startswith("--") or word.rstrip(",.") in HELP


def test_what_was_looked_at_has_a_value_and_bad_things_a_mend(place: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 6006))
        except OSError:
            pytest.skip("somebody listens there")
        taken.listen()
        found = doctor.examine(place / "output")
    assert all(one.value for one in found) and len({one.what for one in found}) == len(found)
    assert all(one.mend for one in found if one.status == "bad")
    port = next(one for one in found if one.what == "port 6006")
    assert port.status == "look" and "6007" in port.mend
    assert not (place / "output").exists() and list(place.iterdir()) == []


def test_a_folder_that_cannot_be_written_stands_in_the_way(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "is_writable", lambda folder: folder != place)
    assert main(["doctor", "--out", str(place / "output"), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    bad = [one for one in found["findings"] if one["status"] == "bad"]
    assert any(one["what"] == "output folder" and "run.output_dir" in one["mend"] for one in bad)
    assert found["packages"]["torch"]


def test_a_bug_report_holds_no_words_no_pictures_and_no_names(place: Path) -> None:
    secret = "the Duchess of Krakow"
    config = {
        "run": {"name": secret, "output_dir": str(Path.home() / "work")},
        "data": {
            "images": f"/srv/{secret}/cats",
            "trigger": secret,
            "prompt": secret,
            "default_caption": secret,
        },
        "preview": {"prompts": [{"text": secret, "negative": secret, "seed": 3}]},
        "optimizer": {"lr": 0.001},
    }
    run = place / "output" / "cat"
    made(
        run,
        *(step(number) for number in range(1, 1001)),
        events.Preview(step=5, files=["samples/secret.png"], prompts=[secret], seconds=1.0),
        events.Message(level="warning", text=f"the prompt '{secret}' is long"),
        events.Failed(reason=f"{Path.home()}/models: torn"),
        events.Failed(reason="'Clarissa said it': the model's part 'text' makes numbers that are not finite"),
        config=config,
    )
    (run / "samples").mkdir()
    (run / "samples" / "secret.png").write_bytes(b"picture")
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs" / "a.log").write_text(
        f'Traceback: {secret}\n{Path.home()}\nerror: "Clarissa\'s": x', encoding="utf-8"
    )
    names = write_bundle(place / "bug.zip", [doctor.Finding("GPU", "none")], run)
    assert names == ["machine.txt", "machine.json", "run.json", "events.jsonl", "logs/a.log"]
    with zipfile.ZipFile(place / "bug.zip") as file:
        texts = {name: file.read(name).decode() for name in file.namelist()}
    for name, text in texts.items():
        assert (
            "Duchess" not in text and "Clarissa" not in text and "picture" not in text.replace("pictures", "")
        ), name
        assert str(Path.home()) not in text or len(str(Path.home())) < 2
    told = json.loads(texts["run.json"])["config"]
    assert told["optimizer"] == {"lr": 0.001} and told["data"]["trigger"] == f"({len(secret)} characters)"
    assert told["data"]["images"] == "(path) cats"
    assert texts["events.jsonl"].count('"kind": "step"') == 400 and "torn" in texts["events.jsonl"]
    with pytest.raises(UserError, match="already"):
        write_bundle(place / "bug.zip", [], None)
    with pytest.raises(UserError, match="no run's folder"):
        write_bundle(place / "other.zip", [], place)
    assert not (place / "other.zip").exists()


@pytest.mark.skipif(os.name == "nt", reason="the name stands in another variable there")
def test_names_of_users_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/margarethe")
    monkeypatch.setenv("LOGNAME", "margarethe")
    assert without_names("/srv/people/margarethe/x by margarethe") == "~/x by USER"


def test_a_run_without_a_bundle_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--run", str(place)]) == 2
    assert "--bundle" in capsys.readouterr().err
